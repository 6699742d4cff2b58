"""Nothing is lost, nothing hangs: kills, damage, full disks, numbers that are not finite, rewards that never return."""

import ast
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from kill_and_resume import differences
from kill_and_resume import run as kill_and_resume
from safetensors.torch import load_file

import grpo
from harness import files, loading, run_folder
from harness.checkpoints import LOGS
from harness.checkpoints import damage as damage_of
from harness.metrics import Alarms
from harness.run_folder import RunFolder
from harness.terminal import show_groups

SETTINGS = dict(prompts_per_step=2, group_size=4, max_completion_tokens=8, max_prompt_tokens=20, lr=1e-3)
SETTINGS |= dict(eval_samples=2, steps=6, save_steps=2, eval_steps=0)
OWN_TASK = """
import itertools

class Own:
    def __init__(self, hangs=False):
        self.hangs = hangs
    def train(self, rng, step):
        return {"x": rng.randrange(10)}
    def eval(self):
        return [{"x": x} for x in range(4)]
    def prompt(self, example):
        return f"<sos>{example['x']}"
    def reward(self, text, example):
        while self.hangs and text:
            pass
        right = float(len(text) % 2)
        return dict(reward=right, correct=right, format=1.0, prediction=text, ground_truth="odd")
"""


@pytest.fixture
def run(model, tokenizer, tmp_path):
    """A run of a random tiny model on a task that it can learn; keyword arguments are settings."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "own.py").write_text(OWN_TASK)

    def start(**settings) -> Path:
        defaults = dict(model=str(tmp_path / "model"), task=f"{tmp_path}/own.py:Own", runs=str(tmp_path / "runs"))
        return grpo.train(grpo.Config(**defaults | SETTINGS | settings))["run"]

    return start


def resume(folder: Path, *flags: str) -> Path:
    return grpo.train(grpo.parse_config(["--resume", str(folder), *flags]))["run"]


def stopped_after(folder: Path, step: int) -> Path:
    """A copy of the run's folder as it was when it was killed somewhere behind this checkpoint."""
    copy = folder.with_name(f"{folder.name}-stopped")
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "final")
    for checkpoint in copy.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    return copy


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# Kills and damage


def test_a_killed_run_ends_as_one_that_was_not(tmp_path):
    """`python tests/harness/kill_and_resume.py` does this with 20 kills."""
    assert kill_and_resume(kills=12, steps=40, seed=1, folder=tmp_path) == []


def test_a_killed_run_with_adapters_ends_as_one_that_was_not(tmp_path):
    assert kill_and_resume(kills=4, steps=16, seed=2, folder=tmp_path, lora_rank=4) == []


def test_the_comparison_of_runs_sees_what_differs(run, tmp_path):
    one, other = run(keep_last=3), run(keep_last=3, seed=1)
    for folder in (one, other):
        (folder / "eval-5.jsonl").write_text("")
    assert differences(one, one) == []
    found = differences(one, other)
    assert {"final/model.safetensors", "checkpoint-6/optimizer.state", "rollouts.jsonl", "metrics"} <= set(found)


def test_a_run_killed_before_its_first_checkpoint_starts_over_in_its_folder(run, capsys):
    whole = run()
    stopped = stopped_after(whole, 0)
    assert resume(stopped) == stopped
    assert (stopped / "rollouts.jsonl").read_bytes() == (whole / "rollouts.jsonl").read_bytes()
    assert [row["step"] for row in rows(stopped, "eval.jsonl")] == [0, 6]
    assert "going on from" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["a byte", "cut off", "no state", "a file is missing", "a log is shorter"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(damage, run, capsys):
    whole = run(keep_last=3)
    stopped = stopped_after(whole, 4)
    newest = stopped / "checkpoint-4"
    weights = bytearray((newest / "model.safetensors").read_bytes())
    if damage == "a byte":
        weights[-5] ^= 1
        (newest / "model.safetensors").write_bytes(weights)
    elif damage == "cut off":
        (newest / "optimizer.state").write_bytes((newest / "optimizer.state").read_bytes()[:-100])
    elif damage == "no state":
        (newest / "state.json").write_text('{"step": 4')
    elif damage == "a file is missing":
        (newest / "config.json").unlink()
    else:
        size = json.loads((stopped / "checkpoint-2" / "state.json").read_text())["log_sizes"]["metrics.jsonl"]
        (stopped / "metrics.jsonl").write_bytes((stopped / "metrics.jsonl").read_bytes()[: size + 3])
    capsys.readouterr()
    resume(stopped)
    out = capsys.readouterr().out
    assert f"{newest} is damaged (" in out and f"going on from {stopped / 'checkpoint-2'}" in out
    assert (stopped / "rollouts.jsonl").read_bytes() == (whole / "rollouts.jsonl").read_bytes()
    for name in ("model.safetensors", "optimizer.state"):
        a, b = load_file(whole / "checkpoint-6" / name), load_file(stopped / "checkpoint-6" / name)
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert not damage_of(stopped / "checkpoint-4", stopped), "the damaged one was written again, and is whole"


def test_what_a_person_calls_a_checkpoint_is_left_alone(run):
    folder = run(steps=2, save_steps=1, keep_last=1)
    own = [folder / name for name in ("checkpoint-best", "checkpoint-1-keep", "checkpoint-2.zip")]
    for path in own:
        path.mkdir()
    assert resume(folder, "--steps", "4") == folder
    assert all(path.exists() for path in own)
    assert [path.name for path in RunFolder(folder).checkpoints()] == ["checkpoint-4"]


def test_where_all_checkpoints_are_damaged_nothing_is_overwritten(run):
    stopped = stopped_after(run(keep_last=3), 4)
    for checkpoint in stopped.glob("checkpoint-*"):
        (checkpoint / "state.json").unlink()
    before = (stopped / "rollouts.jsonl").read_bytes()
    with pytest.raises(grpo.UsageError, match="no checkpoint that is whole"):
        resume(stopped)
    assert (stopped / "rollouts.jsonl").read_bytes() == before


@pytest.mark.parametrize("kl_coef, step, refused", [(0.1, 4, True), (0.0, 4, False), (0.0, 0, True)])
def test_a_run_goes_on_only_from_the_model_that_it_began_with(kl_coef, step, refused, run, tmp_path):
    """It is the reference of a KL penalty, and where the run begins if there is no checkpoint."""
    stopped = stopped_after(run(keep_last=3, kl_coef=kl_coef), step)
    file = tmp_path / "model" / "model.safetensors"
    before = file.read_bytes()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    if refused:
        with pytest.raises(grpo.UsageError, match="is not the model that .* began with: model.safetensors changed"):
            resume(stopped)
        file.write_bytes(before)
    resume(stopped)


@contextmanager
def full_disk(limit: int):
    """No file can grow over so many bytes: a real error of a real write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("fails", ["weights", "optimizer"])
def test_a_save_that_fails_loses_no_earlier_checkpoint(fails, run, monkeypatch):
    """Stopped by a full disk in the middle of its second checkpoint, and gone on with when there is space."""
    whole, save, broken = run(), RunFolder.save_checkpoint, []

    def save_on_a_full_disk(self, step, model, *args, **state):
        if step != 4:
            return save(self, step, model, *args, **state)
        size = (self.path / "checkpoint-2" / "model.safetensors").stat().st_size
        broken.append(self.path)
        with full_disk(size // 2 if fails == "weights" else size + 10_000):
            save(self, step, model, *args, **state)

    monkeypatch.setattr(RunFolder, "save_checkpoint", save_on_a_full_disk)
    with pytest.raises(grpo.UsageError, match="checkpoint-4 in .* could not be .*; checkpoint-2 stands. Free"):
        run()
    monkeypatch.setattr(RunFolder, "save_checkpoint", save)
    (folder,) = broken
    assert [path.name for path in RunFolder(folder).checkpoints()] == ["checkpoint-2"]
    assert not (folder / ".partial").exists()
    resume(folder)
    assert (folder / "rollouts.jsonl").read_bytes() == (whole / "rollouts.jsonl").read_bytes()


def test_a_log_that_cannot_be_written_ends_the_run_in_one_line(run):
    whole = run(steps=2)
    limit = (whole / "rollouts.jsonl").stat().st_size - 200
    with pytest.raises(grpo.UsageError, match="rollouts.jsonl in .* could not be written"), full_disk(max(limit, 1)):
        RunFolder(whole).append("rollouts.jsonl", [{"a": "b" * 1000}])


def test_config_and_csv_are_replaced_whole(tmp_path, make_config, monkeypatch):
    folder = RunFolder.create(make_config(runs=str(tmp_path)))
    folder.write_config(make_config(runs=str(tmp_path)))
    before = (folder.path / "config.yaml").read_text()
    monkeypatch.setattr(files, "sync_to_disk", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # killed while the new one is being written
        folder.write_config(make_config(runs=str(tmp_path), steps=7))
    assert (folder.path / "config.yaml").read_text() == before


def test_the_record_of_a_run_is_written_before_its_first_checkpoint(run, monkeypatch, tmp_path):
    """It is made beside the first steps, as long as it may take."""
    checksums, log_step, logged, waited = run_folder.checksums_of_model, RunFolder.log_step, threading.Event(), []

    def slow(model):
        waited.append(logged.wait(30))
        time.sleep(1.0)
        return checksums(model)

    monkeypatch.setattr(RunFolder, "log_step", lambda *args: (log_step(*args), logged.set()))

    monkeypatch.setattr(run_folder, "checksums_of_model", slow)
    monkeypatch.setattr(run_folder, "write_state", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(steps=1, save_steps=1, eval_steps=0)
    (folder,) = (tmp_path / "runs").iterdir()
    assert waited == [True] and len(rows(folder, "metrics.jsonl")) == 1, "the step did not wait for it"
    assert (folder / "run.json").exists(), "the checkpoint waited"


# Training that notices


def test_three_steps_that_are_not_finite_end_the_run_with_its_rollouts_saved(run, monkeypatch, tmp_path):
    weights, policy_loss = [], grpo.policy_loss

    def breaks(logps, *args):
        loss, clipped = policy_loss(logps, *args)
        return loss * float("nan"), clipped

    monkeypatch.setattr(grpo, "policy_loss", breaks)
    update = grpo.update

    def watched(policy, *args):
        row = update(policy, *args)
        weights.append([p.detach().clone() for p in policy.parameters()])
        return row

    monkeypatch.setattr(grpo, "update", watched)
    with pytest.raises(grpo.UsageError, match="not finite in 3 steps in a row, up to step ") as told:
        run(dead_groups="keep")
    (folder,) = (tmp_path / "runs").iterdir()
    last = int(re.search(r"up to step (\d+)", str(told.value))[1])
    assert len(rows(folder, "rollouts.jsonl")) == last * 8
    metrics = [(row["nonfinite_updates"], row["zero_advantage_groups"] == 1) for row in rows(folder, "metrics.jsonl")]
    assert metrics[-3:] == [(1, False)] * 3 and all(bad == 1 or dead for bad, dead in metrics)
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[-1], strict=True))


def test_a_diverged_model_is_told_in_one_line(model):
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(grpo.UsageError, match="logits are not numbers: it has diverged, or overflows"):
        grpo.TorchSampler(model, [2]).generate([[1, 5]], 2, grpo.Sampling(4), seed=0)


def test_an_error_on_the_way_begins_a_line_of_its_own(tmp_path):
    """And not the one of the progress bar, where nobody looks for it."""
    words = f"grpo.py --lr 1e30 --lr_schedule constant --steps 5 --minibatches 1 --runs {tmp_path} --eval_samples 1"
    words += " --task_args.eval_size 2 --prompts_per_step 4"
    done = subprocess.run([sys.executable, *words.split()], capture_output=True, text=True)
    assert done.returncode == 1 and "has diverged" in done.stderr
    assert re.split("[\r\n]", done.stderr.strip())[-1].startswith("error: "), done.stderr[-500:]
    assert "step/s" in done.stderr, "there was a bar"


HEALTHY = dict(step=1, zero_advantage_groups=0.5, truncated=0.1, kl_ref=0.1, sampler_logp_gap=1e-4, age=0.0)
HEALTHY |= dict(nonfinite_updates=0, skipped_updates=0)


@pytest.mark.parametrize(
    "symptom, patience, said",
    [
        (dict(truncated=1.0), 10, "all completions have been cut off"),
        (dict(kl_ref=1.5), 3, "far from the reference"),
        (dict(sampler_logp_gap=0.06), 1, "by more than rounding"),
    ],
)
def test_each_alarm_is_given_once_after_its_patience(symptom, patience, said):
    alarms = Alarms(1)
    assert all(alarms(HEALTHY) == [] for _ in range(20))
    for _ in range(patience - 1):
        assert alarms(HEALTHY | symptom) == []
    assert alarms(HEALTHY) == []  # it starts to count anew
    given = [alarms(HEALTHY | symptom) for _ in range(patience + 20)]
    assert [len(texts) for texts in given] == [0] * (patience - 1) + [1] + [0] * 20
    assert said in given[patience - 1][0]


@pytest.mark.parametrize(
    "shares, at",
    [([1.0] * 12, 10), ([0.5] * 5 + [1.0] * 12, 13), ([1.0, 0.8] * 8, 10), ([0.9, 0.8] * 10, None), ([1.0] * 9, None)],
)
def test_the_alarm_of_dead_groups_looks_at_ten_steps_together(shares, at):
    """Streaks are broken by chance: 39 of 60 steps without a live group, in streaks of 7, once went unseen."""
    alarms = Alarms(1)
    given = [alarms(HEALTHY | dict(zero_advantage_groups=share)) for share in shares]
    said = [step for step, texts in enumerate(given, 1) if texts]
    assert said == ([at] if at else [])
    assert all("of the last 10 steps' groups nine in ten" in given[step - 1][0] for step in said)


def test_alarms_take_what_was_not_measured():
    assert Alarms(1)(HEALTHY | dict(kl_ref=None, sampler_logp_gap=None)) == []


def test_steps_in_which_some_update_was_good_are_no_end():
    alarms = Alarms(4)
    for bad, skipped in ((4, 0), (3, 1), (3, 0), (1, 3), (2, 2), (0, 4)):
        alarms(HEALTHY | dict(nonfinite_updates=bad, skipped_updates=skipped))
    with pytest.raises(grpo.UsageError):
        for _ in range(3):
            alarms(HEALTHY | dict(nonfinite_updates=2, skipped_updates=2))


def test_a_warning_reaches_the_terminal_of_a_run(run, capsys, monkeypatch):
    judge_all = grpo.judge_all
    monkeypatch.setattr(grpo, "judge_all", lambda *args: [parts | {"reward": 1.0} for parts in judge_all(*args)])
    run(steps=12)
    assert capsys.readouterr().out.count("step 10: of the last 10 steps' groups nine in ten") == 1


# Rewards


def test_a_reward_that_never_returns_is_stopped_and_pays_nothing(run):
    folder = run(task_args=dict(hangs=True), reward_seconds=0.05, steps=1, eval_samples=1)
    found = rows(folder, "rollouts.jsonl")
    assert all(row["reward"] == 0 and row["timed_out"] == 1 for row in found)
    assert found[0]["prediction"] == "reward() took longer than 0.05 s"
    assert rows(folder, "metrics.jsonl")[0]["timed_out"] == 1


def test_a_reward_that_raises_is_named_with_its_prompt_and_completion(run, monkeypatch):
    monkeypatch.setattr(loading, "load_task", lambda *args: Raises())
    with pytest.raises(grpo.UsageError, match=r"Raises.reward\(\) for the prompt '<sos>1' and .* raised KeyError: 'x'"):
        run()


class Raises:
    def train(self, rng, step):
        return {}

    def eval(self):
        return [{}]

    def prompt(self, example):
        return "<sos>1"

    def reward(self, text, example):
        return example["x"]


# Safe by default


def test_nothing_is_evaluated_or_unpickled():
    """No eval, no exec, no pickle, no torch.load in what runs."""
    for path in [*Path(".").glob("*.py"), *Path("mathformer").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "compile", "__import__", "torch.load", "torch.save"), (path, name)
                assert "pickle" not in name and "yaml.load" != name, (path, name)
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "pickle" not in ast.unparse(node), path


def test_code_of_a_model_is_not_run_unless_asked(tmp_path, tokenizer):
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    proof = tmp_path / "was_run"
    code = f"open({str(proof)!r}, 'w').close()\nfrom transformers import PretrainedConfig\n"
    (tmp_path / "code.py").write_text(code + "class Config(PretrainedConfig):\n    model_type = 'strange'\n")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(grpo.UsageError, match="trust_remote_code"):
        loading.load_model_config(str(tmp_path))
    assert not proof.exists()
    assert loading.load_model_config(str(tmp_path), trust_remote_code=True).model_type == "strange" and proof.exists()


def test_what_a_model_wrote_cannot_move_the_cursor(capsys):
    rollouts = [
        grpo.Rollout([1], [5], [0.0], False, f"p\x1b[2J{i}", "t\x1b]0;x\x07\r\n", dict(correct=float(i % 2)))
        for i in range(4)
    ]
    show_groups(1, rollouts, 2)
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "\r" not in out and "\\x1b[2J" in out


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(run, monkeypatch):
    """The system writes when it likes: after a power cut, a file that was not waited for may be there and be empty."""
    synced, missing, fsync, rename = set(), [], os.fsync, Path.rename

    def watched(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def named(self, target):
        if Path(target).name.startswith("checkpoint-"):
            needed = [path for path in self.rglob("*") if path.is_file()] + [self]
            needed += [self.parent / name for name in LOGS]
            missing.extend(path for path in needed if str(path) not in synced)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(Path, "rename", named)
    folder = run(steps=1)
    assert (folder / "checkpoint-1").exists() and missing == [] and str(folder) in synced
