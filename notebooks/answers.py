"""Answers to exercises: what grpo.py has in tables of variants, written out plainly, and what it has not by itself.

Read them after you have tried.
"""

import torch

from grpo import completion_mask, dead_groups
from harness.evaluation import pass_at_k  # noqa: F401 - the answer to an exercise
from mathformer.task import COMPLETION, reduced


def token_logps(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probs [B, T] of the tokens `ids` [B, T] under next-token logits [B, T, V]."""
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def policy_gradient_loss(logps: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """REINFORCE as a loss to minimise, a scalar: minus the mean over real tokens of advantage times log-prob."""
    return -(advantages * logps)[mask].sum() / mask.sum()


def group_advantages(rewards: torch.Tensor, kind: str = "grpo", eps: float = 1e-4) -> torch.Tensor:
    """Advantages [P, G] from rewards [P, G], of kind `grpo` only."""
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + eps)
    return advantages.masked_fill(dead_groups(rewards)[:, None], 0.0)


def policy_loss(logps, old_logps, advantages, clip_low=0.2, clip_high=0.2, mask=None, ratio="token", kind="clip"):
    """The clipped surrogate [B, T], 0 outside the mask; and what was clipped [B, T]: -1, 0 or 1."""
    mask = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask
    r = (logps - old_logps).exp()
    loss = -torch.min(r * advantages, r.clamp(1 - clip_low, 1 + clip_high) * advantages)
    clipped = ((r > 1 + clip_high) & (advantages > 0)).int() - ((r < 1 - clip_low) & (advantages < 0)).int()
    return loss.masked_fill(~mask, 0.0), clipped.masked_fill(~mask, 0)


def kl_estimate(logps: torch.Tensor, ref_logps: torch.Tensor, kind: str = "k3") -> torch.Tensor:
    """KL(policy || reference) at each token, estimated from the token that the policy sampled."""
    d = logps - ref_logps
    return {"k1": d, "k2": d.square() / 2, "k3": torch.expm1(-d) + d}[kind]


def token_weights(lengths, kind="token", max_tokens=0, total_tokens=None, total_rows=None) -> torch.Tensor:
    """The weight [B] of each token of a row."""
    tokens = int(lengths.sum()) if total_tokens is None else total_tokens
    rows = len(lengths) if total_rows is None else total_rows
    ones = torch.ones(len(lengths))
    counts = {"token": tokens * ones, "sequence": rows * lengths, "constant": rows * max_tokens * ones}
    return (1 / counts[kind]).masked_fill(lengths == 0, 0.0)


def step_loss(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, lengths: torch.Tensor, total_tokens: int
) -> torch.Tensor:
    """The GRPO loss of a microbatch, a scalar: clipped at 0.2, all tokens of the step alike, no KL penalty."""
    loss, _ = policy_loss(logps, old_logps, advantages, mask=completion_mask(lengths))
    return (loss.sum(1) * token_weights(lengths, "token", total_tokens=total_tokens)).sum()


def reward(text: str, value: int) -> float:
    """1.0 if `text` is `<answer>N`, with or without `<scratchpad>...` before it, and N is `value`; else 0.0."""
    match = COMPLETION.fullmatch(text)
    return float(match is not None and reduced(match["answer"]) == value)


def repaired_reward(text: str, value: int, steps: list[str]) -> float:
    """1.0 for the right answer, else up to 0.5 for the share of `steps`, such as "3*4=12", that the text shows.

    0.0 for any text that is not `<answer>N` or `<scratchpad>STEP;STEP;...<answer>N` as a whole.
    """
    match = COMPLETION.fullmatch(text)
    if match is None:
        return 0.0
    if reduced(match["answer"]) == value:
        return 1.0
    shown = (match["steps"] or "").split(";")
    return 0.5 * sum(step in shown for step in steps) / len(steps)
