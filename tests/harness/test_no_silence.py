"""Nobody waits in the dark: evaluations have a bar and can be stopped, slow rewards are named, ends say what next."""

import json
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import PRETRAINED

import grpo
from harness import command_line, evaluation, prompts, terminal
from harness.metrics import Alarms
from harness.terminal import WATCH
from mathformer import ArithmeticTask
from tasks import load_task


class Few(ArithmeticTask):
    def __init__(self):
        super().__init__(eval_size=6)


class Sleepy(Few):
    def reward(self, text, example):
        time.sleep(2.5 * (text != ""))  # not in the check at the start
        return super().reward(text, example)


class Forgetful(Few):
    def reward(self, text, example):
        return None


HERE = str(Path(__file__).resolve())


@pytest.fixture
def bars(monkeypatch):
    """Every bar that is made, with its total and what it was moved by."""
    made = []

    class Bar(terminal.tqdm):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            made.append([more.get("desc"), more.get("total"), self])

    monkeypatch.setattr(terminal, "tqdm", Bar)
    return made


# ==== Evaluations =====================================================================================================


def test_an_evaluation_has_a_bar_that_ends_full(make_config, bars):
    moved = []
    tick = WATCH.tick

    def watched(ended):
        tick(ended)
        if WATCH.bar is not None:
            moved.append(WATCH.bar.n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WATCH, "tick", watched)
        grpo.train(make_config(task=f"{HERE}:Few", steps=0, eval_samples=3, group_size=2, prompts_per_step=1))
    ((name, total, bar),) = [bar for bar in bars if bar[0]]
    assert name == "evaluating 6 x 5" and total == 30, "greedy, three samples, and made to show its steps"
    assert moved == sorted(moved) and len(set(moved)) > 3, "it moves while completions end"
    assert bar.n == 30
    assert WATCH.bar is None


def test_a_long_evaluation_is_announced_with_what_would_shorten_it(make_config, monkeypatch, capsys):
    monkeypatch.setattr(WATCH, "LONG", 0.0)
    clock = time.monotonic
    shift = iter(range(0, 10**9, 100))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock() + next(shift))
    grpo.train(make_config(task=f"{HERE}:Few", steps=0, eval_samples=3, group_size=2, prompts_per_step=1))
    said = [line for line in "".join(capsys.readouterr()).splitlines() if "this evaluation takes up to" in line]
    assert len(said) == 1 and "hours here (6 problems x 5 completions of at most 16 tokens)" in said[0]
    assert "lower task_args.eval_size, eval_samples or max_completion_tokens" in said[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_evaluation_between_two_tokens(number, make_config, monkeypatch, capsys):
    """It is not logged, and a resumed run does it again."""
    tick, ticks = WATCH.tick, []

    def watched(ended):
        ticks.append(1)
        if len(ticks) == 5:
            signal.raise_signal(number)
        tick(ended)

    config = make_config(task=f"{HERE}:Few", steps=1, eval_samples=2, group_size=2, prompts_per_step=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WATCH, "tick", watched)
        summary = grpo.train(config)
    folder = summary["run"]
    assert summary["interrupted"] and len(ticks) == 5
    assert (folder / "eval.jsonl").read_text() == ""
    assert "go on with: python grpo.py --resume" in capsys.readouterr().out
    assert not WATCH.stop.is_set(), "the next evaluation of this process is not stopped"
    resumed = grpo.train(grpo.parse_config(["--resume", str(folder)]))
    assert not resumed.get("interrupted")
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]


def test_the_time_of_a_step_on_the_bar_is_without_evaluations(make_config, bars, monkeypatch):
    unpaused = []
    monkeypatch.setattr(terminal.tqdm, "unpause", lambda bar: unpaused.append(bar))
    grpo.train(make_config(task=f"{HERE}:Few", steps=1, eval_samples=1, group_size=2, prompts_per_step=1))
    of_steps = [bar for name, _, bar in bars if name is None]
    assert len(of_steps) == 1 and unpaused.count(of_steps[0]) == 2


@pytest.mark.parametrize("share, low, high", [(0.0, 0.0, 0.17), (1.0, 0.83, 1.0), (0.5, 0.2, 0.8)])
def test_shares_that_are_all_the_same_have_an_honest_interval(share, low, high):
    found = evaluation.clustered_interval([share] * 20)
    assert found == evaluation.wilson_interval(share, 20)
    assert low <= found[0] <= share <= found[1] <= high and found[1] - found[0] > 0.1


# ==== Rewards =========================================================================================================


def test_a_reward_that_does_not_return_is_named(make_config, monkeypatch, capsys):
    monkeypatch.setattr(prompts, "PATIENCE", prompts.Patience())
    monkeypatch.setattr(prompts.Patience, "SECONDS", 0.5)
    task = Sleepy()
    problem = prompts.Problem(task.eval()[0], "a prompt", [1])
    prompts.judge(task, "", problem)
    prompts.judge(task, "an answer", problem)
    said = "".join(capsys.readouterr())
    assert said.count("has not returned for 0.5 s: --reward_seconds would end it") == 1
    assert "Sleepy.reward() for the prompt 'a prompt' and the completion 'an answer'" in said
    assert threading.active_count() < 20


def test_a_reward_with_a_time_limit_is_checked_like_any_other():
    task = load_task(f"{HERE}:Forgetful", {}, reward_seconds=5.0)
    with pytest.raises(grpo.UsageError, match="must be a dict with the keys .*, but is None"):
        prompts.judge(task, "x", prompts.Problem({}, "p", [1]))


def test_the_share_of_rewards_that_time_out_counts_those_that_do_not():
    task = load_task(f"{HERE}:Few", {}, reward_seconds=5.0)
    parts = prompts.judge(task, "", prompts.Problem(task.eval()[0], "p", [1]))
    assert (parts["timed_out"], parts["worker_died"]) == (0, 0)


def test_rewards_that_all_time_out_are_an_alarm():
    row = dict(step=1, zero_advantage_groups=0.5, truncated=0.0, kl_ref=None, sampler_logp_gap=0.0)
    row |= dict(nonfinite_updates=0, skipped_updates=0)
    alarms = Alarms(1)
    said = [alarms(row | {"timed_out": share}) for share in (1.0, 1.0, 1.0, 1.0, 0.9)]
    assert [len(warnings) for warnings in said] == [0, 0, 1, 0, 0] and "every reward has timed out" in said[2][0]
    assert Alarms(1)(row) == []


# ==== First and last words ============================================================================================


@pytest.mark.parametrize(
    "flags, said",
    [("", True), ("--seed 3", True), ("--save_steps 20", True), ("--steps 1000", False), ("--lr 1", False)],
)
def test_about_a_minute_is_said_of_the_recipe_as_it_is(flags, said):
    assert ("about a minute" in grpo.parse_config(flags.split()).about) == said


def test_the_last_lines_are_commands_that_are_right(make_config, capsys):
    config = make_config(task=f"{HERE}:Few", steps=1, eval_samples=1, group_size=2, prompts_per_step=1)
    folder = grpo.train(config)["run"]
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("  ") and "python " in line]
    commands = [line.split("python ")[1].split() for line in lines]
    assert [command[:3] for command in commands] == [
        ["-m", "view", "report"], ["-m", "view", "play"], ["grpo.py", "--config", str(folder / "config.yaml")]
    ]  # fmt: skip
    assert f"The model is in {folder / 'final'}, its curves are in {folder / 'curves.png'}." in out
    further = grpo.parse_config(commands[2][1:])
    assert further.model == str(folder / "final") and further.steps == 1


def test_looks_at_the_base_share_a_folder_and_nothing_that_was_trained_is_lost(make_config):
    config = make_config(task=f"{HERE}:Few", steps=0, eval_samples=1, group_size=2, prompts_per_step=1)
    first, second = grpo.train(config)["run"], grpo.train(config)["run"]
    assert first == second and first.name.endswith("-steps0") and len(list(Path(config.runs).iterdir())) == 1
    assert len((first / "eval.jsonl").read_text().splitlines()) == 1
    resumed = grpo.train(grpo.parse_config(["--resume", str(first), "--steps", "1"]))["run"]
    assert resumed == first and (first / "checkpoint-1").is_dir()
    third = grpo.train(config)["run"]
    assert third != first and (first / "checkpoint-1").is_dir()


def test_what_libraries_say_at_each_start_is_silenced_and_nothing_else(caplog, monkeypatch, capsys):
    import logging

    monkeypatch.delenv("RANK", raising=False)
    command_line.check_arguments(["--steps", "3"])
    assert capsys.readouterr().out == "loading torch, and then mathformer/pretrained ...\n"
    with caplog.at_level(logging.WARNING):
        for name, begin in command_line.NOISE:
            logging.getLogger(name).warning(f"{begin} something")
            logging.getLogger(name).warning("something is wrong")
    assert caplog.messages == ["something is wrong"] * len(command_line.NOISE)


def test_the_sampler_reports_each_token(make_config):
    model = grpo.loading.load_model(PRETRAINED)[0]
    sampler, seen = grpo.TorchSampler(model, [2]), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WATCH, "tick", lambda ended: seen.append(ended))
        samples = sampler.generate([[1, 3, 8, 17, 9]], 4, grpo.Sampling(10), seed=0)
    assert sum(int(ended.sum()) for ended in seen) == sum(not sample.truncated for sample in samples)
    assert all(ended.dtype == torch.bool for ended in seen) and len(seen) == max(sample.length for sample in samples)
