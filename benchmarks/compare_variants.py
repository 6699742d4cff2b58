"""Every variant on the small model: the same number of rollouts, three seeds each.

    python benchmarks/compare_variants.py

Every run is `python grpo.py --config configs/arithmetic.yaml [--config configs/variants/V.yaml] --steps 60
--minibatches 4 --lr 7e-4 --lr_schedule constant --seed S` with the flags of its row. Four updates a batch, since with
one, all ratios are 1, and the variants of ratio and clip are one and the same; a constant rate, since one that falls
hides at the end what a variant does. Two run at a time with one thread each. Prints a table and writes it,
with the curves, to benchmarks/results/.
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
from statistics import fmean

import torch
from arithmetic_seeds import ROOT, cpu_name
from matplotlib.figure import Figure

OVERLAYS = sorted(path.stem for path in (ROOT / "configs" / "variants").glob("*.yaml"))
VARIANTS = {"the defaults": []}
VARIANTS |= {f"{name}.yaml": ["--config", f"configs/variants/{name}.yaml"] for name in OVERLAYS}
VARIANTS |= {
    "GSPO, clip 0.2": ["--ratio", "sequence", "--loss_weight", "sequence"],
    "CISPO, bound 1.2": ["--surrogate", "cispo"],
    "DAPO, no resampling": ["--clip_high", "0.28", "--overlong_share", "0.2"],
    "RLOO, no KL": ["--advantage", "rloo"],
    "sequence weights": ["--loss_weight", "sequence"],
    "constant weights": ["--loss_weight", "constant"],
    "entropy bonus 0.01": ["--entropy_coef", "0.01"],
    "mask_truncated": ["--mask_truncated", "true"],
}
FOUR_UPDATES = ["--minibatches", "4", "--lr", "7e-4", "--lr_schedule", "constant"]


def run(flags: list[str], steps: int, seed: int) -> dict:
    """The last evaluation, the rewards of the steps, and `seconds` of the whole process."""
    with tempfile.TemporaryDirectory() as runs:
        command = ["--config", "configs/arithmetic.yaml", *flags, "--steps", str(steps), *FOUR_UPDATES]
        command += ["--seed", str(seed), "--eval_steps", "0", "--runs", runs]
        started = time.time()
        subprocess.run(
            [sys.executable, "grpo.py", *command], cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        (folder,) = Path(runs).iterdir()
        row = json.loads((folder / "eval.jsonl").read_text().splitlines()[-1])
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        row |= {"seconds": time.time() - started, "tokens": metrics[-1]["tokens"]}
        row["rewards"] = [m["reward"] for m in metrics]
        row["clipped"] = fmean((m["clipped_low"] or 0) + (m["clipped_high"] or 0) for m in metrics)
        return row


def plot(results: dict[str, list[dict]], path: Path) -> None:
    """Mean reward of the steps, smoothed over five, mean of the seeds; the last evaluations beside it."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    names = sorted(results, key=lambda name: fmean(row["accuracy_sampled"] for row in results[name]))
    styles = ["-", "--", ":"]
    for i, name in enumerate(names):
        curves = list(zip(*(row["rewards"] for row in results[name]), strict=True))
        means = [fmean(step) for step in curves]
        smooth = [fmean(means[max(0, t - 2) : t + 3]) for t in range(len(means))]
        line = left.plot(range(1, len(smooth) + 1), smooth, styles[i // 10], color=f"C{i % 10}", label=name)[0]
        for row in results[name]:
            low, high = row["accuracy_sampled_low"], row["accuracy_sampled_high"]
            value = row["accuracy_sampled"]
            error = [[value - low], [high - value]]
            right.errorbar(value, i, xerr=error, fmt="o", markersize=4, color=line.get_color())
    left.set(xlabel="step (256 completions each)", ylabel="mean reward, mean of the seeds", ylim=(0.25, 1))
    left.grid(alpha=0.25)
    left.legend(fontsize=8, ncols=2, reverse=True)
    right.set(xlabel="sampled accuracy at the end, each seed with its 95 % interval", yticks=range(len(names)))
    right.set_yticklabels(names)
    right.grid(alpha=0.25)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "variants.md")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {
            name: [pool.submit(run, VARIANTS[name], options.steps, seed) for seed in options.seeds]
            for name in options.variants
        }
        results = {name: [future.result() for future in found] for name, found in futures.items()}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    lines = [
        f"`python benchmarks/compare_variants.py`, {options.steps} steps of 256 completions, four updates each, seeds "
        f"{options.seeds}, {options.jobs} runs at a time on {os.cpu_count()} cores of {cpu_name()}, torch "
        f"{torch.__version__}, Python {platform.python_version()}, commit {commit.strip()}. Each cell has the seeds. "
        "Accuracy, worked answers and clipped tokens in percent, accuracy on 500 problems that are in no training: the "
        "95 % interval of one sampled accuracy is some 2 to 3 points to each side, of a greedy one 1 to 2. Tokens in "
        "millions, with those that dynamic sampling threw away.\n",
        "| variant | flags | sampled | greedy | worked | length | clipped | tokens | seconds |",
        "| --- " * 9 + "|",
    ]
    for name, rows in results.items():
        cells = [
            " ".join(f"{scale * row[key]:.{digits}f}" for row in rows)
            for key, scale, digits in (
                ("accuracy_sampled", 100, 1), ("accuracy", 100, 1), ("worked", 100, 1), ("length", 1, 1),
                ("clipped", 100, 1), ("tokens", 1e-6, 2), ("seconds", 1, 0),
            )
        ]  # fmt: skip
        lines.append(f"| {name} | {' '.join(VARIANTS[name])} | {' | '.join(cells)} |")
    options.out.write_text("\n".join(lines) + "\n")
    plot(results, options.out.with_suffix(".png"))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
