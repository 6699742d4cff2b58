"""The exercises: for each function, the inputs it is tried on, and the classic mistakes with functions that make them.

The answers are functions of grpo.py, or of answers.py where grpo.py has none of that name.
"""

import math

import torch

import grpo
from answers import COMPLETION, reduced


# ==== Inputs: a list of (what it is, positional arguments, keyword arguments) =========================================


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


GENERATOR = torch.Generator()
RAGGED, ONE, WITH_EMPTY = torch.tensor([3, 1, 5]), torch.tensor([1]), torch.tensor([2, 0, 4])


def length_cases():
    return [("ragged lengths", (RAGGED,), {}), ("a single token", (ONE,), {}), ("an empty row", (WITH_EMPTY,), {})]


def pass_cases():
    cases = [(8, 2, 4), (8, 0, 3), (8, 8, 1), (5, 3, 5), (4, 1, 1)]
    return [(f"n={n}, c={c}, k={k}", (n, c, k), {}) for n, c, k in cases]


def reward_cases():
    texts = ["<answer>12", "<scratchpad>3*4=12<answer>12", "<answer>13", "12", "<answer>12<answer>13"]
    texts += ["<answer>13<answer>12", "so <answer>12", "<answer>123", "<answer>-12", ""]
    cases = [(f"the text {text!r} where 12 is right", (text, 12), {}) for text in texts]
    return cases + [(f"the text {text!r} where -5 is right", (text, -5), {}) for text in ("<answer>-5", "<answer>5")]


def logps_cases():
    ids = torch.tensor([[1, 0, 6], [2, 5, 3]])
    return [("random logits", (normal(2, 3, 7), ids), {}), ("logits near 1000", (1000 + normal(2, 3, 7), ids), {}),
            ("T = 1", (normal(2, 1, 7), ids[:, :1]), {}), ("B = 1", (normal(1, 3, 7), ids[:1]), {})]  # fmt: skip


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
    return [*cases, ("mask None", loss_rows(RAGGED), {})]


def kl_cases():
    return [(f"{kind}, random log-probs", (normal(3, 4), normal(3, 4), kind), {}) for kind in ("k1", "k2", "k3")]


def weight_cases():
    cases = []
    for what, (lengths,), _ in length_cases():
        cases += [(f"{kind}, {what}", (lengths, kind, 8), {}) for kind in ("token", "sequence", "constant")]
        totals, of_larger = dict(total_tokens=40, total_rows=10), f"{what}, totals of a larger step"
        cases += [(f"{kind}, {of_larger}", (lengths, kind, 8), totals) for kind in grpo.TOKEN_WEIGHTS]
    return cases


def step_cases():
    return [(f"{what}, part of a step of 40 tokens", (*loss_rows(lengths), lengths, 40), {})
            for what, (lengths,), _ in length_cases()]  # fmt: skip


PROBLEM = (14, ["3*4=12", "12+2=14"])  # (3*4)+2
EXPLOITS = {  # texts that a careless verifier pays, with what the strict one pays
    "a true equation, again and again": ("<scratchpad>" + "0*0=0;" * 9 + "0*0=0<answer>0", 0.0),
    "many true equations, no answer": ("<scratchpad>3*4=12;12+2=14;1+1=2;2+2=4;0*0=0", 0.0),
    "one right step, again and again": ("<scratchpad>" + "3*4=12;" * 9 + "3*4=12<answer>12", 0.25),
    "a list of numbers": ("<answer>10;11;12;13;14;15", 0.0),
    "two answers": ("<answer>13<answer>14", 0.0),
    "the right number in a step only": ("<scratchpad>7+7=14<answer>7", 0.0),
    "the right number inside a longer one": ("<answer>145", 0.0),
    "text behind the answer": ("<answer>14 or 15", 0.0),
    "steps of another problem": ("<scratchpad>2*7=14<answer>2", 0.0),
    "a right step inside a wrong one": ("<scratchpad>13*4=12<answer>9", 0.0),
    "nothing": ("", 0.0),
}


def repair_cases():
    honest = {
        "the right answer at once": "<answer>14",
        "the right answer, worked out": "<scratchpad>3*4=12;12+2=14<answer>14",
        "one right step, then a slip": "<scratchpad>3*4=12;12+2=15<answer>15",
        "no step, and wrong": "<answer>15",
    }
    texts = honest | {what: text for what, (text, _) in EXPLOITS.items()}
    cases = [(what, (text, *PROBLEM), {}) for what, text in texts.items()]
    return [*cases, ("a negative answer", ("<answer>-2", -2, ["3-5=-2"]), {})]


# ==== Classic mistakes: what the message says, and a function that makes it ===========================================


def clip_with(join, ratio=torch.exp, sign=-1.0, masked=True):
    def policy_loss(logps, old_logps, advantages, clip_low=0.2, clip_high=0.2, mask=None, ratio_kind="", kind=""):
        mask = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask
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


def step_with(*, sign=1.0, detach=False, weights="token", whole=True, mean=False, masked=True, clip=0.2):
    def step_loss(logps, old_logps, advantages, lengths, total_tokens):
        logps = logps.detach() if detach else logps
        mask = grpo.completion_mask(lengths) if masked else None
        loss, _ = grpo.policy_loss(logps, old_logps, advantages, clip, clip, mask)
        if mean:
            return loss.mean()
        total = total_tokens if whole else None
        return sign * (loss.sum(1) * grpo.token_weights(lengths, weights, total_tokens=total)).sum()

    return step_loss


def repaired_with(
    number_anywhere=False, any_equation=False, repeats=False, unfinished=False, inside=False, share=0.5
):
    def repaired_reward(text, value, steps):
        match = COMPLETION.fullmatch(text)
        if (str(value) in text) if number_anywhere else (match and reduced(match["answer"]) == value):
            return 1.0
        if not match and not unfinished:
            return 0.0
        shown = (match["steps"] or "" if match else text.removeprefix("<scratchpad>")).split(";")
        if any_equation:
            return min(0.5, 0.25 * len({s for s in shown if "=" in s}))
        if inside:
            shown = text
        paid = [s for s in shown if s in steps] if repeats else [s for s in steps if s in shown]
        return share * len(paid) / len(steps)

    return repaired_reward


EXERCISES = {
    "completion_mask": (length_cases, {
        "<= where < belongs: each row has one token too many": lambda n: columns(n) <= n[:, None],
        "the end-of-sequence token is left out, but it must be trained": lambda n: columns(n) < n[:, None] - 1,
        "the mask is inverted: it is True on the padding": lambda n: columns(n) >= n[:, None],
    }),
    "pass_at_k": (pass_cases, {
        "1 - (1 - c/n)^k draws with replacement; the n samples are drawn without": lambda n, c, k: 1 - (1 - c / n) ** k,
        "that is the probability of no right one: take it from 1":
            lambda n, c, k: math.comb(n - c, k) / math.comb(n, k),
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
        "the sign: cross_entropy is minus the log-prob":
            lambda x, i: -x.log_softmax(-1).gather(-1, i[..., None])[..., 0],
    }),
    "policy_gradient_loss": (gradient_cases, {
        "the sign: a loss is minimised, so it needs a minus": lambda p, a, m: (a * p)[m].sum() / m.sum(),
        "padding is in the mean: divide by the real tokens, and leave the others out": lambda p, a, m: -(a * p).mean(),
        "the number of real tokens is what divides, not that of all positions":
            lambda p, a, m: -(a * p * m).mean(),
        "the division by the number of real tokens is missing": lambda p, a, m: -(a * p)[m].sum(),
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
        "the sign: better than the mean is positive": lambda r: -grpo.group_advantages(r),
        "mean and std are over the prompts (dim 0), not over each group (dim 1)":
            lambda r: (r - r.mean(0, keepdim=True)) / (r.std(0, keepdim=True) + 1e-4),
    }),
    "policy_loss": (clip_cases, {
        "max where min belongs": clip_with(torch.max),
        "the sign: the loss is minus the objective": clip_with(torch.min, sign=1.0),
        "nothing is clipped": clip_with(lambda plain, clipped: plain),
        "only the clipped term is there: the min with the plain one is missing":
            clip_with(lambda plain, clipped: clipped),
        "the ratio is exp(logp - old logp), and the exp is missing": clip_with(torch.min, ratio=lambda d: d),
        "the ratio is upside down: old over new": clip_with(torch.min, ratio=lambda d: (-d).exp()),
        "the mask is not used: padding has a loss": clip_with(torch.min, masked=False),
        "the loss is detached: no gradient reaches logps": clip_with(torch.min, ratio=lambda d: d.detach().exp()),
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
        "that is the mean over all positions: weigh by token_weights, and add up": step_with(mean=True),
        "the mask is not used: padding has a loss": step_with(masked=False),
        "nothing is clipped": step_with(clip=1e9),
    }),
    "repaired_reward": (repair_cases, {
        "the right number anywhere in the text is still paid": repaired_with(number_anywhere=True),
        "any equation is still paid: only the steps of this problem should be": repaired_with(any_equation=True),
        "a step is still paid each time it is written": repaired_with(repeats=True),
        "a step is still paid inside another text: 13*4=12 holds 3*4=12": repaired_with(inside=True),
        "steps are still paid where no answer follows": repaired_with(unfinished=True),
        "all steps without the right answer are paid as much as the right answer: half of it at most":
            repaired_with(share=1.0),
    }),
}  # fmt: skip
NO_GRADIENT = ("group_advantages",)  # rewards have none
SECOND_OUTPUT = {  # said where the first output is right
    "policy_loss": "the loss is right, `clipped` is not: 1 where r is above the range and A > 0, -1 where r is below "
    "it and A < 0, else 0, and 0 outside the mask",
}
