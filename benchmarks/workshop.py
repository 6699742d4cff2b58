"""The experiments of notebooks 5 and 6, three seeds each: what the notebooks show as recorded curves.

    python benchmarks/workshop.py

Every run is `notebooks/experiments.py`'s `run` with the settings of its arm. Two run at a time with one thread each.
Writes the curves to results/workshop.jsonl.
"""

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from common import ROOT, arguments, origin, python, table, write

sys.path.insert(0, str(ROOT / "notebooks"))
import experiments  # noqa: E402

COLUMNS = {  # heading: where it is, in a row of eval.jsonl; all but the length are shares
    "sampled": "accuracy_sampled", "greedy": "accuracy", "pass@8": "pass_at_k", "worked": "worked",
    "dead": "zero_advantage_groups", "reward": "reward", "length": "length", "cut off": "truncated",
}  # fmt: skip


def measure(arm: str, seed: int, steps: int | None) -> dict:
    torch.set_num_threads(1)
    settings = experiments.ARMS[arm] | ({} if steps is None else {"steps": steps})
    metrics, evaluations, _ = experiments.run(seed, 200, **settings)
    rows = experiments.means_of_five(metrics)
    return dict(arm=arm, seed=seed, rows=rows, first=evaluations[0], last=evaluations[-1])


def cells(results: list[dict]) -> list[str]:
    """Before (the mean of the seeds, which differ in their samples only) and after (each seed)."""
    out = []
    for key in COLUMNS.values():
        before, after = ([r[when][key] for r in results] for when in ("first", "last"))
        if key == "pass_at_k":
            before, after = ([row["8"] for row in found] for found in (before, after))
        digits = 1 if key == "length" else 2
        mean = sum(before) / len(before)
        out.append(f"{mean:.{digits}f} → " + " ".join(f"{value:.{digits}f}" for value in after))
    return out


def main() -> None:
    parser = arguments(__doc__, "workshop.md", seeds=[0, 1, 2], jobs=2, arms=experiments.ARMS)
    parser.add_argument("--steps", type=int, help="of each run, instead of 60 (120 for the weak base)")
    options = parser.parse_args()
    if "weak base" in options.arms and not experiments.WEAK_BASE.exists():
        python("-m", "mathformer.train", "--output", str(experiments.WEAK_BASE), "--steps", "1500", quiet=False)
    work = [(arm, seed, options.steps) for arm in options.arms for seed in options.seeds]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(measure, *zip(*work, strict=True)))
    begin = (
        f"`python benchmarks/workshop.py`, 60 steps of 128 completions (the weak base: 120), seeds {options.seeds}, "
        f"{options.jobs} runs at a time on"
    )
    about = (
        f"{origin(begin, 'torch', 'Python')} Each cell is the mean of the seeds before training → "
        "each seed after it, on 200 problems that are in no training (in the form, and under the cap, of the arm). "
        "`dead` is of groups of 8."
    )
    rows = []
    for arm in options.arms:
        settings = " ".join(f"--{k} {str(v).removeprefix(f'{ROOT}/')}" for k, v in experiments.ARMS[arm].items())
        rows.append([arm, settings, *cells([r for r in results if r["arm"] == arm])])
    write(options.out, about, table(f"arm | settings | {' | '.join(COLUMNS)}", rows))
    options.out.with_suffix(".jsonl").write_text("".join(json.dumps(r) + "\n" for r in results))


if __name__ == "__main__":
    main()
