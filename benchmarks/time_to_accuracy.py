"""How soon the default run is right in 90 % of the problems, in turns with what another commit made of it.

    python benchmarks/time_to_accuracy.py --against d472b2f

Every run is `python grpo.py --eval_steps 5 --eval_samples 1`, a process of its own, with seed 0, 1, ... in turn: the
first evaluation whose greedy accuracy is 90 % or more, and the seconds of all steps up to it, without those of the
evaluations. Prints a table and writes it to results/. Further arguments go to both grpo.py.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from arithmetic_seeds import ROOT
from step_time import origin

GOAL = 0.9


def run(tree: Path, seed: int, more: list[str]) -> tuple[int, float] | None:
    """The step at which GOAL was seen and the seconds of the steps so far; None where it never was."""
    with tempfile.TemporaryDirectory() as runs:
        flags = ["--eval_steps", "5", "--eval_samples", "1", "--seed", str(seed), "--runs", runs, *more]
        subprocess.run(
            [sys.executable, "grpo.py", *flags], cwd=tree, check=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        (folder,) = Path(runs).iterdir()
        metrics, evaluations = (
            [json.loads(line) for line in (folder / name).read_text().splitlines()]
            for name in ("metrics.jsonl", "eval.jsonl")
        )
    step = next((row["step"] for row in evaluations if row["accuracy"] >= GOAL), None)
    seconds = ("seconds_sample", "seconds_train", "seconds_sync")
    return step and (step, sum(row.get(key, 0) for row in metrics[:step] for key in seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", metavar="COMMIT", help="of this repository; without it only today's run is timed")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "time_to_accuracy.md")
    options, more = parser.parse_known_args()
    found: dict[str, list] = {"today": []}
    with tempfile.TemporaryDirectory() as then:
        trees = {"today": ROOT}
        if options.against:
            files = subprocess.run(["git", "archive", options.against], cwd=ROOT, check=True, capture_output=True)
            subprocess.run(["tar", "-x", "-C", then], check=True, input=files.stdout)
            trees[options.against], found[options.against] = Path(then), []
        for turn in range(options.turns):
            for name in sorted(trees, reverse=turn % 2 == 1):
                found[name].append(run(trees[name], turn, more))
    lines = [
        f"{origin('python ' + ' '.join(sys.argv), f'{options.turns} turns')} Greedy accuracy of {100 * GOAL:.0f} %, "
        "looked for every 5 steps; seconds of sampling and training until then.\n",
        "| seed | " + " | ".join(f"{name}: step | seconds" for name in found) + " |",
        "| --- " * (1 + 2 * len(found)) + "|",
    ]
    cell = "{0[0]} | {0[1]:.1f}".format
    for seed, results in enumerate(zip(*found.values(), strict=True)):
        lines.append(f"| {seed} | " + " | ".join(cell(result) if result else "- | -" for result in results) + " |")
    if options.against and all(all(results) for results in found.values()):
        ratios = [new[1] / old[1] for new, old in zip(*found.values(), strict=True)]
        lines.append(
            f"\nToday's seconds over those of {options.against}: median {median(ratios):.2f}, "
            f"from {min(ratios):.2f} to {max(ratios):.2f}."
        )
    options.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
