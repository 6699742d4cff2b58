"""The experiments of notebooks 5 and 6: what is changed in each, and `run`, which trains the small model with it.

Every arm is `python grpo.py --config configs/arithmetic.yaml` with ONE_UPDATE and settings of its own: 60 steps of 128
completions, some 15 s on one core. benchmarks/workshop.py runs all of them with three seeds, and writes what `recorded`
reads.
"""

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import grpo
from mathformer import ArithmeticTask
from mathformer.task import is_true_equation
from harness.run_folder import RunFolder
from harness.command_line import PRESET, parse_config
from harness.settings import Config

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "workshop.jsonl"
# at a constant rate, so that what a setting does is not hidden by what the rate does
ONE_UPDATE = dict(prompts_per_step=16, steps=60, minibatches=1, lr=7e-4, lr_schedule="constant")
KEYS = ("reward", "correct", "length", "length_correct", "length_wrong", "zero_advantage_groups", "truncated", "worked")


class Wrapped(ArithmeticTask):
    """The same problems in parentheses, a form that the base has not met."""

    def example(self, tree, rng):
        example = super().example(tree, rng)
        sos_and_order, expression = re.fullmatch(r"(<\w+><\w+>)(.*)", example["prompt"]).groups()
        return example | {"prompt": f"{sos_and_order}({expression})"}


class Generous(ArithmeticTask):
    """Pays 1 if the right number occurs anywhere, and 1 for each true equation. `correct` stays strict."""

    def reward(self, text, example):
        equations = re.findall(r"[^;<>]+=[^;<>]+", text)
        paid = (str(example["value"]) in text) + sum(map(is_true_equation, equations))
        return super().reward(text, example) | {"reward": float(paid)}


class Anywhere(ArithmeticTask):
    """Pays 1 if the right number occurs anywhere in the text."""

    def reward(self, text, example):
        return super().reward(text, example) | {"reward": float(str(example["value"]) in text)}


HERE = f"{ROOT}/notebooks/experiments.py"
WEAK_BASE = ROOT / "runs" / "weak_base"  # python -m mathformer.train --output runs/weak_base --steps 1500
ARMS = {
    "base": {},
    "wrapped": {"task": f"{HERE}:Wrapped"},
    "no std": {"advantage": "dr_grpo"},
    "sequence weights": {"loss_weight": "sequence"},
    "constant weights": {"loss_weight": "constant"},
    "G = 2": {"group_size": 2, "prompts_per_step": 64},
    "G = 4": {"group_size": 4, "prompts_per_step": 32},
    "G = 16": {"group_size": 16, "prompts_per_step": 8},
    "lr 1e-4": {"lr": 1e-4},
    "lr 3e-3": {"lr": 3e-3},
    "lr 1e-2": {"lr": 1e-2},
    "KL 0.1": {"kl_coef": 0.1},
    "KL 1": {"kl_coef": 1.0},
    "lr 3e-3, KL 0.1": {"lr": 3e-3, "kl_coef": 0.1},
    "lr 1e-2, KL 0.1": {"lr": 1e-2, "kl_coef": 0.1},
    "cap 8": {"max_completion_tokens": 8},
    "weak base": {"model": str(WEAK_BASE), "steps": 120},
    "generous": {"task": f"{HERE}:Generous", "lr": 1e-3},
    "repaired": {"task_args.partial_credit": 0.5, "lr": 1e-3},
    "anywhere": {"task": f"{HERE}:Anywhere"},
}


def config_of(**settings) -> Config:
    """The settings of all arms, and these."""
    chosen = ONE_UPDATE | dict(eval_steps=0, print_groups=0, device="cpu") | settings
    return parse_config(["--config", str(PRESET), *(f"--{name}={value}" for name, value in chosen.items())])


def run(seed: int = 0, eval_size: int = 20, **settings) -> tuple[list[dict], list[dict], list[dict]]:
    """Trains with these settings: the rows of metrics.jsonl, of eval.jsonl, and the last step's of rollouts.jsonl.

    `eval_size` is the number of evaluation problems, few as a rule, since they take longer than many a step.
    """
    with TemporaryDirectory() as runs:
        config = config_of(**settings | {"task_args.eval_size": eval_size, "seed": seed, "runs": runs})
        with redirect_stdout(io.StringIO()):  # the bar, on stderr, stays
            folder = RunFolder(grpo.train(config)["run"])
        rollouts = [row for row in folder.read("rollouts.jsonl") if row["step"] == config.steps]
        return folder.read("metrics.jsonl"), folder.read("eval.jsonl"), rollouts


def means_of_five(rows: list[dict]) -> list[dict]:
    """Metrics of five steps each as one row: a single step of 128 completions is noisy."""
    shortened = []
    for i in range(0, len(rows), 5):
        five = rows[i : i + 5]
        means = {key: [row[key] for row in five if row.get(key) is not None] for key in KEYS}
        shortened.append({"step": i + 3} | {key: round(fmean(v), 4) for key, v in means.items() if v})
    return shortened


def recorded(arm: str) -> list[dict]:
    """What benchmarks/workshop.py measured, one dict a seed: `seed`, `rows` (means of five steps), `first`, `last`."""
    found = [row for line in RECORD.read_text(encoding="utf-8").splitlines() if (row := json.loads(line))["arm"] == arm]
    if not found:
        raise KeyError(f"no arm {arm!r} in {RECORD.name}: {', '.join(ARMS)}")
    return found
