"""Kills a run with SIGKILL at random moments, resumes it each time, and compares it with one that was never killed.

    python tests/harness/kill_and_resume.py                 20 kills, a minute
    python tests/harness/kill_and_resume.py --kills 12      what the test suite does
    python tests/harness/kill_and_resume.py --lora_rank 4   adapters instead of all weights

Every other kill waits for a checkpoint that is just being written. At the end weights, optimizer, rollouts,
evaluations and metrics (but times and memory) must be equal to the last bit. Ends with 1 otherwise.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import grpo  # noqa: E402

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["grpo"])
NOT_REPEATABLE = {"seconds_sample", "seconds_train", "seconds_sync", "tokens_per_second", "peak_memory"}


def command(runs: Path, steps: int, lora_rank: int = 0) -> list[str]:
    """A small run on a CPU, in float32, with a KL penalty, an adaptive coefficient and evaluations on the way."""
    settings = dict(device="cpu", sampler="torch", steps=steps, save_steps=2, eval_steps=5, eval_samples=2, runs=runs)
    settings |= dict(prompts_per_step=4, group_size=4, kl_coef=0.05, kl_target=0.02, minibatches=2, print_groups=0)
    settings |= dict(lora_rank=lora_rank)
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [*flags, "--task_args.eval_size", "8"]


def start(arguments: list[str], errors: str = os.devnull):
    """`python grpo.py *arguments`, as a fork of a process that has imported it already."""
    process = FORKS.Process(target=in_a_fork, args=[arguments, errors])
    process.start()
    return process


def in_a_fork(arguments: list[str], errors: str) -> None:
    for number, path in ((1, os.devnull), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.setsid()
    torch.set_num_threads(1)
    grpo.main(arguments)


def finish(arguments: list[str], folder: Path) -> None:
    process = start(arguments, str(folder / "errors"))
    process.join()
    if process.exitcode:
        raise SystemExit(f"grpo.py ended with {process.exitcode}:\n{(folder / 'errors').read_text()[-2000:]}")


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_somewhere(arguments: list[str], runs: Path, rng: random.Random, in_a_save: bool) -> str:
    """Starts the run, kills it at a random moment, and says where it was; `done` if it was faster."""
    process, begun = start(arguments), time.time()
    seen = sum(lines(path) for path in runs.glob("*/metrics.jsonl"))
    steps = seen + rng.randrange(0, 4)
    delay = rng.choice([0, 0, 0.002, 0.01, 0.03]) if in_a_save else rng.random() * 0.3
    while process.exitcode is None and time.time() - begun < 120:
        at = sum(lines(path) for path in runs.glob("*/metrics.jsonl"))
        saving = any(runs.glob("*/.partial"))
        if at >= steps and (saving if in_a_save else at > seen or time.time() - begun > 4):
            time.sleep(delay)
            saving = any(runs.glob("*/.partial"))
            process.kill()
            process.join()
            where = sum(lines(path) for path in runs.glob("*/metrics.jsonl"))
            return f"at step {where}" + (", in a save" if saving else "")
        time.sleep(0.0005)
    process.join()
    return "done"


def differences(one: Path, other: Path) -> list[str]:
    """What is not the same in two run folders."""
    found = []
    last = max(one.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])).name
    (weights,) = (one / last).glob("*model.safetensors")  # with LoRA an adapter's
    for name in ("final/model.safetensors", f"{last}/{weights.name}", f"{last}/optimizer.state"):
        a, b = load_file(one / name), load_file(other / name)
        if a.keys() != b.keys() or any(not torch.equal(a[key], b[key]) for key in a):
            found.append(name)
    for name in ("rollouts.jsonl", "eval.jsonl", "eval-0.jsonl", "eval-5.jsonl"):
        if (one / name).read_bytes() != (other / name).read_bytes():
            found.append(name)
    rows = [
        [
            {key: value for key, value in json.loads(line).items() if key not in NOT_REPEATABLE}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (one, other)
    ]
    if rows[0] != rows[1] or lines(one / "metrics.csv") != lines(other / "metrics.csv"):
        found.append("metrics")
    return found


def run(kills: int, steps: int, seed: int, folder: Path, lora_rank: int = 0) -> list[str]:
    """Differences between a run that was killed so often and one that was not."""
    rng, happened = random.Random(seed), []
    whole, killed = folder / "whole", folder / "killed"
    finish(command(whole, steps, lora_rank), folder)
    for i in range(kills):
        resumable = list(killed.glob("*/config.yaml"))
        arguments = ["--resume", str(resumable[0].parent)] if resumable else command(killed, steps, lora_rank)
        happened.append(kill_somewhere(arguments, killed, rng, in_a_save=i % 2 == 1))
        print(f"kill {i + 1}: {happened[-1]}", flush=True)
        for unfinished in killed.glob("*"):  # killed before it had a config: nothing was done yet
            if not (unfinished / "config.yaml").exists():
                shutil.rmtree(unfinished)
    ((a,), (b,)) = whole.glob("*"), killed.glob("*")
    finish(["--resume", str(b)], folder)
    return [*differences(a, b), *(["no kill was in time"] if "done" in happened else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora_rank", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(options.kills, options.steps, options.seed, Path(folder), options.lora_rank)
    verdict = f"different: {', '.join(found)}" if found else "all equal"
    print(f"{options.kills} kills, {options.steps} steps: {verdict}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
