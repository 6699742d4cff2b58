"""The default run, `python grpo.py`, once a seed: accuracy before and after, seconds, peak memory.

    python benchmarks/arithmetic_seeds.py --seeds 0 1 2 3 4

Each run is a process of its own, timed from its start to its end, interpreter and imports included. Prints a table
and writes it, with the machine, the versions and the first run's curves, to benchmarks/results/. Further arguments go
to grpo.py: `--seeds 0 --steps 2 --out /tmp/look.md` is a quick look.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "arithmetic_seeds.md")
    options, more = parser.parse_known_args()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    lines = [
        f"`python grpo.py {' '.join([*more, '--seed S'])}`, {os.cpu_count()} cores of {cpu_name()}, {versions}, "
        f"commit {commit.strip()}. Seconds are of the whole process; accuracy is on 500 problems that are in no "
        "training, in percent; worked is the share of sampled answers that show their steps.\n",
        "| seed | greedy before | greedy after | sampled before | sampled after | worked before | worked after "
        "| length before | length after | seconds | peak GB |",
        "| --- " * 11 + "|",
    ]
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as runs:
            started = time.time()
            command = [sys.executable, "grpo.py", "--seed", str(seed), "--runs", runs, *more]
            subprocess.run(command, cwd=ROOT, check=True)
            seconds = time.time() - started
            (run,) = Path(runs).iterdir()
            first, *_, last = map(json.loads, (run / "eval.jsonl").read_text().splitlines())
            if seed == options.seeds[0]:
                shutil.copy(run / "curves.png", options.out.parent / f"arithmetic_seed{seed}.png")
            peak = max(json.loads(line)["peak_memory"] for line in (run / "metrics.jsonl").read_text().splitlines())
        cells = [f"{100 * row[key]:.1f}" for key in ("accuracy", "accuracy_sampled", "worked") for row in (first, last)]
        cells += [f"{row['length']:.1f}" for row in (first, last)]
        lines.append(f"| {seed} | " + " | ".join(cells) + f" | {seconds:.0f} | {peak:.2f} |")
    options.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
