"""The log that notebook 7 reads: 1,000 steps on problems that are harder than the base was trained for.

    python benchmarks/long_run.py             runs, some 15 minutes, and keeps an extract of the run's folder
    python benchmarks/long_run.py FOLDER      keeps an extract of a run that is there
    python benchmarks/long_run.py --steps 2 --out /tmp/look

The extract, in results/long_run/: config.yaml, eval.jsonl, every tenth row of metrics.jsonl, and two groups of every
250th step, one of mixed rewards and the first one.
"""

import json
import shutil
from pathlib import Path

from common import arguments, finished, rows_of

SETTINGS = ["--task_args.max_depth", "6", "--max_prompt_tokens", "64"]
SETTINGS += ["--minibatches", "1", "--lr", "7e-4", "--lr_schedule", "constant"]
SETTINGS += ["--max_completion_tokens", "128", "--eval_steps", "100", "--save_steps", "250"]


def extract(run: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "eval.jsonl"):
        shutil.copy(run / name, out / name)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (out / "metrics.jsonl").write_text("\n".join([lines[0], *lines[9::10]]) + "\n")
    steps: dict[int, list[dict]] = {}
    for row in rows_of(run / "rollouts.jsonl"):
        if row["step"] == 1 or row["step"] % 250 == 0:
            steps.setdefault(row["step"], []).append(row)
    kept = []
    for rows in steps.values():
        groups = [rows[i : i + 8] for i in range(0, len(rows), 8)]
        mixed = next((group for group in groups if len({row["reward"] for row in group}) > 1), groups[-1])
        kept += groups[0] + (mixed if mixed is not groups[0] else [])
    (out / "rollouts.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def main() -> None:
    parser = arguments(__doc__, "long_run", steps="1000")
    parser.add_argument("run", type=Path, nargs="?")
    options = parser.parse_args()
    if options.run:
        extract(options.run, options.out)
        return
    command = ["grpo.py", "--config", "configs/arithmetic.yaml", "--steps", options.steps, *SETTINGS]
    with finished(*command, quiet=False) as done:
        extract(done.folder, options.out)


if __name__ == "__main__":
    main()
