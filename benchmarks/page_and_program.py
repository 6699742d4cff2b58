"""one_page.py beside the default run of grpo.py: accuracy and seconds, in turns, once a seed.

    python benchmarks/page_and_program.py --seeds 0 1 2 3 4
    python benchmarks/page_and_program.py --tiny --seeds 0 --out /tmp/look.md    one step: does this script still run?

Each is a process of its own, timed from its start to its end. The two evaluate the same 500 problems. The page samples
two answers to each, grpo.py eight.
"""

import re
import time
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

from common import ROOT, arguments, finished, flags, in_turns, origin, python, spread, table, write

TINY = {"STEPS, MINIBATCHES = 60": "STEPS, MINIBATCHES = 1", "ArithmeticTask()": "ArithmeticTask(eval_size=2)"}


def shortened(folder: Path) -> Path:
    """A copy of the page with one step and few problems."""
    source = (ROOT / "one_page.py").read_text()
    for old, new in TINY.items():
        assert old in source, old
        source = source.replace(old, new)
    (folder / "mathformer").symlink_to(ROOT / "mathformer")
    (folder / "one_page.py").write_text(source)
    return folder / "one_page.py"


def page(seed: int, tiny: bool) -> tuple[float, float, float]:
    """Greedy and sampled accuracy in percent, and seconds."""
    with TemporaryDirectory() as folder:
        script = shortened(Path(folder)) if tiny else "one_page.py"
        started = time.time()
        printed = python(str(script), str(seed)).stdout
    *_, greedy, sampled = map(float, re.findall(r"([0-9.]+)% right", printed))
    return greedy, sampled, time.time() - started


def program(seed: int, tiny: bool) -> tuple[float, float, float]:
    with finished("grpo.py", *flags(seed=seed), *(flags(steps=1) if tiny else [])) as run:
        last = run.read("eval.jsonl")[-1]
        return 100 * last["accuracy"], 100 * last["accuracy_sampled"], run.seconds


def main() -> None:
    options = arguments(
        __doc__, "page_and_program.md", tiny="one step, few problems", seeds=[0, 1, 2, 3, 4]
    ).parse_args()
    turns = in_turns([page, program], len(options.seeds))
    found = {page: [], program: []}
    for i, one in enumerate(turns):
        found[one].append(one(options.seeds[i // 2], options.tiny))
    rows = []
    for seed, a, b in zip(options.seeds, found[page], found[program], strict=True):
        rows.append([seed, *(f"{value:.1f}" for value in (a[0], b[0], a[1], b[1])), f"{a[2]:.0f}", f"{b[2]:.0f}"])
    means = [mean(run[i] for run in found[one]) for i in (0, 1) for one in (page, program)]
    rows.append(["mean", *(f"{value:.1f}" for value in means), "", ""])
    ratio = spread([a[2] / b[2] for a, b in zip(found[page], found[program], strict=True)], 2)
    heads = (
        "seed | greedy, page | greedy, grpo.py | sampled, page | sampled, grpo.py | seconds, page | seconds, grpo.py"
    )
    about = origin("`python one_page.py S` and `python grpo.py --seed S` in turns,")
    about += " Accuracy after training is in percent, on 500 problems that are in no training; seconds are of the whole"
    about += f" process. The page's seconds over those of grpo.py: {ratio}."
    write(options.out, about, table(heads, rows))


if __name__ == "__main__":
    main()
