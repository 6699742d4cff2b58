"""Reasoning-gym as a task: each of its data sets is drawn, repeats, and is judged by its own verifier."""

import json
import random
from collections import Counter

import pytest

pytest.importorskip("reasoning_gym")
import reasoning_gym
from reasoning_gym.factory import DATASETS

import grpo
from tasks import UsageError, gym, load_task
from tasks.gym import FAR, ReasoningGym, Source

NAMES = sorted(gym.known_names())
NO_GOLD = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}  # any answer that fits is right
SLOW = {"arc_agi", "futoshiki", "knight_swap", "puzzle24", "word_ladder", "zebra_puzzles"}  # a second and more


def test_all_data_sets_are_there_but_the_one_that_is_made_of_others():
    assert len(NAMES) > 100 and set(DATASETS) - set(NAMES) == {"composite"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in NAMES])
def test_problems_repeat_and_right_answers_are_paid(name):
    source, again = Source(name, {}), Source(name, {})
    numbers = [3, 4, 5, FAR + 3]
    random.seed(1)
    problems = [source.problem(number) for number in numbers]
    random.seed(2)  # whatever else draws random numbers
    assert [again.problem(number) for number in numbers] == problems
    assert len({p["question"] for p in problems}) > 1
    task = ReasoningGym(name, eval_size=1)
    for problem in problems:
        right = task.reward(f"I think.\n<answer>{problem['answer']}</answer>", problem)
        assert name in NO_GOLD or (right["reward"], right["correct"], right["format"]) == (1, 1, 1)
        for text in ("", "<answer></answer>", str(problem["answer"]), "<answer>\x00[[[{'</answer>", "<think><answer>1"):
            parts = task.reward(text, problem)
            assert 0 <= parts["reward"] <= 1 and parts["correct"] in (0, 1)
        assert task.reward(str(problem["answer"]), problem)["reward"] == 0, "not without the tags"


def test_the_score_of_the_library_is_the_reward():
    task = ReasoningGym("chain_sum", config={"min_terms": 2, "max_terms": 2})
    problem = task.train(random.Random(0), 1)
    dataset = reasoning_gym.create_dataset("chain_sum", seed=0, size=1, min_terms=2, max_terms=2)
    gold = problem["answer"]
    for answer in (gold, f"The answer is {gold}.", "7.25", f"{gold} or {gold}"):
        parts = task.reward(f"<answer>{answer}</answer>", problem)
        assert parts["reward"] == pytest.approx(dataset.score_answer(answer, problem["entry"]))
    whole = ReasoningGym("chain_sum", partial=False)
    assert whole.reward(f"<answer>The answer is {gold}.</answer>", problem)["reward"] == 0
    assert 0 < task.reward(f"<answer>The answer is {gold}.</answer>", problem)["reward"] < 1


def test_a_verifier_that_raises_pays_nothing_and_says_so(monkeypatch):
    task = ReasoningGym("gcd")
    problem = task.train(random.Random(0), 1)
    monkeypatch.setattr(task.sources["gcd"].dataset, "score_answer", lambda *args: 1 / 0)
    parts = task.reward("<answer>3</answer>", problem)
    assert (parts["reward"], parts["correct"], parts["verifier_failed"]) == (0, 0, 1)


def test_no_problem_of_the_evaluation_is_in_the_training():
    task = ReasoningGym("chain_sum", config=dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1), eval_size=20)
    asked = {e["question"] for e in task.eval()}
    drawn = [task.train(random.Random(i), i)["question"] for i in range(300)]
    assert not asked & set(drawn) and len(set(drawn)) > 20
    with pytest.raises(ValueError, match="all of 1000 problems are in the evaluation: a lower eval_size, or harder"):
        ReasoningGym("coin_flip", config=dict(min_trials=1, max_trials=1), eval_size=64).train(random.Random(0), 1)


def test_a_mixture_has_its_weights_and_its_settings():
    task = ReasoningGym({"gcd": 3, "chain_sum": 1}, config={"chain_sum": {"max_terms": 2}}, eval_size=8)
    drawn = [task.train(random.Random(i), i) for i in range(400)]
    counts = Counter(example["dataset"] for example in drawn)
    assert 2.3 < counts["gcd"] / counts["chain_sum"] < 4 and {e["dataset"] for e in task.eval()} == set(counts)
    sums = [e["question"] for e in drawn if e["dataset"] == "chain_sum"]
    assert all(question.count("+") + question.count(" - ") == 1 for question in sums)
    for example in drawn[:20]:
        assert task.reward(f"<answer>{example['answer']}</answer>", example)["correct"] == 1


@pytest.mark.parametrize(
    "task_args, message",
    [
        (dict(name="chain_sun"), "reasoning-gym has no 'chain_sun'; did you mean chain_sum"),
        (dict(name="composite"), "reasoning-gym has no 'composite'"),
        (dict(name="gcd", config={"min_terms": 2}), "gcd has no setting min_terms; it has .*max_numbers"),
        (dict(name="chain_sum", config={"min_terms": 5, "max_terms": 2}), "chain_sum does not take .*AssertionError"),
        (dict(name={"gcd": 0}), "with weights above 0"),
        (dict(name={}), "with weights above 0"),
        (dict(name={"gcd": 1}, config={"max_numbers": 2}), "config has max_numbers: with several data sets"),
        (dict(name="gcd", eval_size=0), "eval_size is 0: 1 or more"),
    ],
)
def test_bad_arguments(task_args, message):
    with pytest.raises(UsageError, match=message):
        load_task("reasoning_gym", task_args)


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(gym, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="it needs the package reasoning-gym: pip install reasoning-gym"):
        load_task("reasoning_gym", dict(name="gcd"))


def test_a_run_on_it_goes_on_as_if_it_had_not_been_stopped(qwen3_folder, tmp_path):
    settings = dict(model=qwen3_folder, task="reasoning_gym", device="cpu", runs=str(tmp_path), prompts_per_step=2)
    settings |= dict(task_args=dict(name={"gcd": 1, "letter_counting": 1}, eval_size=2), group_size=2, save_steps=1)
    settings |= dict(max_prompt_tokens=700, max_completion_tokens=8, eval_samples=1, eval_steps=0, lr=1e-3)
    whole = grpo.train(grpo.Config(**settings, steps=3))["run"]
    part = grpo.train(grpo.Config(**settings, steps=1))["run"]
    grpo.train(grpo.Config(**settings, steps=3, resume=str(part)))

    def rows(folder):
        return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]

    assert rows(part) == rows(whole) and len(rows(whole)) == 12
    assert {"verifier_failed", "ground_truth"} <= rows(whole)[0].keys()
