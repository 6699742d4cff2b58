"""Whole runs: what they leave behind, that they repeat and resume exactly, and what bad input is told."""

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import transformers
import yaml
from accelerate.state import AcceleratorState
from conftest import PRETRAINED
from matplotlib.figure import Figure
from safetensors.torch import load_file

import grpo
from harness import evaluation, loading, memory, metrics, run_folder, settings, terminal
from harness.metrics import peak_memory
from harness.terminal import finish_step_on_signal, printable
from mathformer.train import build_model
from tasks import TASKS

NOT_REPEATABLE = {"seconds_sample", "seconds_train", "seconds_sync", "tokens_per_second", "peak_memory"}
SMALL_TASK = dict(max_depth=1, eval_size=6)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    build_model("tiny", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(model_folder, tmp_path):
    """Trains a random tiny model for a few steps; keyword arguments override."""

    def start(**settings) -> dict:
        defaults = dict(model=model_folder, task="arithmetic", task_args=SMALL_TASK, runs=str(tmp_path / "runs"))
        defaults |= dict(prompts_per_step=2, group_size=4, max_completion_tokens=8, max_prompt_tokens=20, lr=1e-3)
        return grpo.train(grpo.Config(**defaults | dict(steps=3, eval_samples=2, temperature=1.5) | settings))

    return start


@pytest.fixture
def pays_length(monkeypatch):
    """Pays for the parity of the completion's length, so that a random model has groups to learn from."""
    from mathformer import ArithmeticTask

    def reward(self, text, example):
        right = float(len(text) % 2)
        return dict(reward=right, correct=right, format=1.0, worked=0.0, prediction=len(text), ground_truth=1)

    monkeypatch.setattr(ArithmeticTask, "reward", reward)


def rows(folder, name: str) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def repeatable(metrics: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in NOT_REPEATABLE} for row in metrics]


def weights(folder) -> dict:
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.curves
def test_a_run_leaves_a_complete_folder(run, tmp_path, pays_length):
    summary = run(save_steps=1, eval_steps=2)
    folder = Path(summary["run"])
    assert folder.parent == tmp_path / "runs" and folder.name.startswith("arithmetic-")
    names = {path.name for path in folder.iterdir()}
    expected = {"config.yaml", "metrics.jsonl", "metrics.csv", "rollouts.jsonl", "eval.jsonl", "curves.png", "final"}
    expected |= {"run.json", ".lock"}
    assert names == expected | {"eval-0.jsonl", "eval-2.jsonl", "eval-3.jsonl", "checkpoint-2", "checkpoint-3"}

    metrics = rows(folder, "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    with open(folder / "metrics.csv") as file:
        for row, csv_row in zip(metrics, csv.DictReader(file), strict=True):
            assert csv_row == {key: "" if value is None else str(value) for key, value in row.items()}

    rollouts = rows(folder, "rollouts.jsonl")
    assert len(rollouts) == 3 * 2 * 4
    assert metrics[0]["reward"] == sum(r["reward"] for r in rollouts[:8]) / 8
    assert metrics[-1]["tokens"] == sum(r["length"] for r in rollouts) == summary["tokens"]
    keys = {"step", "prompt_id", "prompt", "completion", "reward", "correct", "format", "prediction", "ground_truth"}
    assert keys | {"advantage", "length", "truncated"} <= rollouts[0].keys()
    assert len({r["prompt_id"] for r in rollouts[:4]}) == 1

    evaluations = rows(folder, "eval.jsonl")
    assert [row["step"] for row in evaluations] == [0, 2, 3]
    assert ["accuracy_worked" in row for row in evaluations] == [True, False, False]
    assert (summary["first"], summary["last"]) == (evaluations[0], evaluations[-1])
    assert len(rows(folder, "eval-3.jsonl")) == evaluations[-1]["n"]

    grpo.Config(**yaml.safe_load((folder / "config.yaml").read_text()))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / "final")
    assert torch.equal(loaded.lm_head.weight, weights(folder / "checkpoint-3")["transformer.word_embeddings.weight"])
    transformers.AutoTokenizer.from_pretrained(folder / "final")
    assert (folder / "curves.png").stat().st_size > 10_000


def test_a_run_ends_with_the_commands_that_show_it(run, pays_length, capsys):
    folder = run(steps=1)["run"]
    last = [line.split("python ")[1].split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert last[:2] == [["-m", "view", "report", str(folder)], ["-m", "view", "play", str(folder)]]
    for words in last[:2]:
        done = subprocess.run([sys.executable, *words], stdin=subprocess.DEVNULL, capture_output=True)
        assert done.returncode == 0, done.stderr
    assert (folder / "report.html").stat().st_size > 10_000


def test_every_metric_is_logged_under_its_name(run, pays_length):
    row = rows(run(kl_coef=0.01)["run"], "metrics.jsonl")[0]
    names = "step reward reward_std penalty correct format worked pass_at_group zero_advantage_groups length "
    names += "length_correct length_wrong truncated reflections age loss kl_ref kl_coef entropy grad_norm lr "
    names += "clipped_low clipped_high ratio_max sampler_kl sampler_logp_gap skipped_updates prompts_too_long tokens "
    names += "tokens_per_second resampled_groups nonfinite_updates "
    names += "seconds_sample seconds_train seconds_sync peak_memory"
    assert set(row) == set(names.split())
    glossary = Path("docs/metrics.md").read_text()
    assert not [name for name in row if f"`{name}`" not in glossary]


def test_the_same_seed_gives_the_same_run(run, pays_length):
    first, second, other = run(), run(), run(seed=1)
    assert first["run"] != second["run"], "a second run never writes into the folder of the first"
    for name in ("rollouts.jsonl", "eval.jsonl"):
        assert rows(first["run"], name) == rows(second["run"], name)
    assert repeatable(rows(first["run"], "metrics.jsonl")) == repeatable(rows(second["run"], "metrics.jsonl"))
    assert rows(first["run"], "rollouts.jsonl") != rows(other["run"], "rollouts.jsonl")


def test_the_weights_change(run, model_folder, pays_length):
    before, after = weights(model_folder), weights(Path(run()["run"]) / "final")
    assert all(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.floats
def test_interrupted_and_resumed_equals_uninterrupted(run, monkeypatch, capsys, pays_length):
    whole = run(steps=6, eval_steps=2)
    log_step = grpo.RunFolder.log_step

    def interrupt(self, row, rollouts):
        log_step(self, row, rollouts)
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(grpo.RunFolder, "log_step", interrupt)
    stopped = run(steps=6, eval_steps=2)
    monkeypatch.setattr(grpo.RunFolder, "log_step", log_step)
    assert stopped["interrupted"] and (Path(stopped["run"]) / "checkpoint-3").is_dir()
    command = f"--resume {stopped['run']}"
    assert command in capsys.readouterr().out
    resumed = grpo.train(grpo.parse_config(command.split()))
    assert resumed["run"] == stopped["run"] and "interrupted" not in resumed
    assert (resumed["first"], resumed["last"]) == (whole["first"], whole["last"])
    for name in ("rollouts.jsonl", "eval.jsonl"):
        assert rows(whole["run"], name) == rows(resumed["run"], name)
    assert repeatable(rows(whole["run"], "metrics.jsonl")) == repeatable(rows(resumed["run"], "metrics.jsonl"))
    a, b = weights(Path(whole["run"]) / "final"), weights(Path(resumed["run"]) / "final")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resume_takes_later_rows_out_of_the_logs(run, pays_length):
    summary = run(steps=3, save_steps=2)
    folder = Path(summary["run"])
    shutil.rmtree(folder / "checkpoint-3")  # as if the run had been killed before it was written
    grpo.train(grpo.parse_config(["--resume", str(folder)]))
    assert [row["step"] for row in rows(folder, "metrics.jsonl")] == [1, 2, 3]
    assert len((folder / "metrics.csv").read_text().splitlines()) == 4
    assert len(rows(folder, "rollouts.jsonl")) == 24


def test_more_steps_may_be_asked_for_on_resume(run, pays_length):
    folder = str(run(steps=2)["run"])
    summary = grpo.train(grpo.parse_config(["--resume", folder, "--steps", "4"]))
    assert summary["last"]["step"] == 4 and len(rows(folder, "metrics.jsonl")) == 4


def test_steps_zero_evaluates_and_shows_one_group(run, capsys, pays_length):
    summary = run(steps=0)
    out = capsys.readouterr().out
    assert "will it learn?" in out and "advantage" in out and "weight" in out
    table = out.split("tokens, with | between them\n")[1].strip().splitlines()
    assert len(table) == 4 and all(len(line.split()) > 4 for line in table)
    assert summary["tokens"] == 0 and rows(summary["run"], "metrics.jsonl") == []


def test_kl_penalty_needs_a_reference_that_stays(run, pays_length):
    kept = rows(run(kl_coef=0.05, lr=1e-2)["run"], "metrics.jsonl")
    assert abs(kept[0]["kl_ref"]) < 1e-6 < 1e-4 < kept[-1]["kl_ref"]
    offloaded = rows(run(kl_coef=0.05, lr=1e-2, offload_reference=True)["run"], "metrics.jsonl")
    assert repeatable(kept) == repeatable(offloaded)
    assert rows(run()["run"], "metrics.jsonl")[0]["kl_ref"] is None


@pytest.mark.parametrize("kl_target", [0.0, 0.01])
def test_resumed_reference_is_the_first_model(run, pays_length, kl_target):
    folder = run(kl_coef=0.05, kl_target=kl_target, lr=1e-2, steps=3)["run"]
    grpo.train(grpo.parse_config(["--resume", str(folder), "--steps", "4"]))
    whole = rows(run(kl_coef=0.05, kl_target=kl_target, lr=1e-2, steps=4)["run"], "metrics.jsonl")
    assert repeatable(whole) == repeatable(rows(folder, "metrics.jsonl"))


def test_the_kl_coefficient_follows_its_target(run, pays_length):
    metrics = rows(run(kl_coef=0.05, kl_target=0.002, lr=1e-2, steps=5)["run"], "metrics.jsonl")
    expected = 0.05
    for row in metrics:
        assert row["kl_coef"] == pytest.approx(expected)
        expected *= 1 + 0.1 * max(-0.2, min(0.2, row["kl_ref"] / 0.002 - 1))
    assert metrics[1]["kl_coef"] < 0.05  # no KL yet in the first step
    assert metrics[-1]["kl_coef"] > metrics[-2]["kl_coef"]  # and too much of it later
    assert {row["kl_coef"] for row in rows(run(kl_coef=0.05)["run"], "metrics.jsonl")} == {0.05}


def test_top_k_takes_old_logps_from_the_trainer(run, pays_length):
    row = rows(run(top_k=3, steps=1)["run"], "metrics.jsonl")[0]
    assert row["ratio_max"] == pytest.approx(1, abs=1e-5)
    assert row["clipped_low"] == 0, "against the sampler's, which are larger, ratios would be far below 1"
    assert row["sampler_logp_gap"] is None, "sampler and trainer have different distributions, their gap says nothing"


def test_bf16_is_bf16_and_sampler_and_trainer_agree_in_it(run):
    settings = dict(model=PRETRAINED, task_args=dict(eval_size=6), prompts_per_step=8, steps=1)
    plain = rows(run(**settings)["run"], "metrics.jsonl")[0]
    AcceleratorState._reset_state(reset_partial_state=True)  # one process has one precision
    bf16 = rows(run(**settings, precision="bf16")["run"], "metrics.jsonl")[0]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert plain["sampler_logp_gap"] < 1e-5
    assert bf16["sampler_logp_gap"] < 0.05
    assert bf16["entropy"] != pytest.approx(plain["entropy"], rel=1e-5)


def test_a_second_interrupt_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), finish_step_on_signal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# Tasks of one's own

OWN_TASK = """
class Own:
    def __init__(self, bonus: float = 1.0, value="1.0"):
        self.bonus, self.value = bonus, value
    def train(self, rng, step): return {"q": rng.choice("1234")}
    def eval(self): return [{"q": q} for q in "56"]
    def prompt(self, example): return f"<sos><big>{example['q']}+1"
    def reward(self, text, example):
        return dict(reward=float(self.value), correct=0, format=1, prediction=text, ground_truth=None)
"""


def test_a_task_in_a_file_of_ones_own(run, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN_TASK)
    summary = run(task=f"{path}:Own", task_args={"bonus": 2.0}, steps=1)
    assert Path(summary["run"]).name.startswith("Own-")
    assert rows(summary["run"], "metrics.jsonl")[0]["zero_advantage_groups"] == 1


def test_a_task_of_a_module(run):
    assert run(task="mathformer.task:ArithmeticTask", steps=1)["last"]["step"] == 1


# The command line


def test_the_plain_command_is_the_arithmetic_preset():
    config = grpo.parse_config([])
    preset = yaml.safe_load(settings.PRESET.read_text())
    assert {key: getattr(config, key) for key in preset} == preset
    assert grpo.parse_config(["--lr", "1e-5"]).lr == 1e-5
    assert grpo.parse_config(["--model", "m", "--task", "math"]).lr == 1e-6, "the small model's rate is for it alone"


def test_command_line_over_environment_over_later_yaml_over_earlier_over_default(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("model: m\ntask: gsm8k\nlr: 0.1\nseed: 1\ngroup_size: 3\ntop_k: 9\n")
    (tmp_path / "b.yaml").write_text("lr: 0.2\nseed: 2\ngroup_size: 4\n")
    monkeypatch.setenv("GRPO_SEED", "3")
    monkeypatch.setenv("GRPO_GROUP_SIZE", "5")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    config = grpo.parse_config([*files, "--group_size", "6"])
    assert (config.top_k, config.lr, config.seed, config.group_size, config.steps) == (9, 0.2, 3, 6, 500)


def test_a_mistyped_environment_variable_is_named(monkeypatch):
    monkeypatch.setenv("GRPO_SED", "3")
    with pytest.raises(grpo.UsageError, match="GRPO_SED"):
        grpo.parse_config([])


def test_a_run_can_be_repeated_from_its_config(run, pays_length):
    first = run()["run"]
    again = grpo.train(grpo.parse_config(["--config", str(first / "config.yaml")]))["run"]
    assert again.name == first.name + "-2"
    assert rows(first, "rollouts.jsonl") == rows(again, "rollouts.jsonl")


def test_help_has_every_setting_with_its_sentence(capsys):
    with pytest.raises(SystemExit) as stopped:
        grpo.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and "the preset configs/arithmetic.yaml applies" in out
    source = Path(settings.__file__).read_text().split("class Config")[1]
    for f in dataclasses.fields(grpo.Config):
        sentence = source.split(f"\n    {f.name}: ")[1].split('"""')[1]
        assert f"--{f.name}" in out and " ".join(sentence.split()) in out, f.name


def test_importing_grpo_starts_nothing():
    heavy = ["mathformer", "vllm", "datasets", "matplotlib", "jsonargparse"]
    code = f"import sys, grpo; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--group_size", "1"], "group_size is 1, it must be 2 or more"),
        (["--temperature", "0"], "temperature is 0.0, it must be greater than 0"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--lr", "nan"], "nan"),
        (["--top_p", "1.5"], "top_p is 1.5"),
        (["--minibatches", "7"], "must divide the 256 completions"),
        (["--task", "chess", "--model", "MODEL"], "unknown task 'chess'"),
        (["--task", "nowhere:Task", "--model", "MODEL"], "cannot be imported"),
        (["--task", "mathformer:Chess", "--model", "MODEL"], "no class Chess"),
        (["--task", "/nowhere/own.py:Own", "--model", "MODEL"], "there is no file /nowhere/own.py"),
        (["--task_args.depth", "3"], "depth"),
        (["--task_args.max_depth", "0"], "max_depth is 0"),
        (["--kl_target", "0.1"], "kl_coef must start above 0"),
        (["--task_args.operators", "+^"], "operators '+^'"),
        (["--model", "MODEL"], "--task is needed beside --model"),
        (["--task", "arithmetic", "--model", "/nowhere/model"], "model '/nowhere/model': there is no such"),
        (["--config", "/nowhere/a.yaml"], "there is no file /nowhere/a.yaml"),
        (["--config", "UNKNOWN"], "learning_rate"),
        (["--config", "WRONG_TYPE"], "steps"),
        (["--groupsize", "4"], "groupsize"),
        (["--steps", "many"], "steps"),
        (["--max_prompt_tokens", "2"], "no prompt fits"),
        (["--resume", "/nowhere/run"], "/nowhere/run is no run's folder: there is no config.yaml in it"),
        (["--device", "cuda"], "device 'cuda'"),
        (["--kl_coef", "inf"], "inf"),
        (["--task", "BROKEN:Own", "--model", "MODEL"], "cannot be imported: SyntaxError"),
        (["--gradient_checkpointing", "true"], "gradient_checkpointing is not there for MathformerForCausalLM"),
        (["--task", "TASK:Own", "--model", "MODEL", "--task_args.value", "nan"], "no finite number"),
        (
            ["--task", "TASK:Own", "--model", "MODEL", "--task_args.value", "many"],
            "raised ValueError: could",
        ),
        (["--task", "TASK:Broken", "--model", "MODEL"], "keys reward, correct"),
    ],
)
def test_bad_input_is_told_in_one_line_before_any_work(argv, said, model_folder, tmp_path, monkeypatch, capsys):
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    (tmp_path / "own.py").write_text(OWN_TASK + "\n\nclass Broken(Own):\n    def reward(self, *args): return 1.0\n")
    (tmp_path / "unknown.yaml").write_text("model: m\ntask: arithmetic\nlearning_rate: 1\n")
    (tmp_path / "type.yaml").write_text("model: m\ntask: arithmetic\nsteps: many\n")
    stand_in = {"MODEL": model_folder, "UNKNOWN": tmp_path / "unknown.yaml", "WRONG_TYPE": tmp_path / "type.yaml"}
    (tmp_path / "broken.py").write_text("class Own(:\n")
    argv = [str(stand_in.get(word, word)).replace("TASK:", f"{tmp_path}/own.py:") for word in argv]
    argv = [word.replace("BROKEN:", f"{tmp_path}/broken.py:") for word in argv]
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: pytest.fail("the evaluation was started"))
    with pytest.raises(SystemExit) as stopped:
        grpo.main([*argv, "--runs", str(tmp_path / "runs")])
    message = stopped.value.code
    assert isinstance(message, str) and message.startswith("error: ") and said in message
    assert "\n" not in message.strip()
    assert not (tmp_path / "runs").exists()


def test_the_sampler_sleeps_while_the_policy_is_trained(run, pays_length, monkeypatch):
    calls = []
    for owner, name in ((grpo.TorchSampler, "sleep"), (grpo.TorchSampler, "sync"), (grpo, "collect"), (grpo, "update")):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, name=name, original=original: (calls.append(name), original(*args))[1]
        )
    run(steps=2)
    assert calls == ["collect", "sleep", "update", "sync"] * 2


def test_a_changed_setting_is_refused_on_resume(run, pays_length):
    folder = str(run()["run"])
    with pytest.raises(grpo.UsageError, match="lr was 0.001 .* cannot become 0.5"):
        grpo.parse_config(["--resume", folder, "--lr", "0.5"])
    with pytest.raises(grpo.UsageError, match="leave --config out"):
        grpo.parse_config(["--resume", folder, "--config", str(settings.PRESET)])
    with pytest.raises(grpo.UsageError, match="past step 2"):
        grpo.train(grpo.parse_config(["--resume", folder, "--steps", "2"]))
    scheduled = str(run(lr_schedule="linear")["run"])
    with pytest.raises(grpo.UsageError, match=r"steps was 3 .* falls \(linear\)") as refused:
        grpo.parse_config(["--resume", scheduled, "--steps", "9"])
    advice = re.search(r"--config \S+ --model \S+", str(refused.value))[0].split()
    longer = grpo.train(grpo.parse_config([*advice, "--steps", "4"]))
    assert len((longer["run"] / "metrics.jsonl").read_text().splitlines()) == 4 and str(longer["run"]) != scheduled


def test_a_resumed_run_remembers_what_was_asked_for(run, pays_length):
    folder = str(run(steps=2)["run"])
    grpo.train(grpo.parse_config(["--resume", folder, "--steps", "4"]))
    assert grpo.parse_config(["--resume", folder]).steps == 4
    again = grpo.parse_config(["--config", f"{folder}/config.yaml"])
    assert again.resume == "", "a run with these settings is a new one"


def test_dead_groups_are_kept_under_a_kl_penalty_also_from_a_saved_config(run, pays_length):
    folder = run()["run"]
    config = grpo.parse_config(["--config", str(folder / "config.yaml"), "--kl_coef", "0.1"])
    assert not config.drops_dead_groups
    assert grpo.parse_config(["--config", str(folder / "config.yaml")]).drops_dead_groups
    assert grpo.parse_config(["--kl_coef", "0.1", "--dead_groups", "drop"]).drops_dead_groups


@pytest.mark.parametrize("at", ["first evaluation", "last evaluation"])
@pytest.mark.parametrize("when", ["before it", "behind it"])
def test_interrupted_in_an_evaluation_and_resumed(run, monkeypatch, pays_length, at, when):
    evaluate = evaluation.evaluate

    def interrupt(*args):
        if args[-1] != (0 if at == "first evaluation" else 2):
            return evaluate(*args)
        monkeypatch.setattr(evaluation, "evaluate", evaluate)
        if when == "before it":  # it is left, and done again
            os.kill(os.getpid(), signal.SIGINT)
        found = evaluate(*args)
        if when == "behind it":  # it is logged, and not done again
            os.kill(os.getpid(), signal.SIGINT)
        return found

    whole = run(steps=3, eval_steps=2)
    monkeypatch.setattr(evaluation, "evaluate", interrupt)
    stopped = run(steps=3, eval_steps=2)
    assert stopped["interrupted"]
    grpo.train(grpo.parse_config(["--resume", str(stopped["run"])]))
    for name in ("rollouts.jsonl", "eval.jsonl"):
        assert rows(whole["run"], name) == rows(stopped["run"], name)


def test_terminal_text_cannot_move_the_cursor():
    assert printable("a\x1b[2Jb\nc\r") == "a\\x1b[2Jb\\nc\\r"
    assert len(printable("x" * 1000)) < 200


@pytest.mark.parametrize(
    "text, limit, shown",
    [
        ("a\tb", 3, "a\\tb"),  # a tab is one character, and four when it is shown
        ("a\tbc", 3, "a ... 1 characters ... bc"),
        ("abcdef", 4, "ab ... 2 characters ... ef"),
        ("abcdef", 6, "abcdef"),
    ],
)
def test_a_line_is_folded_by_its_own_characters(text, limit, shown):
    assert printable(text, limit) == shown


@pytest.mark.parametrize("recipe", ["countdown-workshop", "countdown-3b"])
def test_countdown_recipes_run_on_a_tiny_local_model(recipe, qwen3_folder, tmp_path):
    argv = ["--config", f"configs/{recipe}.yaml", "--model", qwen3_folder, "--task_args.dataset", "synthetic"]
    argv += ["--task_args.eval_size", "4", "--steps", "2", "--eval_samples", "2", "--runs", str(tmp_path)]
    argv += ["--prompts_per_step", "2", "--max_prompt_tokens", "700", "--max_completion_tokens", "12"]
    summary = grpo.train(grpo.parse_config([*argv, "--device", "cpu"]))
    assert [row["step"] for row in rows(summary["run"], "metrics.jsonl")] == [1, 2]
    assert {row["step"] for row in rows(summary["run"], "eval.jsonl")} == {0, 2}
    rollout = rows(summary["run"], "rollouts.jsonl")[0]
    if recipe == "countdown-3b":
        assert rollout["prompt"].startswith("system: ") and rollout["prompt"].endswith("<think>")
        assert rollout["completion"].startswith("Let me solve this step by step.\n<think>")
    else:
        assert rollout["prompt"].startswith("Numbers: [")
    loading.load_model(str(summary["run"] / "final"))


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_valid_config(path):
    config = grpo.parse_config(["--config", str(path)])
    assert config.model and config.task in TASKS and config.about


OVERLAYS = sorted(Path("configs/variants").glob("*.yaml"))


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_every_variant_lies_over_every_recipe_and_runs(overlay, run, pays_length):
    settings = yaml.safe_load(overlay.read_text())
    for recipe in Path("configs").glob("*.yaml"):
        config = grpo.parse_config(["--config", str(recipe), "--config", str(overlay)])
        assert all(getattr(config, name) == value for name, value in settings.items())
        assert config.model == yaml.safe_load(recipe.read_text())["model"]
    metrics = rows(run(**settings)["run"], "metrics.jsonl")
    norms = [row["grad_norm"] for row in metrics if row["skipped_updates"] == 0]
    assert len(metrics) == 3 and norms and all(0 < norm < 100 for norm in norms)


def test_the_page_of_the_variants_has_each_of_them_and_every_choice():
    table = Path("docs/variants.md").read_text()
    assert all(f"`{path.name}`" in table for path in OVERLAYS)
    for name in ("advantage", "loss_weight", "ratio", "surrogate", "kl_in", "kl_kind", "dead_groups"):
        (field,) = (f for f in dataclasses.fields(grpo.Config) if f.name == name)
        assert all(choice in table for choice in field.type.__args__), name


# What holds over a whole run, and in no function alone


def broken_gradients(monkeypatch, in_steps: set[int], in_pass: int | None = None) -> None:
    """The loss is not a number in these steps; with `in_pass`, in that pass over the completions alone."""
    batch_loss, update, now = grpo.batch_loss, grpo.update, {}

    def watched_update(*args):
        now.update(step=args[-1], passes=0)
        return update(*args)

    def broken(*args):
        loss = batch_loss(*args)
        now["passes"] += 1
        breaks = now["step"] in in_steps and in_pass in (None, now["passes"])
        return loss * float("nan") if breaks else loss

    monkeypatch.setattr(grpo, "update", watched_update)
    monkeypatch.setattr(grpo, "batch_loss", broken)


def test_one_gradient_that_is_not_finite_does_no_lasting_harm(run, monkeypatch, pays_length):
    broken_gradients(monkeypatch, {1})
    folder = run(steps=3, save_steps=1, keep_last=3)["run"]
    metrics = rows(folder, "metrics.jsonl")
    assert [row["nonfinite_updates"] for row in metrics] == [1, 0, 0]
    assert all(0 < row["grad_norm"] < 1e6 for row in metrics[1:])
    first, second = (weights(folder / f"checkpoint-{step}") for step in (1, 2))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_steps_end_a_run_only_if_none_of_their_updates_was_good(run, monkeypatch, pays_length):
    broken_gradients(monkeypatch, {1, 2, 3, 4}, in_pass=1)
    assert len(rows(run(steps=4, epochs=2)["run"], "metrics.jsonl")) == 4
    broken_gradients(monkeypatch, {1, 2, 3, 4})
    with pytest.raises(grpo.UsageError, match="not finite in 3 steps in a row, up to step 3"):
        run(steps=4, epochs=2)


def test_the_newest_checkpoints_stay_when_their_numbers_get_longer(run, pays_length):
    folder = run(steps=11, save_steps=1, keep_last=2, eval_steps=0)["run"]
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-10", "checkpoint-11"}
    assert run_folder.RunFolder(folder).newest_whole(11).name == "checkpoint-11"


LATE_PART = """
from own import Own

class Late(Own):
    def train(self, rng, step): return {"q": rng.choice("1234"), "step": step}
    def reward(self, text, example):
        parts = super().reward(text, example)
        return parts | {"bonus": 0.5} if example.get("step", 0) > 1 else parts
"""


def test_the_csv_has_the_parts_that_come_later(run, tmp_path):
    (tmp_path / "own.py").write_text(OWN_TASK)
    (tmp_path / "late.py").write_text(LATE_PART)
    folder = run(task=f"{tmp_path}/late.py:Late", task_args={}, steps=3)["run"]
    with open(folder / "metrics.csv") as file:
        assert [row["bonus"] for row in csv.DictReader(file)] == ["", "0.5", "0.5"]


@pytest.mark.parametrize("prompt, completion, fits", [(1500, 548, True), (1500, 549, False), (549, 1500, False)])
def test_prompt_and_completion_must_fit_the_window_together(prompt, completion, fits, qwen3_folder, tmp_path):
    argv = ["--model", qwen3_folder, "--task", "arithmetic", "--task_args.eval_size", "1", "--steps", "0"]
    argv += ["--prompts_per_step", "1", "--group_size", "2", "--eval_samples", "1", "--runs", str(tmp_path)]
    argv += ["--max_prompt_tokens", str(prompt), "--max_completion_tokens", str(completion)]
    if fits:
        loading.check_window(loading.load_model_config(qwen3_folder), grpo.parse_config(argv))
        return
    with pytest.raises(SystemExit, match=f"max_prompt_tokens {prompt} .* {completion} is more than the model's 2048"):
        grpo.main(argv)


@pytest.mark.parametrize("named_in", ["generation_config.json", "config.json"])
def test_every_end_token_of_a_model_ends_its_answers(named_in, run, model_folder, tokenizer, tmp_path):
    """Chat models have several: the tokenizer knows one of them, their configurations the others."""
    folder = shutil.copytree(model_folder, tmp_path / "chat")
    others = [tokenizer.convert_tokens_to_ids(token) for token in "0123456789"]
    config = folder / named_in
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [2, *others]}))
    seen, update = [], grpo.update

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "update", lambda *args: (seen.extend(args[3]), update(*args))[1])
        run(model=str(folder), steps=2)
    assert {r.completion_ids[-1] for r in seen if not r.truncated} & set(others)
    for r in seen:
        assert not {2, *others} & set(r.completion_ids[:-1])
        assert r.truncated == (r.completion_ids[-1] not in {2, *others})


def test_a_prompt_that_is_drawn_again_is_sampled_anew(run, monkeypatch, tmp_path):
    """With one problem whose groups are all dead, every draw of a step has the same prompts."""
    (tmp_path / "own.py").write_text(OWN_TASK.replace('"1234"', '"1"'))
    drawn, generate = [], grpo.TorchSampler.generate

    def watched(self, prompts, group_size, *args):
        found = generate(self, prompts, group_size, *args)
        drawn.append([r.completion_ids for r in found])
        return found

    monkeypatch.setattr(grpo.TorchSampler, "generate", watched)
    folder = run(
        task=f"{tmp_path}/own.py:Own", task_args={}, steps=1, dead_groups="resample", resample_rounds=2, eval_steps=0
    )["run"]
    assert rows(folder, "metrics.jsonl")[0]["resampled_groups"] == 4
    draws = [ids for ids in drawn if len(ids) == 8]
    assert len(draws) == 3 and all(a != b for a, b in zip(draws, draws[1:], strict=False))


def test_a_lap_takes_the_time_since_the_one_before(monkeypatch):
    times = iter([10.0, 11.0, 13.0, 17.0])
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: next(times)))
    clock = metrics.Stopwatch()
    for name in "abc":
        clock.lap(name)
    assert clock.seconds == {"seconds_a": 1.0, "seconds_b": 2.0, "seconds_c": 4.0}


def test_the_seconds_of_a_step_are_those_of_its_parts(run, pays_length, monkeypatch):
    """Drawing and judging, the update, handing over the weights: each is made slower by another time."""
    for owner, name, seconds in ((grpo, "collect", 0.1), (grpo, "update", 0.2), (grpo.TorchSampler, "sync", 0.4)):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, original=original, seconds=seconds: (time.sleep(seconds), original(*args))[1]
        )
    row = rows(run(steps=1)["run"], "metrics.jsonl")[0]
    parts = {name: row[f"seconds_{name}"] for name in ("sample", "train", "sync")}
    assert 0.1 < parts["sample"] and 0.2 < parts["train"] and 0.4 < parts["sync"]
    assert row["tokens_per_second"] == pytest.approx(row["tokens"] / sum(parts.values()), rel=1e-6)
    monkeypatch.undo()


def test_a_bar_shows_the_progress_of_a_run_and_another_that_of_an_evaluation(run, pays_length, capsys):
    run(steps=3)
    bar = capsys.readouterr().err
    assert "3/3" in bar and "step/s" in bar and "evaluating" in bar
    assert re.search(r"reward -?[0-9.]+, length [0-9]+, dead groups [0-9]+%", bar)
    run(steps=0)
    bar = capsys.readouterr().err
    assert "step/s" not in bar and "evaluating" in bar


def test_the_memory_is_that_of_the_process():
    measured = psutil.Process().memory_info().rss / 1e9
    assert measured < 1.01 * peak_memory(torch.device("cpu")) < 20


@pytest.mark.parametrize("ending, code", [({}, 0), ({"interrupted": True}, 130)])
def test_the_command_ends_with_a_code_for_scripts(ending, code, monkeypatch):
    monkeypatch.setattr(grpo, "train", lambda config: ending)
    with pytest.raises(SystemExit) as stopped:
        grpo.main([])
    assert stopped.value.code == code

    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(grpo, "train", interrupt)
    with pytest.raises(SystemExit) as stopped:
        grpo.main([])
    assert stopped.value.code == 130


LEAST = dict(group_size=2, prompts_per_step=1, max_prompt_tokens=1, max_completion_tokens=1, sample_rows=1, epochs=1)
LEAST |= dict(minibatches=1, tokens_per_microbatch=1, eval_samples=1, save_steps=1, keep_last=1, steps=0, top_k=0)
LEAST |= dict(kl_coef=0, kl_target=0, clip_low=0, clip_high=0, warmup_steps=0, weight_decay=0, eval_steps=0)
LEAST |= dict(print_groups=0, kv_cache_gb=0, importance_cap=0, resample_rounds=0, overlong_share=0, reward_seconds=0)
LEAST |= dict(entropy_coef=0)


@pytest.mark.parametrize("name", LEAST)
def test_the_least_value_of_a_setting_is_allowed_and_less_is_not(name, make_config):
    assert getattr(make_config(**{name: LEAST[name]}), name) == LEAST[name]
    for value in (LEAST[name] - 1, float("nan")):
        with pytest.raises(grpo.UsageError, match=f"{name} is {value}, it must be {LEAST[name]} or more"):
            make_config(**{name: value})


@pytest.mark.parametrize("name", ["temperature", "top_p", "lr", "grad_clip"])
def test_what_must_be_positive(name, make_config):
    assert getattr(make_config(**{name: 1e-9}), name) == 1e-9
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(grpo.UsageError, match=f"{name} is {value}"):
            make_config(**{name: value})


@pytest.mark.curves
def test_the_curves_show_the_log(run, pays_length, monkeypatch):
    """Line by line: what is drawn is what was logged, under its name, evaluations with their intervals."""
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), savefig(self, *args, **kwargs))
    )
    folder = run(steps=4, eval_steps=2)["run"]
    metrics, evaluations = rows(folder, "metrics.jsonl"), rows(folder, "eval.jsonl")
    drawn, bars = {}, {}
    for axis in figures[0].axes:
        for line in axis.get_lines():
            if not line.get_label().startswith("_"):
                drawn[line.get_label()] = list(zip(*line.get_data(), strict=True))
        for container in axis.containers:
            (low, high) = container.lines[1]
            bars[container.get_label()] = list(zip(low.get_ydata(), high.get_ydata(), strict=True))
            drawn[container.get_label()] = list(zip(*container.lines[0].get_data(), strict=True))
    names = [
        "reward",
        "length",
        "length_correct",
        "length_wrong",
        "worked",
        "zero_advantage_groups",
        "truncated",
        "entropy",
    ]
    assert drawn.keys() == {*names, "grad_norm", "accuracy", "accuracy_sampled"}
    for name in [*names, "grad_norm"]:
        values = [(row["step"], row[name]) for row in metrics if row[name] is not None]
        assert [step for step, _ in drawn[name]] == [step for step, _ in values]
        for i, (_, value) in enumerate(drawn[name]):  # a mean with its neighbours
            near = [v for _, v in values[max(0, i - 1) : i + 2]]
            assert value == pytest.approx(sum(near) / len(near)), name
    for name in ("accuracy", "accuracy_sampled"):
        assert drawn[name] == [(row["step"], row[name]) for row in evaluations]
        intervals = [(row[f"{name}_low"], row[f"{name}_high"]) for row in evaluations]
        assert bars[name] == [pytest.approx(interval) for interval in intervals]


def test_minibatches_are_drawn_anew_in_each_pass_and_step(run, pays_length, monkeypatch):
    """All rows in each pass, in an order of its own, the same whenever the run is repeated."""
    batch_loss, update, place, drawn = grpo.batch_loss, grpo.update, {}, []

    def watched_update(policy, optimizer, accelerator, rollouts, *args):
        place.update({id(r): i for i, r in enumerate(rollouts)})
        return update(policy, optimizer, accelerator, rollouts, *args)

    def watched_loss(policy, batch, *args):
        drawn.append(sorted(place[id(r)] for r in batch))
        return batch_loss(policy, batch, *args)

    monkeypatch.setattr(grpo, "update", watched_update)
    monkeypatch.setattr(grpo, "batch_loss", watched_loss)
    settings = dict(steps=2, prompts_per_step=4, epochs=2, minibatches=2, dead_groups="keep", eval_steps=0)
    run(**settings)
    assert len(drawn) == 8, "two steps of two passes of two minibatches"
    for i in range(0, 8, 2):
        assert sorted(drawn[i] + drawn[i + 1]) == list(range(16)) and len(drawn[i]) == 8
    firsts = [tuple(rows) for rows in drawn[::2]]
    assert len(set(firsts)) == 4 and tuple(range(8)) not in firsts
    first = list(drawn)
    run(**settings)
    assert drawn[8:] == first


def test_a_run_limits_its_threads(run, monkeypatch):
    limited = []
    monkeypatch.setattr(loading, "limit_threads", limited.append)
    run(steps=0)
    (model,) = limited
    assert sum(p.numel() for p in model.parameters()) < loading.SINGLE_THREADED and not model.training


def test_a_model_that_is_not_causal_is_refused_before_any_work(tokenizer, tmp_path):
    torch.manual_seed(0)
    shape = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    config = transformers.BertConfig(**shape, num_attention_heads=4, max_position_embeddings=1024)
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    with pytest.raises(grpo.UsageError, match="the logits of BertLMHeadModel are not those of one linear head"):
        small = dict(steps=0, eval_samples=1, max_completion_tokens=2, task_args=SMALL_TASK, prompts_per_step=1)
        runs = str(tmp_path / "runs")
        grpo.train(grpo.Config(model=str(tmp_path / "bert"), task="arithmetic", runs=runs, **small))
    assert not (tmp_path / "runs").exists()


def test_a_reference_has_the_precision_of_the_weights(run, pays_length):
    """Of a policy in bf16, a reference in float32 would differ at the start."""
    for optimizer in ("adamw", "adamw_offload"):
        row = rows(run(optimizer=optimizer, kl_coef=0.5, kl_kind="k1", steps=1)["run"], "metrics.jsonl")[0]
        assert abs(row["kl_ref"]) < 1e-6  # k1, the mean difference itself: k3 would be its square


def test_code_of_a_model_is_trusted_wherever_it_is_loaded(run, monkeypatch):
    asked = []
    for name, at in (("load_model_config", 1), ("load_model", 2)):
        original = getattr(loading, name)

        def watched(*args, name=name, at=at, original=original, **kwargs):
            asked.append((name, kwargs.get("trust_remote_code", args[at] if len(args) > at else None)))
            return original(*args, **kwargs)

        monkeypatch.setattr(loading, name, watched)
    for trusted in (True, False):
        asked.clear()
        run(steps=0, kl_coef=0.1, trust_remote_code=trusted)
        outer = [found for name, found in asked if name == "load_model"]
        assert len(outer) == 2 and {found for _, found in asked} == {trusted}, "the policy, and the reference"


def shown_group(monkeypatch, run, **settings) -> tuple[list, list[float]]:
    """The rollouts and weights that `--steps 0` shows a group of."""
    found, show, weigh = [], terminal.show_group, grpo.token_weights
    with monkeypatch.context() as patch:
        patch.setattr(terminal, "show_group", lambda *args: (found.append(args[0]), show(*args))[1])
        patch.setattr(grpo, "token_weights", lambda *args, **more: (found.append(weigh(*args, **more)), found[-1])[1])
        run(steps=0, **settings)
    rollouts, weights = found
    return rollouts, weights.tolist()


def test_the_group_that_is_shown_has_the_weights_of_the_settings(run, pays_length, monkeypatch):
    rollouts, weights = shown_group(monkeypatch, run)
    assert weights == pytest.approx([1 / sum(r.length for r in rollouts)] * 8) and any(r.truncated for r in rollouts)
    rollouts, weights = shown_group(monkeypatch, run, loss_weight="constant")
    assert weights == pytest.approx([1 / (8 * 8)] * 8)
    rollouts, weights = shown_group(monkeypatch, run, mask_truncated=True)
    whole = sum(r.length for r in rollouts if not r.truncated)
    assert weights == pytest.approx([0 if r.truncated else 1 / whole for r in rollouts])


def test_the_group_that_is_shown_is_advised_by_a_kl_in_the_reward_too(run, pays_length, monkeypatch):
    rollouts, _ = shown_group(monkeypatch, run, kl_coef=0.1, kl_in="reward", advantage="rloo")
    assert all(len(r.ref_logps) == r.length for r in rollouts)


def test_training_prompts_that_are_all_too_long_are_told_before_the_evaluation(run, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN_TASK.replace('rng.choice("1234")', '"1" * 30'))
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: pytest.fail("the evaluation was started"))
    with pytest.raises(grpo.UsageError, match="nearly all prompts are over max_prompt_tokens = 20"):
        run(task=f"{tmp_path}/own.py:Own", task_args={})
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", ["torch", "vllm"])
def test_the_memory_of_vllm_is_counted_where_it_samples(kind, run, monkeypatch):
    def fitted(model_config, config, accelerator, vllm):
        raise grpo.UsageError(f"asked with {vllm}")

    monkeypatch.setattr(loading, "choose_sampler", lambda *args: kind)
    monkeypatch.setattr(memory, "fitted", fitted)
    with pytest.raises(grpo.UsageError, match=f"asked with {kind == 'vllm'}"):
        run(steps=0)


def test_model_task_and_run_can_come_from_the_environment(run, pays_length, monkeypatch, model_folder):
    """The preset of the plain command is for the small model alone, however another one is named."""
    folder = run(steps=1)["run"]
    monkeypatch.setenv("GRPO_MODEL", model_folder)
    monkeypatch.setenv("GRPO_TASK", "arithmetic")
    config = grpo.parse_config([])
    assert (config.model, config.lr) == (model_folder, 1e-6)
    monkeypatch.setenv("GRPO_RESUME", str(folder))
    assert grpo.parse_config([]).lr == 1e-3


def test_each_evaluation_is_shown_once_and_the_last_beside_the_first(run, pays_length, capsys):
    run(steps=2, eval_steps=1)
    heads = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(" " * 20)]
    assert heads == [["before"], ["after", "1", "steps"], ["before", "after", "2", "steps"]]
