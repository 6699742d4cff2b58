"""Does a long run grow? Resident memory of the process along 1,000 steps of the small model.

    python benchmarks/memory_flat.py

One process runs `python grpo.py --config configs/arithmetic.yaml --steps 1000 --prompts_per_step 16 --eval_steps 250`;
this one looks at its memory four times a second.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil
from common import ROOT, arguments, flags, origin, table, write


def main() -> None:
    options = arguments(__doc__, "memory_flat.md", steps=1000, seed=0).parse_args()
    command = ["grpo.py", "--config", "configs/arithmetic.yaml"]
    command += flags(steps=options.steps, seed=options.seed, prompts_per_step=16, eval_steps=options.steps // 4)
    seen: list[tuple[int, float]] = []  # step, MB
    with tempfile.TemporaryDirectory() as runs:
        whole, quiet = [sys.executable, *command, "--runs", runs], subprocess.DEVNULL
        process = subprocess.Popen(whole, cwd=ROOT, stdout=quiet, stderr=quiet)
        while process.poll() is None:
            step = sum(path.read_bytes().count(b"\n") for path in Path(runs).glob("*/metrics.jsonl"))
            seen.append((step, psutil.Process(process.pid).memory_info().rss / 1e6))
            time.sleep(0.25)
    if process.returncode:
        sys.exit(f"grpo.py ended with {process.returncode}")
    tenth = max(1, options.steps // 10)
    windows = [[mb for step, mb in seen if i * tenth < step <= (i + 1) * tenth] for i in range(10)]
    medians = [median(window) for window in windows if window]
    growth = medians[-1] / medians[:2][-1] - 1
    ran = " ".join(["python", *command])
    about = (
        f"{origin(f'`{ran}`,', 'torch', 'Python')} Resident memory in MB, median of each tenth of "
        f"the steps, four looks a second. From the second tenth to the last: {growth:+.1%}."
    )
    heads = " | ".join(["steps", *(f"to {(i + 1) * tenth}" for i in range(len(medians)))])
    write(options.out, about, table(heads, [["MB", *(f"{mb:.0f}" for mb in medians)]]))


if __name__ == "__main__":
    main()
