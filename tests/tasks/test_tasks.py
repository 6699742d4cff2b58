"""Countdown, GSM8K: loading, prompts, and verifiers that cannot be fooled, hung or crashed."""

import json
import random
import time
import zlib
from fractions import Fraction

import datasets
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo
from tasks import TASKS, competition_math, countdown, gsm8k, load_task
from tasks.competition_math import Math
from tasks.countdown import Countdown, countdown_problem, countdown_reward, equation_value
from tasks.gsm8k import GSM8K, gsm8k_reward
from tasks.tags import answer_block

PROBLEM = {"nums": [44, 19, 35], "target": 98}


def write_jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# Answers


@pytest.mark.parametrize(
    "text, block",
    [
        ("<think>a</think><answer>1+2</answer>", "1+2"),
        ("<think>a\nb</think>\n<answer>\n1+2\n</answer>", "\n1+2\n"),
        ("<answer>1+2</answer>", "1+2"),
        ("<think>first <answer>9</answer> no</think><answer>1</answer>", "1"),  # the thinking does not count
        ("<think>never ended <answer>1</answer>", None),
        ("<think>a</think> <think>again <answer>1</answer>", None),
        ("</think><answer>1</answer><answer>2</answer>", None),  # two guesses
        ("</think><answer><answer>1</answer></answer>", None),
        ("</think><answer><answer>1</answer>", None),
        ("</answer>1<answer>", None),
        ("</think><answer>1", None),
        ("", None),
    ],
)
def test_the_answer_is_the_one_block_behind_the_thinking(text, block):
    assert answer_block(text) == block


@pytest.mark.parametrize(
    "text, value",
    [
        ("44+19+35", 98),
        (" ( 44 + 19 )\n+ 35 ", 98),
        ("-(1-3)*4/3", Fraction(8, 3)),
        ("1/3*3", 1),
        ("2**3", None),
        ("99**98**97", None),
        ("7//2", None),
        ("2.5*4", None),
        ("1_0+2", None),
        ("0x10", None),
        ("1e3", None),
        ("٣+1", None),
        ("３+1", None),
        ("1 2", None),
        ("(1)(2)", None),
        ("1,2", None),
        ("3!", None),
        ("1/0", None),
        ("1/(2-2)", None),
        ("98=98", None),
        ("__import__('os')", None),
        ("+3", None),
        ("012+1", None),
        ("", None),
        ("(" * 60 + "1" + ")" * 60, 1),
        ("(" * 1000 + "1" + ")" * 1000, None),
        ("-" * 150 + "1", 1),
        ("9" * 300, None),
        ("1+" * 99 + "1", 100),
        ("1#2", None),
        ("1\n+2", 3),
        ("1 if 1 else 2", None),
        ("True+1", None),
    ],
)
def test_equations_are_plain_arithmetic_and_nothing_else(text, value):
    found = equation_value(text)
    assert (found and found[0]) == value


@given(st.text(alphabet="0123456789+-*/(). \n_,e=<>#\x00", max_size=250))
@settings(deadline=500, max_examples=300)
def test_no_text_raises_or_hangs(text):
    equation_value(text)
    for reward in (countdown_reward, gsm8k_reward):
        parts = reward(f"<think>x</think><answer>{text}</answer>\nFinal: {text}", PROBLEM)
        assert 0 <= parts["format"] <= 1 and parts["correct"] in (0, 1)


# Countdown


def r1(answer: str) -> str:
    return f"Let me solve this step by step.\n<think>44 and\n19 ...</think>\n<answer>{answer}</answer>"


@pytest.mark.parametrize(
    "text, correct, format",
    [
        (r1("44 + 19 + 35"), 1, 1),
        (r1("35 + (44 + 19)"), 1, 1),
        (r1("44 + 54"), 0, 1),  # other numbers
        (r1("44 + 19 + 35 + 19 - 19"), 0, 1),  # one three times
        (r1("44 + 35"), 0, 1),
        (r1("44 + 19 + 35 = 98"), 0, 0.5),
        (r1("forty-four"), 0, 0.5),
        (r1("98"), 0, 1),
        (r1("4*4 + 19 + 35"), 0, 1),  # no gluing or splitting of digits
        (r1("44 + 19 + 35") + "!", 1, 0),
        (r1("44 + 19 + 35").replace("</think>", ""), 0, 0),
        (r1("44 + 19 + 35").replace("<think>", "<think><think>"), 1, 0),
        ("<answer>44 + 19 + 35</answer>", 1, 0),
        ("", 0, 0),
    ],
)
def test_countdown_by_hand(text, correct, format):
    parts = countdown_reward(text, PROBLEM)
    assert (parts["correct"], parts["format"]) == (correct, format)


@pytest.mark.parametrize(
    "weights, paid",
    [
        (dict(), dict(both=2, equation=1, form=1, nothing=0)),
        (dict(format_weight=0), dict(both=1, equation=1, form=0, nothing=0)),
        (dict(format_weight=0, format_gates=True), dict(both=1, equation=0, form=0, nothing=0)),
        (dict(equation_weight=2, format_weight=0.5), dict(both=2.5, equation=2, form=0.5, nothing=0)),
    ],
)
def test_the_form_can_score_gate_or_be_a_metric(weights, paid):
    task = Countdown("synthetic", eval_size=5, **weights)
    texts = dict(both=r1("44+19+35"), equation="<answer>44+19+35</answer>", form=r1("1+2"), nothing="")
    assert {name: task.reward(text, PROBLEM)["reward"] for name, text in texts.items()} == paid


def test_countdown_prompts(tmp_path):
    chat = Countdown("synthetic", eval_size=5)
    system, user = chat.prompt(PROBLEM)
    assert (system["role"], user["role"]) == ("system", "user")
    assert "[44, 19, 35]" in user["content"] and "98" in user["content"]
    assert chat.prefill.endswith("<think>")
    plain = Countdown("synthetic", "plain", eval_size=5)
    assert "98" in plain.prompt(PROBLEM) and plain.prefill == ""
    assert plain.reward("so <answer>44+19+35</answer>", PROBLEM)["reward"] == 2
    assert Countdown("synthetic", "{nums} to {target}:", eval_size=5).prompt(PROBLEM) == "[44, 19, 35] to 98:"
    (tmp_path / "prompt.txt").write_text("Use {nums} for {target}.")
    own = Countdown("synthetic", str(tmp_path / "prompt.txt"), eval_size=5)
    assert own.prompt(PROBLEM) == "Use [44, 19, 35] for 98."
    with pytest.raises(ValueError, match="has no {target}; give r1, plain, or text"):
        Countdown("synthetic", "only {nums}", eval_size=5)


def test_synthetic_problems_are_of_the_kind_and_held_out():
    rng = random.Random(0)
    training = [countdown_problem(rng, for_eval=False) for _ in range(500)]
    assert {len(p["nums"]) for p in training} == {3, 4}
    assert all(1 <= n <= 99 for p in training for n in p["nums"]) and all(10 <= p["target"] <= 100 for p in training)
    task = Countdown("synthetic", eval_size=200)
    keys = [{(tuple(sorted(p["nums"])), p["target"]) for p in problems} for problems in (training, task.eval())]
    assert not keys[0] & keys[1]
    for problems, for_eval in ((training, False), (task.eval(), True)):
        checksums = [zlib.crc32(f"{sorted(p['nums'])} {p['target']}".encode()) % 20 for p in problems]
        assert all((checksum == 0) == for_eval for checksum in checksums)
    assert task.eval() == Countdown("synthetic", eval_size=200).eval()
    assert task.train(random.Random(1), 0) == task.train(random.Random(1), 5)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder"])
def test_countdown_from_files(tmp_path, kind):
    rng = random.Random(0)
    rows = [countdown_problem(rng, for_eval=False) for _ in range(40)]
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        write_jsonl(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.mkdir()
        datasets.Dataset.from_list(rows).to_parquet(path / "train-00000-of-00001.parquet")
    task = Countdown(str(path), eval_size=10)
    evaluation = [str(row) for row in task.eval()]
    training = {str(task.train(random.Random(i), 0)) for i in range(500)}
    assert len(evaluation) == 10 and len(training) == 30 and not training & set(evaluation)
    assert training | set(evaluation) == {str(row) for row in rows}
    assert evaluation == [str(row) for row in Countdown(str(path), eval_size=10).eval()]


def test_a_problem_that_is_there_twice_is_in_the_evaluation_alone(tmp_path):
    rng = random.Random(0)
    rows = [countdown_problem(rng, for_eval=False) for _ in range(30)]
    again = [{"nums": row["nums"][::-1], "target": row["target"]} for row in rows]
    task = Countdown(write_jsonl(tmp_path / "twice.jsonl", rows + again), eval_size=20)
    taken = {(tuple(sorted(row["nums"])), row["target"]) for row in task.eval()}
    drawn = [task.train(random.Random(i), 0) for i in range(300)]
    assert not taken & {(tuple(sorted(row["nums"])), row["target"]) for row in drawn}
    text = [{"nums": row["nums"], "target": str(row["target"])} for row in rows]
    with pytest.raises(ValueError, match="no row can be used, nums and target must be whole numbers.*'target': '"):
        Countdown(write_jsonl(tmp_path / "text.jsonl", text), eval_size=5)


def test_countdown_leaves_out_what_nothing_can_solve(tmp_path, capsys):
    rng = random.Random(0)
    good = [countdown_problem(rng, for_eval=False) for _ in range(30)]
    bad = [([3, -4], 7), ([], 7), ([3], None), (None, 1)]
    bad = [dict(nums=nums, target=target) for nums, target in bad]
    task = Countdown(write_jsonl(tmp_path / "some.jsonl", good[:10] + bad + good[10:]), eval_size=20)
    drawn = [task.train(random.Random(i), 0) for i in range(300)]
    assert not [row for row in [*task.eval(), *drawn] if row in bad] and len({str(row) for row in drawn}) == 10
    assert "4 of 34 rows are left out" in (out := capsys.readouterr().out) and "{'nums': [3, -4], 'target': 7}" in out


@pytest.mark.parametrize(
    "text",
    [
        "<think>" * 20_000 + "<answer>1+2</answer>",
        "<think>" * 400 + "</think><answer>" * 400 + "</answer>" * 400 + "x",
        " " * 100_000 + "<answer>",
    ],
)
def test_long_texts_take_no_time(text):
    started = time.process_time()
    assert countdown_reward(text, PROBLEM)["format"] == gsm8k_reward(text, PROBLEM)["format"] == 0
    assert time.process_time() - started < 2  # the pattern that this guards against took minutes


# GSM8K


@pytest.mark.parametrize(
    "text, reward",
    [
        ("2 + 3 = 5.\nFinal: 1450", 1),
        ("Final: 1,450", 1),
        ("so\nFinal: $1,450.00\n", 1),
        ("Final: +1450", 1),
        ("Final: 1451", 0.1),
        ("Final: -1450", 0.1),
        ("Final: 14,50", 0),
        ("Final: 1450 apples", 0),
        ("Final: 1450\nI hope this helps", 0),
        ("Final: 1450\nFinal: 1450", 0),
        ("Final: 3 or Final: 1450", 0),
        ("The Final: 1450", 0),
        ("1450", 0),
        ("final: 1450", 0),
        ("Final: ", 0),
        ("Final: ١٤٥٠", 0),
        ("Final: 1e3", 0),
        ("Final: nan", 0),
        ("Final: " + "9" * 10_000, 0),
        ("", 0),
    ],
)
def test_gsm8k_by_hand(text, reward):
    parts = gsm8k_reward(text, {"target": Fraction(1450)})
    assert parts["reward"] == reward
    assert parts["correct"] == (reward == 1) and parts["format"] == (reward > 0)


def test_gsm8k_negative_and_decimal_numbers():
    assert gsm8k_reward("Final: -$2.50", {"target": Fraction(-5, 2)})["correct"] == 1
    assert gsm8k_reward("Final: $-2.5", {"target": Fraction(-5, 2)})["correct"] == 1
    assert gsm8k_reward("Final: 2.5", {"target": Fraction(-5, 2)})["correct"] == 0


def gsm8k_rows(n: int) -> list[dict]:
    return [{"question": f"What is {i} and 1000?", "answer": f"Add them.\n#### {i + 1000:,}"} for i in range(n)]


def test_gsm8k_from_a_file_and_a_folder_with_splits(tmp_path):
    task = GSM8K(write_jsonl(tmp_path / "all.jsonl", gsm8k_rows(20)), eval_size=5)
    assert [example["target"] for example in task.eval()] == list(range(1015, 1020))
    assert {task.train(random.Random(i), 0)["target"] for i in range(300)} == set(range(1000, 1015))
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", gsm8k_rows(12))
    write_jsonl(folder / "test.jsonl", gsm8k_rows(30)[20:])
    task = GSM8K(str(folder), train_size=4, eval_size=3)
    assert [example["target"] for example in task.eval()] == [1020, 1021, 1022]
    assert {task.train(random.Random(i), 0)["target"] for i in range(100)} == set(range(1000, 1004))
    system, user = task.prompt(task.eval()[0])
    assert "Final: 42" in system["content"] and user["content"] == "What is 20 and 1000?"
    assert task.reward("Final: 1020", task.eval()[0])["reward"] == 1


def test_a_gold_answer_without_a_number_is_left_out_and_said(tmp_path, capsys):
    bad = [dict(question="Which one?", answer="#### none"), dict(question=None, answer="#### 1")]
    task = GSM8K(write_jsonl(tmp_path / "bad.jsonl", gsm8k_rows(3) + bad), eval_size=1)
    assert [example["target"] for example in [*task.examples, *task.eval()]] == [1000, 1001, 1002]
    assert "2 of 5 rows are left out, their answers have no number behind ####" in (out := capsys.readouterr().out)
    assert "the first is {'question': 'Which one?'" in out
    with pytest.raises(ValueError, match="no row can be used, their answers have no number behind ####"):
        GSM8K(write_jsonl(tmp_path / "all_bad.jsonl", bad), eval_size=1)


def test_no_question_is_there_twice_in_gsm8k(tmp_path):
    rows = gsm8k_rows(8)
    again = [row | dict(question=row["question"].replace(" ", "  ").upper()) for row in rows]
    task = GSM8K(write_jsonl(tmp_path / "twice.jsonl", rows + again), eval_size=3)
    assert [e["target"] for e in task.examples] == list(range(1000, 1005))
    assert [e["target"] for e in task.eval()] == [1005, 1006, 1007]
    (tmp_path / "splits").mkdir()
    write_jsonl(tmp_path / "splits" / "train.jsonl", rows + again)
    write_jsonl(tmp_path / "splits" / "test.jsonl", again[6:] + rows[7:])
    task = GSM8K(str(tmp_path / "splits"))
    assert [e["target"] for e in task.examples] == list(range(1000, 1006))
    assert [e["target"] for e in task.eval()] == [1006, 1007]
    with pytest.raises(ValueError, match="has no problem that is not in its evaluation"):
        write_jsonl(tmp_path / "splits" / "test.jsonl", rows)
        GSM8K(str(tmp_path / "splits"))


# Loading


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ValueError, match="'nobody/nothing'.*cannot be loaded.*local folder or JSON, CSV or Parquet"):
        Countdown("nobody/nothing")
    path = write_jsonl(tmp_path / "a.jsonl", [{"numbers": [1, 2], "target": 3}] * 20)
    with pytest.raises(ValueError, match="has no column nums; it has numbers, target"):
        Countdown(path)
    path = write_jsonl(tmp_path / "b.jsonl", [PROBLEM] * 20)
    with pytest.raises(ValueError, match="20 problems, too few to hold out eval_size = 500"):
        Countdown(path)


@pytest.mark.parametrize("name", ["countdown", "gsm8k", "math"])
def test_grpo_finds_the_tasks_by_name(name, tmp_path):
    with pytest.raises(grpo.UsageError, match="its arguments: .*dataset"):
        load_task(name, {"data": "x"})


@pytest.mark.parametrize("name, is_now", [("Countdown", Countdown), ("GSM8K", GSM8K), ("Math", Math)])
def test_names_of_an_earlier_layout_are_still_found(name, is_now):
    with pytest.raises(grpo.UsageError, match="its arguments: .*dataset"):
        load_task(f"tasks:{name}", {"data": "x"})
    assert TASKS[f"tasks:{name}"] == f"{is_now.__module__}:{is_now.__name__}"


def test_a_run_of_an_earlier_layout_goes_on(qwen3_folder, tmp_path):
    """Its config.yaml has the task by a name of that time."""
    args = dict(dataset="synthetic", prompt_template="plain", eval_size=2)
    settings = dict(model=qwen3_folder, task="tasks:Countdown", task_args=args, steps=1, save_steps=1, eval_samples=1)
    settings |= dict(prompts_per_step=1, group_size=2, max_completion_tokens=4, runs=str(tmp_path))
    folder = grpo.train(grpo.Config(**settings))["run"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["task"] == "tasks:Countdown"
    assert grpo.train(grpo.parse_config(["--resume", str(folder), "--steps", "2"]))["last"]["step"] == 2


@pytest.mark.parametrize(
    "task, asked",
    [
        (lambda: Math("train/set", "test/set"), [("train/set", "train", None), ("test/set", "test", None)]),
        (lambda: GSM8K(), [("openai/gsm8k", "train", "main"), ("openai/gsm8k", "test", "main")]),
        (lambda: GSM8K("my/own"), [("my/own", "train", None), ("my/own", "test", None)]),
        (lambda: Countdown("my/own", eval_size=1), [("my/own", "train", None)]),
    ],
)
def test_splits_of_the_hub_that_are_asked_for(task, asked, monkeypatch):
    found = []

    def load_rows(dataset, split, columns, subset=None):
        found.append((dataset, split, subset))
        row = dict(problem=split, solution="\\boxed{1}", level="Level 1", question=split, nums=[1], target=1)
        row["answer"] = "1" if "problem" in columns else "#### 1"
        return datasets.Dataset.from_list([row, row | {"target": 2}])

    for task_file in (competition_math, countdown, gsm8k):
        monkeypatch.setattr(task_file, "load_rows", load_rows)
    task()
    assert found == asked
