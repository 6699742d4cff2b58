"""MATH: what docs/answers.md says is paid, and nothing else; rows that are left out; no text raises or takes long."""

import json
import random
import re
import time
from pathlib import Path

import pytest

from tasks.competition_math import Math, last_boxed, math_example, math_reward
from tasks.forms import same
from tasks.gsm8k import gsm8k_reward, plain_number
from tasks.latex import MAX_CHARACTERS, MAX_DEPTH, MAX_DIGITS, MAX_TOKENS, read

DOCS = Path(__file__).resolve().parents[2] / "docs" / "answers.md"
REWRITES, ATTACKS = (Path(__file__).with_name(f"math_{kind}.txt") for kind in ("rewrites", "attacks"))


def rows_of(text: str) -> list[list[list[str]]]:
    """The code spans of each cell of each row of the tables."""
    rows = []
    for line in text.splitlines():
        cells = re.split(r"(?<!\\)\|", line.strip())[1:-1]
        spans = [[span.replace(r"\|", "|") for span in re.findall("`([^`]+)`", cell)] for cell in cells]
        if len(spans) == 4 and len(spans[0]) == 1:
            rows.append(spans)
    return rows


MATH = [
    (gold, answer, paid)
    for (gold,), right, wrong, _ in rows_of(DOCS.read_text().partition("## MATH")[2])
    for answers, paid in ((right, 1), (wrong, 0))
    for answer in answers
]
GSM8K = [
    (number, answer, *verdict)
    for (number,), *columns in rows_of(DOCS.read_text().partition("## GSM8K")[2].partition("## MATH")[0])
    for answers, verdict in zip(columns, ((1, 0), (0, 1), (0, 0)), strict=True)
    for answer in answers
]


def boxed(answer: str) -> str:
    return f"<think>so</think><answer>{answer}</answer>"


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_tables_are_large_and_have_both_sides():
    assert sum(paid for *_, paid in MATH) >= 120 and sum(not paid for *_, paid in MATH) >= 120
    assert len(set(MATH)) == len(MATH)


@pytest.mark.parametrize("gold, answer, paid", MATH)
def test_the_table_of_math(gold, answer, paid):
    assert read(gold), "the gold answer is understood"
    parts = math_reward(boxed(answer), math_example("P", gold))
    assert (parts["correct"], parts["format"], parts["ground_truth"]) == (paid, 1, gold)


@pytest.mark.parametrize("number, answer, paid, near", GSM8K)
def test_the_table_of_gsm8k(number, answer, paid, near):
    parts = gsm8k_reward(f"2 + 2 = 4\n{answer}", {"target": plain_number(number)})
    assert (parts["correct"], parts["near_miss"]) == (paid, near)


def pairs_of(file: Path) -> list[tuple[str, str]]:
    """Lines `gold => answer ;; answer`."""
    lines = [line.partition(" => ") for line in file.read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    return [(gold, answer) for gold, _, answers in lines for answer in answers.split(" ;; ")]


def test_honest_rewrites_are_paid():
    pairs = pairs_of(REWRITES)
    assert all(read(gold) for gold, _ in pairs)
    unpaid = [pair for pair in pairs if not same(read(pair[0]), read(pair[1]))]
    assert len(pairs) >= 300 and len(unpaid) <= 0.02 * len(pairs), unpaid


def test_wrong_answers_and_copied_problems_are_not_paid():
    pairs = pairs_of(ATTACKS)
    assert len(pairs) >= 200 and [pair for pair in pairs if same(read(pair[0]), read(pair[1]))] == []


@pytest.mark.parametrize(
    "gold",
    [
        "", " ", "\\frac{1}{", "3 4", "x \\mapsto 2", "\\text{a} 3 \\text{b}", "\\sum_{i=1}^3 i",
        "1, , 2", "(1, 2", "3 +", "\\begin{pmatrix} 1 & 2", "２", "\ud800", "1" * (MAX_DIGITS + 1),
        "x" * (MAX_CHARACTERS + 1),
        "(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH, "x+" * (MAX_TOKENS // 2) + "x", "1 < ", "\\overrightarrow{AB}", None,
        5, ["3"],
    ],
)  # fmt: skip
def test_what_is_not_understood_as_a_whole_is_not_read(gold):
    assert read(gold) == []


def test_what_separates_thousands():
    assert same(read("2100"), read("2,100")) and not same(read("2100"), read("(2,100)"))
    assert same(read("(2, 100)"), read("(2,100)")) and not same(read("2,100"), read("2,10"))


def test_the_bounds_are_no_smaller():
    assert read("1" * MAX_DIGITS) and read("(" * (MAX_DEPTH - 1) + "1" + ")" * (MAX_DEPTH - 1))
    assert read("x+" * (MAX_TOKENS // 2 - 1) + "x")


HOSTILE = [
    "\\frac{" * 200, "\\frac" * 200, "(" * 900, "{" * 900, "\\sqrt" * 200, "\\sqrt{" * 160, "1" * 1000, "\x00", "1/0",
    "\\frac{1}{0}", "x^" * 400,
    "-" * 900, "+" * 900, "\\pm" * 300, "|" * 900, "1," * 499, "\\{1\\pm" * 100, "(1\\pm1," * 100, "2 " * 500,
    "\\text{a}" * 140,
    "\\boxed{" * 140 + "}" * 140, "**" * 499, "\\sin" * 240, "\\sin\\cos" * 100 + "x", "x!" * 490, "1,000" * 190,
    "\\begin{pmatrix}" * 60,
    "\u202e12", "１２", "\ud800", "x" * 1000, "\\frac12" * 140, "sqrt" * 240, "0.\\overline{3}" * 70, "\\" * 999,
    "$" * 1000, "." * 1000,
    "(x+" * 130 + "1" + ")" * 130, "(1-x)" * 190, "((x-y)(y-x))^2" * 60, "9^9^9^9^9^9^9", "10^{10^{10^{10}}}",
    "(10^9)!!!!!!!!!", "a" * 10_000,
    "(1,2" * 200, "[" * 28 + "1" + ")" * 28, "\\{" * 25 + "1 \\pm 2" + "\\} \\pm 1" * 25, "x=" * 400 + "3",
    "1<" * 400 + "2", "\\cup" * 200,
    "4 2/3" * 180, "\\log_" * 200, "x_" * 500, "^\\circ" * 150, "\\pmod" * 160, "<answer>" * 100, "(" * 1_000_000,
    "\\text{" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda answer: f"{answer[:12]!r}"[1:-1])
def test_no_answer_raises_is_paid_or_takes_long(answer):
    started = time.process_time()
    for text in (boxed(answer), answer):
        assert math_reward(text, math_example("P", "3"))["correct"] == 0
        assert gsm8k_reward(text, {"target": 3})["correct"] == 0
    for text in (answer + "\nFinal: 3", "Final: " + answer, "Final: 1" + ",000" * 1434):
        gsm8k_reward(text, {"target": 3})
    assert time.process_time() - started < 0.5


@pytest.fixture
def math_task(tmp_path, capsys) -> Math:
    solution = "We find $a=7$, so it is \\boxed{\\frac{3}{4}}."
    rows = [dict(problem=f"P{i}", solution=solution, level=f"Level {i % 3 + 1}") for i in range(6)]
    for i, nothing in enumerate(["no box, 3", "\\boxed{}", "\\boxed{0.3 \\text{ or so } 4}"], 2):
        rows[i]["solution"] = nothing
    answers = ["\\frac{3}{4}", "12", "x \\mapsto 2", "x+1"]
    tests = [dict(problem=f"Q{i}", answer=answer) for i, answer in enumerate(answers)]
    tests.append(dict(problem=None, answer="1"))
    return Math(write_jsonl(tmp_path / "train.jsonl", rows), write_jsonl(tmp_path / "test.jsonl", tests))


def test_rows_without_a_gold_answer_that_is_understood_are_left_out(math_task, capsys):
    assert [example["problem"] for example in math_task.eval()] == ["Q0", "Q1", "Q3"]
    assert {math_task.train(random.Random(i), 0)["problem"] for i in range(30)} == {"P0", "P1", "P5"}


def test_what_is_left_out_is_counted_and_shown(tmp_path, capsys):
    train = write_jsonl(tmp_path / "train.jsonl", [dict(problem="P", solution="\\boxed{1}", level="Level 1")])
    tests = [dict(problem="Q", answer="2"), dict(problem="R", answer="x \\mapsto 2")]
    Math(train, write_jsonl(tmp_path / "test.jsonl", tests))
    out = capsys.readouterr().out
    assert "1 of 2 rows are left out, their gold answers cannot be read as a whole" in out and "'problem': 'R'" in out
    with pytest.raises(ValueError, match="no row can be used, their gold answers cannot be read"):
        Math(train, write_jsonl(tmp_path / "none.jsonl", tests[1:]))


def test_the_gold_answer_is_what_is_boxed_last():
    assert last_boxed("a \\boxed{1} b \\boxed{\\frac{1}{2}}.") == "\\frac{1}{2}"
    assert last_boxed("none") is None and last_boxed("\\boxed{1") is None


def test_form_and_hedging(math_task):
    example = math_task.eval()[1]
    assert math_task.reward(boxed("12"), example)["reward"] == pytest.approx(1.1)
    assert math_task.reward("<answer>12</answer>", example)["reward"] == 1  # right, not in the form
    assert math_task.reward("12", example)["reward"] == 0
    assert math_task.reward(boxed("12") + " bye", example)["format"] == 0
    assert math_task.reward("Well, " + boxed("12"), example)["format"] == 0
    assert math_task.reward(boxed("11") + "<answer>12</answer>", example)["correct"] == 0
    assert [math_task.reward(boxed(a), example)["unread"] for a in ("12", "11", "3 4", "")] == [0, 0, 1, 1]


def test_typed_problems(math_task):
    example = math_task.typed("What is half of 1? #### \\frac{1}{2}")
    assert math_task.reward(boxed("0.5"), example)["correct"] == 1
    for text in ("no answer", "What? ####", "What? #### 3 4"):
        with pytest.raises(ValueError, match="write the problem"):
            math_task.typed(text)


def test_levels(tmp_path):
    rows = [dict(problem=f"P{i}", solution=f"\\boxed{{{i}}}", level=f"Level {i}") for i in (1, 2, 3)]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    test = write_jsonl(tmp_path / "test.jsonl", [dict(problem="Q", answer="1")])
    task = Math(train, test, levels=[2, 3])
    assert {task.train(random.Random(i), 0)["problem"] for i in range(30)} == {"P2", "P3"}
    with pytest.raises(ValueError, match="no such problem; its levels are Level 1, Level 2, Level 3"):
        Math(train, test, levels=[9])


def test_no_training_on_what_is_evaluated(tmp_path):
    rows = [dict(problem=f"P{i}", solution=f"\\boxed{{{i}}}", level="Level 1") for i in (1, 2, 3)]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    task = Math(train, write_jsonl(tmp_path / "test.jsonl", [dict(problem="P2", answer="2")]))
    assert {task.train(random.Random(i), 0)["problem"] for i in range(30)} == {"P1", "P3"}
    with pytest.raises(ValueError, match="has no problem that is not in"):
        Math(train, write_jsonl(tmp_path / "all.jsonl", [dict(problem=f"P{i}", answer="2") for i in (1, 2, 3)]))
