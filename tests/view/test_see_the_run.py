"""What a person sees of a run besides its report: trackers, whole groups in the terminal, model card, playground."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import PRETRAINED

import grpo
from harness import loading, model_card, run_folder, trackers
from harness.evaluation import evaluation_table
from harness.settings import UsageError
from harness.terminal import announce, show_group, show_groups
from mathformer import ArithmeticTask
from tasks import load_task
from tasks.countdown import Countdown
from tasks.gsm8k import GSM8K
from view import play
from view.__main__ import main as view_main
from view.__main__ import read_config


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture
def run(tmp_path):
    def start(**settings) -> Path:
        defaults = dict(model=PRETRAINED, task="arithmetic", task_args=dict(eval_size=4), runs=str(tmp_path / "runs"))
        defaults |= dict(prompts_per_step=2, group_size=4, max_completion_tokens=40, max_prompt_tokens=48, lr=7e-4)
        defaults |= dict(steps=3, eval_steps=2, eval_samples=2, print_groups=0, device="cpu")
        return grpo.train(grpo.Config(**defaults | settings))["run"]

    return start


# ==== Trackers ========================================================================================================


def logged(folder: Path) -> dict[tuple[str, int], float]:
    """All numbers of metrics.jsonl and eval.jsonl, by name and step."""
    found = {}
    for name, prefix in (("metrics.jsonl", ""), ("eval.jsonl", "eval/")):
        for row in rows(folder, name):
            flat = row | {f"pass_at_{k}": value for k, value in row.get("pass_at_k", {}).items()}
            numbers = {key: value for key, value in flat.items() if isinstance(value, int | float) and key != "step"}
            found |= {(prefix + key, row["step"]): value for key, value in numbers.items()}
    return found


def in_tensorboard(folder: Path) -> dict[tuple[str, int], float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found = [((tag, event.step), event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]
    assert len(found) == len(dict(found)), "a step is there twice"
    return dict(found)


def wandb_records(file: Path):
    """Of a .wandb file: LevelDB's log format, blocks of 32 KiB, each record in one piece or several."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a block's last bytes hold no header
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def in_wandb(folder: Path) -> dict[tuple[str, int], float]:
    found = {}
    for file in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "history":
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                step = record.history.step.num
                found |= {(k, step): v for k, v in items.items() if isinstance(v, int | float)}
                found = {key: value for key, value in found.items() if not key[0].startswith(("_", "episodes"))}
    return found


def test_the_trackers_hold_the_numbers_of_the_log(run, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_PROJECT", "from-the-environment")
    folder = run(report_to="tensorboard, wandb", run_name="my-run")
    expected = logged(folder)
    assert ("reward", 3) in expected and ("eval/accuracy", 2) in expected and ("eval/pass_at_2", 0) in expected
    assert in_tensorboard(folder) == {key: pytest.approx(value, rel=1e-6) for key, value in expected.items()}
    assert in_wandb(folder) == expected
    (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    (described,) = [r.run for r in wandb_records(file) if r.WhichOneof("record_type") == "run"][:1]
    assert (described.project, described.display_name) == ("from-the-environment", "my-run")
    tables = [json.loads(path.read_text()) for path in (folder / "wandb").rglob("episodes_*.table.json")]
    assert len(tables) == 3 and all(table["columns"] == list(trackers.COLUMNS) for table in tables)
    rollouts = rows(folder, "rollouts.jsonl")
    wanted = sorted([r["step"], r["completion"]] for r in rollouts)
    assert sorted([row[0], row[2]] for table in tables for row in table["data"]) == wanted


def test_a_resumed_run_has_each_step_once(run, monkeypatch):
    """Steps behind the last checkpoint are done again: what the event file had of them must go."""
    log_step, done = run_folder.RunFolder.log_step, []

    def killed(self, row, rollouts):
        log_step(self, row, rollouts)
        done.append(row["step"])
        if row["step"] == 4 and len(done) == 4:
            raise ZeroDivisionError("as if the machine had gone down")

    monkeypatch.setattr(run_folder.RunFolder, "log_step", killed)
    folders: list[Path] = []
    create = run_folder.RunFolder.create.__func__
    monkeypatch.setattr(
        run_folder.RunFolder,
        "create",
        classmethod(lambda cls, *args: folders.append((made := create(cls, *args)).path) or made),
    )
    with pytest.raises(ZeroDivisionError):
        run(report_to="tensorboard", steps=5, save_steps=2, eval_steps=0)
    config = yaml.safe_load((folders[0] / "config.yaml").read_text())
    grpo.train(grpo.Config(**config | {"resume": str(folders[0])}))
    assert done == [1, 2, 3, 4, 3, 4, 5]
    expected = logged(folders[0])
    assert in_tensorboard(folders[0]) == {key: pytest.approx(value, rel=1e-6) for key, value in expected.items()}


def test_no_tracker_by_default(run):
    folder = run(steps=1)
    assert not (folder / "tensorboard").exists() and not (folder / "wandb").exists()


def test_trackers_that_are_not_there_are_refused_before_any_folder(run, monkeypatch, tmp_path):
    with pytest.raises(UsageError, match="'tensorbord': choose of tensorboard, wandb, trackio"):
        run(report_to="tensorbord")
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install trackio"):
        run(report_to="trackio")
    assert not (tmp_path / "runs").exists()


def test_wandb_without_a_login_is_refused_before_any_folder(run, monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(type(wandb.api), "api_key", property(lambda self: None))
    with pytest.raises(UsageError, match="wandb login, or set WANDB_MODE=offline"):
        run(report_to="wandb")
    assert not (tmp_path / "runs").exists()


def test_a_tracker_that_does_not_start_says_why(make_config, tmp_path):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with pytest.raises(UsageError, match=r"tensorboard does not start: .*\S+/tensorboard.*; leave it out of report_to"):
        trackers.Trackers(make_config(report_to="tensorboard"), tmp_path, 0)


# ==== The terminal ====================================================================================================


def group(*rewards: float, text="short") -> list[grpo.Rollout]:
    made = []
    for reward in rewards:
        parts = dict(correct=float(reward == 1))
        made.append(grpo.Rollout([1], [5], [0.0], False, f"question {rewards}", text, parts, reward))
        made[-1].advantage = reward - 0.5
    return made


def test_whole_groups_are_shown_mixed_ones_first(capsys):
    mixed = group(0.0, 1.0, text="a" * 150 + "b" * 1000 + "c" * 150)
    show_groups(7, group(0.0, 0.0) + mixed + group(1.0, 1.0), 2)
    first, *lines = capsys.readouterr().out.strip().splitlines()
    assert first == "step 7, 1 of 2 right: question (0.0, 1.0)"
    assert lines[0].startswith("   1       reward  0.00 advantage -0.50  aaa")
    assert lines[1].startswith("   2 right reward  1.00 advantage +0.50  aaa")
    assert "... 1,100 characters ..." in lines[1] and lines[1].endswith("c" * 100) and "b" not in lines[1]
    assert lines[2] == "step 7, 0 of 2 right: question (0.0, 0.0)" and len(lines) == 5


def test_groups_are_printed_every_so_many_steps(run, capsys):
    run(steps=5, print_groups=2)
    shown = [line.split()[1] for line in capsys.readouterr().out.splitlines() if " of 4 right: " in line]
    assert shown == ["1,", "1,", "2,", "2,", "4,", "4,"]


# ==== The model card ==================================================================================================


@pytest.mark.curves
def test_the_model_card_says_what_was_done_and_its_lines_load_the_model(run):
    folder = run(lr=0.05)  # it collapses: before and after differ
    card = (folder / "final" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and "base_model" not in front  # a folder is no name on the Hub
    first, last = rows(folder, "eval.jsonl")[0], rows(folder, "eval.jsonl")[-1]
    assert first["accuracy"] != last["accuracy"]
    cells = [f"{r['accuracy']:.1%} ({r['accuracy_low']:.1%} to {r['accuracy_high']:.1%})" for r in (first, last)]
    assert f"| greedy accuracy | {cells[0]} | {cells[1]} |" in card
    metrics = rows(folder, "metrics.jsonl")
    minutes = sum(row[f"seconds_{part}"] for row in metrics for part in ("sample", "train", "sync")) / 60
    assert metrics[-1]["tokens"] == sum(row["length"] for row in rows(folder, "rollouts.jsonl"))
    assert f"seed 0: {metrics[-1]['tokens']:,} tokens sampled, {minutes:.1f} minutes" in card
    assert "| `lr` | `0.05` |" in card and "`clip_low`" not in card and "`runs`" not in card
    assert (folder / "final" / "curves.png").stat().st_size > 10_000
    python = card.split("```python\n")[1].split("```")[0].replace("path/to/final", str(folder / "final"))
    subprocess.run([sys.executable, "-c", python], check=True, capture_output=True)


def test_the_card_of_a_model_of_the_hub_names_its_base(make_config, run):
    folder = run()
    config = make_config(model="Qwen/Qwen2.5-0.5B")
    card = model_card.model_card(config, "qwen2", rows(folder, "eval.jsonl"), rows(folder, "metrics.jsonl"))
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "Qwen/Qwen2.5-0.5B" and "mathformer" not in card


# ==== The playground ==================================================================================================


def test_base_and_trained_answer_side_by_side(run, monkeypatch, capsys):
    folder = run(lr=0.05)  # it collapses, so that the two answer differently
    monkeypatch.setattr(sys, "stdin", io.StringIO("3*(4+5)\n\n3*(\n1/0\n"))
    monkeypatch.setenv("COLUMNS", "120")
    view_main(["play", str(folder), "--samples", "2"])
    out = capsys.readouterr().out
    assert "<big>3*(4+5)" in out and "the answer is 27" in out
    both = next(line for line in out.splitlines() if line.startswith("most likely"))
    assert both.count("reward") == 2 and both[58:61] == " | "
    answers = out.splitlines()[out.splitlines().index(both) + 1].split(" | ")
    assert answers[0].strip().startswith("<answer>") and answers[0].strip() != answers[1].strip()
    assert out.count("BASE, ") == 2 and out.count("no problem of this task") == 2 and "divides by 0" in out


@pytest.mark.parametrize("what", ["no folder", "no model", "other version"])
def test_a_folder_that_cannot_be_played_with_says_why(what, run, tmp_path, capsys):
    folder = tmp_path / "other"
    folder.mkdir()
    config = yaml.safe_dump(dict(model=PRETRAINED, task="arithmetic"))
    if what != "no folder":
        (folder / "config.yaml").write_text(config + ("old_name: 1\n" if what == "other version" else ""))
    message = {"no folder": "no run's folder", "no model": "no trained model yet", "other version": "old_name"}[what]
    with pytest.raises(SystemExit) as exit_:
        view_main(["play", str(folder)])
    assert str(exit_.value.code).startswith("error: ") and message in str(exit_.value.code)


def test_typed_problems():
    assert ArithmeticTask().typed("3*(4+5)")["value"] == 27
    assert Countdown("synthetic", eval_size=1).typed("3 7 25 = 46") == {"nums": [3, 7, 25], "target": 46}
    gsm8k = GSM8K.__new__(GSM8K)  # without its data
    typed = gsm8k.typed("How many? #### 1,200")
    assert (typed["question"], typed["target"]) == ("How many?", 1200)
    countdown = Countdown("synthetic", eval_size=1)
    for task, text, message in (
        (countdown, "3 7 25", "write the numbers, an equals sign"),
        (countdown, "= 25", "write the numbers, an equals sign"),
        (gsm8k, "How many?", "no number behind ####"),
        (ArithmeticTask(), "3*(", "was expected"),
    ):
        with pytest.raises(ValueError, match=message):
            task.typed(text)


def test_a_typed_problem_of_mathematics():
    from tasks.competition_math import Math

    math = Math.__new__(Math)
    math.unreadable = set()
    example = math.typed(r"What is half of one? #### \frac{1}{2}")
    assert example["problem"] == "What is half of one?"
    assert math_is_right(example, r"<think>so</think><answer>$0.5$</answer>")
    with pytest.raises(ValueError, match="####"):
        math.typed("What is half of one?")


def math_is_right(example: dict, text: str) -> bool:
    from tasks.competition_math import math_reward

    return math_reward(text, example)["correct"] == 1


def test_the_contract_says_typed_is_optional():
    class Own:
        pass

    tokenizer = loading.load_model(PRETRAINED)[1]
    with pytest.raises(ValueError, match="no method `typed`"):
        play.problem_of("1+1", Own(), tokenizer, None, [], None)


@pytest.mark.parametrize("processes, said", [(1, "on cpu."), (2, "on 2 processes (cpu) on cpu.")])
def test_the_first_line_names_the_processes(processes, said, make_config, capsys):
    kind = SimpleNamespace(value="MULTI_CPU" if processes > 1 else "NO")
    accelerator = SimpleNamespace(num_processes=processes, distributed_type=kind, device=torch.device("cpu"))
    found = dict(folder=run_folder.RunFolder(Path("runs/x")), checkpoint=Path("runs/x/checkpoint-7"))
    found |= dict(accelerator=accelerator, model=torch.nn.Linear(2, 3), sampler_name="torch")
    announce(make_config(), SimpleNamespace(**found))
    out = capsys.readouterr().out
    assert f", lr 1e-06, {said} \nrun folder: runs/x\ngoing on from runs/x/checkpoint-7\n" in out


def test_before_and_after_side_by_side():
    def row(step: int, accuracy: float, **more) -> dict:
        found = {"step": step, "pass_at_k": {"1": accuracy, "4": accuracy + 0.1}, "length": 10 + step, "truncated": 0.5}
        for key in ("accuracy", "accuracy_sampled"):
            found |= {key: accuracy, f"{key}_low": accuracy - 0.05, f"{key}_high": accuracy + 0.05}
        return found | more

    table = evaluation_table([row(0, 0.25, accuracy_worked=0.75, worked=0.1), row(3, 0.5, worked=0.9)])
    assert [line.split() for line in table.splitlines()] == [
        ["before", "after", "3", "steps"],
        ["greedy", "accuracy", "25.0%", "[20.0,", "30.0]", "50.0%", "[45.0,", "55.0]"],
        ["sampled", "accuracy", "25.0%", "[20.0,", "30.0]", "50.0%", "[45.0,", "55.0]"],
        ["pass@4", "35.0%", "60.0%"],
        ["length,", "tokens", "10.0", "13.0"],
        ["truncated", "50.0%", "50.0%"],
        ["show", "their", "steps", "10.0%", "90.0%"],
        ["made", "to", "show", "steps", "75.0%", "right"],
    ]


def test_the_group_that_is_shown_first_is_one_to_learn_from(make_config, capsys):
    rollouts = group(0.0, 0.0) + group(0.0, 1.0)
    for r in rollouts[:2]:
        r.dead = True
    words = SimpleNamespace(decode=lambda ids: "".join(f"<{i}>" for i in ids))
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    show_group(rollouts, lambda *args, **totals: weights, words, make_config(group_size=2))
    out = capsys.readouterr().out
    assert "completions of question (0.0, 1.0)" in out
    table = [line.split() for line in out.splitlines()[-2:]]
    assert table == [["0.00", "-0.500", "3.00e-01", "1", "<5>"], ["1.00", "+0.500", "4.00e-01", "1", "<5>"]]


def test_every_row_of_the_card_is_its_own(make_config):
    def row(x: float, **more) -> dict:
        found = {"n": 50, "pass_at_k": {"1": x, "4": x + 0.2}, "length": 100 * x}
        for i, key in enumerate(("accuracy", "accuracy_sampled"), 1):
            found |= {key: x + i / 100, f"{key}_low": x, f"{key}_high": x + 0.1}
        return found | more

    metrics = [dict(tokens=1000, seconds_sample=60, seconds_train=30, seconds_sync=30)] * 2
    card = model_card.model_card(make_config(seed=3), "qwen2", [row(0.1), row(0.9), row(0.3)], metrics)
    assert card.split("| --- | --- | --- |\n")[1].split("\n\n")[0].splitlines() == [
        "| greedy accuracy | 11.0% (10.0% to 20.0%) | 31.0% (30.0% to 40.0%) |",
        "| sampled accuracy | 12.0% (10.0% to 20.0%) | 32.0% (30.0% to 40.0%) |",
        "| pass@4 | 30.0% | 50.0% |",
        "| tokens of a sampled answer | 10.0 | 30.0 |",
    ]
    assert "seed 3: 1,000 tokens sampled, 4.0 minutes" in card and "On 50 evaluation problems" in card


def test_a_run_is_played_as_it_was_trained(run, monkeypatch, capsys):
    """Its task with all arguments, its sampling; and only samples count as samples."""
    task_args = dict(eval_size=4, max_depth=2)
    folder = run(temperature=0.5, top_k=3, task_args=task_args, reward_seconds=5.0, steps=2, save_steps=1)
    loaded, sampled, load, complete = [], [], load_task, grpo.complete

    def answer(sampler, tokenizer, task, problems, group_size, sampling, *args):
        sampled.append(sampling)
        found = complete(sampler, tokenizer, task, problems, group_size, sampling, *args)
        for r in found:  # the most likely answer is right, all others are not
            r.parts["correct"] = float(sampling.temperature == 0)
            r.parts["ground_truth"] = "12\x1b[2J\n"
        return found

    monkeypatch.setattr(play, "load_task", lambda *args: (loaded.append(args), load(*args))[1])
    monkeypatch.setattr(grpo, "complete", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("3*4\n"))
    view_main(["play", str(folder), "--samples", "2"])
    assert loaded == [("arithmetic", task_args, 5.0)]
    assert sampled == [grpo.Sampling(40, 0.0), grpo.Sampling(40, 0.5, 1.0, 3)] * 2
    out = capsys.readouterr().out
    assert out.count("0 of 2 samples right") == 2
    assert "the answer is 12\\x1b[2J\\n\n" in out, "a terminal does not obey it"


def test_an_unfinished_run_is_played_from_its_newest_checkpoint(run):
    folder = run(steps=2, save_steps=1)
    config = read_config(folder)
    assert play.trained_model(folder, config) == str(folder / "final")
    shutil.rmtree(folder / "final")
    assert play.trained_model(folder, config) == str(folder / "checkpoint-2")


def test_a_run_with_adapters_is_played_from_them_as_from_the_model_at_its_end(run, monkeypatch, capsys):
    folder = run(steps=2, save_steps=1, lora_rank=4, lr=0.03)
    shown = []
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.StringIO("3*4\n12-7\n"))
        capsys.readouterr()
        view_main(["play", str(folder), "--samples", "0"])
        shown.append([line for line in capsys.readouterr().out.splitlines() if "|" in line])
        shutil.rmtree(folder / "final", ignore_errors=True)
    assert shown[0] == shown[1] and len(shown[0]) > 4
    assert any(left.strip() != right.strip() for left, right in (line.split(" | ") for line in shown[0][1:]))
