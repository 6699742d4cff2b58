"""Several processes, on a CPU with gloo: they train as one does, write once, and stop together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import several_processes
import torch

from harness import devices, loading, parallel
from harness.run_folder import RunFolder
from harness.settings import UsageError

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--config_file"]
DEEPSPEED = pytest.param("deepspeed_zero2", marks=pytest.mark.slow)  # compiles an operator: 40 s on a new machine
SMALL = dict(task_args='{"eval_size": 40}', eval_samples=2, prompts_per_step=5, max_completion_tokens=24, save_steps=2)
SMALL |= dict(lr_schedule="constant")  # with another, a run that is resumed cannot get more steps
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": ".:tests:tests/harness"}


def command_line(kind: str, script: str, *arguments: str) -> list[str]:
    return [*LAUNCH, f"configs/accelerate/{kind}.yaml", "--main_process_port", "0", script, *arguments]


def launch(kind: str, script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = command_line(kind, script, *arguments)
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


def flags(runs: Path, **settings) -> list[str]:
    return [f"--{name}={value}" for name, value in (SMALL | settings | dict(runs=runs)).items()]


def grpo_run(kind: str, runs: Path, **settings) -> subprocess.CompletedProcess:
    return launch(kind, "grpo.py", *flags(runs, **settings))


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    timed = ("seconds_sample", "seconds_train", "seconds_sync", "tokens_per_second", "peak_memory")
    found = [json.loads(line) for line in open(folder / name)]
    return [{key: value for key, value in row.items() if key not in timed} for row in found]


@pytest.mark.floats
@pytest.mark.usefixtures("no_compile")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", DEEPSPEED])
def test_two_processes_train_as_one(kind, tmp_path):
    cases = [case for case in several_processes.CASES if kind == "ddp" or case not in several_processes.WHOLE_ONLY]
    done = launch(kind, "tests/harness/several_processes.py", str(tmp_path / "two.pt"), "fp32", *cases)
    assert not done.returncode, done.stderr[-3000:]
    two = torch.load(tmp_path / "two.pt")
    assert two.pop("kind") == {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED"}[kind]
    assert two.keys() == {*cases, "one row"}
    one = several_processes.results(cases)
    for case, found in two.items():
        exact = case not in several_processes.WHOLE_ONLY  # in bf16, of 3 digits, sums in another order are other sums
        assert found["drift"] == 0, f"{case}: the processes have come to weights of their own"
        for name, weight in one[case]["weights"].items():
            apart = (weight - found["weights"][name]).abs()
            if exact:
                # AdamW divides a gradient by its size. Where it is nearly 0, its rounding, which depends on how rows
                # fall into batches and on the processor, decides over the direction: few weights, three steps at most.
                assert apart.max() < 3 * several_processes.LR and (apart > 1e-5).float().mean() < 0.01, (case, name)
            else:
                assert apart.max() < 0.02, (case, name)
        apart = (torch.tensor(sum(found["logps"], [])) - torch.tensor(sum(one[case]["logps"], []))).abs()
        assert apart.max() < (1e-5 if exact else 0.3) and apart.mean() < (1e-6 if exact else 0.02), case
        for key, value in one[case]["metrics"].items() if exact else ():
            assert found["metrics"][key] == (None if value is None else pytest.approx(value, rel=1e-3, abs=1e-5)), key
    assert not torch.equal(
        *(one[case]["weights"]["model.embed_tokens.weight"] for case in ("uneven shares", "nothing to learn"))
    )


def test_log_probs_of_a_sharded_policy_in_bf16_are_not_rounded_to_it(tmp_path):
    """accelerate's own setting for FSDP2 rounds what comes out of the policy."""
    cases = ["uneven shares", "adapters"]
    done = launch("fsdp2", "tests/harness/several_processes.py", str(tmp_path / "two.pt"), "bf16", *cases)
    assert not done.returncode, done.stderr[-3000:]
    adapted = torch.load(tmp_path / "two.pt")["adapters"]
    assert adapted["metrics"]["grad_norm"] > 0 and adapted["drift"] == 0, "frozen in bf16, trained in float32"
    found = torch.load(tmp_path / "two.pt")["uneven shares"]
    logps = torch.tensor(sum(found["logps"], []))
    assert (logps != logps.bfloat16().float()).float().mean() > 0.9
    exact = torch.tensor(sum(several_processes.results(["uneven shares"])["uneven shares"]["logps"], []))
    assert 1e-4 < (logps - exact).abs().mean() < 0.1, "the policy itself is in bf16"
    assert all(weight.dtype == torch.float32 for weight in found["weights"].values())


@pytest.mark.parametrize("rank", [0, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow), DEEPSPEED])
def test_a_run_of_two_processes_leaves_one_folder_and_resumes(kind, rank, tmp_path):
    """Five prompts for two processes: three and two."""
    lora = dict(lora_rank=rank, kl_coef=0.01) if rank else {}
    whole = grpo_run(kind, tmp_path / "whole", steps=4, **lora)
    assert not whole.returncode, whole.stderr[-3000:]
    (folder,) = (tmp_path / "whole").iterdir()
    metrics = rows(folder, "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    completions = rows(folder, "rollouts.jsonl")
    assert len(completions) == 4 * 5 * 8
    for start in range(0, len(completions), 8):  # groups are whole, and no two processes sampled the same
        assert len({row["prompt"] for row in completions[start : start + 8]}) == 1
    first = completions[:40]
    assert len({row["prompt"] for row in first}) == 5
    assert metrics[0]["reward"] == pytest.approx(sum(row["reward"] for row in first) / 40)
    assert metrics[0]["tokens"] == sum(row["length"] for row in first)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert whole.stdout.count("GRPO:") == whole.stdout.count("The model is in") == 1
    # the greedy answers of the start do not depend on who wrote them
    alone = subprocess.run(
        [sys.executable, "grpo.py", *flags(tmp_path / "alone", steps=0)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert not alone.returncode, alone.stderr[-3000:]
    (single,) = (tmp_path / "alone").iterdir()
    assert rows(single, "eval.jsonl")[0]["accuracy"] == rows(folder, "eval.jsonl")[0]["accuracy"]

    assert not grpo_run(kind, tmp_path / "parts", steps=2, **lora).returncode
    (parts,) = (tmp_path / "parts").iterdir()
    resumed = grpo_run(kind, tmp_path / "parts", resume=parts, steps=4)
    assert not resumed.returncode, resumed.stderr[-3000:]
    assert rows(parts, "metrics.jsonl") == metrics
    a, b = (loading.load_model(str(path / "final"))[0] for path in (folder, parts))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_a_process_that_dies_takes_the_others_with_it(tmp_path):
    (tmp_path / "fragile.py").write_text(
        "from mathformer import ArithmeticTask\n"
        "import os\n"
        "class Fragile(ArithmeticTask):\n"
        "    steps = 0\n"
        "    def train(self, rng, step):\n"
        "        self.steps = step\n"
        "        return super().train(rng, step)\n"
        "    def reward(self, text, example):\n"
        "        if os.environ['RANK'] == '1' and self.steps == 4:\n"
        "            raise ValueError('the judge has left')\n"
        "        return super().reward(text, example)\n"
    )
    done = grpo_run("ddp", tmp_path / "runs", task=f"{tmp_path / 'fragile.py'}:Fragile", model="mathformer/pretrained",
                    steps=6, max_prompt_tokens=48)  # fmt: skip
    assert done.returncode and "error: process 1: Fragile.reward()" in done.stderr
    assert "the judge has left" in done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert len(rows(folder, "metrics.jsonl")) == 3


@pytest.mark.parametrize("signalled", ["the launcher", "one process"])
def test_a_signal_stops_all_after_the_same_step(signalled, tmp_path):
    command = command_line("ddp", "grpo.py", *flags(tmp_path, steps=10_000, save_steps=9_999))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT) as run:
        deadline = time.time() + 120
        while not list(tmp_path.glob("*/metrics.jsonl")) or not rows(next(tmp_path.iterdir()), "metrics.jsonl"):
            assert time.time() < deadline and run.poll() is None
            time.sleep(0.1)
        workers = [p for p in psutil.Process(run.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
        (run if signalled == "the launcher" else workers[0]).send_signal(signal.SIGTERM)
        printed = run.communicate(timeout=60)[0]
    (folder,) = tmp_path.iterdir()
    (checkpoint,) = folder.glob("checkpoint-*")
    assert f"stopped after step {checkpoint.name.split('-')[1]}" in printed
    assert len(rows(folder, "metrics.jsonl")) == int(checkpoint.name.split("-")[1])


def test_all_know_the_evaluations_that_the_main_process_kept(make_config, monkeypatch):
    """It cuts off later ones when a run goes on, and another process may read the file before that."""
    folder, kept = RunFolder.create(make_config()), [{"step": 2}]
    (folder.path / "eval.jsonl").write_text('{"step": 2}\n{"step": 4}\n')
    monkeypatch.setattr(parallel, "of_main_process", lambda value: kept)
    folder.start(make_config(), 2)
    assert folder.evaluations == kept


def test_more_processes_than_prompts_are_refused(make_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "64")
    with pytest.raises(UsageError, match="64 processes are to share 32 prompts_per_step"):
        devices.make_accelerator(make_config())


def test_more_processes_than_gpus_are_refused(make_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="8 processes were started on this machine.* it has 2: accelerate launch"):
        devices.make_accelerator(make_config())


def test_processes_that_cannot_meet_are_refused(make_config, monkeypatch):
    """On an Apple GPU each would be a run of its own, without a word."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(devices, "Accelerator", lambda **kwargs: type("Alone", (), dict(num_processes=1, device="mps")))
    with pytest.raises(UsageError, match="2 processes on mps cannot work together"):
        devices.make_accelerator(make_config())


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 12])
def test_shares_are_all_there_is_in_order_and_even(processes, monkeypatch):
    items, shares = list(range(10)), []
    for i in range(processes):
        state = type("State", (), dict(num_processes=processes, process_index=i))
        monkeypatch.setattr(parallel, "PartialState", lambda state=state: state)
        shares.append(parallel.share(items))
    assert sum(shares, []) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
