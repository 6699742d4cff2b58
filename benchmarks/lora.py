"""LoRA beside training all weights, each at several learning rates, three seeds each.

    python benchmarks/lora.py
    python benchmarks/lora.py --finer --out benchmarks/results/lora_finer.md     between the best rates

Every run is the default one, `python grpo.py --config configs/arithmetic.yaml`, with the flags of its row; one thread
each, two at a time. The plot has an accuracy for each learning rate: what learns best at its best rate is to be
compared, not what learns best at a rate that suits one of them.
"""

import re
from pathlib import Path
from statistics import fmean

from common import arguments, arms_times_seeds, finished, flags, of_seeds, origin, table, write
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from safetensors.torch import load_file

RATES = {
    "all weights": [4e-4, 8e-4, 1.6e-3, 3.2e-3],
    "rank 1": [5e-4, 1e-3, 2e-3, 4e-3],
    "rank 8": [5e-4, 1e-3, 2e-3, 4e-3],
    "rank 32": [5e-4, 1e-3, 2e-3, 4e-3],
}
FINER = {"all weights": [5.7e-4, 1.13e-3], "rank 1": [1.41e-3, 2.83e-3], "rank 32": [1.41e-3, 2.83e-3]}
COLUMNS = {  # heading: key, scale, digits
    "sampled": ("accuracy_sampled", 100, 1), "greedy": ("accuracy", 100, 1), "worked": ("worked", 100, 1),
    "seconds": ("seconds", 1, 0),
}  # fmt: skip


def arm(name: str, lr: float) -> list[str]:
    rank = name.removeprefix("rank ")
    return ["--lr", f"{lr:g}", *(["--lora_rank", rank] if rank.isdigit() else [])]


def run(arm: list[str], steps: int, seed: int) -> dict:
    """The last evaluation, `trained` numbers, and the seconds of the steps."""
    command = ["grpo.py", "--config", "configs/arithmetic.yaml", *arm, *flags(steps=steps, seed=seed, eval_steps=0)]
    with finished(*command, OMP_NUM_THREADS="1") as done:
        row, metrics = done.read("eval.jsonl")[-1], done.read("metrics.jsonl")
        whole = sum(weight.numel() for weight in load_file(done.folder / "final" / "model.safetensors").values())
    told = re.search(r"([\d,]+) numbers are trained", done.process.stdout)
    seconds = sum(m[key] or 0 for m in metrics for key in ("seconds_sample", "seconds_train", "seconds_sync"))
    return row | {"seconds": seconds, "trained": told.group(1) if told else f"{whole:,}"}


def plot(results: dict[str, list[dict]], path: Path) -> None:
    """Sampled accuracy over the learning rate, mean and seeds."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(dict.fromkeys(key.rpartition(", ")[0] for key in results)):
        own = {key: rows for key, rows in results.items() if key.startswith(f"{name}, ")}
        rates = [float(key.rpartition(" ")[2]) for key in own]
        seeds = [[100 * row["accuracy_sampled"] for row in rows] for rows in own.values()]
        trained = next(iter(own.values()))[0]["trained"]
        rates = [rate * 1.03 ** (i - 1) for rate in rates]  # beside each other
        axes.plot(rates, [fmean(found) for found in seeds], "-", color=f"C{i}", label=f"{name}: {trained} numbers")
        for rate, found in zip(rates, seeds, strict=True):
            axes.plot([rate] * len(found), found, "o", markersize=4, color=f"C{i}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="sampled accuracy, percent: each seed, and the mean")
    ticks = sorted({float(key.rpartition(" ")[2]) for key in results})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    of = {f"{name}, {lr:g}": arm(name, lr) for name, rates in RATES.items() for lr in rates}
    finer = {f"{name}, {lr:g}": arm(name, lr) for name, rates in FINER.items() for lr in rates}
    parser = arguments(__doc__, "lora.md", seeds=[0, 1, 2], steps=60, jobs=2, arms=of)
    parser.add_argument("--finer", action="store_true", help="rates on both sides of the best ones")
    options = parser.parse_args()
    arms = finer if options.finer else {name: of[name] for name in options.arms}
    results = arms_times_seeds(run, arms, options, options.seeds)
    begin = (
        f"`python benchmarks/lora.py{' --finer' * options.finer}`, {options.steps} steps of 256 completions, four "
        f"updates each, seeds {options.seeds}, {options.jobs} runs at a time on"
    )
    about = f"{origin(begin, 'torch', 'peft', 'Python')} Each cell has the seeds; accuracy in percent, on 500 problems "
    about += "that are in no training. Seconds are those of the steps."
    rows = []
    for name, found in results.items():
        what, _, rate = name.rpartition(", ")
        rows.append([what, found[0]["trained"], rate, *of_seeds(found, COLUMNS)])
    write(options.out, about, table(f"what is trained | numbers | learning rate | {' | '.join(COLUMNS)}", rows))
    plot(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
