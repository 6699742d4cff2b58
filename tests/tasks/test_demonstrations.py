"""What the tasks show as right answers: to a model in its prompt (few_shot), or to learn from (harness.sft)."""

import json
import random
import re

import pytest

from harness.prompts import demonstration
from tasks import TASKS, load_task
from tasks.countdown import Countdown, countdown_problem, equation_value
from tasks.solver import Value, combined, searches, worked_solution
from tasks.tags import is_think_then_answer


@pytest.fixture(scope="module")
def task_args(tmp_path_factory):
    """Of each built-in task, with small data sets of the forms that those on the Hub have."""
    folder = tmp_path_factory.mktemp("data")

    def write(name: str, rows: list[dict]) -> str:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder / name)

    questions = [
        dict(
            question=f"What are {i},000 and {i}?",
            answer=f"Add: {i}000+{i}=<<{i}000+{i}={i}00{i}>>{i}00{i}.\n\n#### {i},00{i}",
        )
        for i in range(1, 9)
    ]
    maths = [
        dict(problem=f"Find {i}/7.", solution=f"It is $\\boxed{{\\frac{{{i}}}{{7}}}}$.", answer=f"\\frac{{{i}}}{{7}}")
        | dict(level="Level 1")
        for i in range(1, 9)
    ]
    return {
        "arithmetic": dict(max_depth=3),
        "countdown": dict(dataset="synthetic", eval_size=20),
        "sentences": {},
        "reasoning_gym": dict(name="lcm", eval_size=20),
        "gsm8k": dict(dataset=write("questions.jsonl", questions), eval_size=3),
        "math": dict(dataset=write("math.jsonl", maths), eval_dataset=write("eval.jsonl", maths[:3])),
    }


BUILT_IN = [name for name in TASKS if ":" not in name]
CASES = [(name, {}) for name in BUILT_IN] + [
    (name, {"prompt_template": "plain"}) for name in ("countdown", "gsm8k", "math")
]


@pytest.mark.parametrize("name, more", CASES)
def test_what_is_shown_is_paid_in_full_and_is_in_no_evaluation(name, more, task_args):
    task = load_task(name, task_args[name] | more)
    rng, held_out = random.Random(0), [task.prompt(example) for example in task.eval()]
    shown = [demonstration(task, rng) for _ in range(40)]
    for example, text in shown:
        parts = task.reward(getattr(task, "prefill", "") + text, example)
        best = 1.1 if name == "math" else 2.0 if name == "countdown" else 1.0
        assert (parts["reward"], parts["correct"], parts["format"]) == (pytest.approx(best), 1, 1), text
        assert task.prompt(example) not in held_out
    assert len({text for _, text in shown}) > 2
    again = random.Random(0)
    assert [demonstration(task, again) for _ in range(40)] == shown, "all randomness comes from rng"


def test_solutions_of_the_data_set_are_shown_as_they_are(task_args):
    """Without what GSM8K has for a calculator; behind a plain prompt, a space comes first."""
    example, text = load_task("gsm8k", task_args["gsm8k"]).demonstration(random.Random(0))
    i = int(example["number"][0])
    assert text == f"Add: {i}000+{i}={i}00{i}.\nFinal: {i},00{i}"
    plain = load_task("gsm8k", task_args["gsm8k"] | {"prompt_template": "plain"})
    assert plain.demonstration(random.Random(0))[1] == " " + text
    example, text = load_task("math", task_args["math"]).demonstration(random.Random(0))
    answer = example["answer"]
    assert text == f"<think>It is $\\boxed{{{answer}}}$.</think>\n<answer>${answer}$</answer>"


def test_a_countdown_search_is_true_and_has_dead_ends():
    task, rng, tries = Countdown("synthetic", eval_size=1), random.Random(1), []
    for _ in range(300):
        example, text = task.demonstration(rng)
        assert is_think_then_answer(task.prefill + text) and "<think>" not in text
        *failed, found, so = text.partition("</think>")[0].strip().split("\n")
        for line in (*failed, found):
            *steps, verdict = re.split(", (?=no|yes)|, ", line)
            for step in steps:
                left, right = step.split(" = ")
                assert equation_value(left)[0] == int(right)
            assert len(steps) == len(example["nums"]) - 1
            assert verdict == ("yes." if int(right) == example["target"] else "no.")
        assert verdict == "yes." and so == f"So {text.partition('<answer>')[2][:-9]} = {example['target']}."
        tries.append(len(failed))
    assert set(tries) == {0, 1, 2, 3}, tries


@pytest.mark.parametrize(
    "a, operator, b, text",
    [
        (Value(3, "1 + 2", "+"), "*", Value(4, "4"), "(1 + 2) * 4"),
        (Value(4, "4"), "*", Value(3, "1 + 2", "+"), "4 * (1 + 2)"),
        (Value(9, "9"), "-", Value(3, "1 + 2", "+"), "9 - (1 + 2)"),
        (Value(9, "9"), "-", Value(1, "2 - 1", "-"), "9 - (2 - 1)"),
        (Value(9, "9"), "+", Value(1, "2 - 1", "-"), "9 + 2 - 1"),
        (Value(1, "2 - 1", "-"), "-", Value(1, "1"), "2 - 1 - 1"),
        (Value(8, "8"), "/", Value(4, "2 * 2", "*"), "8 / (2 * 2)"),
        (Value(8, "8"), "/", Value(2, "4 / 2", "/"), "8 / (4 / 2)"),
        (Value(8, "8"), "*", Value(2, "4 / 2", "/"), "8 * 4 / 2"),
        (Value(9, "9"), "-", Value(4, "2 * 2", "*"), "9 - 2 * 2"),
        (Value(3, "3"), "-", Value(4, "4"), None),
        (Value(3, "3"), "/", Value(2, "2"), None),
        (Value(3, "3"), "/", Value(0, "1 - 1", "-"), None),
    ],
)
def test_parentheses_stand_where_they_are_needed(a, operator, b, text):
    made = combined(a, operator, b)
    assert (made and made.text) == text
    if made:
        assert equation_value(made.text)[0] == made.number and made.operator == operator


def test_all_ways_are_tried_once():
    """Of 2 and 8: 2 + 8, 8 - 2, 2 * 8, 8 / 2; and of three numbers every value that there is."""
    ways = [made.text for made, _ in searches(random.Random(0), [Value(2, "2"), Value(8, "8")])]
    assert sorted(ways) == ["2 * 8", "2 + 8", "8 - 2", "8 / 2"]
    values = {made.number for made, _ in searches(random.Random(0), [Value(n, str(n)) for n in (1, 2, 4)])}
    assert values == {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12}


def test_problems_without_an_equation_are_passed_over(tmp_path):
    rows = [dict(nums=[1, 1, 1], target=n) for n in range(50, 60)] + [
        dict(nums=[1, 2, n], target=n + 3) for n in range(10)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert worked_solution(random.Random(0), [1, 1, 1], 50) is None
    task = Countdown(str(tmp_path / "rows.jsonl"), eval_size=2)
    assert all(task.demonstration(random.Random(i))[0]["nums"][1] == 2 for i in range(20))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:10]))
    with pytest.raises(ValueError, match="no equation was found"):
        Countdown(str(tmp_path / "rows.jsonl"), eval_size=2).demonstration(random.Random(0))


@pytest.mark.parametrize("numbers", [1, 7, [], [3, 9], ["3"], 3.0, "3"])
def test_numbers_that_cannot_be_are_refused(numbers):
    with pytest.raises(ValueError, match="2 to 6, or a list of such sizes"):
        Countdown("synthetic", numbers=numbers)


def test_numbers_are_for_problems_of_our_own(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(dict(nums=[1, 2], target=3)) + "\n")
    with pytest.raises(ValueError, match="numbers is for the dataset synthetic"):
        Countdown(str(tmp_path / "rows.jsonl"), numbers=3)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_problems_of_our_own_have_as_many_numbers_as_asked(size):
    rng = random.Random(0)
    problems = [countdown_problem(rng, False, [size]) for _ in range(20)]
    assert all(len(p["nums"]) == size and 10 <= p["target"] <= 100 for p in problems)
