"""SmolLM2 learns sentences: by which rule, how well, and how; and what it then does with words that it never had.

    python -m harness.smollm2 && python benchmarks/smollm2.py     two hours on two cores
    python benchmarks/smollm2.py --arms words --seeds 0
    python benchmarks/smollm2.py --keep RUN RUN ...               extracts of runs that are there, and the table

Every run is `python grpo.py --config configs/smollm2-sentence.yaml --seed S` with the flags of its row; then
`--steps 0` of the model that it began with and of the one that it came to, on problems of five words. An extract, in
results/smollm2/, is named by rule and seed: config.yaml, metrics.jsonl, eval.jsonl, the evaluation of five words as
five.jsonl, and answers.jsonl, the most likely answer to each problem of each evaluation.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import yaml
from common import arguments, finished, flags, origin, rows_of, table, write

ARMS = {
    "words": [],
    "strict": ["--task_args.rule", "strict", "--few_shot", "1"],
    "own": ["--task_args.rule", "own", "--few_shot", "1"],
}
COLUMNS = {"greedy": "accuracy", "sampled": "accuracy_sampled", "listed": "listed", "copied": "copied"}
COLUMNS |= {"cut off": "truncated"}


def name_of(run: Path) -> str:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    return f"{settings['task_args']['rule']}-seed{settings['seed']}"


def extract(run: Path, out: Path) -> None:
    """Keeps what is worth reading of a run's folder."""
    out.mkdir(parents=True, exist_ok=True)
    name, answers = name_of(run), []
    for log in ("config.yaml", "metrics.jsonl", "eval.jsonl"):
        shutil.copy(run / log, out / f"{name}-{log}")
    for row in rows_of(run / "eval.jsonl"):
        for answer in rows_of(run / f"eval-{row['step']}.jsonl"):
            kept = {key: answer[key] for key in ("ground_truth", "completion", "correct", "listed", "copied")}
            answers.append({"step": row["step"]} | kept)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in answers]
    (out / f"{name}-answers.jsonl").write_text("".join(lines), encoding="utf-8")


def five_words(model: str, run: Path, out: Path, more: list[str]) -> None:
    """Before and after, on words of the evaluation, five at a time: no problem of the training has so many."""
    lines = []
    for name in (model, run / "final"):
        command = ["--config", run / "config.yaml", "--model", name, "--steps", "0", "--task_args.words", "5"]
        with finished("grpo.py", *map(str, command), *more) as done:
            lines += [json.dumps(row) + "\n" for row in done.read("eval.jsonl")]
    (out / f"{name_of(run)}-five.jsonl").write_text("".join(lines))


def percent(row: dict, key: str) -> str:
    return f"{100 * row[key]:.1f}"


def show(out: Path) -> None:
    """The table of all extracts that are there."""
    lines = []
    for log in sorted(out.glob("*-eval.jsonl"), key=lambda log: (list(ARMS).index(log.name.split("-")[0]), log.name)):
        name = log.name.removesuffix("-eval.jsonl")
        rule, seed = re.fullmatch(r"(\w+)-seed(\d+)", name).groups()
        metrics = rows_of(out / f"{name}-metrics.jsonl")
        seconds = sum(row["seconds_sample"] + row["seconds_train"] + row["seconds_sync"] for row in metrics)
        settings, five = yaml.safe_load((out / f"{name}-config.yaml").read_text()), out / f"{name}-five.jsonl"
        new = " → ".join(percent(row, "accuracy_sampled") for row in rows_of(five)) if five.exists() else ""
        for row in (rows := rows_of(log)):
            last = row is rows[-1]
            cells = [percent(row, key) for key in COLUMNS.values()]
            cells += [f"{row['sentence_length']:.1f}", new if last else "", f"{seconds:.0f}" if last else ""]
            lines.append([rule, seed, settings["precision"], row["step"], *cells])
    heads = f"rule | seed | precision | after step | {' | '.join(COLUMNS)} | words of one | five words | seconds"
    about = (
        f"{origin('`python benchmarks/smollm2.py`,')} In percent, of 64 problems whose words are in no training, and "
        "four samples each: `listed` and `copied` are shares of the samples. `five words`: sampled answers that are "
        "right before → after, by the same rule. Seconds are those of the 20 steps."
    )
    write(out / "table.md", about, table(heads, lines))


def main() -> None:
    parser = arguments(__doc__, "smollm2", "two steps with a toy", seeds=[0, 1, 2], arms=ARMS)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--keep", nargs="+", type=Path, default=[], help="folders of runs")
    options = parser.parse_args()
    if not options.keep and not (Path(options.model) / "config.json").exists():
        sys.exit(f"error: there is no model in {options.model}: python -m harness.smollm2 makes it")
    more = ["--precision", options.precision]
    if options.tiny:
        more = "--prompts_per_step 1 --group_size 2 --max_prompt_tokens 800 --max_completion_tokens 4".split()
        more += ["--eval_samples", "1"]
    for run in options.keep:
        extract(run, options.out)
        five_words(options.model, run, options.out, more)
    for arm in () if options.keep else options.arms:
        for seed in options.seeds:
            steps = flags(seed=seed, model=options.model, **dict(steps=2, eval_steps=1) if options.tiny else {})
            command = ["grpo.py", "--config", "configs/smollm2-sentence.yaml", *ARMS[arm], *steps, *more]
            with finished(*command, quiet=False) as done:
                extract(done.folder, options.out)
                five_words(options.model, done.folder, options.out, more)
    show(options.out)


if __name__ == "__main__":
    main()
