"""What the start prints, and what goes to a library's log instead of the terminal."""

import os
import subprocess
import sys
import time

import pytest

from harness import messages
from harness.messages import LibraryLog, stage
from harness.settings import HERE as ROOT


def test_a_quick_stage_says_nothing_and_a_slow_one_how_long_it_takes(capfd, monkeypatch):
    monkeypatch.setattr(messages, "SLOW", 0.2)
    with stage("quick"):
        pass
    with stage("slow"):
        time.sleep(0.4)
        begun = capfd.readouterr().out
    assert begun == "slow ...\n" and capfd.readouterr().out == "slow: 0.4 s\n"
    time.sleep(0.3)
    assert capfd.readouterr().out == "", "the line of the quick one came late"


def test_a_stage_that_fails_is_not_said_to_be_over(capfd, monkeypatch):
    monkeypatch.setattr(messages, "SLOW", 0.1)
    with pytest.raises(ValueError), stage("slow"):
        time.sleep(0.2)
        raise ValueError
    assert capfd.readouterr().out == "slow ...\n"


def run(code: str) -> subprocess.CompletedProcess:
    """In a process of its own, whose streams are those of the system."""
    begin = "import logging, os, subprocess, sys\nfrom pathlib import Path\nfrom harness.messages import *\n"
    return subprocess.run([sys.executable, "-c", begin + code], capture_output=True, text=True, cwd=ROOT)


def test_a_stage_known_to_be_slow_is_told_before_its_output_is_taken_away():
    done = run("with stage('starting', is_slow=True), LibraryLog('library').everything(): print('chatter')")
    assert done.stdout == "starting ...\nstarting: 0.0 s\n" and not done.stderr


def test_all_output_goes_to_the_log_and_comes_back():
    done = run("""
log = LibraryLog("library")
print("before")
with log.everything():
    print("from Python")
    os.write(2, b"from C\\n")
    subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
print("after")
try:
    with log.everything():
        print("then it failed", file=sys.stderr)
        raise ValueError
except ValueError:
    print("and went on")
print(Path(log.path).read_text().split("\\n"), file=sys.stderr)
os.unlink(log.path)
""")
    assert done.stdout == "before\nafter\nand went on\n"
    assert eval(done.stderr) == ["from Python", "from C", "from a child", "then it failed", ""]


def test_a_log_moves_to_the_run_and_goes_on_behind_what_is_there(tmp_path):
    (tmp_path / "library.log").write_text("an earlier start\n")
    done = run(f"""
log, logger = LibraryLog("library"), logging.getLogger("own")
with log.everything():
    print("while it started")
log.take("own")
logger.warning("before there is a folder")
first = log.path
log.move_to(Path({str(tmp_path)!r}))
log.move_to(Path({str(tmp_path)!r}))
logger.warning("in a step")
logging.getLogger("own.below").error("that %s", "matters")
print(os.path.exists(first))
""")
    lines = (tmp_path / "library.log").read_text().splitlines()
    assert lines[:2] == ["an earlier start", "while it started"] and len(lines) == 5
    assert [line.split(": ")[1] for line in lines[2:]] == ["before there is a folder", "in a step", "that matters"]
    assert done.stdout == "False\n" and done.stderr == "own.below: that matters\n"


def test_each_process_has_a_log_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(messages.PartialState(), "process_index", 1)
    log = LibraryLog("library")
    log.move_to(tmp_path)
    assert log.path == str(tmp_path / "library-1.log") and os.path.exists(log.path)
