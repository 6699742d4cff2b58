"""What the optional flags of mathformer.train_rl do: the same short run with and without each, on three seeds.

    python benchmarks/rl_flags.py

Every run is `python -m mathformer.train_rl --checkpoint mathformer/pretrained --steps 100 --seed S` with the flags of
the row. Two run at a time with one thread each. Prints a table and writes it to benchmarks/results/. Further arguments
go to mathformer.train_rl.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from arithmetic_seeds import cpu_name

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "the defaults": [],
    "no KL penalty": ["--kl_coef", "0"],
    "adaptive KL": ["--kl_target", "0.05"],
    "partial credit": ["--partial_credit", "0.5"],
    "curriculum": ["--curriculum_steps", "50"],
    "two epochs a batch": ["--epochs", "2"],
    "four epochs a batch": ["--epochs", "4"],
    "mathFormer's learning rate": ["--lr", "1e-5"],
}


def run(flags: list[str], steps: int, seed: int) -> dict:
    """The last evaluation, with `seconds` of the whole process."""
    with tempfile.TemporaryDirectory() as runs:
        command = ["--checkpoint", "mathformer/pretrained", "--steps", str(steps), "--seed", str(seed), "--runs", runs]
        started = time.time()
        subprocess.run(
            [sys.executable, "-m", "mathformer.train_rl", *command, "--eval_interval", "0", *flags],
            cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        (folder,) = Path(runs).iterdir()
        row = json.loads((folder / "eval.jsonl").read_text().splitlines()[-1])
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        return row | {"seconds": time.time() - started, "kl_ref": last["kl_ref"] or 0.0, "kl_coef": last["kl_coef"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "rl_flags.md")
    options, more = parser.parse_known_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {
            name: [pool.submit(run, VARIANTS[name] + more, options.steps, seed) for seed in options.seeds]
            for name in options.variants
        }
        results = {name: [future.result() for future in found] for name, found in futures.items()}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    lines = [
        f"`{' '.join(['python benchmarks/rl_flags.py', *more])}`, {options.steps} steps, seeds {options.seeds}, "
        f"{options.jobs} runs at a time on {os.cpu_count()} cores of {cpu_name()}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, commit {commit.strip()}. Each cell has the three seeds; accuracy and "
        "worked answers in percent, on 500 problems; the base has 38.2 greedy and 33.0 sampled.\n",
        "| run | flags | greedy | sampled | worked | KL at the end | kl_coef at the end | seconds |",
        "| --- " * 8 + "|",
    ]
    for name, rows in results.items():
        cells = [
            " ".join(f"{100 * row[key]:.1f}" for row in rows) for key in ("accuracy", "accuracy_sampled", "worked")
        ]
        cells += [" ".join(f"{row[key]:.3f}" for row in rows) for key in ("kl_ref", "kl_coef")]
        cells.append(" ".join(f"{row['seconds']:.0f}" for row in rows))
        lines.append(f"| {name} | {' '.join(VARIANTS[name])} | {' | '.join(cells)} |")
    options.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
