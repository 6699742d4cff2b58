"""What the optional flags of mathformer.train_rl do: the same short run with and without each, on three seeds.

    python benchmarks/rl_flags.py

Every run is `python -m mathformer.train_rl --checkpoint mathformer/pretrained --steps 100 --seed S` with the flags of
the row. Two run at a time with one thread each. Further arguments go to mathformer.train_rl.
"""

from common import arguments, arms_times_seeds, finished, flags, of_seeds, origin, table, write

VARIANTS = {
    "the defaults": [],
    "no KL penalty": ["--kl_coef", "0"],
    "adaptive KL": ["--kl_target", "0.05"],
    "partial credit": ["--partial_credit", "0.5"],
    "curriculum": ["--curriculum_steps", "50"],
    "two epochs a batch": ["--epochs", "2"],
    "four epochs a batch": ["--epochs", "4"],
    "mathFormer's learning rate": ["--lr", "1e-5"],
}
COLUMNS = {  # heading: key, scale, digits
    "greedy": ("accuracy", 100, 1), "sampled": ("accuracy_sampled", 100, 1), "worked": ("worked", 100, 1),
    "KL at the end": ("kl_ref", 1, 3), "kl_coef at the end": ("kl_coef", 1, 3), "seconds": ("seconds", 1, 0),
}  # fmt: skip


def run(arm: list[str], steps: int, seed: int) -> dict:
    """The last evaluation, with `seconds` of the whole process."""
    command = ["-m", "mathformer.train_rl", "--checkpoint", "mathformer/pretrained"]
    command += flags(steps=steps, seed=seed, eval_interval=0)
    with finished(*command, *arm, OMP_NUM_THREADS="1") as done:
        row, last = done.read("eval.jsonl")[-1], done.read("metrics.jsonl")[-1]
    return row | {"seconds": done.seconds, "kl_ref": last["kl_ref"] or 0.0, "kl_coef": last["kl_coef"]}


def main() -> None:
    parser = arguments(__doc__, "rl_flags.md", seeds=[0, 1, 2], steps=100, jobs=2, variants=VARIANTS)
    options, more = parser.parse_known_args()
    arms = {name: VARIANTS[name] + more for name in options.variants}
    results = arms_times_seeds(run, arms, options, options.seeds)
    begin = f"`{' '.join(['python benchmarks/rl_flags.py', *more])}`, {options.steps} steps, seeds {options.seeds}, "
    about = (
        f"{origin(f'{begin}{options.jobs} runs at a time on', 'torch', 'Python')} Each cell has the three seeds; "
        "accuracy and worked answers in percent, on 500 problems; the base has 38.2 greedy and 33.0 sampled."
    )
    rows = [[name, " ".join(VARIANTS[name]), *of_seeds(found, COLUMNS)] for name, found in results.items()]
    write(options.out, about, table(f"run | flags | {' | '.join(COLUMNS)}", rows))


if __name__ == "__main__":
    main()
