"""The experiments of notebooks 5 and 6, three seeds each: what the notebooks show as recorded curves.

    python benchmarks/workshop.py

Every run is `notebooks/experiments.py`'s `run` with the settings of its arm. Two run at a time with one thread each.
Writes the table results/workshop.md and the curves results/workshop.jsonl.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from arithmetic_seeds import ROOT, cpu_name

sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]
import experiments  # noqa: E402

COLUMNS = {  # heading: where it is, in a row of eval.jsonl; all but the length are shares
    "sampled": "accuracy_sampled", "greedy": "accuracy", "pass@8": "pass_at_k", "worked": "worked",
    "dead": "zero_advantage_groups", "reward": "reward", "length": "length", "cut off": "truncated",
}  # fmt: skip


def measure(arm: str, seed: int, steps: int | None) -> dict:
    torch.set_num_threads(1)
    settings = experiments.ARMS[arm] | ({} if steps is None else {"steps": steps})
    metrics, evaluations, _ = experiments.run(seed, 200, **settings)
    rows = experiments.means_of_five(metrics)
    return dict(arm=arm, seed=seed, rows=rows, first=evaluations[0], last=evaluations[-1])


def cells(results: list[dict]) -> str:
    """Before (the mean of the seeds, which differ in their samples only) and after (each seed)."""
    out = []
    for key in COLUMNS.values():
        before, after = ([r[when][key] for r in results] for when in ("first", "last"))
        if key == "pass_at_k":
            before, after = ([row["8"] for row in found] for found in (before, after))
        digits = 1 if key == "length" else 2
        mean = sum(before) / len(before)
        out.append(f"{mean:.{digits}f} → " + " ".join(f"{value:.{digits}f}" for value in after))
    return " | ".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of each run, instead of 60 (120 for the weak base)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--arms", nargs="+", default=list(experiments.ARMS), choices=list(experiments.ARMS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "workshop.md")
    options = parser.parse_args()
    if "weak base" in options.arms and not experiments.WEAK_BASE.exists():
        command = [sys.executable, "-m", "mathformer.train", "--output", str(experiments.WEAK_BASE), "--steps", "1500"]
        subprocess.run(command, cwd=ROOT, check=True)
    work = [(arm, seed, options.steps) for arm in options.arms for seed in options.seeds]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(measure, *zip(*work, strict=True)))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    lines = [
        f"`python benchmarks/workshop.py`, 60 steps of 128 completions (the weak base: 120), seeds {options.seeds}, "
        f"{options.jobs} runs at a time on {os.cpu_count()} cores of {cpu_name()}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, commit {commit.strip()}. Each cell is the mean of the seeds before training → "
        "each seed after it, on 200 problems that are in no training (in the form, and under the cap, of the arm). "
        "`dead` is of groups of 8.\n",
        "| arm | settings | " + " | ".join(COLUMNS) + " |",
        "| --- " * (2 + len(COLUMNS)) + "|",
    ]
    for arm in options.arms:
        flags = " ".join(f"--{k} {str(v).removeprefix(f'{ROOT}/')}" for k, v in experiments.ARMS[arm].items())
        lines.append(f"| {arm} | {flags} | {cells([r for r in results if r['arm'] == arm])} |")
    options.out.write_text("\n".join(lines) + "\n")
    options.out.with_suffix(".jsonl").write_text("".join(json.dumps(r) + "\n" for r in results))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
