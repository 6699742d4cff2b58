"""The choices beyond GRPO's own, each a small pure function with its paper. Those of GRPO itself stand in grpo.py.

Every table here is joined with the one in grpo.py that has its name. The keys are values of the settings.

Shapes: P prompts, G completions of each, B = P*G rows, T tokens of the longest completion.
"""

import math

import torch

from tasks import UsageError


def pick(table: dict, kind: str):
    """The entry called `kind`; a ValueError that names all of them if there is none."""
    if kind not in table:
        raise ValueError(f"kind {kind!r}: choose {', '.join(table)}")
    return table[kind]


# ==== Sampling ========================================================================================================


def keep_top(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Logits [B, V] with -inf on the tokens that may not be sampled. The most likely token always stays.

    `top_k` keeps the k largest; 0 is off. `top_p` (nucleus sampling, arXiv 1904.09751, section 3.1) keeps the smallest
    set of tokens whose probabilities sum to `top_p`; 1 is off.
    """
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= top_p  # the mass before this token is enough already
        logits = logits.masked_fill(outside.scatter(1, order, outside), -math.inf)
    return logits


def draw(probs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token of each row, [B, V] to [B, 1]: where the cumulative sum of the row first reaches a random level.

    As `torch.multinomial`, which draws a random number for each of the V tokens, and not only one: that took three
    times as long for 49,152 tokens. The levels are above 0, which no token of probability 0 is the first to reach.
    """
    kind = torch.float32 if probs.device.type == "mps" else torch.float64  # in which 1 + 1e-15 is not 1
    sums = probs.to(kind).cumsum_(-1)
    if sums[:, -1].isnan().any():
        raise UsageError("the logits are not numbers: it has diverged, or overflows in fp16. Lower lr, or take fp32")
    below_1 = torch.rand(len(probs), 1, dtype=kind, device=probs.device, generator=generator)
    return torch.searchsorted(sums, (1 - below_1) * sums[:, -1:])


# ==== Rewards and advantages ==========================================================================================


def dr_grpo(rewards: torch.Tensor, mean: torch.Tensor, eps: float) -> torch.Tensor:
    """r - mean. Dr. GRPO, arXiv 2503.20783, section 3.2: no std, which favours prompts that are easy or hard."""
    return rewards - mean


def rloo(rewards: torch.Tensor, mean: torch.Tensor, eps: float) -> torch.Tensor:
    """r - mean of the group's others. RLOO, arXiv 2402.14740: unbiased, dr_grpo times G / (G - 1)."""
    return (rewards - mean) * rewards.shape[1] / (rewards.shape[1] - 1)


def batch_std(rewards: torch.Tensor, mean: torch.Tensor, eps: float) -> torch.Tensor:
    """(r - mean) / (std + eps), with the std of all rewards of the step. Lite PPO, arXiv 2508.08221."""
    return (rewards - mean) / (rewards.std() + eps)


def maxrl(rewards: torch.Tensor, mean: torch.Tensor, eps: float) -> torch.Tensor:
    """(r - mean) / mean, and 0 where the mean is 0, for rewards of 0 and more. MaxRL, arXiv 2602.02710."""
    if rewards.min() < 0:
        raise UsageError(f"advantage maxrl is for rewards of 0 and more, but one is {rewards.min():g}")
    return (rewards - mean) / mean.clamp(min=torch.finfo(rewards.dtype).tiny)


# from rewards [P, G], their group means [P, 1] and eps to advantages [P, G]
ADVANTAGES = {"dr_grpo": dr_grpo, "rloo": rloo, "batch": batch_std, "maxrl": maxrl}


def overlong_penalty(length: int, max_tokens: int, share: float) -> float:
    """DAPO's soft punishment (arXiv 2503.14476, section 3.4): 0 up to the last `share` of max_tokens, then up to 1."""
    return max(0.0, 1 - (max_tokens - length) / (share * max_tokens)) if share else 0.0


# ==== The loss ========================================================================================================


def sequence_ratio(logps: torch.Tensor, old_logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One ratio a completion: exp of the mean of its tokens' log-ratios. GSPO, arXiv 2507.18071, section 4.

    Each token has its own gradient: `logps - logps.detach()` is 0 and has one (section 4.3, GSPO-token). The paper's
    setting is loss weights `sequence` and a clip of 3e-4 and 4e-4.
    """
    log_ratio = ((logps - old_logps) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return (log_ratio.detach() + logps - logps.detach()).exp()


RATIOS = {"sequence": sequence_ratio}  # from log-probs [B, T], old ones, and the mask to ratios [B, T]


def cispo(ratio, logps, advantages, clip_low: float, clip_high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """-detach(min(r, 1 + clip_high)) * A * logp. CISPO, MiniMax-M1, arXiv 2506.13585, section 3.1.

    The ratio is a bounded weight, so that tokens which the clip would silence keep a gradient.
    """
    bounded = ratio.clamp(max=1 + clip_high).detach()
    return -bounded * advantages * logps, (ratio > 1 + clip_high).int()


# from ratios [B, T], log-probs, advantages and both clips to the loss and what was clipped, [B, T] each
SURROGATES = {"cispo": cispo}


def k1(d: torch.Tensor) -> torch.Tensor:
    """d = logp - ref_logp: unbiased, of either sign. http://joschu.net/blog/kl-approx.html"""
    return d


def k2(d: torch.Tensor) -> torch.Tensor:
    """d^2 / 2: biased, of small variance."""
    return d.square() / 2


KL_ESTIMATES = {"k1": k1, "k2": k2}
# In the loss, each estimator needs its own factor for its gradient to be that of KL(policy || reference): the ratio to
# the policy that sampled. Without it, k1 has the expected gradient 0. k2 wants it as a mere weight, without a gradient.
KL_FACTORS = {"k1": lambda ratio: ratio, "k2": lambda ratio: ratio.detach()}


def adapted_kl_coef(kl_coef: float, kl_ref: float | None, target: float) -> float:
    """The coefficient of the next step: a little larger if the KL came out above the target, smaller if below.

        kl_coef * (1 + 0.1 * clip(kl_ref / target - 1, -0.2, 0.2))    arXiv 1909.08593, section 2.2

    At most 2 % a step: the KL answers late, and a faster controller would swing. A step that trained nothing
    (`kl_ref` None) changes nothing.
    """
    return kl_coef if kl_ref is None else kl_coef * (1 + 0.1 * max(-0.2, min(0.2, kl_ref / target - 1)))


def constant_weights(lengths: torch.Tensor, total_tokens: int, total_rows: int, max_tokens: int) -> torch.Tensor:
    """1 / (total_rows * max_tokens). Dr. GRPO, arXiv 2503.20783, section 3.2: the same whatever the lengths are."""
    if max_tokens < 1:
        raise ValueError("the constant weights need max_tokens")
    return torch.ones_like(lengths) / (total_rows * max_tokens)


# from lengths [B], the totals of the optimizer step and max_completion_tokens to the weight of each row's tokens [B]
TOKEN_WEIGHTS = {"constant": constant_weights}
