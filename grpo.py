"""Group Relative Policy Optimization (GRPO), the whole algorithm, from top to bottom.

GRPO (DeepSeekMath, arXiv 2402.03300) improves a language model by trial and error, on problems
whose answers a program can check. It is REINFORCE with two changes. The baseline is the mean
reward of a group of answers to the same prompt, so there is no value network. And the ratio of
new to old probability is clipped as in PPO, so that a batch can be used more than once. A step:

    1. draw P prompts, let the policy write G completions of each       TorchSampler.generate
    2. let the task's verifier pay each completion                      complete
    3. advantage = (reward - mean of the group) / std of the group      group_advantages
    4. log-probs of the same tokens under the policy as it is now       Policy.forward
    5. r = exp(logp - old logp);  loss = -min(r*A, clip(r)*A)           policy_loss
    6. if wanted, add kl_coef * KL(policy || reference)                 kl_estimate
       (or take it off the reward, before step 3)                       assign_advantages
    7. weighted sum over tokens; backward, clip the gradient, AdamW     token_weights, update

The paper also has a learned reward model and renews its reference model: both are left out. By
default four settings depart from the paper. All tokens weigh the same, as in DAPO (the paper:
--loss_weight sequence). There is no KL penalty (--kl_coef 0.04). A batch is used for one update
(--epochs, --minibatches). The old log-probs are the sampler's own (--old_logps trainer).

Lines you may want to change are marked `# GRPO:`. Other advantages, ratios, losses and weights are
in variants.py, how to write a task is in tasks/, and what a run needs besides is in harness/.

    python grpo.py                              arithmetic on a CPU, about a minute, no download
    python grpo.py --steps 0                    evaluate, show one group of completions, stop
    python grpo.py --model M --task T           any causal language model, any task
    python grpo.py --resume runs/<run>          go on with a run that was stopped
    python grpo.py --help                       every setting
"""

import math
import os
import random
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from harness.command_line import check_arguments, errors_as_lines, parse_config

# Before torch is imported: what Apple's GPU lacks runs on the CPU, and runs repeat exactly.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
os.environ.setdefault("MKL_CBWR", "AUTO")
if __name__ == "__main__":
    check_arguments(sys.argv[1:])  # torch takes seconds: a mistake is answered before

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import variants
from harness import evaluation, kv_cache, loading, lora, memory, metrics, optimizers, parallel, terminal
from harness.ahead import written_ahead
from harness.batching import add_logps, own_microbatches, pad, policy_inputs
from harness.fast_head import best_head
from harness.model_checks import check_model, scaled_and_capped
from harness.prompts import Problem, draw_prompts, judge_all, written_text
from harness.proven_sampler import proven_sampler
from harness.run_folder import RunFolder
from harness.settings import Config, Sample, Sampling, UsageError  # noqa: F401
from harness.stopping import completes

# ==== 1. Sampling =================================================================================


@dataclass
class Rollout:
    """One completion, from the sampler to the log. Its token ids are never encoded again."""

    prompt_ids: list[int]
    completion_ids: list[int]  # with the end-of-sequence token, if the model wrote it
    logps: list[float]  # the sampler's log-prob of each completion token
    truncated: bool  # cut off at max_completion_tokens
    prompt: str = ""
    text: str = ""  # what the verifier judges: the completion, without the end-of-sequence token
    parts: dict = field(default_factory=dict)  # what the task's reward() returned
    reward: float = 0.0
    penalty: float = 0.0  # taken off the reward before it becomes an advantage
    advantage: float = 0.0
    dead: bool = False  # reward - penalty is the same in the whole group
    age: int = 0  # steps since the weights that wrote it
    old_logps: list[float] | None = None  # the trainer's, before the update, if asked for
    ref_logps: list[float] | None = None  # under the reference model, if there is one

    @property
    def length(self) -> int:
        return len(self.completion_ids)


def output_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Hidden states [..., D] to logits [..., V] in float32, in the sampler as in the trainer.

    Autocast is off: with it, a float32 product would come back as bf16, in 3 significant digits.
    """
    head = model.get_output_embeddings()
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        return scaled_and_capped(model, F.linear(hidden.float(), head.weight.float(), bias))


class TorchSampler:
    """Samples with the trained model itself, on any device. VLLMSampler is its fast twin.

    A prompt goes through the model once, and its G completions start from that key-value cache.
    Finished rows leave the batch.
    """

    def __init__(
        self, model, eos_ids, sample_rows=256, autocast=nullcontext, source=None, tokenizer=None
    ):
        self.model, self.source = kv_cache.share_keys(model), source or model
        self.sample_rows, self.autocast, self.tokenizer = sample_rows, autocast, tokenizer
        self.device = next(model.parameters()).device
        self.eos = torch.tensor(eos_ids, device=self.device)
        self.generator = torch.Generator(self.device)  # its own: nothing else changes what is drawn

    def sleep(self) -> None:
        """Before each update. Nothing to give back here."""

    def sync(self) -> None:
        """After each update. A copy of the trained model has to follow."""
        if self.source is not self.model:
            parallel.copy_weights(self.source, self.model)

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], group_size: int, sampling: Sampling, seed: int
    ) -> list[Sample]:
        """`group_size` completions of each prompt; those of one prompt are neighbours."""
        self.model.eval()
        self.generator.manual_seed(seed)
        at_once = max(1, self.sample_rows // group_size)
        chunks = [prompts[i : i + at_once] for i in range(0, len(prompts), at_once)]
        with self.autocast():
            return [s for chunk in chunks for s in self._generate(chunk, group_size, *sampling)]

    def _generate(self, prompts, group_size, max_tokens, temperature, top_p, top_k, stop):
        # Padding on the left: the last column holds the last token of every prompt.
        longest = max(map(len, prompts))
        ids = [[0] * (longest - len(p)) + p for p in prompts]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        mask = torch.tensor(mask, device=self.device)  # [P, L]
        logits, cache = self._forward(torch.tensor(ids, device=self.device), mask, None)  # [P, V]
        B = len(prompts) * group_size
        rows = torch.arange(B, device=self.device) // group_size  # the prompt of each completion
        kv_cache.take_rows(cache, rows)
        logits, mask = logits[rows], mask[rows]  # [B, V], [B, L]

        tokens = torch.zeros(B, max_tokens, dtype=torch.long, device=self.device)
        logps = torch.zeros(B, max_tokens, device=self.device)
        lengths = torch.full((B,), max_tokens, device=self.device)
        ended = torch.zeros(B, dtype=torch.bool, device=self.device)
        unfinished = torch.arange(B, device=self.device)  # [b], rows that are still being written
        for t in range(max_tokens):
            if temperature > 0:
                logits = variants.keep_top(logits / temperature, top_k, top_p)
            all_logps = logits.log_softmax(-1)  # [b, V]
            if temperature > 0:
                token = variants.draw(all_logps.exp(), self.generator)  # [b, 1]
            else:
                token = all_logps.argmax(-1, keepdim=True)
            tokens[unfinished, t] = token[:, 0]
            logps[unfinished, t] = all_logps.gather(1, token)[:, 0]
            stopped = torch.isin(token[:, 0], self.eos)  # [b]
            if stop:
                stopped |= completes(self.tokenizer, stop, tokens[unfinished, : t + 1])
            terminal.WATCH.tick(stopped)  # moves an evaluation's bar, or ends it on Ctrl-C
            if stopped.any():
                ended[unfinished[stopped]] = True
                lengths[unfinished[stopped]] = t + 1
                kept = kv_cache.close_gaps(stopped)  # rows to keep; the last ones fill the gaps
                unfinished, token, mask = unfinished[kept], token[kept], mask[kept]
                kv_cache.take_rows(cache, kept)
            if t + 1 == max_tokens or not len(unfinished):
                break
            mask = F.pad(mask, (0, 1), value=1)
            logits, cache = self._forward(token, mask, cache)
        tokens, logps, lengths, ended = (x.tolist() for x in (tokens, logps, lengths, ended))
        return [
            Sample(prompts[i // group_size], tokens[i][:n], logps[i][:n], truncated=not ended[i])
            for i, n in enumerate(lengths)
        ]

    def _forward(self, ids: Tensor, mask: Tensor, cache):
        """Logits [B, V] after the last of `ids` [B, T]; `mask` [B, past + T] is 0 on padding."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = self.model.base_model(
            ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return output_logits(self.model, out.last_hidden_state[:, -1]), out.past_key_values


# ==== 2. Rewards and advantages ===================================================================


def complete(
    sampler, tokenizer, task, problems: list[Problem], group_size: int, sampling: Sampling,
    seed: int, prefix: str = "",
) -> list[Rollout]:  # fmt: skip
    """`group_size` judged completions of each problem; those of one problem are neighbours.

    `prefix` goes between prompt and completion, and is judged with it. Each process samples and
    judges its share of the problems, and gets all rollouts.
    """
    problems, seed = parallel.share(problems), parallel.own_seed(seed)
    prefix_ids = tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else []
    samples = sampler.generate([p.ids + prefix_ids for p in problems], group_size, sampling, seed)
    rollouts = [Rollout(**sample._asdict()) for sample in samples]
    for i, r in enumerate(rollouts):
        problem = problems[i // group_size]
        r.prompt, r.text = problem.prompt, problem.begun + prefix
        r.text += written_text(tokenizer, r, sampling.stop)
    for r, parts in zip(rollouts, judge_all(task, rollouts, problems), strict=True):
        r.parts, r.reward = parts, float(parts["reward"])  # GRPO: whatever the task pays
    return parallel.join(rollouts)


def collect(sampler, tokenizer, task, config: Config, step: int) -> tuple[list[Rollout], dict]:
    """The rollouts of a step, P groups of G neighbours; and counts of what was drawn."""
    G = config.group_size
    counts = {"prompts_too_long": 0, "resampled_groups": 0, "step_tokens": 0}

    def draw(attempt: int, n: int) -> list[list[Rollout]]:
        """`n` groups. Step and attempt seed the draw, so that a resumed run repeats it."""
        problems, too_long = draw_prompts(task, tokenizer, config, step, attempt)
        seed = config.step_seed(step, attempt)
        drawn = complete(sampler, tokenizer, task, problems[:n], G, config.sampling, seed)
        counts["prompts_too_long"] += too_long
        counts["step_tokens"] += sum(r.length for r in drawn)
        return metrics.groups_of(drawn, G)

    groups = draw(0, config.prompts_per_step)
    # GRPO: DAPO's dynamic sampling, off by default: fresh groups for those whose rewards, before
    # any penalty, are equal
    for attempt in range(1, 1 + config.resample_rounds):
        equal = [i for i, group in enumerate(groups) if metrics.equal_rewards(group)]
        if not equal:
            break
        for i, fresh in zip(equal, draw(attempt, len(equal)), strict=True):
            groups[i] = fresh
        counts["resampled_groups"] += len(equal)
    return sum(groups, []), counts


# GRPO: how much better an answer is than the others of its group. The group is its own baseline.
def grpo_advantages(rewards: Tensor, mean: Tensor, eps: float) -> Tensor:
    """(r - mean) / (std + eps), for rewards [P, G] and their group means [P, 1]."""
    return (rewards - mean) / (rewards.std(1, keepdim=True) + eps)


ADVANTAGES = {"grpo": grpo_advantages, **variants.ADVANTAGES}


def dead_groups(rewards: Tensor) -> Tensor:
    """[P, G] to [P]: whether all rewards of a group are equal, so that it teaches nothing."""
    return rewards.amax(1) == rewards.amin(1)


def group_advantages(rewards: Tensor, kind: str = "grpo", eps: float = 1e-4) -> Tensor:
    """Advantages [P, G] from rewards [P, G]: GRPO's own (section 4.1.2 of the paper) or a variant.

    The std has G - 1 in its denominator, not G as in some repositories. An eps of 1e-8 would turn
    rounding errors into advantages of 1.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [P, G] with G of 2 or more, not {list(rewards.shape)}")
    advantages = variants.pick(ADVANTAGES, kind)(rewards, rewards.mean(1, keepdim=True), eps)
    # exactly 0 in a dead group, although the mean may be a rounding error away from the rewards
    return advantages.masked_fill(dead_groups(rewards)[:, None], 0.0)


def assign_advantages(rollouts: list[Rollout], config: Config) -> None:
    """Sets `penalty`, `advantage` and `dead` of each rollout of a step."""
    for r in rollouts:
        limit, share = config.max_completion_tokens, config.overlong_share
        r.penalty = variants.overlong_penalty(r.length, limit, share)
        if config.kl_in == "reward":  # GRPO: k1, summed over the completion, off its reward
            old_logps = r.logps if r.old_logps is None else r.old_logps
            r.penalty += config.kl_coef * (sum(old_logps) - sum(r.ref_logps))
    rewards = torch.tensor([r.reward - r.penalty for r in rollouts], dtype=torch.float64)
    rewards = rewards.view(-1, config.group_size)  # [P, G]
    advantages = group_advantages(rewards, config.advantage).flatten().tolist()
    dead = dead_groups(rewards).repeat_interleave(config.group_size).tolist()
    for i, r in enumerate(rollouts):
        r.advantage, r.dead = advantages[i], dead[i]


# ==== 3. The loss =================================================================================


class Policy(nn.Module):
    """Token ids to log-probs, in one module call, so that data parallelism can wrap all of it."""

    def __init__(self, model: nn.Module, temperature: float = 1.0, entropy_gradient: bool = False):
        super().__init__()
        self.model, self.temperature, self.entropy_gradient = model, temperature, entropy_gradient
        self._no_split_modules = model._no_split_modules  # the layers, which FSDP takes as units
        self.chunk = memory.logits_chunk(model.config)  # tokens whose logits exist at the same time

    def forward(self, ids: Tensor, prompt_lengths: Tensor, lengths: Tensor, **hints):
        """Log-probs and entropies, both [B, T] in float32, 0 past the end of a row.

        Args:
            ids: [B, L]. A row is a prompt, its completion, and padding of any value.
            prompt_lengths, lengths: [B], tokens of prompt and completion. T is the largest length.
            hints: of `best_head`.

        No attention mask is needed: attention is causal, and the padding is on the right.
        """
        hidden = self.model.base_model(ids, use_cache=False).last_hidden_state  # [B, L, D]
        # Position j predicts token j + 1. Masks come from lengths, not from token values: padding
        # often is the end-of-sequence token, which must be trained.
        position = torch.arange(ids.shape[1] - 1, device=ids.device)
        first, end = prompt_lengths[:, None] - 1, (prompt_lengths + lengths)[:, None] - 1
        predicts = (position >= first) & (position < end)  # [B, L-1]
        hidden, targets = hidden[:, :-1][predicts], ids[:, 1:][predicts]  # [N, D], [N]

        mask = completion_mask(lengths)  # [B, T], of N real tokens in the same order
        found = best_head(self, mask, **hints)(hidden, targets)  # plain_head's, with less work
        return tuple(x.new_zeros(mask.shape).masked_scatter(mask, x) for x in found)

    def plain_head(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [N, D], and the tokens [N] behind them, to log-probs and entropies [N]."""
        chunks = zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True)
        # the backward pass computes a chunk's logits again, so they need not be kept
        found = (checkpoint(self._token_logps, *c, use_reentrant=False) for c in chunks)
        return tuple(map(torch.cat, zip(*found, strict=True)))

    def _token_logps(self, hidden: Tensor, targets: Tensor):
        # GRPO: with the sampler's temperature
        all_logps = (output_logits(self.model, hidden) / self.temperature).log_softmax(-1)
        # without an entropy bonus, the entropy is only a metric
        with torch.set_grad_enabled(self.entropy_gradient and torch.is_grad_enabled()):
            entropy = -(all_logps.exp() * all_logps).sum(-1)
        return all_logps.gather(1, targets[:, None])[:, 0], entropy


def completion_mask(lengths: Tensor) -> Tensor:
    """[B] to [B, T]: True on real tokens, the end-of-sequence token among them."""
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


def completion_logps(model, ids, prompt_lengths, lengths, temperature: float = 1.0) -> Tensor:
    """Log-probs [B, T] of the completion tokens, for the arguments of `Policy.forward`."""
    return Policy(model, temperature)(ids, prompt_lengths, lengths)[0]


# GRPO: one ratio a token
def token_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    return (logps - old_logps).exp()


def clipped_loss(ratio, logps, advantages, clip_low, clip_high) -> tuple[Tensor, Tensor]:
    """-min(r * A, clamp(r, 1 - clip_low, 1 + clip_high) * A). PPO, arXiv 1707.06347, eq. 7."""
    gain = ratio * advantages
    limited_gain = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    # GRPO: min, not max. A token that went far in the direction of its advantage gets no gradient;
    # one that went the other way keeps it.
    loss = -torch.min(gain, limited_gain)
    high = (ratio > 1 + clip_high) & (advantages > 0)
    low = (ratio < 1 - clip_low) & (advantages < 0)
    return loss, high.int() - low.int()


RATIOS = {"token": token_ratio, **variants.RATIOS}
SURROGATES = {"clip": clipped_loss, **variants.SURROGATES}


def policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, clip_low=0.2, clip_high=0.2,
    mask: Tensor | None = None, ratio="token", kind="clip",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss of each token [B, T], to be minimised, 0 outside the mask; and what was clipped.

    Args:
        logps, old_logps: [B, T], of the sampled tokens, new and old.
        advantages: [B, 1] or [B, T].
        mask: [B, T], True on real tokens. None means that all are.

    What was clipped [B, T]: 1 where the clip acted from above, -1 from below, 0 elsewhere.
    """
    mask = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask
    r = variants.pick(RATIOS, ratio)(logps, old_logps, mask)
    loss, clipped = variants.pick(SURROGATES, kind)(r, logps, advantages, clip_low, clip_high)
    return loss.masked_fill(~mask, 0.0), clipped.masked_fill(~mask, 0)


def k3(d: Tensor) -> Tensor:
    """exp(-d) - 1 + d, for d = logp - ref_logp: unbiased and never negative (GRPO, eq. 4)."""
    return torch.expm1(-d) + d  # exp(-d) - 1 + d could round below 0


KL_ESTIMATES = {"k3": k3, **variants.KL_ESTIMATES}
# GRPO: k3 by itself has the gradient of KL(reference || policy); times the ratio, the right one.
KL_FACTORS = {"k3": lambda ratio: ratio, **variants.KL_FACTORS}


def kl_estimate(logps: Tensor, ref_logps: Tensor, kind: str = "k3") -> Tensor:
    """KL(policy || reference) at each token, estimated from the token that the policy sampled."""
    return variants.pick(KL_ESTIMATES, kind)(logps - ref_logps)


# GRPO: what a token of a row weighs in the loss
def same_for_all_tokens(lengths, total_tokens, total_rows, max_tokens) -> Tensor:
    """1 / total_tokens. DAPO, arXiv 2503.14476, section 3.3."""
    return torch.ones_like(lengths) / total_tokens


def same_for_all_rows(lengths, total_tokens, total_rows, max_tokens) -> Tensor:
    """1 / (total_rows * length). GRPO's own: tokens of long answers weigh less."""
    return 1 / (total_rows * lengths)


TOKEN_WEIGHTS = {"token": same_for_all_tokens, "sequence": same_for_all_rows}
TOKEN_WEIGHTS |= variants.TOKEN_WEIGHTS


def token_weights(
    lengths: Tensor, kind="token", max_tokens=0, total_tokens: int | None = None,
    total_rows: int | None = None,
) -> Tensor:  # fmt: skip
    """The weight of the tokens of each row [B]: loss = sum_i w_i * sum_t token_loss[i, t].

    Args:
        lengths: [B] completion lengths. A row of length 0 gets weight 0.
        max_tokens: max_completion_tokens, which `constant` needs.
        total_tokens, total_rows: of the whole optimizer step; None takes those of `lengths`. With
            totals of its own for each microbatch, the loss would depend on the split.
    """
    total_tokens = int(lengths.sum()) if total_tokens is None else total_tokens
    total_rows = len(lengths) if total_rows is None else total_rows
    as_floats = lengths.to(torch.get_default_dtype())
    weigh = variants.pick(TOKEN_WEIGHTS, kind)
    return weigh(as_floats, total_tokens, total_rows, max_tokens).masked_fill(lengths == 0, 0.0)


# ==== 4. The update ===============================================================================


def update(
    policy, optimizer, accelerator: Accelerator, rollouts: list[Rollout], config: Config, step: int
) -> dict[str, float | None]:
    """Trains on the rollouts of a step: `epochs` passes of `minibatches` optimizer steps each.

    Advantages, old and reference log-probs stay the same in all of them. Returns metrics of the
    trained tokens.
    """
    lr = optimizers.learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    policy.train()  # for gradient checkpointing; all dropout was set to 0 at loading
    order, figures = random.Random(f"{config.seed}/{step}/minibatches"), metrics.UpdateFigures()
    size = len(rollouts) // config.minibatches
    for _ in range(config.epochs):
        rows = order.sample(rollouts, len(rollouts))  # shuffled
        for i in range(0, len(rows), size):
            minibatch = rows[i : i + size]
            optimizer_step(policy, optimizer, accelerator, minibatch, config, figures)
    return figures.metrics(config, lr)


def optimizer_step(
    policy, optimizer, accelerator: Accelerator, rows: list[Rollout], config: Config, figures
) -> None:
    """One step on these rows, or none if they have nothing to teach."""
    # GRPO: masked rows count in no total; they only helped to set their group's mean and std
    rows = [r for r in rows if not (r.truncated and config.mask_truncated)]
    totals = sum(r.length for r in rows), len(rows)
    # GRPO: a dead group has advantage 0. Without a KL penalty or an entropy bonus in the loss, it
    # has no gradient and needs no pass through the model. It still counts in the totals: otherwise
    # the other rows would weigh more, as with a higher learning rate.
    trained = [r for r in rows if not r.dead] if config.drops_dead_groups else rows
    if all(r.dead for r in trained) and not config.loss_is_regularised:
        trained = []  # no step: with gradients of 0, AdamW's momentum would still move the weights
    # scale: number of processes, to undo the averaging of gradients; 0 for rows that only fill up
    for batch, scale, last in own_microbatches(trained, config.tokens_per_microbatch):
        with parallel.holds_gradients(accelerator, policy, last):
            recorder = figures if scale else None
            loss = batch_loss(policy, batch, config, accelerator.device, *totals, recorder)
            accelerator.backward(loss * scale)
    norm = None
    if trained:
        norm = float(accelerator.clip_grad_norm_(policy.parameters(), config.grad_clip))
        if math.isfinite(norm) or accelerator.scaler:  # skips such steps
            optimizer.step()
    optimizer.zero_grad()
    figures.add_step(norm)


def batch_loss(
    policy: nn.Module, batch: list[Rollout], config: Config, device: torch.device,
    total_tokens: int, total_rows: int, figures: metrics.UpdateFigures | None = None,
) -> Tensor:  # fmt: skip
    """What these rows add to the loss of an optimizer step with these totals: a scalar."""
    inputs = policy_inputs(batch, device)
    lengths, mask = inputs["lengths"], completion_mask(inputs["lengths"])  # [B], [B, T]
    # GRPO: the old policy is the one that acted, so the old log-probs are the sampler's
    old_logps = sampler_logps = pad([r.logps for r in batch], device)
    if config.uses_trainer_logps:
        old_logps = pad([r.old_logps for r in batch], device)
    advantages = torch.tensor([[r.advantage] for r in batch], device=device)  # [B, 1]

    limit = config.max_completion_tokens
    weights = token_weights(lengths, config.loss_weight, limit, total_tokens, total_rows)  # [B]
    ref_logps = pad([r.ref_logps for r in batch], device) if config.kl_coef > 0 else None

    def loss_of(logps: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, a scalar; of each token [B, T] the KL, and what was clipped."""
        clips, kinds = (config.clip_low, config.clip_high), (config.ratio, config.surrogate)
        loss, clipped = policy_loss(logps, old_logps, advantages, *clips, mask, *kinds)
        if config.importance_cap:  # GRPO: capped weights, for a sampler not quite the policy
            loss = loss * (old_logps - sampler_logps).exp().clamp(max=config.importance_cap)
        kl = torch.zeros_like(logps)
        if ref_logps is not None:
            kl = kl_estimate(logps, ref_logps, config.kl_kind).masked_fill(~mask, 0.0)
            if config.kl_in == "loss":  # GRPO: the penalty on each token
                factor = KL_FACTORS[config.kl_kind]((logps - old_logps).exp())
                loss = loss + config.kl_coef * (factor * kl)
        if config.entropy_coef:  # GRPO: a reward for being undecided
            loss = loss - config.entropy_coef * entropy
        return (loss.sum(1) * weights).sum(), kl, clipped

    logps, entropy = policy(**inputs, loss_of=loss_of)  # [B, T], all that has a gradient
    loss, kl, clipped = loss_of(logps, entropy)
    if figures:
        figures.add_batch(loss, logps, old_logps, sampler_logps, kl, entropy, clipped, mask)
    return loss


# ==== 5. train() and main() =======================================================================


def setup(config: Config) -> loading.Run:
    """All parts of a run, checked before any long work and before a folder is made."""
    run = loading.load(config)  # task, model, tokenizer, evaluation problems, device
    config, accelerator, model = run.config, run.accelerator, run.model
    check_model(run, Policy, TorchSampler)
    lora.add_adapters(model, config, accelerator, run.checkpoint)
    policy = Policy(model, config.temperature, entropy_gradient=config.entropy_coef > 0)
    optimizer = optimizers.make_optimizer(policy, config, accelerator)
    copied = parallel.samplable(run)
    run.policy, run.optimizer = accelerator.prepare(policy, optimizer)
    if run.sampler_name == "torch":
        rows, autocast = config.sample_rows, accelerator.autocast
        run.sampler = TorchSampler(copied, run.eos_ids, rows, autocast, model, run.tokenizer)
    else:
        run.sampler = proven_sampler(run, config)
    run.reference = loading.reference_policy(run, Policy) if config.kl_coef > 0 else None
    run.folder = run.folder or RunFolder.create(config, accelerator.is_main_process)
    run.state = run.folder.resume(run.checkpoint, run.optimizer, parallel.engine(run.policy))
    run.folder.start(config, run.state["step"])
    terminal.announce(config, run)
    run.sampler = written_ahead(run, config)
    return run


def train(config: Config) -> dict[str, Any]:
    """The whole run. Returns first and last evaluation, seconds, tokens, and the run's folder."""
    started, run = time.monotonic(), setup(config)
    accelerator, folder = run.accelerator, run.folder
    step, tokens = run.state["step"], run.state.get("tokens", 0)
    config = replace(run.config, kl_coef=run.state.get("kl_coef", config.kl_coef))
    answer = partial(complete, run.sampler, run.tokenizer, run.task)

    def save_checkpoint():
        state = dict(tokens=tokens, kl_coef=config.kl_coef)
        saved = run.model, run.tokenizer, run.optimizer
        folder.save_checkpoint(step, *saved, config.keep_last, **state)

    evaluate = partial(evaluation.evaluate_and_log, answer, run, config, save_checkpoint)

    with terminal.progress(config, step, accelerator, started) as progress:
        while not progress.stopping():
            if evaluation.is_due(step, folder.evaluations, config):
                evaluate(step)
            if step == config.steps or progress.stopping():
                break
            step, clock = step + 1, metrics.Stopwatch()

            rollouts, counts = collect(run.sampler, run.tokenizer, run.task, config, step)
            run.sampler.sleep()
            clock.lap("sample")
            if config.uses_trainer_logps:
                add_logps("old_logps", run.policy, rollouts, accelerator, config)
            if run.reference is not None:
                add_logps("ref_logps", run.reference, rollouts, accelerator, config)
            assign_advantages(rollouts, config)
            learned = update(run.policy, run.optimizer, accelerator, rollouts, config, step)
            clock.lap("train")
            run.sampler.sync()
            clock.lap("sync")

            tokens += counts["step_tokens"]
            row = metrics.step_row(step, rollouts, learned, counts, tokens, clock, config)
            folder.log_step(row, rollouts)
            progress.show(row, rollouts)
            if config.kl_target:
                now = variants.adapted_kl_coef(config.kl_coef, learned["kl_ref"], config.kl_target)
                config = replace(config, kl_coef=now)
            if step % config.save_steps == 0 or step == config.steps:
                save_checkpoint()

    done = evaluation.is_done(folder.evaluations, config)
    if not done:
        if not folder.has_checkpoint(step):
            save_checkpoint()
        if progress.out_of_time:
            evaluate(step)
        evaluation.show_stopped(folder, step)
    if config.steps == 0 and done:
        show_one_group(run, config)
    elif done or progress.out_of_time:
        folder.save_final(run.model, run.tokenizer, run.optimizer)
        evaluation.show_result(folder, time.monotonic() - started)
    return folder.close(started, tokens, interrupted=not (done or progress.out_of_time))


def show_one_group(run: loading.Run, config: Config) -> None:
    """What `--steps 0` ends with: a group's tokens, rewards, advantages and weights."""
    rollouts, _ = collect(run.sampler, run.tokenizer, run.task, config, step=1)
    if run.reference is not None:
        add_logps("ref_logps", run.reference, rollouts, run.accelerator, config)
    assign_advantages(rollouts, config)
    terminal.show_group(rollouts, token_weights, run.tokenizer, config)


def main(argv: list[str] | None = None) -> None:
    with errors_as_lines():
        result = train(parse_config(sys.argv[1:] if argv is None else argv))
    sys.exit(130 if result.get("interrupted") else 0)


if __name__ == "__main__":
    main()
