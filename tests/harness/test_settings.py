"""One real run of two steps for each setting, changed, beside one in which it is not.

It must change what it says it changes, and nothing else. What a run computes has a direction, from prompts to weights:
whatever comes behind the first thing that changes may change too, and nothing before it.
"""

import copy
import dataclasses
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import pass_flags
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from tqdm import tqdm

import grpo
from harness import trackers
from harness.metrics import RESERVED
from mathformer.train import build_model
from tasks import REWARD_KEYS

# A task whose rewards a random model can get: the parity of the answer's length. `dead` pays nothing to some prompts.
TASK = """
from mathformer import ArithmeticTask

class Parity(ArithmeticTask):
    def __init__(self, dead: int = 0, seconds: float = 0.0, **settings):
        super().__init__(max_depth=settings.pop("max_depth", 1), eval_size=4, **settings)
        self.dead, self.seconds = dead, seconds

    def reward(self, text, example):
        import time
        started = time.time()
        while time.time() < started + self.seconds:
            pass
        right = float(len(text) % 2 and not (self.dead and example["value"] % self.dead))
        return dict(reward=right, correct=right, format=1.0, prediction=len(text), ground_truth=1)

class Twice(Parity):
    def prompt(self, example):
        return example["prompt"] + "+1"
"""
# What a run computes, in this order. `later` is the second step.
LINE = ["prompts", "completions", "rewards", "penalties", "advantages", "loss", "gradient", "weights", "later"]
BESIDE = ["evaluation", "evaluated", "passes", "sampled", "dtypes", "layers", "lr", "files", "shown", "counts"]


@dataclass
class Seen:
    """What there was to see of a run."""

    folder: Path
    printed: str
    rollouts: list[list[grpo.Rollout]]  # of each step, as they went into the update
    passes: list[tuple]  # through the policy and the reference: (training, with gradients, rows)
    sampled: list[int]  # rows that were sampled at once
    dtypes: set  # of what linear layers gave
    layers: int  # passes through feed-forward layers in training mode
    moved: list[tuple]  # the arguments of each `to` of the policy and the reference

    def rows(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    @cached_property
    def metrics(self) -> list[dict]:
        return self.rows("metrics.jsonl")

    def weights(self, step: int) -> dict[str, torch.Tensor]:
        (file,) = (self.folder / f"checkpoint-{step}").glob("*model.safetensors")  # with LoRA, an adapter's
        return load_file(file)

    def moments(self, step: int) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"checkpoint-{step}" / "optimizer.state")

    @cached_property
    def parts(self) -> dict[str, Any]:
        """By the names in LINE and BESIDE."""
        first, row = self.rollouts[0], self.metrics[0]
        later = [[r.completion_ids for r in rollouts] for rollouts in self.rollouts[1:]]
        first_weights, *later_weights = (
            self.weights(step) if (self.folder / f"checkpoint-{step}").exists() else {} for step in (1, 2)
        )
        return {
            "prompts": [r.prompt_ids for r in first],
            "completions": [(r.completion_ids, r.truncated) for r in first],
            "rewards": [r.reward for r in first],
            "penalties": [r.penalty for r in first],
            "advantages": [r.advantage for r in first],
            "loss": row["loss"],
            "gradient": row["grad_norm"],
            "weights": first_weights,
            "later": later_weights[0] | {"completions": later, "loss": [row["loss"] for row in self.metrics[1:]]},
            "evaluation": {key: value for key, value in self.rows("eval.jsonl")[0].items() if key != "step"},
            "evaluated": [row["step"] for row in self.rows("eval.jsonl")],
            "passes": self.passes,
            "sampled": self.sampled,
            "dtypes": self.dtypes,
            "layers": self.layers,
            "lr": [row["lr"] for row in self.metrics],
            "files": sorted(path.name for path in self.folder.iterdir()),
            "shown": self.printed.count(" right: "),
            "counts": [
                (row["prompts_too_long"], row["resampled_groups"], row["skipped_updates"]) for row in self.metrics
            ],
        }


def equal(a, b) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(value, b[name]) for name, value in a.items())
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.fixture(scope="module")
def stands(tmp_path_factory, tokenizer, qwen3_folder):
    """What names in capitals stand for: a task's file, models, a folder."""
    folder = tmp_path_factory.mktemp("settings")
    (folder / "parity.py").write_text(TASK)
    for name, seed in (("tiny", 0), ("other", 1)):
        torch.manual_seed(seed)
        build_model("tiny", tokenizer).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    named = {"PARITY": f"{folder}/parity.py:Parity", "TWICE": f"{folder}/parity.py:Twice", "QWEN3": qwen3_folder}
    return named | {
        "TINY": str(folder / "tiny"),
        "OTHER": str(folder / "other"),
        "ELSEWHERE": str(folder / "elsewhere"),
    }


@pytest.fixture(scope="module")
def seen(stands, tmp_path_factory):
    """What a run shows, started from the command line; the same settings are run once."""
    known: dict[str, Seen] = {}

    def start(**settings) -> Seen:
        off = settings.pop("SAMPLER_OFF", 0.0)
        key = json.dumps([settings, off], sort_keys=True)
        if key not in known:
            base = dict(model="TINY", task="PARITY", steps=2, prompts_per_step=2, group_size=4, lr=1e-3, eval_samples=2)
            base |= dict(max_completion_tokens=8, max_prompt_tokens=20, save_steps=1, keep_last=9, eval_steps=0, seed=3)
            base |= dict(print_groups=0, runs=str(tmp_path_factory.mktemp("runs")))
            with pytest.MonkeyPatch.context() as patch:
                known[key] = watched(pass_flags(base | settings, stands), off, patch)
        return known[key]

    return start


def watched(argv: list[str], sampler_off: float, patch: pytest.MonkeyPatch) -> Seen:
    """Runs `python grpo.py ARGV`. `sampler_off` is added to the sampler's log-probs, as if it were not the policy."""
    rollouts, passes, sampled, dtypes, layers, printed, moved = [], [], [], set(), [0], [], []
    update, forward, generate = grpo.update, grpo.Policy.forward, grpo.TorchSampler.generate
    _generate, to, train, check = grpo.TorchSampler._generate, grpo.Policy.to, grpo.train, grpo.check_model
    checked = []

    def watch_check(*args):  # its passes are not the run's
        check(*args)
        checked.append(True)
        for seen in (passes, sampled, dtypes):
            seen.clear()
        layers[0] = 0

    def watch_update(policy, optimizer, accelerator, of_step, *args):
        rollouts.append(copy.deepcopy(of_step))
        return update(policy, optimizer, accelerator, of_step, *args)

    def watch_forward(self, ids, *args, **kwargs):
        passes.append((self.training, torch.is_grad_enabled(), len(ids)))
        return forward(self, ids, *args, **kwargs)

    def watch_generate(self, prompts, group_size, sampling, seed):
        found = generate(self, prompts, group_size, sampling, seed)
        off = sampler_off if checked else 0.0
        return [sample._replace(logps=[logp + off for logp in sample.logps]) for sample in found]

    def watch_rows(self, prompts, group_size, *args):
        sampled.append(len(prompts) * group_size)
        return _generate(self, prompts, group_size, *args)

    def watch_linear(module, args, output):
        if sampled and isinstance(module, nn.Linear):  # the checks before the first evaluation are in float32
            dtypes.add(output.dtype)

    def watch_layers(module, args):  # before it: to make activations again, a layer is not gone through to its end
        layers[0] += type(module).__name__ in ("MLP", "Qwen3MLP") and module.training

    found = {}
    patch.setattr(grpo, "check_model", watch_check)
    patch.setattr(grpo, "update", watch_update)
    patch.setattr(grpo.Policy, "forward", watch_forward)
    patch.setattr(grpo.Policy, "to", lambda self, *args: (moved.append(args), to(self, *args))[1])
    patch.setattr(grpo.TorchSampler, "generate", watch_generate)
    patch.setattr(grpo.TorchSampler, "_generate", watch_rows)
    patch.setattr(grpo, "train", lambda config: found.setdefault("result", train(config)))
    patch.setattr("builtins.print", lambda *args, **kwargs: printed.append(" ".join(map(str, args))))
    patch.setattr(tqdm, "write", printed.append)
    AcceleratorState._reset_state(reset_partial_state=True)  # a process has one precision
    hooks = [register_module_forward_hook(watch_linear), register_module_forward_pre_hook(watch_layers)]
    try:
        with torch.compiler.set_stance("force_eager"):  # torchao would compile its steps, for longer than the tests run
            grpo.main(argv)
    except SystemExit as stopped:
        if stopped.code != 0:
            raise grpo.UsageError(stopped.code) from stopped
    finally:
        for hook in hooks:
            hook.remove()
        AcceleratorState._reset_state(reset_partial_state=True)
    text = "\n".join(printed)
    return Seen(found["result"]["run"], text, rollouts, passes, sampled, dtypes, layers[0], moved)


# ==== What the figures of a run must come to ==========================================================================


def surrogate(run: Seen, step: int = 1, kind: str = "token", max_tokens: int = 8, masked: bool = False) -> float:
    """The loss of a step on the policy, where each ratio is 1, from its rollouts."""
    rows = [r for r in run.rollouts[step - 1] if not (masked and r.truncated)]
    total = sum(r.length for r in rows)
    weight = {"token": lambda r: 1 / total, "sequence": lambda r: 1 / (len(rows) * r.length)}
    weight["constant"] = lambda r: 1 / (len(rows) * max_tokens)
    return sum(-r.advantage * r.length * weight[kind](r) for r in rows)


def about(value: float) -> Any:
    return pytest.approx(value, rel=1e-4, abs=1e-6)


def moves(run: Seen, stands: dict, step: int) -> dict[str, torch.Tensor]:
    """How far each weight went in a step."""
    before = run.weights(step - 1) if step > 1 else load_file(Path(stands["TINY"]) / "model.safetensors")
    return {name: value - before[name] for name, value in run.weights(step).items()}


def are_times(a: dict, factor: float, b: dict) -> bool:
    return all(torch.allclose(a[name], factor * b[name], rtol=1e-3, atol=2e-7) for name in a)


@dataclass
class Case:
    name: str
    changed: dict[str, Any]  # the settings of the second run beside those of the first
    changes: str = ""  # names of what must change; in LINE, what comes behind the first of them may
    check: Callable[[Seen, Seen, dict], Any] = lambda a, b, stands: None
    base: dict[str, Any] = field(default_factory=dict)
    may: str = ""

    def __str__(self):
        return "-".join([self.name, *(str(v) for v in self.changed.values() if isinstance(v, str) and v.islower())])


def of(name: str, value, changes: str = "", check=lambda a, b, stands: None, may: str = "", also=(), **base) -> Case:
    return Case(name, {name: value, **dict(also)}, changes, check, base, may)


# ==== The settings ====================================================================================================


def check_task(a, b, stands):
    assert all(r.prompt.endswith("+1") for r in b.rollouts[0])


def check_task_args(a, b, stands):
    assert max(len(p) for p in a.parts["prompts"]) == 5 < max(len(p) for p in b.parts["prompts"])


def check_reward_seconds(a, b, stands):
    assert all(r.parts.get("timed_out") == 1 and r.reward == 0 for r in b.rollouts[0])


def check_seed(a, b, stands):
    assert a.rows("eval.jsonl")[0]["accuracy"] == b.rows("eval.jsonl")[0]["accuracy"], "the same problems, greedily"


def check_bf16(a, b, stands):
    assert a.dtypes == {torch.float32} and b.dtypes == {torch.bfloat16}, "in sampler, policy and reference"
    logps = torch.tensor([logp for r in b.rollouts[0] for logp in r.logps])
    assert (logps != logps.bfloat16().float()).any(), "the head stays in float32"
    assert all(value.dtype == torch.float32 for value in b.weights(2).values())


def check_about(a, b, stands):
    assert "a recipe of mine" in b.printed and "a recipe of mine" not in a.printed


def check_prompts_per_step(a, b, stands):
    assert [len(rollouts) for rollouts in b.rollouts] == [3 * 4, 3 * 4]
    assert b.parts["prompts"][:8] == a.parts["prompts"]


def check_group_size(a, b, stands):
    assert [len(rollouts) for rollouts in b.rollouts] == [2 * 6, 2 * 6]
    assert b.parts["prompts"][::6] == a.parts["prompts"][::4]


def check_max_prompt_tokens(a, b, stands):
    assert max(map(len, b.parts["prompts"])) <= 11 < max(map(len, a.parts["prompts"]))
    assert sum(row["prompts_too_long"] for row in b.metrics) > 0 == sum(row["prompts_too_long"] for row in a.metrics)
    assert b.rows("eval.jsonl")[0]["n"] < a.rows("eval.jsonl")[0]["n"] and "are left out" in b.printed


def check_max_completion_tokens(a, b, stands):
    assert max(r.length for r in b.rollouts[0]) == 5 and max(r.length for r in a.rollouts[0]) == 8
    assert all(r.truncated == (r.completion_ids[-1] != 2) for r in b.rollouts[0])


def check_temperature(a, b, stands):
    for run in (a, b):  # sampler, policy and reference have it
        assert run.metrics[0]["sampler_logp_gap"] < 1e-5 and abs(run.metrics[0]["kl_ref"]) < 1e-5
    assert b.metrics[0]["entropy"] < a.metrics[0]["entropy"]


def check_most_likely(a, b, stands):
    for run in (b,):
        for i in range(0, 8, 4):  # a group's completions are all the most likely one
            assert len({tuple(r.completion_ids) for r in run.rollouts[0][i : i + 4]}) == 1
    assert all(r.old_logps for r in b.rollouts[0]) and "log-probs of the trainer" in b.printed


def check_sample_rows(a, b, stands):
    assert set(a.sampled) == {8, 4} and set(b.sampled) == {4}  # two groups or one, and the greedy answers


def check_advantage(a, b, stands):
    for rollouts in b.rollouts:
        rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float64).view(2, 4)
        kind = next(
            line.split()[1] for line in (b.folder / "config.yaml").read_text().splitlines() if "advantage:" in line
        )
        assert [r.advantage for r in rollouts] == grpo.group_advantages(rewards, kind).flatten().tolist()


def check_loss_weight(kind):
    def check(a, b, stands):
        assert a.metrics[0]["loss"] == about(surrogate(a)) and b.metrics[0]["loss"] == about(surrogate(b, 1, kind))

    return check


def check_cispo(a, b, stands):
    rows = b.rollouts[0]
    assert b.metrics[0]["loss"] == about(sum(-r.advantage * sum(r.logps) for r in rows) / sum(r.length for r in rows))
    assert b.metrics[0]["grad_norm"] == about(a.metrics[0]["grad_norm"]), (
        "where each ratio is 1, the gradient is the same"
    )


def share(run: Seen, sign: int) -> float:
    """Of the trained tokens, those of an advantage of this sign."""
    rows = [r for r in run.rollouts[0] if not r.dead]
    return sum(r.length for r in rows if r.advantage * sign > 0) / sum(r.length for r in rows)


def check_clip_low(a, b, stands):  # all ratios are exp(-0.3) = 0.74
    assert a.metrics[0]["clipped_low"] == about(share(a, -1)) and a.metrics[0]["clipped_low"] > 0
    assert b.metrics[0]["clipped_low"] == b.metrics[0]["clipped_high"] == a.metrics[0]["clipped_high"] == 0


def check_clip_high(a, b, stands):  # all ratios are exp(0.3) = 1.35
    assert a.metrics[0]["clipped_high"] == about(share(a, 1)) and a.metrics[0]["clipped_high"] > 0
    assert b.metrics[0]["clipped_high"] == b.metrics[0]["clipped_low"] == a.metrics[0]["clipped_low"] == 0


KL = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) - 1 + d}


def check_kl(kind="k3", coefs=(0.5, 0.5), in_reward=False):
    """In each step: the metric, the loss and the penalty that follow from the log-probs of policy and reference."""

    def check(a, b, stands):
        for step, (coef, row, rollouts) in enumerate(zip(coefs, b.metrics, b.rollouts, strict=True), 1):
            total = sum(r.length for r in rollouts)
            kl = sum(KL[kind](p - q) for r in rollouts for p, q in zip(r.logps, r.ref_logps, strict=True)) / total
            assert row["kl_ref"] == pytest.approx(kl, rel=1e-3, abs=1e-6) and row["kl_coef"] == pytest.approx(coef)
            assert row["loss"] == about(surrogate(b, step) + (0 if in_reward else coef * kl))
            for r in rollouts:
                paid = coef * (sum(r.logps) - sum(r.ref_logps)) if in_reward else 0
                assert r.penalty == pytest.approx(paid, abs=1e-6)
            assert step == 1 or kl != 0
            assert row["reward"] == pytest.approx(sum(r.reward for r in rollouts) / len(rollouts)), "what the task paid"

    return check


def check_entropy_coef(a, b, stands):
    assert b.metrics[0]["loss"] == about(a.metrics[0]["loss"] - 0.5 * a.metrics[0]["entropy"])


def check_old_logps(a, b, stands):
    assert a.metrics[0]["ratio_max"] == about(math.exp(0.3)) and b.metrics[0]["ratio_max"] == about(1)
    assert b.metrics[0]["sampler_logp_gap"] == a.metrics[0]["sampler_logp_gap"] == about(0.3)


def updates(run: Seen) -> int:
    """Optimizer steps in the first step."""
    return int(run.moments(1)["0.step"])


def trained_rows(run: Seen) -> int:
    """Rows that went forward and backward in the whole run."""
    return sum(rows for training, with_gradients, rows in run.passes if training and with_gradients)


def check_epochs(a, b, stands):
    assert (updates(a), updates(b)) == (1, 3) and trained_rows(b) == 3 * trained_rows(a)


def check_minibatches(a, b, stands):
    assert (updates(a), updates(b)) == (1, 2) and trained_rows(b) == trained_rows(a)


def check_importance_cap(a, b, stands):  # trainer over sampler is exp(0.3) = 1.35 for each token
    assert b.metrics[0]["loss"] == about(1.2 * a.metrics[0]["loss"])
    assert b.metrics[0]["grad_norm"] == about(1.2 * a.metrics[0]["grad_norm"])


def dead_rows(run: Seen) -> int:
    return sum(r.dead for rollouts in run.rollouts for r in rollouts)


def check_keep(a, b, stands):
    assert dead_rows(a) and trained_rows(b) == trained_rows(a) + dead_rows(a) == 32
    assert b.metrics[0]["loss"] == about(a.metrics[0]["loss"])


def check_resample(a, b, stands):
    assert dead_rows(b) < dead_rows(a) and sum(row["resampled_groups"] for row in b.metrics) > 0
    for old, new in zip(a.rollouts[0], b.rollouts[0], strict=True):  # only dead groups are replaced
        assert old.dead or old.completion_ids == new.completion_ids


def check_resample_rounds(a, b, stands):
    assert sum(row["resampled_groups"] for row in a.metrics) == 4 and [
        row["resampled_groups"] for row in b.metrics
    ] == [6, 6]


def check_mask_truncated(a, b, stands):
    assert any(r.truncated for r in b.rollouts[0]) and b.metrics[0]["loss"] == about(surrogate(b, masked=True))


def check_overlong_share(a, b, stands):  # of 8 tokens, the last 4 cost up to 1
    for r in b.rollouts[0]:
        assert r.penalty == about(max(0, (r.length - 4) / 4))
    assert b.metrics[0]["penalty"] > 0 and b.metrics[0]["reward"] == a.metrics[0]["reward"], "what the task paid"


def check_lr(a, b, stands):
    assert [row["lr"] for row in b.metrics] == [3e-3, 3e-3]
    assert are_times(moves(b, stands, 1), 3, moves(a, stands, 1)), "the first step of AdamW is in proportion to it"


def check_warmup(a, b, stands):
    assert [row["lr"] for row in b.metrics] == [pytest.approx(0.5e-3), pytest.approx(1e-3)]
    assert are_times(moves(b, stands, 1), 0.5, moves(a, stands, 1))


def check_schedule(second, third):
    def check(a, b, stands):
        assert [row["lr"] for row in b.metrics] == [pytest.approx(1e-3 * share) for share in (1, second, third)]
        assert equal(a.weights(1), b.weights(1)) and are_times(moves(b, stands, 2), second, moves(a, stands, 2))

    return check


def check_weight_decay(a, b, stands):
    before = load_file(Path(stands["TINY"]) / "model.safetensors")
    decay = {name: value - a.weights(1)[name] for name, value in b.weights(1).items()}
    assert are_times(decay, -1e-3 * 10, before)


def check_grad_clip(a, b, stands):
    for run, longest in ((a, 1.0), (b, 0.01)):  # AdamW's first moment is a tenth of the gradient that reached it
        norm = math.sqrt(sum(v.square().sum().item() for name, v in run.moments(1).items() if name.endswith("exp_avg")))
        assert norm == pytest.approx(0.1 * min(longest, run.metrics[0]["grad_norm"]), rel=1e-4)
    assert b.metrics[0]["grad_norm"] == a.metrics[0]["grad_norm"] > 0.01


def check_microbatches(a, b, stands):
    rows = [rows for training, _, rows in b.passes if training]
    assert max(rows) <= 30 // 6 and len(rows) > sum(training for training, *_ in a.passes)
    assert b.metrics[0]["loss"] == about(a.metrics[0]["loss"]) and b.metrics[0]["grad_norm"] == about(
        a.metrics[0]["grad_norm"]
    )


def check_auto(a, b, stands):
    whole_step = 2 * 4 * (20 + 8)
    assert f"tokens_per_microbatch auto is {whole_step};" in b.printed
    assert f"tokens_per_microbatch: {whole_step}\n" in (b.folder / "config.yaml").read_text(), (
        "a resumed run cuts alike"
    )
    assert sum(training for training, *_ in b.passes) == sum(not row["skipped_updates"] for row in b.metrics)


def check_checkpointing(a, b, stands):
    assert b.layers == 2 * a.layers > 0, "each layer goes forward twice in an update"
    assert b.metrics[0]["grad_norm"] == about(a.metrics[0]["grad_norm"])


def check_offload_reference(a, b, stands):
    devices = [str(args[0]) for args in b.moved if args and not isinstance(args[0], torch.dtype)]
    assert devices and (not torch.cuda.is_available() or "cpu" in devices)


def check_optimizer(saved):
    def check(a, b, stands):
        assert a.dtypes == {torch.float32} and b.dtypes == {torch.bfloat16}
        assert {value.dtype for value in b.weights(2).values()} == {saved}

    return check


def check_lora_rank(a, b, stands):
    assert len(b.weights(1)) == 2 * 3 * 4 and {min(value.shape) for value in b.weights(1).values()} == {4}
    assert b.metrics[0]["loss"] == about(a.metrics[0]["loss"]), "adapters begin without effect"


def check_lora_alpha(a, b, stands):
    assert b.metrics[0]["grad_norm"] == about(a.metrics[0]["grad_norm"] * 8 / 32)


def check_lora_targets(a, b, stands):
    assert b.weights(1).keys() < a.weights(1).keys() and all("query_key_value" in name for name in b.weights(1))
    assert b.metrics[0]["grad_norm"] < a.metrics[0]["grad_norm"]


def check_eval_samples(a, b, stands):
    assert a.rows("eval.jsonl")[0]["pass_at_k"].keys() == {"1", "2"}
    assert b.rows("eval.jsonl")[0]["pass_at_k"].keys() == {"1", "2", "3"}
    assert set(b.sampled) == {8, 4, 12}


def check_runs(a, b, stands):
    assert str(b.folder.parent) == stands["ELSEWHERE"]


def check_reflection_words(a, b, stands):
    words = re.compile(r"\b(max|min|next|prev|abs)\b")
    for row, rollouts in zip(b.metrics, b.rollouts, strict=True):
        assert row["reflections"] == sum(bool(words.search(r.text)) for r in rollouts) / len(rollouts)
    assert b.metrics[0]["reflections"] > 0 == a.metrics[0]["reflections"]


CASES = [
    of("model", "OTHER", "completions weights", may="evaluation passes"),
    of("task", "TWICE", "prompts", check_task, may="evaluation passes"),
    of("task_args", '{"max_depth": 3}', "prompts", check_task_args, may="evaluation passes"),
    of(
        "reward_seconds",
        0.01,
        "rewards counts",
        check_reward_seconds,
        task_args='{"seconds": 0.03}',
        may="evaluation passes layers",
    ),
    of("seed", 4, "prompts completions weights", check_seed, may="evaluation passes layers"),
    of("device", "cpu"),
    of("precision", "bf16", "dtypes weights", check_bf16, kl_coef=0.5, may="completions evaluation passes"),
    of("about", "a recipe of mine", "", check_about),
    of("sampler", "torch"),
    of("prompts_per_step", 3, "prompts passes sampled", check_prompts_per_step),
    of("group_size", 6, "prompts passes sampled", check_group_size),
    of(
        "max_prompt_tokens",
        11,
        "prompts evaluation counts",
        check_max_prompt_tokens,
        task_args='{"max_depth": 3}',
        may="passes sampled layers",
    ),
    of("max_completion_tokens", 5, "completions evaluation", check_max_completion_tokens, may="passes layers"),
    of("temperature", 0.7, "completions evaluation weights", check_temperature, kl_coef=0.5, may="passes layers"),
    of("top_p", 1e-6, "completions evaluation", check_most_likely, may="passes layers counts"),
    of("top_k", 1, "completions evaluation", check_most_likely, may="passes layers counts"),
    of("sample_rows", 4, "sampled completions", check_sample_rows, may="evaluation passes"),
    *(
        of("advantage", kind, "advantages loss weights", check_advantage)
        for kind in ("dr_grpo", "rloo", "batch", "maxrl")
    ),
    *(of("loss_weight", kind, "loss gradient weights", check_loss_weight(kind)) for kind in ("sequence", "constant")),
    of("ratio", "sequence", "loss weights", epochs=2, lr=0.01),
    of("surrogate", "cispo", "loss", check_cispo),
    of("clip_low", 0.5, "loss gradient", check_clip_low, SAMPLER_OFF=0.3),
    of("clip_high", 0.5, "loss gradient", check_clip_high, SAMPLER_OFF=-0.3),
    of("kl_coef", 0.5, "passes later", check_kl(), may="loss gradient weights"),
    of("kl_kind", "k1", "gradient weights", check_kl("k1"), may="loss", kl_coef=0.5),
    of("kl_kind", "k2", "later", check_kl("k2"), may="loss gradient weights", kl_coef=0.5),
    of(
        "kl_in",
        "reward",
        "later",
        check_kl("k3", in_reward=True),
        may="penalties passes layers",
        kl_coef=0.5,
        advantage="rloo",
    ),
    of("kl_target", 1000, "later", check_kl("k3", (0.5, 0.49)), kl_coef=0.5),
    of("kl_target", 1000, "later", check_kl("k3", (0.5, 0.49), True), kl_coef=0.5, kl_in="reward", advantage="rloo"),
    of("entropy_coef", 0.5, "loss gradient weights", check_entropy_coef, may="passes"),
    of("old_logps", "trainer", "passes loss gradient", check_old_logps, SAMPLER_OFF=-0.3),
    of("epochs", 3, "weights passes layers", check_epochs, may="loss gradient counts"),
    of("minibatches", 2, "weights passes", check_minibatches, may="loss gradient counts layers"),
    of("importance_cap", 1.2, "loss gradient", check_importance_cap, SAMPLER_OFF=-0.3, old_logps="trainer"),
    of(
        "dead_groups",
        "keep",
        "passes",
        check_keep,
        task_args='{"dead": 2}',
        prompts_per_step=4,
        may="loss gradient weights layers counts",
    ),
    of(
        "dead_groups",
        "resample",
        "prompts counts",
        check_resample,
        also=dict(resample_rounds=3),
        task_args='{"dead": 2}',
        may="passes sampled layers",
    ),
    of(
        "resample_rounds",
        3,
        "prompts counts",
        check_resample_rounds,
        task_args='{"dead": 1000}',
        dead_groups="resample",
        resample_rounds=1,
        may="passes sampled layers",
    ),
    of("mask_truncated", "true", "loss gradient weights", check_mask_truncated, may="passes"),
    of("overlong_share", 0.5, "penalties advantages weights", check_overlong_share, may="passes"),
    of("offload_reference", "true", "", check_offload_reference, kl_coef=0.5),
    of("optimizer", "adamw_8bit", "dtypes weights", check_optimizer(torch.bfloat16), may="completions evaluation"),
    of("optimizer", "adamw_offload", "dtypes weights", check_optimizer(torch.float32), may="completions evaluation"),
    of("lora_rank", 4, "gradient weights", check_lora_rank, may="passes layers counts"),
    of("lora_alpha", 8.0, "gradient", check_lora_alpha, may="weights", lora_rank=4),
    of("lora_targets", "query_key_value", "gradient weights", check_lora_targets, lora_rank=4),
    of("steps", 3, "lr files evaluated passes sampled layers counts", may="later"),
    of("lr", 3e-3, "lr weights", check_lr),
    of("lr_schedule", "linear", "lr later", check_schedule(2 / 3, 1 / 3), steps=3),
    of("lr_schedule", "cosine", "lr later", check_schedule(0.75, 0.25), steps=3),
    of("warmup_steps", 2, "lr weights", check_warmup, may="passes"),
    of("weight_decay", 10, "weights", check_weight_decay, may="passes"),
    of("grad_clip", 0.01, "later", check_grad_clip, may="weights"),
    of("tokens_per_microbatch", 30, "passes layers", check_microbatches, may="loss gradient weights"),
    of(
        "tokens_per_microbatch",
        "auto",
        "passes layers",
        check_auto,
        may="loss gradient weights",
        tokens_per_microbatch=30,
    ),
    of(
        "gradient_checkpointing",
        "true",
        "layers",
        check_checkpointing,
        model="QWEN3",
        max_prompt_tokens=60,
        may="loss gradient weights",
    ),
    of("eval_steps", 1, "evaluated sampled files"),
    of("eval_samples", 3, "evaluation sampled", check_eval_samples),
    of("runs", "ELSEWHERE", "", check_runs),
    of("save_steps", 2, "files", may="weights"),
    of("keep_last", 1, "files", may="weights"),
    of("print_groups", 1, "shown"),
    of("reflection_words", '["MAX", "Min", "next", "prev", "abs"]', "", check_reflection_words),
    of("report_to", "tensorboard", "files"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_setting_changes_what_it_says_and_nothing_else(case, seen, stands):
    a, b = seen(**case.base), seen(**case.base | case.changed)
    changes, may = case.changes.split(), case.may.split()
    first = min((LINE.index(name) for name in changes + may if name in LINE), default=len(LINE))
    for name in LINE + BESIDE:
        same = equal(a.parts[name], b.parts[name])
        if name in changes:
            assert not same, f"{case.name} did not change {name}"
        elif name not in may and not (name in LINE and LINE.index(name) > first):
            assert same, f"{case.name} changed {name}"
    case.check(a, b, stands)


# What one run beside another cannot show is tested in functions of their own.
ELSEWHERE = {
    "trust_remote_code": "harness/test_reliability.py::test_code_of_a_model_is_not_run_unless_asked",
    "kv_cache_gb": "harness/test_vllm.py::test_settings_of_vllm_reach_it",
    "cudnn_attention": "harness/test_loading.py::test_which_attention_torch_may_take",
    "stop": "harness/test_stopping.py::test_a_run_stops_at_strings_of_the_setting_or_of_the_task",
    "system_prompt": "harness/test_templates.py::test_a_system_prompt_takes_the_place_of_the_tasks_own",
    "few_shot": "harness/test_templates.py::test_worked_examples_are_earlier_turns_of_a_chat",
    "chat_template": "harness/test_templates.py::test_a_template_of_a_file_takes_the_place_of_the_models_and_is_kept",
    "chat_template_args": "harness/test_templates.py::test_arguments_of_the_template_reach_it",
    "server": "harness/test_server.py::test_servers_share_the_prompts_and_answer_as_one",
    "serve_on": "harness/test_server.py::test_servers_get_gpus_that_do_not_train",
    "server_minutes": "harness/test_server.py::test_a_server_that_hangs_is_given_up",
    "weights_folder": "harness/test_server.py::test_weights_are_removed_at_the_end_and_what_a_dead_run_left",
    "staleness": "harness/test_server.py::test_which_weights_write_a_step",
    "vllm_sleep": "harness/test_vllm.py::test_settings_of_vllm_reach_it",
    "project": "harness/test_settings.py::test_a_tracker_is_told_the_project_and_the_name_of_the_run",
    "run_name": "harness/test_settings.py::test_a_tracker_is_told_the_project_and_the_name_of_the_run",
    "keep_best": "harness/test_survival.py::test_the_best_checkpoint_is_kept",
    "max_minutes": "harness/test_survival.py::test_a_run_ends_in_time",
    "allow_changed": "harness/test_survival.py::test_settings_that_were_edited_are_noticed",
    "resume": "test_run.py::test_interrupted_and_resumed_equals_uninterrupted",
}


def test_every_setting_has_a_test():
    tested = {case.name for case in CASES}
    assert (
        tested | ELSEWHERE.keys() == {f.name for f in dataclasses.fields(grpo.Config)} and not tested & ELSEWHERE.keys()
    )
    for place in ELSEWHERE.values():
        file, _, test = place.partition("::")
        assert f"\ndef {test}(" in (Path(__file__).parents[1] / file).read_text(), place


@pytest.mark.parametrize("choice, said", [("device=cuda", "no device 'cuda'"), ("sampler=vllm", "is not installed")])
def test_what_is_not_there_is_refused(choice, said, seen):
    if torch.cuda.is_available() if "cuda" in choice else find_spec("vllm"):
        pytest.skip("it is there")
    with pytest.raises(grpo.UsageError, match=said):
        seen(**dict([choice.split("=")]))


class Tracker:
    """Stands for accelerate's trackers; a real one is in tests/view/test_see_the_run.py."""

    made: list["Tracker"] = []
    name = "wandb"

    def __init__(self, project: str, **settings):
        self.project, self.settings, self.logged = project, settings, []
        self.made.append(self)

    def start(self):
        self.logged.append("start")

    def store_init_configuration(self, config):
        self.config = config

    def log(self, values, step):
        assert "step" not in values and None not in values.values()
        self.logged.append((step, sorted(values)[0].partition("/")[0] == "eval"))

    def log_table(self, name, columns, data, step):
        self.logged.append((step, len(data)))

    def finish(self):
        self.logged.append("finish")


def test_a_tracker_is_told_the_project_and_the_name_of_the_run(seen, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "wandb", Tracker)
    monkeypatch.setattr(Tracker, "made", [])
    for name in ("WANDB_PROJECT", "WANDB_NAME", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    plain = seen(report_to="wandb")
    named = seen(report_to="wandb", project="my-project", run_name="my-run")
    (a, b), name = Tracker.made, plain.folder.name
    assert (a.project, a.settings["name"], a.settings["id"]) == ("grpo", name, name)
    assert (b.project, b.settings["name"], b.settings["id"]) == ("my-project", "my-run", named.folder.name)
    assert a.settings["resume"] == "allow", "a resumed run goes on in the same run of theirs"
    monkeypatch.setenv("TRACKIO_PROJECT", "of-trackio")
    monkeypatch.setenv("WANDB_NAME", "of-wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "made", made := [])
        trackers.Trackers(grpo.Config(model="m", task="t", report_to="wandb"), plain.folder, 0)
    assert (made[0].project, made[0].settings["name"]) == ("of-trackio", "of-wandb")
    assert b.config["run_name"] == "my-run" and equal(plain.parts["weights"], named.parts["weights"])
    assert b.logged == ["start", (0, True), (1, False), (1, 8), (2, False), (2, 8), (2, True), "finish"]


# ==== What else there is to see of these runs =========================================================================

# Their names are in the error that refuses the others, and in the name of the run's folder they count for nothing.
MAY_CHANGE = {"steps", "eval_steps", "save_steps", "keep_last", "print_groups", "about", "runs", "resume", "project"}
MAY_CHANGE |= {"reflection_words", "report_to", "run_name", "tokens_per_microbatch", "gradient_checkpointing"}
MAY_CHANGE |= {"keep_best", "max_minutes", "allow_changed", "trust_remote_code"}
MAY_CHANGE |= {"server", "serve_on", "server_minutes", "weights_folder"}
MAY_CHANGE |= {"offload_reference", "vllm_sleep", "reward_seconds", "kv_cache_gb", "cudnn_attention"}
VALUES = {"keep_best": "false", "max_minutes": 5, "allow_changed": "lr"}
VALUES |= {
    "trust_remote_code": "true",
    "cudnn_attention": "true",
    "kv_cache_gb": 1,
    "vllm_sleep": "true",
    "project": "p",
    "run_name": "r",
    "server": "http://127.0.0.1:8000",
    "serve_on": "cpu",
    "server_minutes": 1,
    "weights_folder": "ELSEWHERE",
    "staleness": 1,
    "stop": '["7"]',
    "system_prompt": "7",
    "few_shot": 1,
    "chat_template": "a.jinja",
    "chat_template_args": '{"a": 1}',
}
VALUES |= {case.name: case.changed[case.name] for case in CASES if not case.base or len(case.changed) == 1}
NEEDS = {"kl_target": dict(kl_coef=0.5), "resample_rounds": dict(dead_groups="resample", resample_rounds=1)}
NEEDS |= {"lora_alpha": dict(lora_rank=4), "lora_targets": dict(lora_rank=4)}
NEEDS |= {"kl_in": dict(kl_coef=0.5, advantage="rloo"), "importance_cap": dict(old_logps="trainer")}


@pytest.mark.parametrize("name", sorted({f.name for f in dataclasses.fields(grpo.Config)} - {"resume", "runs"}))
def test_what_may_change_when_a_run_goes_on(name, seen, stands):
    """Refused is what would make it another run; the rest has its effect."""
    run = seen(**NEEDS.get(name, {}))
    value = "keep" if name == "dead_groups" else VALUES[name]
    argv = ["--resume", str(run.folder), *pass_flags({name: value}, stands)]
    if name not in MAY_CHANGE:
        with pytest.raises(grpo.UsageError, match=f"^{name} was .* cannot become .* what can change: "):
            grpo.parse_config(argv)
        return
    before, config = grpo.parse_config(argv[:2]), grpo.parse_config(argv)
    changed = {f.name for f in dataclasses.fields(grpo.Config) if getattr(before, f.name) != getattr(config, f.name)}
    assert changed == {name}


def digest(run: Seen) -> str:
    return re.fullmatch(r"(Parity|Twice)-(\w+)-s\d+-([0-9a-f]{6})(-\d+)?", run.folder.name)[3]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_setting_is_kept_and_tells_runs_apart(case, seen, stands):
    """In config.yaml, and in the name of the folder, where it makes another run."""
    a, b = seen(**case.base), seen(**case.base | case.changed)
    assert (digest(a) == digest(b)) == (case.name in MAY_CHANGE)
    saved = [yaml.safe_load((run.folder / "config.yaml").read_text()) for run in (a, b)]
    assert {name for name in saved[0] if saved[0][name] != saved[1][name]} - {"runs"} == set(case.changed) - {"runs"}


def test_the_logs_hold_what_was_trained(seen):
    run = seen(overlong_share=0.5, steps=3)
    rollouts = sum(run.rollouts, [])
    rows = run.rows("rollouts.jsonl")
    assert [row["step"] for row in rows] == [1] * 8 + [2] * 8 + [3] * 8
    for row, r in zip(rows, rollouts, strict=True):
        expected = dict(prompt=r.prompt, completion=r.text, advantage=r.advantage, penalty=r.penalty, length=r.length)
        assert row == dict(step=row["step"], prompt_id=row["prompt_id"], truncated=r.truncated) | r.parts | expected
    assert all(re.fullmatch("[0-9a-f]{8}", row["prompt_id"]) for row in rows)
    assert len({row["prompt_id"] for row in rows}) == len({row["prompt"] for row in rows}) > 3
    for i, row in enumerate(run.metrics, 1):
        assert row["tokens"] == sum(r.length for r in rollouts[: 8 * i])
        assert row["loss"] == about(surrogate(run, i)) and row["sampler_kl"] == pytest.approx(0, abs=1e-6)


def test_a_sampler_that_is_surer_than_the_policy_shows_in_the_sign(seen):
    for off in (0.3, -0.3):
        row = seen(SAMPLER_OFF=off).metrics[0]
        assert row["sampler_kl"] == about(off) and row["sampler_logp_gap"] == about(0.3)
        assert row["ratio_max"] == about(max(1, math.exp(-off)))


def test_what_was_thrown_away_was_sampled_too(seen):
    run = seen(task_args='{"dead": 1000}', dead_groups="resample", resample_rounds=3)
    drawn = 8 + run.metrics[0]["resampled_groups"] * 4
    assert run.metrics[0]["tokens"] > sum(r.length for r in run.rollouts[0]) and drawn == 32


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(), "GRPO: TINY (0.09 M parameters) on PARITY, 2 steps of 2 prompts x 4 completions, lr 0.001, on cpu."),
        (
            dict(old_logps="trainer"),
            "the ratio is taken against log-probs of the trainer: one more forward pass a step",
        ),
        (
            dict(dead_groups="drop", kl_coef=0.5),
            "dead groups are dropped although the loss has a KL penalty or an entro",
        ),
        (
            dict(dead_groups="drop", entropy_coef=0.5),
            "dead groups are dropped although the loss has a KL penalty or an",
        ),
    ],
)
def test_the_first_lines_say_what_is_run(settings, said, seen, stands):
    said = said.replace("TINY", stands["TINY"]).replace("PARITY", stands["PARITY"])
    printed = seen(**settings).printed
    assert said in printed and f"run folder: {seen(**settings).folder}" in printed
    plain = seen().printed
    assert not settings or said not in plain, "where it is not so, nothing is said"


def test_no_part_of_a_task_can_have_a_name_of_the_runs_own(seen):
    """Whatever a run logs besides what the task returned is reserved, and nothing else is."""
    run, logged = seen(), set()
    for name in ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl", "eval-0.jsonl"):
        logged |= set().union(*run.rows(name))
    assert logged - set(REWARD_KEYS) == RESERVED
