"""Whether two commits compute the same, to the last digit: a default run, variants and KL, everything but times.

    python benchmarks/compare_commits.py f88dbc6 HEAD
    python benchmarks/compare_commits.py HEAD .             before a commit: . is the working tree

The two runs of a pair go side by side, with one thread each, in MKL's mode that rounds alike on all processors.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, check_out, rows_of

OF_THE_MACHINE = {"seconds_sample", "seconds_train", "seconds_sync", "tokens_per_second", "peak_memory"}
PRESET = "--config configs/arithmetic.yaml"
SHORT = f"{PRESET} --steps 2 --task_args.eval_size 50 --eval_samples 4"
MORE = {
    "KL in the loss": "--kl_coef 0.05 --kl_target 0.01",
    "KL in the reward": "--kl_coef 0.05 --kl_in reward --advantage rloo --offload_reference true",
    "k2 beside an entropy bonus": "--kl_coef 0.05 --kl_kind k2 --entropy_coef 0.01",
    "log-probs of the trainer": "--old_logps trainer --importance_cap 2 --temperature 0.9",
    "top_k and top_p": "--top_k 5 --top_p 0.9 --surrogate cispo",
    "four optimizer steps": "--epochs 2 --minibatches 2 --grad_clip 0.5 --lr_schedule cosine --warmup_steps 1",
    "cut off and drawn again": "--max_completion_tokens 6 --mask_truncated true --overlong_share 0.5 "
    "--dead_groups resample --resample_rounds 2",
    "dead groups kept": "--dead_groups keep --optimizer adamw_offload --tokens_per_microbatch 500",
}


def start(code: Path, flags: str, runs: Path) -> subprocess.Popen:
    env = os.environ | {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "grpo.py", *flags.split(), "--runs", str(runs)]
    return subprocess.Popen(command, cwd=code, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def results_of(runs: Path, log: str) -> list[dict]:
    (path,) = runs.glob(f"*/{log}")
    return [{key: value for key, value in row.items() if key not in OF_THE_MACHINE} for row in rows_of(path)]


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
    options, differ = parser.parse_args(), False
    runs = {"default, seed 0": PRESET}
    runs |= {path.stem: f"{SHORT} --config {path}" for path in sorted((ROOT / "configs/variants").glob("*.yaml"))}
    runs |= {title: f"{SHORT} {flags}" for title, flags in MORE.items()}
    print("| run | log | rows | |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        codes = [
            ROOT if commit == "." else check_out(commit, Path(name) / str(i))
            for i, commit in enumerate(options.commits)
        ]
        for title, flags in runs.items():
            if options.only not in title:
                continue
            outs = [Path(name) / f"{title}-{i}" for i in range(2)]
            processes = [start(code, flags, out) for code, out in zip(codes, outs, strict=True)]
            errors = [process.communicate()[1] for process in processes]
            if any(process.returncode for process in processes):
                sys.exit(f"{title}: {''.join(errors)[-2000:]}")
            for log in ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl"):
                one, other = (results_of(out, log) for out in outs)
                found = difference(one, other)
                differ = differ or bool(found)
                print(f"| {title} | {log} | {len(one):,} | {found or 'equal'} |", flush=True)
    sys.exit(int(differ))


if __name__ == "__main__":
    main()
