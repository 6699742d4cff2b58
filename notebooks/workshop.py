"""`check` compares an exercise with grpo.py and says what is wrong; `predict` and `compare` keep a guess for later."""

import copy

import answers
import torch
from exercises import EXERCISES, GENERATOR

import grpo

GUESSES: dict[str, float] = {}


def predict(**guesses: float) -> None:
    """Notes your guesses, to be shown beside the results by `compare`."""
    GUESSES.update(guesses)
    print("noted: " + ", ".join(f"{name} = {guess:g}" for name, guess in guesses.items()))


def compare(**results: float) -> None:
    """Shows each result beside your guess."""
    for name, result in results.items():
        guess = f"your guess {GUESSES[name]:g}" if name in GUESSES else "no guess yet"
        print(f"{name}: {guess}, measured {result:.3g}")


def answer(name: str):
    """The library's function of this name: the answer key."""
    return getattr(answers, name, None) or getattr(grpo, name)


class Unusable(Exception):
    """What a function returned is no tensor, nor anything that can become one."""


def run(function, args, kwargs):
    """Its outputs as a list, and the gradients with respect to each floating-point argument (None if detached)."""
    args = [a.clone().requires_grad_(a.is_floating_point()) if torch.is_tensor(a) else copy.copy(a) for a in args]
    out = function(*args, **kwargs)
    if out is None:
        raise Unusable("None: is the `return` missing?")
    try:
        outs = [torch.as_tensor(o) for o in (out if isinstance(out, tuple | list) else [out])]
    except (TypeError, ValueError, RuntimeError) as error:
        raise Unusable(f"a {type(out).__name__} that is no tensor") from error
    inputs = [a for a in args if torch.is_tensor(a) and a.requires_grad]
    live = [o for o in outs if o.requires_grad]
    if not live or not inputs:
        return outs, None
    # a weight for each element, so that errors cannot cancel in a sum
    total = sum((o * torch.linspace(1, 2, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in live)
    grads = torch.autograd.grad(total, inputs, allow_unused=True)
    return outs, [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True)]


def same(mine, key) -> bool:
    (outs, grads), (right, right_grads) = mine, key
    if len(outs) != len(right) or (grads is None) != (right_grads is None):
        return False
    pairs = [*zip(outs, right, strict=True), *zip(grads or [], right_grads or [], strict=True)]
    return all(a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=1e-6, rtol=1e-6) for a, b in pairs)


def is_constant(tensors: list[torch.Tensor]) -> bool:
    """Whether all elements of all of them are one number."""
    return len({value for t in tensors for value in t.flatten().tolist()}) == 1


def complaint(function, name: str) -> str:
    """What is wrong with it, in a sentence; nothing if it is right."""
    GENERATOR.manual_seed(0)
    cases, mistakes = EXERCISES[name][0](), EXERCISES[name][1]
    keys, got = [run(answer(name), args, kwargs) for _, args, kwargs in cases], []
    for (what, args, kwargs), (right, _) in zip(cases, keys, strict=True):
        try:
            outs, grads = run(function, args, kwargs)
        except NotImplementedError:
            return "not written yet"
        except Unusable as error:
            return f"it returned {error} (on {what})"
        except Exception as error:
            said = str(error).splitlines()[0] if str(error) else ""
            return f"it raised {type(error).__name__}: {said} (on {what})"
        if len(outs) != len(right):
            return f"it returned {len(outs)} values, {len(right)} are wanted (on {what})"
        for mine, key in zip(outs, right, strict=True):
            if mine.shape != key.shape:
                return f"it returned the shape {list(mine.shape)}, wanted is {list(key.shape)} (on {what})"
            kinds = [(t.dtype == torch.bool, t.is_floating_point()) for t in (mine, key)]
            if kinds[0] != kinds[1] and not (key.dim() == 0 and mine.dtype != torch.bool):  # 0 may be returned for 0.0
                return f"it returned the dtype {mine.dtype}, wanted is {key.dtype} (on {what})"
        got.append((outs, grads))
    wrong = [i for i in range(len(cases)) if not same(got[i], keys[i])]
    if not wrong:
        return ""
    for mistake, makes_it in mistakes.items():
        if all(same(got[i], run(makes_it, *cases[i][1:])) for i in range(len(cases))):
            return mistake
    what, (outs, grads), (right, right_grads) = cases[wrong[0]][0], got[wrong[0]], keys[wrong[0]]
    if not all(o.double().isfinite().all() for o in outs):
        return f"it returned a number that is not finite (on {what})"
    firsts = [outs[0] for outs, _ in got]
    if len(cases) > 1 and is_constant(firsts) and not is_constant([right[0] for right, _ in keys]):
        return f"it returned a constant, whatever the input (on {what})"
    if right_grads is not None and grads is None:
        return f"it returned a detached tensor: no gradient reaches the input (on {what})"
    error = max(((a.double() - b.double()).abs().max().item() for a, b in zip(outs, right, strict=True)), default=0)
    return f"it differs by up to {error:.3g} (on {what})" if error > 1e-6 else f"the gradient differs (on {what})"


def check(function):
    """Says whether `function` does what the library's function of that name does; returns the one to go on with."""
    name = function.__name__
    if name not in EXERCISES:
        raise ValueError(f"{name} is no exercise: {', '.join(EXERCISES)}")
    found = complaint(function, name)
    if not found:
        _, args, kwargs = EXERCISES[name][0]()[0]
        has_gradient = run(answer(name), args, kwargs)[1] is not None
        print(f"{name}: right{', values and gradients' if has_gradient else ''}")
        return function
    if found == "not written yet":
        print(f"{name}: not written yet. Take your time; until then the notebook goes on with the library's.")
    else:
        print(f"{name}: not yet: {found}. Until it is right, the notebook goes on with the library's.")
    return answer(name)
