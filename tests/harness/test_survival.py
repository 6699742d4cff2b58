# ruff: noqa: F811  (the fixture `run` is imported)
"""A run's folder survives: two writers, foreign hands, lost terminals, the end of the time; the best is kept."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_reliability import resume, rows, run, stopped_after  # noqa: F401 (a fixture is among them)

import grpo
from harness import checkpoints, curves, evaluation, files, run_folder, terminal
from harness.files import Lock, as_line, checksum, read_rows
from harness.run_folder import RunFolder
from harness.streams import LOST, Steady
from view import __main__ as view
from view import report

ROOT = Path(grpo.__file__).parent


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    return all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


def names_of(folder: Path, pattern: str = "checkpoint-*") -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


# One writer


@pytest.fixture
def another_process():
    """Holds the lock of a folder until it is killed."""
    started = []

    def hold(folder: Path) -> subprocess.Popen:
        code = (
            f"import time; from harness.files import Lock; from pathlib import Path; lock = Lock(Path({str(folder)!r}))"
        )
        code += "; print('held', flush=True); time.sleep(60)"
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()


def test_one_process_writes_into_a_folder(run, another_process):
    stopped = stopped_after(run(keep_last=3), 4)
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file() and path.name != ".lock"}
    holder = another_process(stopped)
    with pytest.raises(
        grpo.UsageError, match=f"process {holder.pid} on .* writes into .*: wait for its end, or stop it"
    ):
        resume(stopped)
    assert before == {path: path.read_bytes() for path in before}
    report.main([str(stopped)])  # reading needs no lock
    holder.kill()
    holder.wait()
    resume(stopped)


def test_a_run_holds_its_folder_from_the_first_step_on_and_lets_go_of_it(run, monkeypatch):
    held, log_step = [], RunFolder.log_step

    def try_to_lock(self, *args):
        code = f"from harness.files import Lock; from pathlib import Path; Lock(Path({str(self.path)!r}))"
        held.append(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stderr)
        return log_step(self, *args)

    monkeypatch.setattr(RunFolder, "log_step", try_to_lock)
    folder = run(steps=1)
    assert f"process {os.getpid()} on" in held[0]
    Lock(folder).release()


def test_a_look_at_the_base_does_not_take_away_the_folder_of_another_look(run, another_process):
    first = run(steps=0)
    another_process(first)
    second = run(steps=0)
    assert second.name == f"{first.name}-2" and (first / "config.yaml").exists()


def test_a_log_that_is_being_written_is_read_up_to_its_last_whole_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_rows(path) == [{"step": 1}, {"step": 2}] and read_rows(tmp_path / "none") == []
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(grpo.UsageError, match="metrics.jsonl, line 2 is damaged: --resume leaves it out"):
        read_rows(path)


def test_the_report_bears_a_log_that_is_cut_while_it_is_read(run, monkeypatch):
    folder, choose = run(), report.choose

    def cut_meanwhile(*args):
        chosen = choose(*args)
        os.truncate(folder / "rollouts.jsonl", 1000)
        return chosen

    monkeypatch.setattr(report, "choose", cut_meanwhile)
    assert len(report.load_run(folder, 1000, 10**9)["groups"]) <= 3


# Rotation, and the best


def test_rotation_never_takes_the_checkpoint_that_was_just_written(run, monkeypatch):
    """Though one that is damaged has a larger number."""
    stopped = stopped_after(run(keep_last=9, save_steps=1), 6)
    (stopped / "checkpoint-6" / "state.json").write_text("{}")
    shutil.rmtree(stopped / "checkpoint-5")
    log_step = RunFolder.log_step

    def killed_at_6(self, row, rollouts):
        if row["step"] == 6:
            raise KeyboardInterrupt
        return log_step(self, row, rollouts)

    monkeypatch.setattr(RunFolder, "log_step", killed_at_6)
    with pytest.raises(KeyboardInterrupt):
        resume(stopped, "--keep_last", "1")
    assert names_of(stopped) == ["checkpoint-5", "checkpoint-6"]
    assert not checkpoints.damage(stopped / "checkpoint-5", stopped)


def test_links_and_foreign_names_are_left_alone(run, tmp_path):
    folder = run(steps=2, save_steps=1, keep_last=1)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder / "checkpoint-2", elsewhere)
    (folder / "checkpoint-1").symlink_to(elsewhere)
    for name in ("checkpoint-best", "checkpoint-1-keep", "checkpoint-007"):
        (folder / name).mkdir()
    (folder / "checkpoint-3.zip").touch()
    resume(folder, "--steps", "4")
    assert (elsewhere / "model.safetensors").exists() and (folder / "checkpoint-1").is_symlink()
    left = {"checkpoint-1", "checkpoint-best", "checkpoint-1-keep", "checkpoint-007", "checkpoint-3.zip"}
    assert set(names_of(folder)) == left | {"checkpoint-4"}


@pytest.fixture
def rises_and_falls(monkeypatch):
    """Evaluations whose accuracy is largest after step 2."""
    evaluate, shares = evaluation.evaluate, {0: 0.1, 2: 0.9, 4: 0.3}

    def pretended(complete, task, problems, config, step):
        row, details = evaluate(complete, task, problems, config, step)
        share = shares.get(step, 0.2)
        return row | dict(
            accuracy_sampled=share, accuracy_sampled_low=share - 0.05, accuracy_sampled_high=share + 0.05
        ), details

    monkeypatch.setattr(evaluation, "evaluate", pretended)


def test_the_best_checkpoint_is_kept(run, rises_and_falls, capsys):
    folder = run(eval_steps=2, save_steps=3, keep_last=1)
    assert names_of(folder) == ["checkpoint-2", "checkpoint-6"]
    assert f"The model after step 2 was better than the last one: {folder / 'checkpoint-2'}." in capsys.readouterr().out
    assert (
        "the best evaluation was after step 2: its model is in checkpoint-2"
        in report.load_run(folder, 9, 10**9)["notes"]
    )
    assert same_weights(folder / "final", folder / "checkpoint-6")
    assert names_of(run(eval_steps=2, save_steps=3, keep_last=1, keep_best=False)) == ["checkpoint-6"]


def test_a_new_run_goes_on_from_a_checkpoint_that_is_not_the_last(run, rises_and_falls, capsys):
    folder = run(eval_steps=2, save_steps=3, keep_last=1)
    before = {path: checksum(path) for path in folder.rglob("*") if path.is_file()}
    branch = resume(folder / "checkpoint-2", "--steps", "6")
    assert f"going on from {branch / 'checkpoint-2'}" in capsys.readouterr().out, "and not from the beginning"
    assert branch.name == f"{folder.name}-from2" and before == {path: checksum(path) for path in before}
    assert same_weights(branch / "final", folder / "final")
    assert rows(branch, "rollouts.jsonl") == rows(folder, "rollouts.jsonl")
    assert [row["step"] for row in rows(branch, "eval.jsonl")] == [0, 2, 4, 6]
    (folder / "checkpoint-2" / "config.json").unlink()
    with pytest.raises(grpo.UsageError, match="checkpoint-2 is damaged"):
        resume(folder / "checkpoint-2")


# What may fail


@pytest.mark.parametrize(
    "where, what, said",
    [
        (curves, "plot", "curves.png"),
        (run_folder, "model_card", "the model card"),
        (RunFolder, "write_csv", "metrics.csv"),
    ],
)
def test_a_picture_never_costs_a_model(where, what, said, run, monkeypatch, capsys):
    monkeypatch.setattr(where, what, lambda *args: (_ for _ in ()).throw(ValueError("weird is no backend")))
    folder = run()
    assert (folder / "final" / "model.safetensors").exists() and names_of(folder)[-1] == "checkpoint-6"
    line = f"{said} could not be made: ValueError: weird is no backend; all else goes on"
    assert line in "".join(capsys.readouterr())


@pytest.mark.curves
def test_a_model_may_have_dollars_in_its_name(run, tmp_path):
    shutil.copytree(tmp_path / "model", tmp_path / "m$_$")
    folder = run(model=str(tmp_path / "m$_$"), steps=1)
    assert (folder / "final" / "curves.png").stat().st_size > 10_000


def test_a_tracker_that_fails_costs_no_run(run, capsys, monkeypatch):
    from harness import trackers

    def start(config, folder, step):
        made = object.__new__(trackers.Trackers)
        made.trackers = [Broken()]
        return made

    class Broken:
        name = "wandb"

        def fail(self, *args, **kwargs):
            raise ConnectionError("gone")

        log = log_table = finish = fail

    monkeypatch.setattr(run_folder, "Trackers", start)
    assert (run(steps=1) / "final" / "model.safetensors").exists()
    said = "".join(capsys.readouterr())
    for what in ("a row in wandb", "the table of wandb", "the end of the trackers"):
        assert f"{what} could not be made: ConnectionError: gone" in said


# Damage and foreign hands


def test_no_flipped_bit_of_state_json_is_obeyed(run):
    checkpoint = run(steps=2) / "checkpoint-2"
    file, good = checkpoint / "state.json", checkpoints.read_state(checkpoint)
    before, rng = file.read_bytes(), random.Random(0)
    for i in range(len(before)):
        file.write_bytes(before[:i] + bytes([before[i] ^ 1 << rng.randrange(8)]) + before[i + 1 :])
        try:
            found = checkpoints.read_state(checkpoint)
        except (ValueError, grpo.UsageError):
            continue
        assert {name: found.get(name) for name in good} == good, i


def test_flipped_bits_of_other_small_files_are_refused_or_harmless(run, capsys):
    """config.yaml, run.json, the logs: a flip is one line, or changes nothing of what is trained."""
    whole = run(keep_last=3, kl_coef=0.1)
    rng = random.Random(1)
    fixed = checkpoints.fixed_settings(grpo.parse_config(["--resume", str(whole)]))
    for name in ("config.yaml", "run.json"):
        before = (whole / name).read_bytes()
        for _ in range(60):
            i = rng.randrange(len(before))
            (whole / name).write_bytes(before[:i] + bytes([before[i] ^ 1 << rng.randrange(8)]) + before[i + 1 :])
            try:
                config = grpo.parse_config(["--resume", str(whole)])
                checkpoints.changed_settings(whole / "checkpoint-6", config)
                RunFolder(whole).check_base(config.model)
            except grpo.UsageError as error:
                assert "\n" not in str(error)
                continue
            assert checkpoints.fixed_settings(config) == fixed
        (whole / name).write_bytes(before)
    stopped = stopped_after(whole, 4)
    for name in ("metrics.jsonl", "eval.jsonl"):
        before = (stopped / name).read_bytes()
        i = before.index(b'"step": ') + 8
        (stopped / name).write_bytes(before[:i] + b"9" + before[i + 1 :])
    resume(stopped)
    out = capsys.readouterr().out
    assert all(
        f"{name} is not what it was at checkpoint-4: the run goes on" in out for name in ("metrics.jsonl", "eval.jsonl")
    )
    assert same_weights(stopped / "final", whole / "final")


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(step=3), "step is 3"),
        (dict(log_sizes={"/etc/passwd": 0}), "log_sizes is"),
        (dict(log_sizes={"../other.jsonl": 0}), "log_sizes is"),
        (dict(log_sizes={"metrics.jsonl": -1}), "log_sizes is"),
        (dict(log_sizes=[]), "log_sizes is"),
        (dict(checksums={"/etc/passwd": 0}), "checksums are not of files in it"),
        (dict(checksums={"../../x": 0}), "checksums are not of files in it"),
        (dict(tokens="many"), "tokens is 'many'"),
        (dict(kl_coef=float("nan")), "kl_coef is nan"),
        (dict(kl_coef="1"), "kl_coef is '1'"),
        (dict(format=99), "has the format 99"),
    ],
)
def test_what_state_json_says_is_checked_before_it_is_obeyed(change, said, run, tmp_path):
    """Though its checksum fits: someone may have made it by hand."""
    checkpoint = run(steps=2) / "checkpoint-2"
    state = checkpoints.read_state(checkpoint) | change
    (checkpoint / "state.json").write_text(json.dumps(state | {"state_checksum": checkpoints.own_checksum(state)}))
    with pytest.raises((ValueError, grpo.UsageError), match=said):
        checkpoints.read_state(checkpoint)


@pytest.mark.parametrize("what", ["a parameter less", "another shape", "a parameter too many"])
def test_moments_that_do_not_fit_are_refused(what, run):
    stopped = stopped_after(run(keep_last=3), 4)
    checkpoint = stopped / "checkpoint-4"
    moments = load_file(checkpoint / "optimizer.state")
    if what == "a parameter less":
        moments = {name: value for name, value in moments.items() if not name.startswith("0.")}
    elif what == "another shape":
        moments["0.exp_avg"] = moments["0.exp_avg"][:1].clone()
    else:
        moments = {name.replace("0.", "999.", 1) if name.startswith("0.") else name: v for name, v in moments.items()}
    save_file(moments, checkpoint / "optimizer.state")
    state = checkpoints.read_state(checkpoint)
    state["checksums"]["optimizer.state"] = checksum(checkpoint / "optimizer.state")
    (checkpoint / "state.json").write_text(json.dumps(state | {"state_checksum": checkpoints.own_checksum(state)}))
    with pytest.raises(grpo.UsageError, match="optimizer.state has|optimizer's state has"):
        resume(stopped)


@pytest.mark.parametrize("loss", ["missing", "emptied", "a line in the middle"])
def test_lost_rollouts_do_not_cost_weights(loss, run, capsys):
    whole = run(keep_last=3)
    stopped = stopped_after(whole, 4)
    log = stopped / "rollouts.jsonl"
    if loss == "missing":
        log.unlink()
    elif loss == "emptied":
        log.write_bytes(b"")
    else:
        lines = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(b"".join([lines[0], b"x" * (len(lines[1]) - 1) + b"\n", *lines[2:]]))
    resume(stopped)
    said = "line 2 is damaged: it is left out" if loss.startswith("a line") else "has lost rows"
    assert said in capsys.readouterr().out and same_weights(stopped / "final", whole / "final")


@pytest.mark.parametrize("name", ["metrics.jsonl", "eval.jsonl"])
def test_rows_that_are_damaged_in_the_middle_are_left_out_before_training_goes_on(name, run, capsys):
    whole = run(keep_last=3, eval_steps=1)
    stopped = stopped_after(whole, 4)
    lines = (stopped / name).read_bytes().splitlines(keepends=True)
    (stopped / name).write_bytes(b"".join([lines[0], b"x" * (len(lines[1]) - 1) + b"\n", *lines[2:]]))
    resume(stopped)
    assert f"{stopped / name}, line 2 is damaged: it is left out, and {name}.damaged" in capsys.readouterr().out
    assert b"\nxxxx" in (stopped / f"{name}.damaged").read_bytes()
    steps = [row["step"] for row in read_rows(stopped / name)]
    assert steps == [row["step"] for i, row in enumerate(rows(whole, name)) if i != 1]
    assert same_weights(stopped / "final", whole / "final")
    assert not checkpoints.damage(stopped / "checkpoint-2", stopped), "bytes are where they were"


def test_a_folder_does_not_say_that_code_is_trusted(run, capsys):
    folder = run(steps=1)
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | dict(trust_remote_code=True)))
    for argv in (["--resume", str(folder)], ["--config", str(folder / "config.yaml")]):
        assert not grpo.parse_config(argv).trust_remote_code
        assert "that has to be said again, with --trust_remote_code" in capsys.readouterr().out
        assert grpo.parse_config([*argv, "--trust_remote_code"]).trust_remote_code
    assert not view.read_config(folder).trust_remote_code


def test_settings_that_were_edited_are_noticed(run, capsys):
    stopped = stopped_after(run(keep_last=3), 4)
    settings = yaml.safe_load((stopped / "config.yaml").read_text())
    (stopped / "config.yaml").write_text(yaml.safe_dump(settings | dict(lr=0.5)))
    with pytest.raises(
        grpo.UsageError, match="lr is 0.5, and .*checkpoint-4 was trained with 0.001: put it back .*--allow_changed lr"
    ):
        resume(stopped)
    with pytest.raises(grpo.UsageError, match="lr is 0.5"):
        resume(stopped, "--allow_changed", "seed")
    with pytest.raises(grpo.UsageError, match="allow_changed has lrr, and there is no such setting"):
        resume(stopped, "--allow_changed", "lrr")
    resume(stopped, "--allow_changed", "lr")
    assert "lr was 0.001 up to step 4, and is 0.5 from now on" in capsys.readouterr().out
    assert rows(stopped, "changes.jsonl") == [{"step": 4, "changed": {"lr": [0.001, 0.5]}}]
    assert [row["lr"] for row in rows(stopped, "metrics.jsonl")] == [0.001] * 4 + [0.5] * 2


def test_a_flag_may_change_what_allow_changed_names(run):
    stopped = stopped_after(run(keep_last=3), 4)
    with pytest.raises(grpo.UsageError, match="lr was 0.001 .* cannot become 0.5"):
        resume(stopped, "--lr", "0.5")
    resume(stopped, "--lr", "0.5", "--allow_changed", "lr")
    assert rows(stopped, "metrics.jsonl")[-1]["lr"] == 0.5


def test_folders_of_a_later_version_are_refused_and_older_ones_read(run, capsys):
    stopped = stopped_after(run(keep_last=3), 4)
    record = json.loads((stopped / "run.json").read_text())
    (stopped / "run.json").write_text(json.dumps(record | {"format": files.FORMAT + 1}))
    for command in (lambda: resume(stopped), lambda: report.main([str(stopped)])):
        with pytest.raises(grpo.UsageError, match=f"has the format {files.FORMAT + 1}, .* take a newer one"):
            command()
    (stopped / "run.json").unlink()
    for checkpoint in stopped.glob("checkpoint-*"):
        state = json.loads((checkpoint / "state.json").read_text())
        kept = ("step", "checksums", "log_sizes", "tokens", "kl_coef")
        (checkpoint / "state.json").write_text(json.dumps({name: state[name] for name in kept}))
    report.main([str(stopped)])
    assert resume(stopped) == stopped


def test_space_is_spoken_of_only_where_it_lacks(run):
    folder = run(steps=1)
    (folder / "rollouts.jsonl").unlink()
    (folder / "rollouts.jsonl").mkdir()
    said = "could not be written: .*checkpoint-1 stands. Go on with --resume"
    with pytest.raises(grpo.UsageError, match=said) as error:
        RunFolder(folder).append("rollouts.jsonl", [{}])
    assert "Free some space" not in str(error.value)


def test_commands_are_quoted_where_a_folder_has_spaces(run, tmp_path, capsys):
    folder = run(runs=str(tmp_path / "my runs"), steps=1)
    out = capsys.readouterr().out
    assert out.count(f"'{folder}'") == 2 and f"'{folder / 'final'}'" in out
    command = report.load_run(folder, 9, 10**9)["command"]
    assert command == f"python grpo.py --config '{folder / 'config.yaml'}'"


# Bytes


def test_half_a_surrogate_pair_is_escaped(tmp_path):
    row = {"completion": "a\ud800b\u00e9\u4e2d"}
    assert json.loads(as_line(row)) == row and as_line(row).isascii() is False
    (tmp_path / "a.jsonl").write_text(as_line(row), encoding="utf-8")
    assert read_rows(tmp_path / "a.jsonl") == [row]


def test_a_stream_that_knows_few_characters_is_not_lost(tmp_path):
    with open(tmp_path / "out", "w", encoding="latin-1") as file:
        stream = Steady(file)
        stream.write("é \u4e2d\n")
        stream.flush()
    assert (tmp_path / "out").read_bytes() == b"\xe9 \\u4e2d\n" and not LOST.is_set()


def test_a_folder_for_runs_that_is_a_link_to_nothing_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for runs in (tmp_path / "link", tmp_path / "link" / "below"):
        with pytest.raises(grpo.UsageError, match="is a link to nothing"):
            grpo.parse_config(["--runs", str(runs)])


# Terminals, and the end of the time


def in_a_process(folder: Path, stdout, **environment: str) -> subprocess.Popen:
    """The run of `folder`'s settings, anew and longer, in a process of its own."""
    command = [
        sys.executable,
        "grpo.py",
        "--config",
        str(folder / "config.yaml"),
        "--steps",
        "2000",
        "--save_steps",
        "2000",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command += ["--print_groups", "1", "--runs", str(folder.parent / "other")]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", ["closed", "full"])
def test_a_lost_terminal_is_no_lost_run(how, run):
    folder = run(steps=1)
    if how == "closed":
        process = in_a_process(folder, subprocess.PIPE, PYTHONUNBUFFERED="1")
        next(line for line in process.stdout if line.startswith("step"))
        process.stdout.close()
    else:
        with open("/dev/full", "w") as full:
            process = in_a_process(folder, full, PYTHONUNBUFFERED="1")
    errors = process.stderr.read()
    assert process.wait(60) == 130 and "Traceback" not in errors and "Exception ignored" not in errors
    (made,) = (folder.parent / "other").iterdir()
    steps = len(rows(made, "metrics.jsonl"))
    assert (how == "closed") <= steps < 2000 and names_of(made)[-1] == f"checkpoint-{steps}"


def test_logs_are_utf_8_whatever_the_locale(run, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(own.read_text().replace("prediction=text", 'prediction="\u4e2d\u00e9"'), encoding="utf-8")
    folder = run(steps=1)
    code = "import sys, grpo; grpo.main(sys.argv[1:])"
    flags = ["--config", str(folder / "config.yaml"), "--runs", str(tmp_path / "other"), "--print_groups", "1"]
    environment = os.environ | {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    }
    subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, env=environment, check=True, capture_output=True)
    (made,) = (tmp_path / "other").iterdir()
    assert rows(made, "rollouts.jsonl")[0]["prediction"] == "\u4e2d\u00e9"


@pytest.fixture
def at_step_3(monkeypatch):
    """Calls something when the third step is logged."""

    def then(act):
        log_step = RunFolder.log_step

        def watched(self, row, rollouts):
            log_step(self, row, rollouts)
            if row["step"] == 3:
                act()

        monkeypatch.setattr(RunFolder, "log_step", watched)

    return then


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_scheduler_gets_an_evaluation_and_a_final_model(number, run, at_step_3, capsys):
    whole = run()
    at_step_3(lambda: os.kill(os.getpid(), number))
    folder = run(runs=str(whole.parent / "other"))
    out = capsys.readouterr().out
    assert f"stopped after step 3; go on with: python grpo.py --resume {folder}" in out and "after 3 steps" in out
    assert [row["step"] for row in rows(folder, "eval.jsonl")] == [0, 3]
    assert same_weights(folder / "final", folder / "checkpoint-3")
    resume(folder)
    assert same_weights(folder / "final", whole / "final")


def test_a_person_gets_a_checkpoint_and_no_more(run, at_step_3):
    at_step_3(lambda: os.kill(os.getpid(), signal.SIGINT))
    folder = run()
    assert names_of(folder)[-1] == "checkpoint-3" and not (folder / "final").exists()
    assert [row["step"] for row in rows(folder, "eval.jsonl")] == [0]


def test_a_run_ends_in_time(run, at_step_3, monkeypatch, capsys):
    clock, passed = terminal.time.monotonic, []
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock() + sum(passed))
    at_step_3(lambda: passed.append(540))
    folder = run(max_minutes=10.0)
    out = "".join(capsys.readouterr())
    assert "max_minutes 10 is nearly over: the run saves, evaluates and ends" in out and "stopped after step 3" in out
    assert [row["step"] for row in rows(folder, "eval.jsonl")] == [0, 3] and (folder / "final").exists()
    passed.clear()
    assert [row["step"] for row in rows(resume(folder), "eval.jsonl")] == [0, 6]


def test_no_clock_that_can_be_set_back_measures_anything():
    for path in [ROOT / "grpo.py", *(ROOT / "harness").glob("*.py"), ROOT / "mathformer" / "train.py"]:
        assert "time.time()" not in path.read_text(), path


def test_the_model_card_is_the_one_of_the_run(run):
    assert "sampled accuracy" in (run() / "final" / "README.md").read_text()
