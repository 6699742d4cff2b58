"""The files of examples/: the command in each runs, the evaluation is held out, and each answer is paid as it says."""

import random
import re
import runpy
from pathlib import Path

import pytest

import grpo
from tasks import load_task
from tasks.data import load_rows

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))


def command_of(path: Path) -> list[str]:
    """The arguments of the one command in its docstring."""
    (command,) = re.findall(r"python grpo\.py (.*?)\n\"\"\"", path.read_text(), re.DOTALL)
    return command.replace("\\\n", " ").split()


def task_of(path: Path, **task_args):
    words = command_of(path)
    return load_task(words[words.index("--task") + 1], task_args)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_its_command_is_in_the_docs(path):
    assert len(path.read_text().splitlines()) < 60
    page = (ROOT / "docs" / "your_own_task.md").read_text().replace("\\\n", " ")
    assert " ".join(command_of(path)) in re.sub(r"\s+", " ", page)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_command_of_an_example_runs(path, qwen3_folder, tmp_path):
    """With a tiny model in place of the real one, and one step."""
    words = command_of(path)
    words[words.index("--model") + 1] = qwen3_folder
    words += ["--steps", "1", "--eval_samples", "1", "--prompts_per_step", "2", "--runs", str(tmp_path)]
    words[words.index("--max_completion_tokens") + 1] = "8"
    assert (grpo.train(grpo.parse_config(words))["run"] / "final").is_dir()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_what_is_evaluated_is_in_no_training(path):
    task, rng = task_of(path), random.Random(0)
    held_out = [task.prompt(example) for example in task.eval()]
    assert len(held_out) >= 5 and held_out == [task.prompt(example) for example in task.eval()]
    assert not [prompt for prompt in (task.prompt(task.train(rng, 1)) for _ in range(500)) if prompt in held_out]


PARIS, TEN_TO = {"country": "France", "capital": "Paris"}, {"start": 23 * 60 + 50, "hours": 1, "minutes": 15}


@pytest.mark.parametrize(
    "stem, example, text, reward",
    [
        ("capitals", PARIS, " Paris.\n", 1.0),
        ("capitals", PARIS, "paris", 1.0),
        ("capitals", PARIS, "It is Paris", 0.0),
        ("capitals", PARIS, "", 0.0),
        ("capitals", PARIS, "Paris London Rome", 0.0),
        ("trl_rewards", {"word": "sea"}, "One line\nand by the sea.", 1.0),
        ("trl_rewards", {"word": "sea"}, "by the sea", 0.5),
        ("trl_rewards", {"word": "sea"}, "One\ntwo", 0.5),
        ("trl_rewards", {"word": "sea"}, "", 0.0),
        ("clock", TEN_TO, "<think>23:50, 1:05</think> <answer>01:05</answer>", 1.1),
        ("clock", TEN_TO, "<think></think><answer>1:05</answer>", 1.1),
        ("clock", TEN_TO, "<answer>01:05</answer>", 1.0),
        ("clock", TEN_TO, "<think>a</think><answer>25:05</answer>", 0.1),
        ("clock", TEN_TO, "<think>a</think><answer>01:05</answer><answer>01:06</answer>", 0.0),
        ("clock", TEN_TO, "<think>01:05", 0.0),
        ("clock", TEN_TO, "x" * 300_000, 0.0),
    ],
)
def test_what_an_answer_is_paid(stem, example, text, reward):
    (path,) = (path for path in EXAMPLES if path.stem == stem)
    parts = task_of(path).reward(text, example)
    assert parts["reward"] == pytest.approx(reward) and parts["correct"] == float(reward >= 1)


def test_capitals_has_two_hundred_different_rows_and_takes_a_csv(tmp_path):
    (path,) = (path for path in EXAMPLES if path.stem == "capitals")
    task = task_of(path)
    rows = task.eval() + task.rows
    assert len(rows) == len({row["country"] for row in rows}) == 200
    csv = tmp_path / "rows.csv"
    csv.write_text("country,capital\nFrance,Paris\nPeru,Lima\n")
    assert task_of(path, dataset=str(csv), eval_size=1).rows == [{"country": "Peru", "capital": "Lima"}]


def test_a_data_set_that_looks_local_and_is_not_there_is_refused_at_once(tmp_path, monkeypatch):
    (path,) = (path for path in EXAMPLES if path.stem == "capitals")
    monkeypatch.chdir(tmp_path)
    Path("capitals.jsonl").write_text("{}\n")
    where = f"{path}:Capitals"
    for name in ("capital.jsonl", "./capital.jsonl", "data/x.parquet"):
        with pytest.raises(grpo.UsageError, match="there is no such file or folder") as error:
            load_task(where, {"dataset": name})
        assert ("did you mean capitals.jsonl?" in str(error.value)) == ("capital" in name)


def test_the_reward_functions_of_trl_are_called_as_trl_calls_them():
    found = runpy.run_path(str(ROOT / "examples/trl_rewards.py"))
    completions = [[{"role": "assistant", "content": text}] for text in ("a\nsea", "b")]
    assert found["two_lines"]([None] * 2, completions, word=["sea"] * 2) == [0.5, 0.0]
    assert found["ends_with_the_word"]([None] * 2, completions, word=["sea", "hill"]) == [0.5, 0.0]


@pytest.mark.parametrize(
    "second, said",
    [
        ('{"question": "b", "answer": "B"', "line 2 is not JSON"),
        ('["b", "B"]', "line 2 is no row in braces"),
    ],
)
def test_a_broken_line_of_a_data_set_is_named(second, said, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a", "answer": "A"}\n' + second + '\n{"question": "c", "answer": "C"}\n')
    with pytest.raises(ValueError) as error:
        load_rows(str(file), "train", ["question"])
    assert said in str(error.value) and "\n" not in str(error.value)
