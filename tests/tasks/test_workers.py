"""Rewards with a limit in time: what no code inside a process could stop is stopped, counted, and costs no run."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

import grpo
from harness.prompts import Problem, judge_all
from tasks import load_task

TASK = """
import os, random, signal, subprocess, sys, threading, time

class Odd:
    def __init__(self, only_in=0):
        if only_in and os.getpid() != only_in:
            raise ValueError("cannot be built here")
    def train(self, rng, step):
        return {"x": rng.randrange(10)}
    def eval(self):
        return [{"x": x} for x in range(4)]
    def prompt(self, example):
        return f"<sos>{example['x']}"
    def reward(self, text, example):
        if text == "loop":
            while True:
                try:
                    time.sleep(60)
                except Exception:
                    pass
        if text == "catch":
            while True:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    signal.pthread_sigmask(signal.SIG_BLOCK, set(range(1, 64)))
                except BaseException:
                    pass
        if text == "thread":
            thread = threading.Thread(target=time.sleep, args=[60])
            thread.start()
            thread.join()
        if text.startswith("program"):
            subprocess.run([sys.executable, "-c", f"import time; time.sleep(60)  # {text}"])
        if text == "own timeout":
            raise TimeoutError("of its own")
        if text == "exit":
            sys.exit(3)
        if text == "abort":
            os.abort()
        if text == "memory":
            raise MemoryError
        if text == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if text == "slow":
            time.sleep(0.3)
        if text == "status":
            return dict(reward=subprocess.run([sys.executable, "-c", "raise SystemExit(3)"]).returncode, correct=0,
                        format=0, prediction="", ground_truth="")
        if text == "print":
            print("something to disturb")
        if text == "raises":
            raise KeyError("x")
        if text == "none":
            return None
        if text == "huge":
            return dict(reward=10**5000, correct=0, format=0, prediction="", ground_truth="")
        parts = dict(reward=float(len(text)), correct=1.0, format=1.0, prediction=text, ground_truth=example["x"])
        return parts | dict(pid=os.getpid())
"""


@pytest.fixture
def task(tmp_path):
    (tmp_path / "odd.py").write_text(TASK)
    return load_task(f"{tmp_path}/odd.py:Odd", {}, 0.7)


def rewards(task, *texts: str) -> list[dict]:
    return [result.get("parts", result) for result in task.workers.rewards([(text, {"x": 1}) for text in texts])]


@pytest.mark.parametrize("text", ["loop", "catch", "thread", "program a"])
def test_what_does_not_return_is_killed_and_counted(text, task, capsys):
    started = time.monotonic()
    before, stopped, after = rewards(task, "ab", text, "abc")
    assert time.monotonic() - started < 10
    assert (before["reward"], after["reward"], stopped["reward"], stopped["timed_out"]) == (2, 3, 0, 1)
    assert stopped["prediction"] == "reward() took longer than 0.7 s" and "timed_out" not in before
    assert "reward() took longer than 0.7 s: the answer counts as wrong" in "".join(capsys.readouterr())
    assert rewards(task, "abcd")[0]["reward"] == 4


def test_an_answer_that_came_too_late_is_wrong_whenever_it_is_looked_at(task):
    task.workers.seconds = 0.2
    assert task.workers.rewards([("slow", {"x": 1})])[0]["parts"]["timed_out"] == 1
    task.workers.look = lambda found, look=task.workers.look: (time.sleep(0.5), look(found))
    assert task.workers.rewards([("slow", {"x": 1})])[0]["parts"]["timed_out"] == 1


def test_what_a_reward_started_is_killed_with_it(task):
    rewards(task, "program of this test")
    assert "program of this test" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_a_reward_sees_how_its_own_programs_end(task):
    assert rewards(task, "status")[0]["reward"] == 3


@pytest.mark.parametrize("text", ["abort", "memory", "killed"])
def test_a_worker_that_dies_costs_one_answer(text, task, capsys):
    found = rewards(task, "ab", text, "abc", text, "a")
    assert [parts["reward"] for parts in found] == [2, 0, 3, 0, 1]
    assert [parts.get("worker_died", 0) for parts in found] == [0, 1, 0, 1, 0]
    assert "".join(capsys.readouterr()).count("a worker for rewards died") == 1


def test_a_worker_that_is_killed_from_outside_is_replaced(task):
    for worker in task.workers.workers:
        os.kill(worker.pid, signal.SIGKILL)
    found = rewards(task, *["ab"] * 6)
    assert all(parts["reward"] == 2 or parts.get("worker_died") for parts in found)
    assert [parts["reward"] for parts in rewards(task, *["ab"] * 6)] == [2] * 6


@pytest.mark.parametrize(
    "text, said", [("own timeout", "TimeoutError: of its own"), ("raises", "KeyError: 'x'"), ("exit", "SystemExit: 3")]
)
def test_what_a_reward_raises_is_named_and_no_timeout(text, said, task):
    with pytest.raises(grpo.UsageError, match=f"for the prompt 'p' and the completion '{text}' raised {said}"):
        judge_all(task, [FakeRollout(text)], [Problem({"x": 1}, "p", [1])])


@pytest.mark.parametrize("text, said", [("none", "but is None"), ("huge", "raised ValueError")])
def test_what_a_reward_gives_is_checked(text, said, task):
    with pytest.raises(grpo.UsageError, match=said):
        judge_all(task, [FakeRollout(text)], [Problem({"x": 1}, "p", [1])])


class FakeRollout:
    def __init__(self, text: str):
        self.text = text


def test_results_are_those_of_one_by_one_in_their_order(task):
    rng = random.Random(0)
    texts = [rng.choice(["", "a", "ab", "slow", "print", "\ud800", "\x00", "x" * 100_000]) for _ in range(40)]
    found = rewards(task, *texts)
    pids = {parts.pop("pid") for parts in found}
    alone = [task.reward(text, {"x": 1}) for text in texts]
    assert [{k: v for k, v in parts.items() if k != "pid"} for parts in alone] == found
    assert len(pids) == len(task.workers.workers) and os.getpid() not in pids
    assert rewards(task) == []


def test_a_task_that_a_worker_cannot_build_is_named(tmp_path):
    (tmp_path / "odd.py").write_text(TASK)
    with pytest.raises(grpo.UsageError, match="cannot be built in a process of its own: .*built here"):
        load_task(f"{tmp_path}/odd.py:Odd", {"only_in": os.getpid()}, 1.0)


def test_no_worker_outlives_its_run(tmp_path):
    """Also if the run is killed while a worker is busy."""
    (tmp_path / "odd.py").write_text(TASK)
    code = f"from tasks import load_task; t = load_task({str(tmp_path / 'odd.py:Odd')!r}, {{}}, 1000.0); "
    code += "print([w.pid for w in t.workers.workers], flush=True); t.workers.rewards([('loop', {})] * 9)"
    root = Path(grpo.__file__).parent
    with subprocess.Popen([os.sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) as run:
        pids = json.loads(run.stdout.readline())
        time.sleep(0.5)
        run.kill()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
