"""Runs that go wrong on purpose, so that one knows what it looks like: the README's "When it does not learn".

    python benchmarks/failures.py

Each is `python grpo.py --config configs/arithmetic.yaml --steps 60 --minibatches 1 --lr 7e-4 --lr_schedule constant
--seed 0` with the flags of its row: a rate that falls to 0 would stop much of this before one sees it. Two run at a
time with one thread each. Prints what the metrics show, and writes it to benchmarks/results/.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

import torch
from arithmetic_seeds import ROOT, cpu_name

FAILURES = {
    "healthy": [],
    "not improving: lr too low": ["--lr", "1e-6"],
    "not improving: problems too hard": ["--task_args.max_depth", "6"],
    "dead groups: groups too small": ["--group_size", "2", "--prompts_per_step", "128"],
    "collapsed: lr too high": ["--lr", "0.01"],
    "diverged: lr far too high": ["--lr", "1000"],
    "not finite: float32 overflows": ["--lr", "1e30"],
    "KL over 1": ["--lr", "0.004", "--kl_coef", "0.0001"],
    "KL penalty too strong": ["--kl_coef", "3"],
    "clipped too much": ["--minibatches", "16", "--epochs", "4"],
    "cut off": ["--max_completion_tokens", "8"],
    "all cut off": ["--max_completion_tokens", "2"],
    "length running away: the reward pays for it": ["--task", "benchmarks/leaky_task.py:PaysLength"],
    "greedy in disguise: nothing varies": ["--temperature", "0.05"],
    "sampled from few tokens only": ["--top_k", "1"],
}
SHOWN = ("reward", "correct", "zero_advantage_groups", "truncated", "length", "entropy", "grad_norm", "kl_ref")
SHOWN += ("clipped_low", "clipped_high", "ratio_max", "skipped_updates", "nonfinite_updates")


def run(flags: list[str], steps: int) -> tuple[list[dict], str]:
    """The rows of metrics.jsonl, and what the run said besides."""
    with tempfile.TemporaryDirectory() as runs:
        settings = dict(config="configs/arithmetic.yaml", steps=steps, seed=0, eval_steps=0, print_groups=0, runs=runs)
        settings |= dict(minibatches=1, lr=7e-4, lr_schedule="constant")
        command = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        done = subprocess.run(
            [sys.executable, "grpo.py", *command, *flags], cwd=ROOT, capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        (folder,) = Path(runs).iterdir()
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    said = [line for line in done.stdout.splitlines() if line.startswith(("step ", "  will it learn"))]
    said += [line for line in done.stderr.splitlines() if line.startswith("error")]
    return rows, " / ".join(said)


def figure(rows: list[dict], key: str) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    if not values:
        return "-"
    value = fmean(values)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=list(FAILURES), choices=list(FAILURES))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "failures.md")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {name: pool.submit(run, FAILURES[name], options.steps) for name in options.only}
        results = {name: future.result() for name, future in futures.items()}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    lines = [
        f"`python benchmarks/failures.py`, {options.steps} steps, seed 0, torch {torch.__version__}, Python "
        f"{platform.python_version()}, on a CPU ({cpu_name()}), commit {commit.strip()}. Each cell: mean of the first "
        "five steps → mean of the last five.\n",
        f"| run | flags | steps | {' | '.join(SHOWN)} | what it said |",
        "| --- " * (len(SHOWN) + 4) + "|",
    ]
    for name, (rows, said) in results.items():
        cells = [f"{figure(rows[:5], key)} → {figure(rows[-5:], key)}" for key in SHOWN]
        lines.append(f"| {name} | `{' '.join(FAILURES[name])}` | {len(rows)} | {' | '.join(cells)} | {said} |")
    options.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
