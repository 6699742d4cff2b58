"""Whether two commits compute the same: default run, variants and KL, every figure but times, on one machine.

    python benchmarks/compare_commits.py 74b50e7 HEAD
    python benchmarks/compare_commits.py HEAD .             before a commit: . is the working tree

Runs of one pair go side by side, with one thread each, in MKL's mode that gives the same digits on any processor.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
OF_THE_MACHINE = {"seconds_sample", "seconds_train", "seconds_sync", "tokens_per_second", "peak_memory"}
LOGS = ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl")
PRESET = "--config configs/arithmetic.yaml"
SHORT = f"{PRESET} --steps 2 --task_args.eval_size 50 --eval_samples 4"
RUNS = {"default, seed 0": f"{PRESET} --seed 0"}
OVERLAYS = sorted(path.relative_to(HERE) for path in HERE.glob("configs/variants/*.yaml"))
RUNS |= {path.stem: f"{SHORT} --config {path}" for path in OVERLAYS}
RUNS |= {
    "KL in the loss": f"{SHORT} --kl_coef 0.05 --kl_target 0.01",
    "KL in the reward": f"{SHORT} --kl_coef 0.05 --kl_in reward --advantage rloo --offload_reference true",
    "k2 beside an entropy bonus": f"{SHORT} --kl_coef 0.05 --kl_kind k2 --entropy_coef 0.01",
    "log-probs of the trainer": f"{SHORT} --old_logps trainer --importance_cap 2 --temperature 0.9",
    "top_k and top_p": f"{SHORT} --top_k 5 --top_p 0.9 --surrogate cispo",
    "four optimizer steps": f"{SHORT} --epochs 2 --minibatches 2 --grad_clip 0.5 --lr_schedule cosine --warmup_steps 1",
    "cut off, too long, drawn again": f"{SHORT} --max_completion_tokens 6 --mask_truncated true --overlong_share 0.5 "
    "--dead_groups resample --resample_rounds 2",
    "dead groups kept": f"{SHORT} --dead_groups keep --optimizer adamw_offload --tokens_per_microbatch 500",
}


def checked_out(commit: str, folder: Path) -> Path:
    if commit == ".":
        return HERE
    subprocess.run(["git", "-C", HERE, "worktree", "add", "--detach", folder, commit], check=True, capture_output=True)
    return folder


def start(code: Path, flags: str, runs: Path) -> subprocess.Popen:
    env = os.environ | {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "grpo.py", *flags.split(), "--runs", str(runs)]
    return subprocess.Popen(command, cwd=code, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def rows_of(runs: Path, log: str) -> list[dict]:
    (path,) = runs.glob(f"*/{log}")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in OF_THE_MACHINE} for row in rows]


def difference(one: list[dict], other: list[dict]) -> str:
    """What differs first; nothing if nothing does."""
    if len(one) != len(other):
        return f"{len(one)} and {len(other)} rows"
    for i, (a, b) in enumerate(zip(one, other, strict=True), 1):
        if list(a) != list(b):
            return f"row {i} has other keys"
        if keys := [key for key in a if a[key] != b[key]]:
            return f"row {i}, {keys[0]}: {a[keys[0]]} and {b[keys[0]]}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs=2)
    parser.add_argument("--only", default="", help="runs whose names have this in them")
    options = parser.parse_args()
    differ = 0
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / side for side in ("one", "other")]
        codes = [checked_out(commit, folder) for commit, folder in zip(options.commits, folders, strict=True)]
        try:
            print("| run | log | rows | |\n| --- | --- | --- | --- |")
            for title, flags in RUNS.items():
                if options.only not in title:
                    continue
                outs = [Path(name) / f"{title}-{i}" for i in range(2)]
                processes = [start(code, flags, out) for code, out in zip(codes, outs, strict=True)]
                errors = [process.communicate()[1] for process in processes]
                if failed := [error for process, error in zip(processes, errors, strict=True) if process.returncode]:
                    sys.exit(f"{title}: {failed[0][-2000:]}")
                for log in LOGS:
                    one, other = (rows_of(out, log) for out in outs)
                    found = difference(one, other)
                    differ += bool(found)
                    print(f"| {title} | {log} | {len(one):,} | {found or 'equal'} |", flush=True)
        finally:
            for code in codes:
                if code != HERE:
                    subprocess.run(["git", "-C", HERE, "worktree", "remove", "--force", code], check=True)
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
