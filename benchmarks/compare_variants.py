"""Every variant on the small model: the same number of rollouts, three seeds each.

    python benchmarks/compare_variants.py

Every run is `python grpo.py --config configs/arithmetic.yaml [--config configs/variants/V.yaml] --steps 60
--minibatches 4 --lr 7e-4 --lr_schedule constant --seed S` with the flags of its row. Four updates a batch, since with
one, all ratios are 1, and the variants of ratio and clip are one and the same; a constant rate, since one that falls
hides at the end what a variant does. Two run at a time with one thread each. Draws the curves, too.
"""

from pathlib import Path
from statistics import fmean

from common import ROOT, arguments, arms_times_seeds, finished, flags, of_seeds, origin, table, write
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
COLUMNS = {  # heading: key, scale, digits
    "sampled": ("accuracy_sampled", 100, 1), "greedy": ("accuracy", 100, 1), "worked": ("worked", 100, 1),
    "length": ("length", 1, 1), "clipped": ("clipped", 100, 1), "tokens": ("tokens", 1e-6, 2),
    "seconds": ("seconds", 1, 0),
}  # fmt: skip


def run(arm: list[str], steps: int, seed: int) -> dict:
    """The last evaluation, the rewards of the steps, and `seconds` of the whole process."""
    command = ["grpo.py", "--config", "configs/arithmetic.yaml", *arm, *FOUR_UPDATES]
    with finished(*command, *flags(steps=steps, seed=seed, eval_steps=0), OMP_NUM_THREADS="1") as done:
        row, metrics = done.read("eval.jsonl")[-1], done.read("metrics.jsonl")
    row |= {"seconds": done.seconds, "tokens": metrics[-1]["tokens"], "rewards": [m["reward"] for m in metrics]}
    return row | {"clipped": clipped(metrics)}


def clipped(metrics: list[dict]) -> float:
    """The share of trained tokens that the clip acted on, mean of the steps."""
    return fmean((m["clipped_low"] or 0) + (m["clipped_high"] or 0) for m in metrics)


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
    parser = arguments(__doc__, "variants.md", seeds=[0, 1, 2], steps=60, jobs=2, variants=VARIANTS)
    options = parser.parse_args()
    results = arms_times_seeds(run, {name: VARIANTS[name] for name in options.variants}, options, options.seeds)
    begin = (
        f"`python benchmarks/compare_variants.py`, {options.steps} steps of 256 completions, four updates each, seeds "
        f"{options.seeds}, {options.jobs} runs at a time on"
    )
    about = (
        f"{origin(begin, 'torch', 'Python')} Each cell has the seeds. "
        "Accuracy, worked answers and clipped tokens in percent, accuracy on 500 problems that are in no training: the "
        "95 % interval of one sampled accuracy is some 2 to 3 points to each side, of a greedy one 1 to 2. Tokens in "
        "millions, with those that dynamic sampling threw away."
    )
    rows = [[name, " ".join(VARIANTS[name]), *of_seeds(found, COLUMNS)] for name, found in results.items()]
    write(options.out, about, table(f"variant | flags | {' | '.join(COLUMNS)}", rows))
    plot(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
