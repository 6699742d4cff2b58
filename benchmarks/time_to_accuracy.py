"""How soon the default run is right in 90 % of the problems, in turns with what another commit made of it.

    python benchmarks/time_to_accuracy.py --against d472b2f

Every run is `python grpo.py --eval_steps 5 --eval_samples 1`, a process of its own, with seed 0, 1, ... in turn: the
first evaluation whose greedy accuracy is 90 % or more, and the seconds of all steps up to it, without those of the
evaluations. Further arguments go to both grpo.py.
"""

import sys
import tempfile
from pathlib import Path
from statistics import median

from common import ROOT, arguments, check_out, finished, flags, in_turns, origin, table, write

GOAL = 0.9


def run(tree: Path, seed: int, more: list[str]) -> tuple[int, float] | None:
    """The step at which GOAL was seen and the seconds of the steps so far; None where it never was."""
    command = ["grpo.py", *flags(eval_steps=5, eval_samples=1, seed=seed), *more]
    with finished(*command, tree=tree) as done:
        metrics, evaluations = done.read("metrics.jsonl"), done.read("eval.jsonl")
    step = next((row["step"] for row in evaluations if row["accuracy"] >= GOAL), None)
    seconds = ("seconds_sample", "seconds_train", "seconds_sync")
    return step and (step, sum(row.get(key, 0) for row in metrics[:step] for key in seconds))


def main() -> None:
    parser = arguments(__doc__, "time_to_accuracy.md", turns=5)
    parser.add_argument("--against", metavar="COMMIT", help="of this repository; without it only today's run is timed")
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as then:
        trees = {"today": ROOT}
        if options.against:
            trees[options.against] = check_out(options.against, Path(then) / "tree")
        found = {name: [] for name in trees}
        for name in in_turns(sorted(trees), options.turns):
            found[name].append(run(trees[name], len(found[name]), more))
    command = " ".join(["python", *sys.argv])
    about = (
        f"{origin(f'`{command}`, {options.turns} turns,')} Greedy accuracy of {100 * GOAL:.0f} %, "
        "looked for every 5 steps; seconds of sampling and training until then."
    )
    cell = "{0[0]} | {0[1]:.1f}".format
    rows = [
        [seed, *(cell(result) if result else "- | -" for result in results)]
        for seed, results in enumerate(zip(*found.values(), strict=True))
    ]
    parts = [about, table(" | ".join(["seed", *(f"{name}: step | seconds" for name in found)]), rows)]
    if options.against and all(all(results) for results in found.values()):
        ratios = [new[1] / old[1] for new, old in zip(*found.values(), strict=True)]
        parts.append(
            f"Today's seconds over those of {options.against}: median {median(ratios):.2f}, "
            f"from {min(ratios):.2f} to {max(ratios):.2f}."
        )
    write(options.out, *parts)


if __name__ == "__main__":
    main()
