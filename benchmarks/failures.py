"""Runs that go wrong on purpose, so that one knows what it looks like: docs/when_it_does_not_learn.md.

    python benchmarks/failures.py

Each is `python grpo.py --config configs/arithmetic.yaml --steps 60 --minibatches 1 --lr 7e-4 --lr_schedule constant
--seed 0` with the flags of its row: a rate that falls to 0 would stop much of this before one sees it. Two run at a
time with one thread each.
"""

from statistics import fmean

from common import arguments, arms_times_seeds, commit, cpu_name, finished, flags, table, versions, write

FAILURES = {
    "healthy": [],
    "not improving: lr too low": ["--lr", "1e-6"],
    "not improving: problems too hard": ["--task_args.max_depth", "6"],
    "dead groups: groups too small": ["--group_size", "2", "--prompts_per_step", "128"],
    "collapsed: lr too high": ["--lr", "0.01"],
    "diverged: lr far too high": ["--lr", "1000"],
    "not finite: float32 overflows": ["--lr", "1e30"],
    "KL over 1": ["--lr", "0.004", "--kl_coef", "0.0001"],
    "KL penalty too strong": ["--kl_coef", "3"],
    "clipped too much": ["--minibatches", "16", "--epochs", "4"],
    "cut off": ["--max_completion_tokens", "8"],
    "all cut off": ["--max_completion_tokens", "2"],
    "length running away: the reward pays for it": ["--task", "benchmarks/leaky_task.py:PaysLength", "--lr", "0.002"],
    "greedy in disguise: nothing varies": ["--temperature", "0.05"],
    "sampled from few tokens only": ["--top_k", "1"],
}
SHOWN = ("reward", "correct", "zero_advantage_groups", "truncated", "length", "entropy", "grad_norm", "kl_ref")
SHOWN += ("clipped_low", "clipped_high", "ratio_max", "skipped_updates", "nonfinite_updates")


def run(arm: list[str], steps: int, seed: int) -> tuple[list[dict], str]:
    """The rows of metrics.jsonl, and what the run said besides."""
    settings = dict(config="configs/arithmetic.yaml", steps=steps, seed=seed, eval_steps=0, print_groups=0)
    settings |= dict(minibatches=1, lr=7e-4, lr_schedule="constant")
    with finished("grpo.py", *flags(**settings), *arm, check=False, OMP_NUM_THREADS="1") as done:
        rows = done.read("metrics.jsonl")
    out, errors = (text.splitlines() for text in (done.process.stdout, done.process.stderr))
    said = [line for line in out if line.startswith(("step ", "  will it learn"))]
    return rows, " / ".join(said + [line for line in errors if line.startswith("error")])


def figure(rows: list[dict], key: str) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    if not values:
        return "-"
    value = fmean(values)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    options = arguments(__doc__, "failures.md", steps=60, jobs=2, only=FAILURES).parse_args()
    results = arms_times_seeds(run, {name: FAILURES[name] for name in options.only}, options, [0])
    about = (
        f"`python benchmarks/failures.py`, {options.steps} steps, seed 0, {versions('torch', 'Python')}, on a CPU "
        f"({cpu_name()}), commit {commit()}. Each cell: mean of the first five steps → mean of the last five."
    )
    lines = []
    for name, [(rows, said)] in results.items():
        cells = [f"{figure(rows[:5], key)} → {figure(rows[-5:], key)}" for key in SHOWN]
        lines.append([name, f"`{' '.join(FAILURES[name])}`", len(rows), *cells, said])
    write(options.out, about, table(f"run | flags | steps | {' | '.join(SHOWN)} | what it said", lines))


if __name__ == "__main__":
    main()
