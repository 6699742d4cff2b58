"""The figures of a step, under the names that logs, plots and docs/metrics.md have; and the alarms on them."""

import math
import re
import sys
import time
from collections import Counter, deque
from statistics import fmean
from typing import Any

import psutil
import torch
from accelerate import PartialState

from harness import parallel
from harness.settings import MAX_LOGP_GAP, Config, UsageError
from tasks import REWARD_KEYS

# Names of the run's own figures, which a task's parts would overwrite in the logs.
RESERVED = frozenset(
    """step n prompt prompt_id completion advantage penalty length length_correct length_wrong truncated tokens
    accuracy accuracy_low accuracy_high accuracy_sampled accuracy_sampled_low accuracy_sampled_high
    accuracy_worked sampled_correct pass_at_k pass_at_group graded_groups reward_std zero_advantage_groups
    reflections age loss kl_ref kl_coef entropy grad_norm lr clipped_low clipped_high ratio_max sampler_kl
    sampler_logp_gap skipped_updates nonfinite_updates prompts_too_long resampled_groups tokens_per_second
    seconds_sample seconds_train seconds_sync peak_memory""".split()
)


def groups_of(rollouts: list, group_size: int) -> list[list]:
    """Completions of the same prompt are neighbours."""
    return [rollouts[i : i + group_size] for i in range(0, len(rollouts), group_size)]


def equal_rewards(group: list) -> bool:
    """Whether all rewards of the group, before any penalty, are equal: no answer is better than another."""
    return len({r.reward for r in group}) == 1


def is_graded(group: list) -> bool:
    """Whether partial credit tells answers apart: two wrong ones, in equally good form, have different rewards."""
    wrong: dict[float, set] = {}
    for r in group:
        if r.parts["correct"] != 1:
            wrong.setdefault(r.parts["format"], set()).add(r.reward)
    return any(len(rewards) > 1 for rewards in wrong.values())


def rollout_metrics(rollouts: list, config: Config) -> dict[str, float | None]:
    """What a step's completions look like, before any update. None where a mean is over nothing."""
    rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float64).view(-1, config.group_size)
    groups = groups_of(rollouts, config.group_size)
    words = "|".join(config.reflection_words) or "(?!)"  # which matches nothing
    reflection = re.compile(rf"\b({words})\b", re.IGNORECASE)
    return {
        "reward": average(r.reward for r in rollouts),
        "reward_std": rewards.std(1).mean().item(),
        "penalty": average(r.penalty for r in rollouts),
        **part_means(rollouts),
        "pass_at_group": average(any(r.parts["correct"] for r in group) for group in groups),
        "zero_advantage_groups": average(map(equal_rewards, groups)),
        "length": average(r.length for r in rollouts),
        "length_correct": average(r.length for r in rollouts if r.parts["correct"]),
        "length_wrong": average(r.length for r in rollouts if not r.parts["correct"]),
        "truncated": average(r.truncated for r in rollouts),
        "age": average(r.age for r in rollouts),
        "reflections": average(bool(reflection.search(r.text)) for r in rollouts),
    }


def part_means(rollouts: list) -> dict[str, float | None]:
    """Means of `correct`, `format` and of every number of the task's own, over the completions that have one."""
    own = [key for r in rollouts for key, value in r.parts.items() if key not in REWARD_KEYS and is_number(value)]
    keys = dict.fromkeys(["correct", "format", *own])
    return {key: average(float(r.parts[key]) for r in rollouts if is_number(r.parts.get(key))) for key in keys}


def average(values) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def is_finite(number: int | float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond what a float can be
        return False


def peak_memory(device: torch.device) -> float:
    """Most memory used so far, in GB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # on Windows, where the most so far is not known
        return psutil.Process().memory_info().rss / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


class UpdateFigures:
    """Collects the figures of an update: sums over its trained tokens, and one gradient norm an optimizer step."""

    def __init__(self):
        self.sums: Counter[str] = Counter()
        self.before_any_step: Counter[str] | None = None
        self.grad_norms, self.ratio_max, self.skipped, self.not_finite = [], 1.0, 0, 0

    def add_batch(self, loss, logps, old_logps, sampler_logps, kl, entropy, clipped, mask) -> None:
        """The loss of a microbatch, and tensors [B, T] of which those inside the mask count."""
        gap = (sampler_logps - logps)[mask]
        figures = {
            "loss": loss,
            "tokens": mask.sum(),
            "kl_ref": kl.sum(),
            "entropy": entropy.sum(),
            "clipped_low": (clipped < 0).sum(),
            "clipped_high": (clipped > 0).sum(),
            "sampler_kl": gap.sum(),
            "sampler_logp_gap": gap.abs().sum(),
            "ratio_max": (logps - old_logps)[mask].max().exp(),
        }
        values = torch.stack([figure.detach().float() for figure in figures.values()]).tolist()  # one wait for the GPU
        sums = dict(zip(figures, values, strict=True))
        self.ratio_max = max(self.ratio_max, sums.pop("ratio_max"))
        self.sums.update(sums)

    def add_step(self, grad_norm: float | None) -> None:
        """None for a step without rows to learn from."""
        if grad_norm is None:
            self.skipped += 1
            return
        if self.before_any_step is None:
            self.before_any_step = Counter(self.sums)
        self.grad_norms.append(grad_norm)
        self.not_finite += not math.isfinite(grad_norm)

    def metrics(self, config: Config, lr: float) -> dict[str, float | None]:
        """Means over the trained tokens of all processes; None where there are none."""
        sums, first = parallel.total(self.sums), parallel.total(self.before_any_step or Counter())

        def per_token(key: str, over: Counter) -> float | None:
            return over[key] / over["tokens"] if over["tokens"] else None

        # Two figures compare the sampler with the trainer. These are the same model only until the first optimizer
        # step, and the same distribution only where the sampler leaves no token out.
        comparable = first if config.samples_all_tokens else Counter()
        return {
            "loss": sums["loss"] / (config.epochs * config.minibatches),
            "kl_ref": per_token("kl_ref", sums) if config.kl_coef > 0 else None,
            "kl_coef": config.kl_coef,
            "entropy": per_token("entropy", sums),
            "grad_norm": average(self.grad_norms),
            "lr": lr,
            "clipped_low": per_token("clipped_low", sums),
            "clipped_high": per_token("clipped_high", sums),
            "ratio_max": max(parallel.join([self.ratio_max])),
            "sampler_kl": per_token("sampler_kl", comparable),
            "sampler_logp_gap": per_token("sampler_logp_gap", comparable),
            "skipped_updates": self.skipped,
            "nonfinite_updates": self.not_finite,
        }


class Stopwatch:
    """Where the seconds of a step go."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.started = time.monotonic()

    def lap(self, name: str) -> None:
        """`name` took the time since the last lap, or since the start."""
        self.seconds[f"seconds_{name}"] = time.monotonic() - self.started - sum(self.seconds.values())


def step_row(
    step: int, rollouts: list, learned: dict, counts: dict, tokens: int, clock: Stopwatch, config: Config
) -> dict[str, Any]:
    """The row of metrics.jsonl."""
    rate = counts["step_tokens"] / sum(clock.seconds.values())
    counts = {key: value for key, value in counts.items() if key != "step_tokens"}
    row = {"step": step, **rollout_metrics(rollouts, config), **learned, **counts, "tokens": tokens}
    return row | {"tokens_per_second": rate, **clock.seconds, "peak_memory": peak_memory(PartialState().device)}


class Alarms:
    """Asked after each step, says once what a person should know about a run that goes wrong, and what to try."""

    # symptom, after how many steps in a row, what to say
    SYMPTOMS = (
        (lambda row: row["dead_lately"] >= 0.9, 1,
         "of the last 10 steps' groups nine in ten, or more, were dead: little is learned. "
         "All wrong: the policy has collapsed (go back to "
         "a checkpoint, with a lower lr), or the problems are too hard. All right: too easy. Right or wrong by prompt: "
         "a group's answers are all alike (temperature too low, top_k, top_p)"),
        (lambda row: row["truncated"] == 1, 10,
         "all completions have been cut off for 10 steps: raise max_completion_tokens, pay less for long answers "
         "(overlong_share), or, if the text is gibberish, go back to a checkpoint with a lower lr"),
        (lambda row: row.get("timed_out") == 1, 3,
         "every reward has timed out for 3 steps: is reward_seconds too short, or does reward() hang?"),
        (lambda row: (row["kl_ref"] or 0) > 1, 3,
         "the policy is far from the reference, kl_ref has been over 1 for 3 steps: lower lr, or raise kl_coef"),
        (lambda row: (row["sampler_logp_gap"] or 0) > MAX_LOGP_GAP and not row["age"], 1,
         "the sampler's log-probs differ from the trainer's by more than rounding (sampler_logp_gap): are its weights "
         "stale? Try --sampler torch, or correct for it with --old_logps trainer --importance_cap 2"),
    )  # fmt: skip
    NOT_FINITE = 3  # steps in a row
    NOT_FINITE_SCALED = 20  # in fp16 a first gradient overflows until its scale, 2**16, has been halved often enough

    def __init__(self, updates: int, scaled: bool = False):
        self.updates, self.counts = updates, Counter()  # optimizer steps in a step
        self.patience = self.NOT_FINITE_SCALED if scaled else self.NOT_FINITE
        self.dead = deque(maxlen=10)  # shares of dead groups, of the last steps

    def __call__(self, row: dict) -> list[str]:
        """The warnings of this step; a UsageError where going on makes no sense."""
        warnings = []
        self.dead.append(row["zero_advantage_groups"])
        row = row | {"dead_lately": fmean(self.dead) if len(self.dead) == self.dead.maxlen else 0.0}
        for i, (shows, patience, text) in enumerate(self.SYMPTOMS):
            self.counts[i] = self.counts[i] + 1 if shows(row) or self.counts[i] >= patience else 0
            if self.counts[i] == patience:
                warnings.append(text)
        none_was_good = row["nonfinite_updates"] and row["nonfinite_updates"] + row["skipped_updates"] == self.updates
        self.counts["nonfinite"] = self.counts["nonfinite"] + 1 if none_was_good else 0
        if self.counts["nonfinite"] == self.patience:
            raise UsageError(
                f"the gradient was not finite in {self.patience} steps in a row, up to step {row['step']}: no weight "
                "was changed in them, every completion is in rollouts.jsonl. Go back to a checkpoint, and try a lower "
                "lr, or --precision fp32"
            )
        return warnings
