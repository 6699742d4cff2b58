"""`check` compares an exercise with grpo.py and says what is wrong; `predict` and `compare` keep a guess for later."""

import copy

# ruff: noqa: E501
import math

import answers
import torch

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


# ==== Inputs: a list of (what it is, positional arguments, keyword arguments) =========================================


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


GENERATOR = torch.Generator()
RAGGED, ONE, WITH_EMPTY = torch.tensor([3, 1, 5]), torch.tensor([1]), torch.tensor([2, 0, 4])


def length_cases():
    return [("ragged lengths", (RAGGED,), {}), ("a single token", (ONE,), {}), ("an empty row", (WITH_EMPTY,), {})]


def pass_cases():
    return [(f"n={n}, c={c}, k={k}", (n, c, k), {}) for n, c, k in [(8, 2, 4), (8, 0, 3), (8, 8, 1), (5, 3, 5), (4, 1, 1)]]


def reward_cases():
    texts = ["<answer>12", "<scratchpad>3*4=12<answer>12", "<answer>13", "12", "<answer>12<answer>13", "<answer>123", ""]
    return [(f"the text {text!r} where 12 is right", (text, 12), {}) for text in texts]


def logps_cases():
    ids = torch.tensor([[1, 0, 6], [2, 5, 3]])
    return [("random logits", (normal(2, 3, 7), ids), {}), ("logits near 1000", (1000 + normal(2, 3, 7), ids), {})]


def loss_rows(lengths):
    old = normal(len(lengths), int(lengths.max())) - 2
    return old + 0.5 * normal(*old.shape), old, normal(len(lengths), 1)


def gradient_cases():
    cases = []
    for what, (lengths,), _ in length_cases():
        logps, _, advantages = loss_rows(lengths)
        cases.append((what, (logps, advantages, grpo.completion_mask(lengths)), {}))
    return cases


def advantage_cases():
    equal = torch.full((2, 4), 0.1, dtype=torch.float64)
    mixed = torch.cat([normal(2, 4), equal])
    return [("random rewards", (normal(3, 5),), {}), ("all rewards equal", (equal,), {}),
            ("a dead group among others", (mixed,), {}), ("groups of two", (normal(3, 2),), {})]  # fmt: skip


def clip_cases():
    cases = []
    for what, (lengths,), _ in length_cases():
        for low, high in [(0.2, 0.2), (0.1, 0.3)]:
            mask = grpo.completion_mask(lengths)
            cases.append((f"{what}, clip {low}/{high}", (*loss_rows(lengths), low, high, mask), {}))
    return cases


def kl_cases():
    return [(f"{kind}, random log-probs", (normal(3, 4), normal(3, 4), kind), {}) for kind in ("k1", "k2", "k3")]


def weight_cases():
    cases = []
    for what, (lengths,), _ in length_cases():
        cases += [(f"{kind}, {what}", (lengths, kind, 8), {}) for kind in ("token", "sequence", "constant")]
        totals = dict(total_tokens=40, total_rows=10)
        cases += [(f"{kind}, {what}, totals of a larger step", (lengths, kind, 8), totals) for kind in grpo.TOKEN_WEIGHTS]
    return cases


def step_cases():
    return [(f"{what}, part of a step of 40 tokens", (*loss_rows(lengths), lengths, 40), {})
            for what, (lengths,), _ in length_cases()]  # fmt: skip


# ==== Classic mistakes: what the message says, and a function that makes it ===========================================


def clip_with(join, ratio=torch.exp, sign=-1.0, masked=True):
    def policy_loss(logps, old_logps, advantages, clip_low=0.2, clip_high=0.2, mask=None, ratio_kind="", kind=""):
        r = ratio(logps - old_logps)
        loss = sign * join(r * advantages, r.clamp(1 - clip_low, 1 + clip_high) * advantages)
        _, clipped = grpo.policy_loss(logps, old_logps, advantages, clip_low, clip_high, mask)
        return (loss.masked_fill(~mask, 0.0) if masked else loss), clipped

    return policy_loss


def k3_swapped(logps, ref, kind="k3"):
    return grpo.kl_estimate(ref, logps, kind)


def weights_by_padding(lengths, kind="token", max_tokens=0, total_tokens=None, total_rows=None):
    weights = grpo.token_weights(lengths, kind, max_tokens, total_tokens, total_rows)
    return torch.full_like(weights, 1 / (len(lengths) * int(lengths.max()))) if kind == "token" else weights


def weights_of_part(lengths, kind="token", max_tokens=0, total_tokens=None, total_rows=None):
    return grpo.token_weights(lengths, kind, max_tokens)


def swap_kinds(lengths, kind="token", max_tokens=0, total_tokens=None, total_rows=None):
    kind = {"token": "sequence", "sequence": "token"}.get(kind, kind)
    return grpo.token_weights(lengths, kind, max_tokens, total_tokens, total_rows)


def columns(lengths):
    return torch.arange(int(lengths.max()))


def step_with(*, sign=1.0, detach=False, weights="token", whole=True):
    def step_loss(logps, old_logps, advantages, lengths, total_tokens):
        logps = logps.detach() if detach else logps
        loss, _ = grpo.policy_loss(logps, old_logps, advantages, mask=grpo.completion_mask(lengths))
        total = total_tokens if whole else None
        return sign * (loss.sum(1) * grpo.token_weights(lengths, weights, total_tokens=total)).sum()

    return step_loss


EXERCISES = {
    "completion_mask": (length_cases, {
        "<= where < belongs: each row has one token too many": lambda n: columns(n) <= n[:, None],
        "the end-of-sequence token is left out, but it must be trained": lambda n: columns(n) < n[:, None] - 1,
        "the mask is inverted: it is True on the padding": lambda n: columns(n) >= n[:, None],
    }),
    "pass_at_k": (pass_cases, {
        "1 - (1 - c/n)^k draws with replacement; the n samples are drawn without": lambda n, c, k: 1 - (1 - c / n) ** k,
        "that is the probability of no right one: take it from 1": lambda n, c, k: math.comb(n - c, k) / math.comb(n, k),
        "that is pass@1: k is not used": lambda n, c, k: c / n,
    }),
    "reward": (reward_cases, {
        "the right number anywhere in the text is paid: 123 holds a 12": lambda text, value: float(str(value) in text),
        "the end of the text is all that is looked at: a form without <answer> is paid":
            lambda text, value: float(text.endswith(str(value))),
        "answers that show their steps are not paid": lambda text, value: float(text == f"<answer>{value}"),
    }),
    "token_logps": (logps_cases, {
        "those are probabilities: the log is missing": lambda x, i: x.softmax(-1).gather(-1, i[..., None])[..., 0],
        "those are the logits: they are not normalised": lambda x, i: x.gather(-1, i[..., None])[..., 0],
        "the softmax is over positions, not over the vocabulary":
            lambda x, i: x.log_softmax(1).gather(-1, i[..., None])[..., 0],
        "that is the largest log-prob, not that of the sampled token": lambda x, i: x.log_softmax(-1).amax(-1),
    }),
    "policy_gradient_loss": (gradient_cases, {
        "the sign: a loss is minimised, so it needs a minus": lambda p, a, m: (a * p)[m].sum() / m.sum(),
        "padding is in the mean: divide by the real tokens, and leave the others out": lambda p, a, m: -(a * p).mean(),
        "that is the mean over sequences of their token means, not the token mean":
            lambda p, a, m: -((a * p * m).sum(1) / m.sum(1).clamp(min=1)).mean(),
        "the loss is detached: no gradient reaches the log-probs": lambda p, a, m: -(a * p.detach())[m].sum() / m.sum(),
    }),
    "group_advantages": (advantage_cases, {
        "mean and std are over the whole batch, not over each group":
            lambda r: (r - r.mean()) / (r.std() + 1e-4),
        "the division by the group's std is missing (that is dr_grpo)": lambda r: grpo.group_advantages(r, "dr_grpo"),
        "the std has G in the denominator, not G - 1":
            lambda r: (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True, correction=0) + 1e-4),
        "the mean is missing: there is no baseline": lambda r: r / (r.std(1, keepdim=True) + 1e-4),
    }),
    "policy_loss": (clip_cases, {
        "max where min belongs": clip_with(torch.max),
        "the sign: the loss is minus the objective": clip_with(torch.min, sign=1.0),
        "nothing is clipped": clip_with(lambda plain, clipped: plain),
        "only the clipped term is there: the min with the plain one is missing": clip_with(lambda plain, clipped: clipped),
        "the ratio is exp(logp - old logp), and the exp is missing": clip_with(torch.min, ratio=lambda d: d),
        "the ratio is upside down: old over new": clip_with(torch.min, ratio=lambda d: (-d).exp()),
        "the mask is not used: padding has a loss": clip_with(torch.min, masked=False),
    }),
    "kl_estimate": (kl_cases, {
        "d has the wrong sign: it is logp - ref_logp": k3_swapped,
        "k3 has the wrong sign in the exponent: exp(-d) - 1 + d":
            lambda p, r, kind: torch.expm1(p - r) - (p - r) if kind == "k3" else grpo.kl_estimate(p, r, kind),
        "k2 lacks the factor 1/2": lambda p, r, kind: (p - r) ** 2 if kind == "k2" else grpo.kl_estimate(p, r, kind),
        "the estimate is detached: no gradient reaches the log-probs":
            lambda p, r, kind: grpo.kl_estimate(p.detach(), r, kind),
    }),
    "token_weights": (weight_cases, {
        "padding is counted: token weights are one over the real tokens": weights_by_padding,
        "the totals of the step are not used: a microbatch is only a part of it": weights_of_part,
        "token and sequence are exchanged": swap_kinds,
    }),
    "step_loss": (step_cases, {
        "the sign: policy_loss is a loss already": step_with(sign=-1.0),
        "the loss is detached": step_with(detach=True),
        "that is the sequence mean, not the token mean": step_with(weights="sequence"),
        "total_tokens is not used: a microbatch is only a part of the step": step_with(whole=False),
    }),
}  # fmt: skip


# ==== The comparison ==================================================================================================


def run(function, args, kwargs):
    """Its outputs as a list, and the gradients with respect to each floating-point argument (None if detached)."""
    args = [a.clone().requires_grad_(a.is_floating_point()) if torch.is_tensor(a) else copy.copy(a) for a in args]
    out = function(*args, **kwargs)
    outs = [torch.as_tensor(o) for o in (out if isinstance(out, tuple | list) else [out])]
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
        except Exception as error:
            return f"it raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} (on {what})"
        if len(outs) != len(right):
            return f"it returned {len(outs)} values, {len(right)} are wanted (on {what})"
        for mine, key in zip(outs, right, strict=True):
            if mine.shape != key.shape:
                return f"it returned the shape {list(mine.shape)}, wanted is {list(key.shape)} (on {what})"
            if (mine.dtype == torch.bool, mine.is_floating_point()) != (key.dtype == torch.bool, key.is_floating_point()):
                return f"it returned the dtype {mine.dtype}, wanted is {key.dtype} (on {what})"
        got.append((outs, grads))
    wrong = [i for i in range(len(cases)) if not same(got[i], keys[i])]
    if not wrong:
        return ""
    for mistake, makes_it in mistakes.items():
        if all(same(got[i], run(makes_it, *cases[i][1:])) for i in range(len(cases))):
            return mistake
    what, first = cases[wrong[0]][0], [o.double() for o in got[wrong[0]][0]]
    if keys[wrong[0]][1] is not None and got[wrong[0]][1] is None:
        constant = all(len(set(o.flatten().tolist())) == 1 for outs, _ in got for o in outs)
        return f"it returned {'a constant' if constant else 'a detached tensor'}: no gradient reaches the input (on {what})"
    if len(got) > 1 and all(len(set(outs[0].flatten().tolist())) == 1 for outs, _ in got) and len(
        {outs[0].flatten()[0].item() for outs, _ in got}) == 1:  # fmt: skip
        return f"it returned a constant, whatever the input (on {what})"
    error = max((a - b.double()).abs().max().item() for a, b in zip(first, keys[wrong[0]][0], strict=True))
    return f"it differs by up to {error:.3g} (on {what})" if error > 1e-6 else f"the gradient differs (on {what})"


def check(function):
    """Says whether `function` does what the library's function of that name does; returns the one to go on with."""
    name = function.__name__
    found = complaint(function, name)
    if not found:
        print(f"{name}: right, values and gradients")
        return function
    if found == "not written yet":
        print(f"{name}: not written yet. Take your time; until then the notebook goes on with the library's.")
    else:
        print(f"{name}: not yet: {found}. Until it is right, the notebook goes on with the library's.")
    return answer(name)
