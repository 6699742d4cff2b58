"""Rows of unequal length to microbatches, and microbatches to tensors. A row is a `Sample` or a `Rollout`."""

from typing import NamedTuple

import torch
from accelerate import Accelerator, PartialState
from torch import nn

from harness import parallel
from harness.settings import Config

PASS_TOKENS = 256  # what one more pass through the model costs, in tokens: some


def row_tokens(row) -> int:
    return len(row.prompt_ids) + len(row.completion_ids)


def microbatches(rows: list, token_budget: int) -> list[list]:
    """Splits rows into batches of at most `token_budget` tokens, padding included; a longer row is a batch by itself.

    The rows are sorted by length and cut where that is cheapest: a batch costs its tokens, and `PASS_TOKENS` more.
    """
    rows = sorted(rows, key=row_tokens, reverse=True)
    best = {len(rows): (0, 0)}  # of the rows from i on: the lowest cost, and where their first batch ends
    for i in reversed(range(len(rows))):
        longest = row_tokens(rows[i])
        ends = range(i + 1, 1 + min(len(rows), i + max(1, token_budget // longest)))
        best[i] = min((PASS_TOKENS + (end - i) * longest + best[end][0], end) for end in ends)
    cuts = [0]
    while cuts[-1] < len(rows):
        cuts.append(best[cuts[-1]][1])
    return [rows[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]


class Microbatch(NamedTuple):
    """What goes through the model at once."""

    rows: list
    scale: int  # of the loss: the number of processes, whose gradients get averaged; 0 if these rows do not count
    last: bool  # of this process


def own_microbatches(rows: list, token_budget: int) -> list[Microbatch]:
    """The microbatches of this process: the rows are dealt out by length.

    Every process gets equally many microbatches, since a pass through the model may be something they do together:
    where one has none left, it takes a short row along that does not count.
    """
    rows, state = sorted(rows, key=row_tokens, reverse=True), PartialState()
    of_all = [microbatches(rows[i :: state.num_processes], token_budget) for i in range(state.num_processes)]
    own, most = of_all[state.process_index], max(map(len, of_all))
    scales = [state.num_processes] * len(own) + [0] * (most - len(own))
    own = own + [rows[-1:]] * (most - len(own))
    return [Microbatch(batch, scale, i == most) for i, (batch, scale) in enumerate(zip(own, scales, strict=True), 1)]


def pad(rows: list[list], device) -> torch.Tensor:
    """Lists of unequal length to a tensor [B, longest], with zeros on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)


def policy_inputs(batch: list, device) -> dict[str, torch.Tensor]:
    """The arguments of `Policy.forward` for these rows."""
    return {
        "ids": pad([r.prompt_ids + r.completion_ids for r in batch], device),
        "prompt_lengths": torch.tensor([len(r.prompt_ids) for r in batch], device=device),
        "lengths": torch.tensor([len(r.completion_ids) for r in batch], device=device),
    }


@torch.no_grad()
def logps_under(policy: nn.Module, rows: list, accelerator: Accelerator, token_budget: int) -> list[list[float]]:
    """The log-probs of each row's completion tokens under `policy`, which goes back to where it was."""
    home = next(policy.parameters()).device
    policy.to(accelerator.device).eval()
    place, found = {id(row): i for i, row in enumerate(rows)}, []
    for batch, scale, _ in own_microbatches(rows, token_budget):
        with accelerator.autocast():
            logps, _ = policy(**policy_inputs(batch, accelerator.device), entropy=False)
        if scale:
            for r, row in zip(batch, logps.tolist(), strict=True):
                found.append((place[id(r)], row[: len(r.completion_ids)]))
    policy.to(home)
    return [row for _, row in sorted(parallel.join(found))]


def add_logps(name: str, policy: nn.Module, rollouts: list, accelerator: Accelerator, config: Config) -> None:
    """Sets `old_logps` or `ref_logps` of each rollout."""
    found = logps_under(policy, rollouts, accelerator, config.tokens_per_microbatch)
    for rollout, logps in zip(rollouts, found, strict=True):
        setattr(rollout, name, logps)
