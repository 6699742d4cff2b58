"""The default run, `python grpo.py`, once a seed: accuracy before and after, seconds, peak memory.

    python benchmarks/arithmetic_seeds.py --seeds 0 1 2 3 4

Each run is a process of its own, timed from its start to its end, interpreter and imports included. The first run's
curves are kept beside the table. Further arguments go to grpo.py: `--seeds 0 --steps 2 --out /tmp/look.md` is a quick
look.
"""

import shutil

from common import arguments, finished, origin, table, write

HEADS = "seed | greedy before | greedy after | sampled before | sampled after | worked before | worked after"
HEADS += " | length before | length after | seconds | peak GB"


def main() -> None:
    options, more = arguments(__doc__, "arithmetic_seeds.md", seeds=[0, 1, 2, 3, 4]).parse_known_args()
    rows = []
    for seed in options.seeds:
        with finished("grpo.py", "--seed", str(seed), *more, quiet=False) as run:
            first, *_, last = run.read("eval.jsonl")
            if seed == options.seeds[0]:
                shutil.copy(run.folder / "curves.png", options.out.parent / f"arithmetic_seed{seed}.png")
            peak = max(row["peak_memory"] for row in run.read("metrics.jsonl"))
        cells = [f"{100 * row[key]:.1f}" for key in ("accuracy", "accuracy_sampled", "worked") for row in (first, last)]
        cells += [f"{row['length']:.1f}" for row in (first, last)]
        rows.append([seed, *cells, f"{run.seconds:.0f}", f"{peak:.2f}"])
    command = " ".join(["python grpo.py", *more, "--seed S"])
    about = (
        f"{origin(f'`{command}`,')} Seconds are of the whole process; accuracy is "
        "on 500 problems that are in no training, in percent; worked is the share of sampled answers that show their "
        "steps."
    )
    write(options.out, about, table(HEADS, rows))


if __name__ == "__main__":
    main()
