"""How answers from older weights affect learning, and how well the ratio corrects it: the small model, five seeds.

    python benchmarks/staleness.py

Every run is `python grpo.py --staleness K --steps 50 --eval_steps 0 --seed S`, with the flags of its row. `the ratio`:
the old log-probs are those of the weights that wrote the answers, and the clip acts on what is too far. `nothing`: the
old ones are the trainer's own, so that an answer counts as if it were new. `capped weights`: the same, but each token
is weighted by its probability under the trainer over that under the sampler, at most 2. Draws the curves, too.
"""

from statistics import fmean

from common import arguments, arms_times_seeds, finished, flags, of_seeds, origin, table, write
from compare_variants import clipped, plot

CORRECTIONS = {
    "the ratio": [],
    "nothing": ["--old_logps", "trainer"],
    "capped weights": ["--old_logps", "trainer", "--importance_cap", "2"],
}
ARMS = {"0": []} | {
    f"{k}, {correction}": ["--staleness", str(k), *more] for k in (1, 2, 4) for correction, more in CORRECTIONS.items()
}
COLUMNS = {  # heading: key, scale, digits
    "sampled": ("accuracy_sampled", 100, 1), "greedy": ("accuracy", 100, 1), "reward of all steps": ("area", 1, 3),
    "age": ("age", 1, 2), "gap": ("gap", 1, 3), "clipped": ("clipped", 100, 1),
}  # fmt: skip


def run(arm: list[str], steps: int, seed: int) -> dict:
    """The last evaluation, the rewards of the steps, and means over them."""
    with finished("grpo.py", *arm, *flags(steps=steps, seed=seed, eval_steps=0), OMP_NUM_THREADS="1") as done:
        row, metrics = done.read("eval.jsonl")[-1], done.read("metrics.jsonl")
    row |= {"rewards": [m["reward"] for m in metrics], "area": fmean(m["reward"] for m in metrics)}
    row |= {"age": fmean(m["age"] for m in metrics), "gap": fmean(m["sampler_logp_gap"] or 0 for m in metrics)}
    return row | {"clipped": clipped(metrics)}


def main() -> None:
    parser = arguments(__doc__, "staleness.md", seeds=[0, 1, 2, 3, 4], steps=50, jobs=2, arms=ARMS)
    options = parser.parse_args()
    results = arms_times_seeds(run, {name: ARMS[name] for name in options.arms}, options, options.seeds)
    begin = (
        f"`python benchmarks/staleness.py`, {options.steps} steps, seeds {options.seeds}, {options.jobs} at a time on"
    )
    about = (
        f"{origin(begin, 'torch', 'Python')} Each cell has the seeds. Accuracy and clipped tokens in percent, accuracy "
        "on problems that are in no training; age in steps of four updates, and gap (mean |difference| of log-probs "
        "of sampler and trainer), as means over the steps."
    )
    rows = [[name, " ".join(ARMS[name]), *of_seeds(found, COLUMNS)] for name, found in results.items()]
    write(options.out, about, table(f"staleness, corrected by | flags | {' | '.join(COLUMNS)}", rows))
    plot(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
