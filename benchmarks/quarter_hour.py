"""What is to be measured on a GPU, in the order of what is most worth knowing: a quarter of an hour, or several.

    python benchmarks/quarter_hour.py                 all of it, until 15 minutes are over
    python benchmarks/quarter_hour.py --list          what it would run
    python benchmarks/quarter_hour.py --minutes 8     what is not done yet, until 8 minutes are over
    python benchmarks/quarter_hour.py --tiny --out FOLDER     all of it with a toy, on any device

Each command is ended at its limit; what was measured until then counts. One that would not end in the time that is left
is left for the next call, which begins with it: quarter_hour.json, beside the tables, says what is done. docs/gpu.md
says which row of which table a command gives.
"""

import json
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

from common import RESULTS, arguments, commit, within

SMALL_CARD = "optimizer=adamw_offload vllm_sleep=true kv_cache_gb=2 gradient_checkpointing=true "
SMALL_CARD += "tokens_per_microbatch=2560"  # as configs/countdown-24gb.yaml
LORA = "lora_rank=16 vllm_sleep=true kv_cache_gb=3 gradient_checkpointing=true tokens_per_microbatch=10240"


SMOLLM2 = "grpo.py --config configs/smollm2-sentence.yaml"  # `python -m harness.smollm2` makes its model before
LONG = "grpo.py --config configs/smollm2-long.yaml"  # a quarter of an hour by itself


class Task(NamedTuple):
    seconds: int  # after which it is ended
    words: str  # behind `python`; {out}, {steps} and {commit} are filled in

    @property
    def name(self) -> str:
        return self.words.split(" --out")[0].split(" --runs")[0]


def gpu(seconds: int, shape: str, more: str) -> Task:
    return Task(seconds, f"benchmarks/gpu.py --shapes {shape} {more} --out {{out}} --commit {{commit}}")


TASKS = [
    gpu(80, "Qwen2.5-1.5B", "--profile"),
    gpu(90, "Qwen2.5-1.5B", "--profile --set cudnn_attention=true"),
    gpu(270, "Qwen2.5-0.5B", "--steps 5 --versus TRL --limit 150"),
    gpu(130, "Qwen2.5-1.5B", "--steps 4"),
    gpu(110, "Qwen2.5-1.5B", "--steps 3 --set vllm_sleep=true"),
    gpu(150, "Qwen2.5-3B", "--steps 3"),
    gpu(130, "Qwen3-1.7B", "--steps 3"),
    gpu(200, "Qwen2.5-3B", f"--steps 2 --card_gb 24 --set {SMALL_CARD}"),
    gpu(130, "Qwen2.5-3B", f"--steps 2 --card_gb 24 --set {LORA}"),
    gpu(100, "Qwen2.5-1.5B", f"--steps 3 --set {LORA} precision=fp16"),
    *(Task(90, f"{SMOLLM2} --seed {seed} --runs {{out}}/smollm2") for seed in (0, 1)),
    gpu(130, "Qwen2.5-1.5B", "--steps 4 --set tokens_per_microbatch=auto"),
    gpu(80, "Qwen2.5-3B", "--profile"),
    gpu(320, "Qwen2.5-1.5B", "--steps 3 --versus TRL --limit 220"),
    Task(890, f"{LONG} --seed 0 --runs {{out}}/smollm2"),
]


def run(task: Task, out: Path, name: str, tiny: bool, limit: float) -> dict:
    words = task.words.format(out=shlex.quote(str(out)), commit=shlex.quote(name))
    if tiny:
        for recipe in (SMOLLM2, LONG):
            words = words.replace(recipe, "grpo.py --steps 1 --task_args.eval_size 2")
        words = words.replace("--shapes ", "--tiny ").replace(" precision=fp16", "")  # which a CPU has not
        words = " ".join(word for word in words.split() if not word.startswith("Qwen"))
    started = time.monotonic()
    code = within(limit, [sys.executable, *shlex.split(words)])
    ended = f"ended at its limit of {limit:.0f} s" if code is None else code
    return dict(task=task.name, ended=ended, seconds=round(time.monotonic() - started))


def main() -> None:
    parser = arguments(__doc__, tiny="with a toy", minutes=15.0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--commit", default=commit(), help="where the repository is not at hand")
    options = parser.parse_args()
    if options.list:
        for task in TASKS:
            print(f"{task.seconds:5} s  python {task.name}")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    record, ends = options.out / "quarter_hour.json", time.monotonic() + 60 * options.minutes
    done = json.loads(record.read_text()) if record.exists() else []
    for task in TASKS:
        if any(row["task"] == task.name and row["ended"] == 0 for row in done):
            continue
        left = ends - time.monotonic()
        if left < task.seconds:
            print(f"{left:.0f} s are left, and {task.name} may take {task.seconds}: it is for the next call")
            break
        print(f"==== {task.name}: at most {task.seconds} s of {left:.0f}", flush=True)
        done.append(run(task, options.out, options.commit or "unknown", options.tiny, task.seconds))
        print(f"==== it took {done[-1]['seconds']} s: {done[-1]['ended'] or 'done'}", flush=True)
        record.write_text(json.dumps(done, indent=1) + "\n")
        if options.tiny and done[-1]["ended"] != 0:
            sys.exit(1)


if __name__ == "__main__":
    main()
