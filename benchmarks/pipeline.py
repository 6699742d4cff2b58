"""The small model from nothing: pretraining, GRPO and evaluation, on all operators with fractions.

    python benchmarks/pipeline.py --seeds 0 1 2
    python benchmarks/pipeline.py --seeds 0 1 2 --num_experts 4 --active_experts 2

For each seed, three commands, which are printed: mathformer.train, mathformer.train_rl (with its default settings but
for the number of steps), and mathformer.evaluate before and after. Each is timed as a process. Adds a row for each seed
to a table in benchmarks/results/, and writes the models to --work. Two processes with OMP_NUM_THREADS=1, started at the
same time with seeds of their own, use two cores better than one process does.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from arithmetic_seeds import cpu_name

ROOT = Path(__file__).resolve().parent.parent
PROBLEMS = ["--operators", "all", "--max_depth", "2", "--negatives", "0.1", "--parentheses", "0.05", "--spaces", "0.05"]


def run(*command: str) -> float:
    """Seconds of `python -m command`."""
    print("python -m", *command, flush=True)
    started = time.time()
    subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True)
    return time.time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_experts", default="1")
    parser.add_argument("--active_experts", default="1")
    parser.add_argument("--pretrain_steps", default="5000")
    parser.add_argument("--rl_steps", default="300")
    parser.add_argument("--tiny", action="store_true", help="a step of each, two problems, answers of four tokens")
    parser.add_argument("--work", type=Path, default=Path("runs/pipeline"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "pipeline.md")
    options = parser.parse_args()
    problems, short = ("2", ["--max_gen_len", "4"]) if options.tiny else ("1000", [])
    if options.tiny:
        options.pretrain_steps = options.rl_steps = "1"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    head = [
        f"`OMP_NUM_THREADS={threads} python benchmarks/pipeline.py --seeds S`, on {os.cpu_count()} cores of "
        f"{cpu_name()}, {versions}, commit {commit.strip()}. Accuracy in percent with its 95 % interval, on {problems} "
        "problems that are in no training; worked: the share of sampled answers that show steps.\n",
        "| experts, active | seed | pretraining steps | greedy before | greedy after | sampled before | sampled after "
        "| worked before | worked after | made to work, before | after | pretraining s | RL s | evaluation s | min |",
        "| --- " * 15 + "|",
    ]
    if not options.out.exists():
        options.out.write_text("\n".join(head) + "\n")
    for seed in map(str, options.seeds):
        work = (options.work / f"experts{options.num_experts}-s{seed}").resolve()
        base, runs = work / "base", work / "runs"
        experts = ["--num_experts", options.num_experts, "--active_experts", options.active_experts]
        pretraining = run(
            "mathformer.train", "--output", str(base), *PROBLEMS, *experts, "--steps", options.pretrain_steps,
            "--seed", seed,
        )  # fmt: skip
        rl = run(
            "mathformer.train_rl", "--checkpoint", str(base), "--steps", options.rl_steps, "--runs", str(runs),
            "--seed", seed, "--eval_interval", "100", *short,
        )  # fmt: skip
        (final,) = runs.glob("*/final")
        evaluation, rows = 0.0, []
        for name, checkpoint in (("before", base), ("after", final)):
            out = work / f"{name}.json"
            command = ["--checkpoint", str(checkpoint), "--problems", problems, "--seed", seed, "--out", str(out)]
            evaluation += run("mathformer.evaluate", *command, *short)
            rows.append(json.loads(out.read_text())["evaluation"])
        cells = [
            f"{100 * row[key]:.1f} ({100 * row[key + '_low']:.1f} to {100 * row[key + '_high']:.1f})"
            for key in ("accuracy", "accuracy_sampled")
            for row in rows
        ]
        cells += [f"{100 * row[key]:.1f}" for key in ("worked", "accuracy_worked") for row in rows]
        seconds = [pretraining, rl, evaluation]
        cells += [f"{s:.0f}" for s in seconds] + [f"{sum(seconds) / 60:.1f}"]
        first = [f"{options.num_experts}, {options.active_experts}", seed, options.pretrain_steps]
        with open(options.out, "a") as file:
            file.write(f"| {' | '.join(first + cells)} |\n")


if __name__ == "__main__":
    main()
