"""Does a long run grow? Resident memory of the process along 1,000 steps of the small model.

    python benchmarks/memory_flat.py

One process runs `python grpo.py --config configs/arithmetic.yaml --steps 1000 --prompts_per_step 16 --eval_steps 250`;
this one looks at its memory four times a second. Prints a table, and writes it to benchmarks/results/.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil
import torch
from arithmetic_seeds import ROOT, cpu_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "memory_flat.md")
    options = parser.parse_args()
    settings = dict(steps=options.steps, seed=options.seed, prompts_per_step=16, eval_steps=options.steps // 4)
    seen: list[tuple[int, float]] = []  # step, MB
    with tempfile.TemporaryDirectory() as runs:
        flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "grpo.py", "--config", "configs/arithmetic.yaml", *flags, "--runs", runs]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            step = sum(path.read_bytes().count(b"\n") for path in Path(runs).glob("*/metrics.jsonl"))
            seen.append((step, psutil.Process(process.pid).memory_info().rss / 1e6))
            time.sleep(0.25)
    if process.returncode:
        sys.exit(f"grpo.py ended with {process.returncode}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    tenth = max(1, options.steps // 10)
    windows = [[mb for step, mb in seen if i * tenth < step <= (i + 1) * tenth] for i in range(10)]
    medians = [median(window) for window in windows if window]
    growth = medians[-1] / medians[:2][-1] - 1
    lines = [
        f"`{' '.join(['python', *command[1:-2]])}`, {os.cpu_count()} cores of {cpu_name()}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, commit {commit.strip()}. Resident memory in MB, median of each tenth of "
        f"the steps, four looks a second. From the second tenth to the last: {growth:+.1%}.\n",
        "| steps | " + " | ".join(f"to {(i + 1) * tenth}" for i in range(len(medians))) + " |",
        "| --- " * (len(medians) + 1) + "|",
        "| MB | " + " | ".join(f"{mb:.0f}" for mb in medians) + " |",
    ]
    options.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
