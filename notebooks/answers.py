"""Answers to exercises that are not functions of grpo.py by themselves. Read them after you have tried."""

import torch

from grpo import completion_mask, policy_loss, token_weights
from mathformer.task import COMPLETION, reduced


def token_logps(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probs [B, T] of the tokens `ids` [B, T] under next-token logits [B, T, V]."""
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def policy_gradient_loss(logps: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """REINFORCE as a loss to minimise, a scalar: minus the mean over real tokens of advantage times log-prob."""
    return -(advantages * logps)[mask].sum() / mask.sum()


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
