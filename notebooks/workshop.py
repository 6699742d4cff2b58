"""`check` compares an exercise with grpo.py and says what is wrong; `predict` and `compare` keep a guess for later."""

import copy

import answers
import torch
from exercises import EXERCISES, GENERATOR, NO_GRADIENT, SECOND_OUTPUT

import grpo

GUESSES: dict[str, float] = {}


def predict(**guesses: float | None) -> None:
    """Notes your guesses, to be shown beside the results by `compare`."""
    for name, guess in guesses.items():
        if guess is None:
            print(f"{name}: put a number in the place of None")
        elif isinstance(guess, int | float):
            GUESSES[name] = guess
            print(f"{name}: noted, {guess:g}")
        else:
            print(f"{name}: {guess!r} is no number")


def compare(**results: float) -> None:
    """Shows each result beside your guess."""
    for name, result in results.items():
        guess = f"your guess {GUESSES[name]:g}" if name in GUESSES else "no guess"
        print(f"{name}: {guess}, measured {result:.3g}")


def answer(name: str):
    """The library's function of this name: the answer key."""
    return getattr(answers, name, None) or getattr(grpo, name)


class Unusable(Exception):
    """What a function returned or did cannot be compared; the message says why."""


def run(name: str, function, args, kwargs):
    """Its outputs as a list of tensors, and the gradients with respect to its inputs (None if there are none)."""
    needs_gradient = name not in NO_GRADIENT
    mine = [a.clone() if torch.is_tensor(a) else copy.deepcopy(a) for a in args]
    mine = [a.requires_grad_(a.is_floating_point() and needs_gradient) if torch.is_tensor(a) else a for a in mine]
    out = function(*mine, **kwargs)
    if any(not torch.equal(a, b) if torch.is_tensor(a) else a != b for a, b in zip(args, mine, strict=True)):
        raise Unusable("it changed its input: compute with a copy, without `-=`, `.remove` and the like")
    if out is None:
        raise Unusable("it returned None: is the `return` missing?")
    outs = list(out) if isinstance(out, tuple) else [out]
    for o in outs:
        if not torch.is_tensor(o) and not isinstance(o, int | float):
            raise Unusable(f"it returned a {type(o).__name__}, where a tensor or a number is wanted")
    inputs = [a for a in mine if torch.is_tensor(a) and a.requires_grad]
    outs = [torch.as_tensor(o) for o in outs]
    live = [o for o in outs if o.requires_grad]
    if not live or not inputs:
        return outs, None
    # a weight for each element, so that errors cannot cancel in a sum
    total = sum((o * torch.linspace(1, 2, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in live)
    grads = torch.autograd.grad(total, inputs, allow_unused=True)
    return outs, [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True)]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=1e-6, rtol=1e-6)


def same_first(mine, key) -> bool:
    """Whether the first outputs are equal, and the gradients; a mistake shows there."""
    (outs, grads), (right, right_grads) = mine, key
    if (grads is None) != (right_grads is None):
        return False
    return all(close(a, b) for a, b in [(outs[0], right[0]), *zip(grads or [], right_grads or [], strict=True)])


def is_constant(tensors: list[torch.Tensor]) -> bool:
    """Whether all elements of all of them are one number."""
    return len({value for t in tensors for value in t.flatten().tolist()}) == 1


def form_error(outs: list[torch.Tensor], right: list[torch.Tensor]) -> str:
    """What is wrong with the number of outputs, a shape or a dtype, if anything is."""
    if len(outs) != len(right):
        return f"it returned {len(outs)} values, {len(right)} are wanted"
    for mine, key in zip(outs, right, strict=True):
        if mine.shape != key.shape:
            return f"it returned the shape {list(mine.shape)}, wanted is {list(key.shape)}"
        # counts and marks may have any type of number, and a single number too: 0 for 0.0, True for 1.0
        wrong_mask = (mine.dtype == torch.bool) != (key.dtype == torch.bool)
        if key.dim() and (wrong_mask or (key.is_floating_point() and not mine.is_floating_point())):
            return f"it returned the dtype {mine.dtype}, wanted is {key.dtype}"
    return ""


def complaint(function, name: str) -> str:
    """What is wrong with it, in a sentence; nothing if it is right."""
    GENERATOR.manual_seed(0)
    cases, mistakes = EXERCISES[name][0](), EXERCISES[name][1]
    keys, got = [run(name, answer(name), args, kwargs) for _, args, kwargs in cases], []
    for (what, args, kwargs), (right, _) in zip(cases, keys, strict=True):
        try:
            outs, grads = run(name, function, args, kwargs)
        except NotImplementedError:
            return "not written yet"
        except Unusable as error:
            return f"{error} (on {what})"
        except Exception as error:
            said = str(error).splitlines()[0] if str(error) else ""
            return f"it raised {type(error).__name__}: {said} (on {what})"
        if error := form_error(outs, right):
            return f"{error} (on {what})"
        got.append((outs, grads))
    wrong = [i for i in range(len(cases)) if not same_first(got[i], keys[i])]
    if not wrong:
        for (outs, _), (right, _), (what, _, _) in zip(got, keys, cases, strict=True):
            if not all(close(a, b) for a, b in zip(outs, right, strict=True)):
                return f"{SECOND_OUTPUT[name]} (on {what})"
        return ""
    for mistake, makes_it in mistakes.items():
        if all(same_first(got[i], run(name, makes_it, *cases[i][1:])) for i in range(len(cases))):
            return mistake
    what, (outs, grads), (right, right_grads) = cases[wrong[0]][0], got[wrong[0]], keys[wrong[0]]
    if not all(o.double().isfinite().all() for o in outs):
        return f"it returned a number that is not finite (on {what})"
    firsts = [outs[0] for outs, _ in got]
    if len(cases) > 1 and is_constant(firsts) and not is_constant([right[0] for right, _ in keys]):
        return f"it returned {firsts[0].flatten()[0].item():g} for every input, also on {what}"
    if right_grads is not None and grads is None:
        return f"it returned a detached tensor: no gradient reaches the input (on {what})"
    error = (outs[0].double() - right[0].double()).abs().max().item() if outs[0].numel() else 0
    return f"it differs by up to {error:.3g} (on {what})" if error > 1e-6 else f"the gradient differs (on {what})"


def check(function):
    """Says whether `function` does what the library's function of that name does; returns the one to go on with."""
    name = function.__name__
    if name not in EXERCISES:
        raise ValueError(f"{name} is no exercise: {', '.join(EXERCISES)}")
    if function is answer(name):
        print(f"{name}: this is the library's function already. Run the cell with yours again, and then this one.")
        return function
    found = complaint(function, name)
    if not found:
        _, args, kwargs = EXERCISES[name][0]()[0]
        has_gradient = run(name, answer(name), args, kwargs)[1] is not None
        print(f"{name}: right{', values and gradients' if has_gradient else ''}")
        return function
    if found == "not written yet":
        print(f"{name}: not written yet. Take your time; until then the notebook goes on with the library's.")
    else:
        print(f"{name}: not yet: {found}. Until it is right, the notebook goes on with the library's.")
    return answer(name)
