"""The small model from nothing: pretraining, GRPO and evaluation, on all operators with fractions.

    python benchmarks/pipeline.py --seeds 0 1 2
    python benchmarks/pipeline.py --seeds 0 1 2 --num_experts 4 --active_experts 2

For each seed, three commands, which are printed: mathformer.train, mathformer.train_rl (with its default settings but
for the number of steps), and mathformer.evaluate before and after. Each is timed as a process. Adds a row for each seed
to a table in benchmarks/results/, and writes the models to --work. Two processes with OMP_NUM_THREADS=1, started at the
same time with seeds of their own, use two cores better than one process does.
"""

import json
import os
import time
from pathlib import Path

from common import arguments, flags, origin, python, table

PROBLEMS = ["--operators", "all", "--max_depth", "2", "--negatives", "0.1", "--parentheses", "0.05", "--spaces", "0.05"]


HEADS = "experts, active | seed | pretraining steps | greedy before | greedy after | sampled before | sampled after"
HEADS += " | worked before | worked after | made to work, before | after | pretraining s | RL s | evaluation s | min"


def run(*command: str) -> float:
    """Seconds of `python -m command`."""
    print("python -m", *command, flush=True)
    started = time.time()
    python("-m", *command, quiet=False)
    return time.time() - started


def main() -> None:
    parser = arguments(
        __doc__, "pipeline.md", "a step of each, two problems, answers of four tokens", seeds=[0, 1, 2],
        num_experts="1", active_experts="1", pretrain_steps="5000", rl_steps="300", work=Path("runs/pipeline"),
    )  # fmt: skip
    options = parser.parse_args()
    problems, short = ("2", ["--max_gen_len", "4"]) if options.tiny else ("1000", [])
    if options.tiny:
        options.pretrain_steps = options.rl_steps = "1"
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    about = (
        f"{origin(f'`OMP_NUM_THREADS={threads} python benchmarks/pipeline.py --seeds S`, on')} Accuracy in percent "
        f"with its 95 % interval, on {problems} problems that are in no training; worked: the share of sampled answers "
        "that show steps."
    )
    if not options.out.exists():
        options.out.write_text(f"{about}\n\n{table(HEADS, [])}\n")
    for seed in options.seeds:
        work = (options.work / f"experts{options.num_experts}-s{seed}").resolve()
        base, runs = work / "base", work / "runs"
        experts = flags(num_experts=options.num_experts, active_experts=options.active_experts)
        more = flags(steps=options.pretrain_steps, seed=seed)
        pretraining = run("mathformer.train", "--output", str(base), *PROBLEMS, *experts, *more)
        settings = flags(checkpoint=base, steps=options.rl_steps, runs=runs, seed=seed, eval_interval=100)
        rl = run("mathformer.train_rl", *settings, *short)
        (final,) = runs.glob("*/final")
        evaluation, rows = 0.0, []
        for name, checkpoint in (("before", base), ("after", final)):
            out = work / f"{name}.json"
            settings = flags(checkpoint=checkpoint, problems=problems, seed=seed, out=out)
            evaluation += run("mathformer.evaluate", *settings, *short)
            rows.append(json.loads(out.read_text())["evaluation"])
        cells = [
            f"{100 * row[key]:.1f} ({100 * row[key + '_low']:.1f} to {100 * row[key + '_high']:.1f})"
            for key in ("accuracy", "accuracy_sampled")
            for row in rows
        ]
        cells += [f"{100 * row[key]:.1f}" for key in ("worked", "accuracy_worked") for row in rows]
        seconds = [pretraining, rl, evaluation]
        cells += [f"{s:.0f}" for s in seconds] + [f"{sum(seconds) / 60:.1f}"]
        first = [f"{options.num_experts}, {options.active_experts}", str(seed), options.pretrain_steps]
        with open(options.out, "a") as file:
            file.write(f"| {' | '.join(first + cells)} |\n")


if __name__ == "__main__":
    main()
