"""pass@k, the intervals, the verdict, the metrics of rollouts, and `evaluate` as a whole."""

import itertools
import json
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import is_close

import grpo
from harness import parallel
from harness.evaluation import clustered_interval, evaluate, pass_at_k, verdict, wilson_interval
from harness.metrics import is_graded, part_means, rollout_metrics
from harness.prompts import Problem, draw_prompts, encode_prompt, judge
from harness.settings import Sample


def test_pass_at_k_equals_enumeration():
    for n, c in [(5, 0), (5, 2), (6, 5), (4, 4)]:
        samples = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            draws = list(itertools.combinations(samples, k))
            assert is_close(pass_at_k(n, c, k), sum(map(any, draws)) / len(draws), 1e-12)


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_nonsense(n, c, k):
    with pytest.raises(ValueError, match="pass_at_k"):
        pass_at_k(n, c, k)


def test_wilson_interval_of_a_known_case():
    low, high = wilson_interval(0.9, 10)  # 9 of 10: the textbook's 0.596 to 0.982
    assert is_close(low, 0.5958, 1e-3) and is_close(high, 0.9821, 1e-3)
    for n in range(1, 600):  # the share is inside its interval, or the error bars of the plot would be negative
        assert wilson_interval(0.0, n)[0] <= 0 and wilson_interval(1.0, n)[1] >= 1


def test_clustered_interval_counts_prompts_not_completions():
    low, high = clustered_interval([0.0, 1.0] * 50)
    half = 1.96 * (0.5 * (100 / 99) ** 0.5) / 10
    assert is_close(low, 0.5 - half, 1e-5) and is_close(high, 0.5 + half, 1e-5)


def rollout(reward: float, length: int, text: str = "", truncated: bool = False, dead: bool = False, **parts):
    parts = dict(reward=reward, correct=float(reward == 1), format=1.0, prediction=None, ground_truth=None) | parts
    return grpo.Rollout([1], [3] * length, [0.0] * length, truncated, "p", text, parts, reward, dead=dead)


def test_rollout_metrics_by_hand(make_config):
    rollouts = [
        rollout(1.0, 2, worked=1.0),
        rollout(0.0, 4, truncated=True, worked=0.0),
        rollout(0.5, 6, text="Wait, let me check", format=0.0, dead=True, worked=1.0),
        rollout(0.5, 8, dead=True, worked=0.0),
    ]
    rollouts[0].penalty, rollouts[1].age = 0.5, 3
    metrics = rollout_metrics(rollouts, make_config(group_size=2))
    expected = dict(reward=0.5, correct=0.25, format=0.75, pass_at_group=0.5, zero_advantage_groups=0.5, length=5.0)
    expected |= dict(length_correct=2.0, length_wrong=6.0, truncated=0.25, reflections=0.25, worked=0.5)
    expected |= dict(reward_std=0.5**0.5 / 2, penalty=0.125, age=0.75)
    assert metrics.keys() == expected.keys()
    for key, value in expected.items():
        assert is_close(metrics[key], value), key


def test_means_over_nothing_are_none(make_config):
    metrics = rollout_metrics([rollout(0.0, 3), rollout(0.0, 3)], make_config(group_size=2))
    assert metrics["length_correct"] is None and metrics["length_wrong"] == 3


class FakeTask:
    """Right when the completion has an even number of tokens."""

    def train(self, rng, step):
        return {"x": rng.randrange(10)}

    def eval(self):
        return [{"x": x} for x in range(10)]

    def prompt(self, example):
        return f"<sos>{example['x']}"

    def reward(self, text, example):
        right = float(len(text) % 2 == 0)
        return dict(reward=right, correct=right, format=1.0, prediction=len(text), ground_truth="even", shout=2)


class FakeSampler:
    """Completions of one or two digits by a fixed plan, so that every figure can be worked out by hand."""

    def generate(self, prompts, group_size, sampling, seed):
        rollouts = []
        for p, prompt in enumerate(prompts):
            for g in range(group_size):
                digits = 2 if sampling.temperature == 0 and p < 7 else 1 + (p + g) % 2 if p else 2
                ids = [7, 7, 2] if digits == 2 else [7]  # two digits and the end, or one digit cut off
                rollouts.append(Sample(prompt, ids, [0.0] * len(ids), truncated=digits == 1))
        return rollouts


@pytest.mark.parametrize(
    "answers, graded",
    [
        ([(0, 1, 0.1), (0, 1, 0.1), (1, 1, 1.0), (0, 0, 0.0)], False),  # right, form and none: no partial credit
        ([(0, 1, 0.1), (0, 1, 0.3), (1, 1, 1.0)], True),
        ([(1, 1, 1.0), (1, 1, 1.2), (0, 1, 0.1)], False),  # right ones may differ: nothing leads to them
        ([(0, 0, 0.0), (0, 0, 0.2)], True),
        ([(0, 0.5, 0.5), (0, 1, 1.0)], False),
    ],
)
def test_a_graded_group_has_wrong_answers_of_different_worth(answers, graded):
    group = [SimpleNamespace(parts=dict(correct=c, format=f), reward=r) for c, f, r in answers]
    assert is_graded(group) == graded


def test_evaluate_by_hand(tokenizer, make_config):
    task, config = FakeTask(), make_config(eval_samples=4)
    problems = [Problem(e, *encode_prompt(tokenizer, task, e)) for e in task.eval()]
    complete = partial(grpo.complete, FakeSampler(), tokenizer, task)
    row, details = evaluate(complete, task, problems, config, step=3)
    # greedy: the first seven are right, and of the last three (one or two tokens by turns) the eighth and tenth
    greedy = [1] * 7 + [1 if (1 + p % 2) == 2 else 0 for p in (7, 8, 9)]
    assert row["n"] == 10 and row["step"] == 3
    assert is_close(row["accuracy"], sum(greedy) / 10)
    # sampled: prompt 0 is always right, every other has two of four right
    assert is_close(row["accuracy_sampled"], (1 + 9 * 0.5) / 10)
    assert row["pass_at_k"].keys() == {"1", "2", "4"}
    assert is_close(row["pass_at_k"]["2"], (1 + 9 * (1 - 1 / 6)) / 10) and row["pass_at_k"]["4"] == 1
    assert is_close(row["zero_advantage_groups"], 0.1) and row["graded_groups"] == 0
    assert is_close(row["length"], (4 * 3 + 9 * 8) / 40) and is_close(row["truncated"], 18 / 40)
    assert row["shout"] == 2 and is_close(row["reward"], row["accuracy_sampled"]), "of the samples"
    odd = evaluate(complete, task, problems, make_config(eval_samples=6), step=3)[0]
    assert odd["pass_at_k"].keys() == {"1", "2", "4", "6"}
    assert [d["correct"] for d in details] == greedy and details[0]["sampled_correct"] == 1


def verdict_row(dead, pass_1, pass_8, truncated=0.0, format=1.0, graded=0.0):
    row = dict(zero_advantage_groups=dead, pass_at_k={"1": pass_1, "8": pass_8}, truncated=truncated, format=format)
    return row | dict(graded_groups=graded)


@pytest.mark.parametrize(
    "row, said",
    [
        (verdict_row(0.3, 0.3, 0.7), "yes"),
        (verdict_row(0.65, 0.2, 0.5), "perhaps"),
        (verdict_row(0.9, 0.05, 0.3), "too few groups disagree"),
        (verdict_row(0.6, 0.3, 0.35), "too few groups disagree"),
        (verdict_row(0.9, 0.95, 0.99), "too easy"),
        (verdict_row(0.3, 0.125, 0.5, truncated=0.5), "yes"),  # SmolLM2, which then learned
        (verdict_row(0.3, 0.3, 0.7, truncated=0.5), "50% of the completions are cut off: raise max_completion_tokens"),
        (verdict_row(0.3, 0.3, 0.7, truncated=0.95), "unlikely"),
        (verdict_row(0.3, 0.3, 0.7, format=0.1), "yes"),
        (verdict_row(0.3, 0.3, 0.7, format=0.1), "10% have the right form"),
        (verdict_row(0.3, 0.3, 0.7, format=0.01), "unlikely"),
        (verdict_row(0.3, 0.8, 0.95), "perhaps, slowly; harder problems leave more to learn"),
        # SmolLM2 on sentences by the strict rule, which then learned; the same without partial credit; nearly solved
        (verdict_row(0.02, 0.03, 0.09, graded=0.9), "perhaps, if partial credit leads there: few answers are right"),
        (verdict_row(0.02, 0.03, 0.09, graded=0.3), "unlikely"),
        (verdict_row(0.6, 0.03, 0.09, graded=0.9), "unlikely"),
        (verdict_row(0.02, 0.88, 0.94, graded=0.9), "unlikely"),
        (verdict_row(0.9, 0.05, 0.3), "unlikely"),
        (verdict_row(0.6, 0.3, 0.35), "unlikely"),
        (dict(verdict_row(1.0, 0.3, 0.3), pass_at_k={"1": 0.3}), "eval_samples of 4 or more"),
    ],
)
def test_verdict(row, said):
    assert said in verdict(row)


@pytest.mark.parametrize(
    "dead, pass_1, pass_8, form, said",
    [
        # trained, and learned: three given words, strictly, numbers in words to digits, word problems, two numbers
        (0.03, 0.07, 0.45, 0.43, "yes"),
        (0.02, 0.06, 0.41, 0.84, "yes"),
        (0.08, 0.10, 0.47, 0.77, "yes"),
        (0.17, 0.09, 0.42, 0.31, "yes"),
        (0.00, 0.05, 0.27, 0.60, "yes"),
        # seldom right even once in eight: Countdown with three numbers, five words, problems of two steps
        (0.00, 0.01, 0.06, 0.60, "unlikely"),
        (0.05, 0.01, 0.06, 0.43, "unlikely"),
        (0.10, 0.02, 0.11, 0.31, "unlikely"),
        (0.98, 0.00, 0.00, 0.90, "unlikely"),
        # between: sums of three or four terms, the largest of four numbers
        (0.20, 0.02, 0.14, 0.90, "perhaps, slowly; few_shot or harness.sft can show it how to answer"),
        (0.55, 0.20, 0.48, 0.90, "perhaps, slowly; a larger group_size leaves fewer dead groups"),
    ],
)
def test_the_verdict_on_what_smollm2_was_tried_on(dead, pass_1, pass_8, form, said):
    """SmolLM2-135M-Instruct with rewards that pay for the form, one seed each, and what became of it.

    Of the tasks that it was seldom right on, only pass@8 was noted: the figures beside it are made up to go with it.
    """
    assert f"will it learn? {said}" in verdict(verdict_row(dead, pass_1, pass_8, truncated=0.48, format=form))


def test_the_verdict_has_remarks_only_where_they_hold():
    assert ";" not in verdict(verdict_row(0.3, 0.3, 0.7, truncated=0.3, format=0.2))


def test_the_verdict_names_its_figures():
    said = verdict(verdict_row(0.3, 0.25, 0.7))
    assert said == "will it learn? yes (groups of 8: 30% dead, pass@1 25%, pass@8 70%)"


def test_prefill_is_prompted_and_judged(tokenizer, make_config):
    task = FakeTask()
    task.prefill = "12"
    example = {"x": 4}
    prompt, ids, begun = encode_prompt(tokenizer, task, example)
    assert prompt == "<sos>412" and ids == tokenizer("<sos>412")["input_ids"] and begun == "12"
    problems = [Problem(example, prompt, ids, begun)]
    rollouts = grpo.complete(FakeSampler(), tokenizer, task, problems, 1, make_config().sampling, 0, prefix="(")
    assert rollouts[0].text == "12(00" and rollouts[0].prompt_ids == ids + tokenizer("(")["input_ids"]


def test_chat_messages_go_through_the_template(tokenizer):
    task = FakeTask()
    task.prompt = lambda example: [{"role": "user", "content": "1+1"}]
    with pytest.raises(grpo.UsageError, match="no chat template"):
        encode_prompt(tokenizer, task, {})
    tokenizer.chat_template = (
        "<sos>{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    try:
        prompt, ids, _ = encode_prompt(tokenizer, task, {})
    finally:
        tokenizer.chat_template = None
    assert prompt == "<sos>1+1=" and ids == tokenizer("<sos>1+1=")["input_ids"]


def test_draws_depend_on_seed_and_step_and_leave_long_prompts_out(tokenizer, make_config):
    task = FakeTask()
    task.prompt = lambda example: "<sos>" + "1" * (1 + example["x"])
    config = make_config(max_prompt_tokens=6, prompts_per_step=50)
    problems, too_long = draw_prompts(task, tokenizer, config, 1)
    assert len(problems) == 50 and max(len(p.ids) for p in problems) == 6 and too_long > 10
    assert draw_prompts(task, tokenizer, config, 1) == (problems, too_long)
    assert draw_prompts(task, tokenizer, config, 2)[0] != problems
    assert draw_prompts(task, tokenizer, make_config(seed=1, max_prompt_tokens=6), 1)[0] != problems[:32]
    with pytest.raises(grpo.UsageError, match="max_prompt_tokens"):
        draw_prompts(task, tokenizer, make_config(max_prompt_tokens=1, prompts_per_step=2), 1)
    task.prompt = lambda example: ""
    with pytest.raises(grpo.UsageError, match="empty"):
        draw_prompts(task, tokenizer, make_config(), 1)


def test_collect_gives_each_group_its_own_advantages(tokenizer, make_config):
    config = make_config(prompts_per_step=3, group_size=4)
    rollouts, _ = grpo.collect(FakeSampler(), tokenizer, FakeTask(), config, 1)
    grpo.assign_advantages(rollouts, config)
    rewards = torch.tensor([r.reward for r in rollouts]).view(3, 4)
    assert torch.allclose(torch.tensor([r.advantage for r in rollouts]).view(3, 4), grpo.group_advantages(rewards))
    assert [r.dead for r in rollouts] == [True] * 4 + [False] * 8


def test_every_step_and_run_has_a_sampling_seed_of_its_own(tokenizer, make_config):
    seeds = []

    class Recorder(FakeSampler):
        def generate(self, prompts, group_size, sampling, seed):
            seeds.append(seed)
            return super().generate(prompts, group_size, sampling, seed)

    for run_seed in range(4):
        for step in range(1, 6):
            grpo.collect(Recorder(), tokenizer, FakeTask(), make_config(seed=run_seed), step)
    assert len(set(seeds)) == 20


def test_completions_are_never_tokenised_again(tokenizer, make_config):
    class Odd(FakeSampler):  # a row that decoding and encoding would change: an end token, and a <pad> in the middle
        def generate(self, prompts, group_size, sampling, seed):
            return [Sample(p, [7, 0, 7, 2], [0.0] * 4, False) for p in prompts for _ in range(group_size)]

    rollouts, _ = grpo.collect(Odd(), tokenizer, FakeTask(), make_config(prompts_per_step=1, group_size=2), 1)
    assert rollouts[0].completion_ids == [7, 0, 7, 2]
    assert rollouts[0].text == "0<pad>0", "a special token in the middle is no part of the number 00"


class OddTask(FakeTask):
    parts: dict = {}

    def reward(self, text, example):
        return dict(reward=1.0, correct=1, format=1.0, prediction=None, ground_truth=None) | self.parts


def test_numbers_of_numpy_and_torch_are_numbers():
    task = OddTask()
    task.parts = dict(reward=np.float32(0.5), correct=np.bool_(True), own=torch.tensor(2.0), fraction=Fraction(1, 3))
    parts = judge(task, "", Problem({}, "", [1]))
    assert parts["reward"] == 0.5 and parts["correct"] is True and parts["own"] == 2.0
    json.dumps({key: parts[key] for key in ("reward", "correct", "own")})


@pytest.mark.parametrize(
    "parts, said",
    [
        (dict(reward=float("inf")), "the reward inf, which is no finite number"),
        (dict(reward="1"), "the reward '1'"),
        (dict(correct=None), "the correct None"),
        (dict(correct=0.5), "must be 0 or 1"),
        (dict(format=float("nan")), "the format nan"),
        (dict(step=7.0, accuracy=0.1), "gives accuracy, step: the run's own figures have that name"),
        (dict(tokens="many"), "gives tokens: the run's own figures"),
    ],
)
def test_what_a_task_may_not_return(parts, said):
    task = OddTask()
    task.parts = parts
    with pytest.raises(grpo.UsageError, match="OddTask.reward.*prompt 'p' and the completion 't'.*" + said):
        judge(task, "t", Problem({}, "p", [1]))


@pytest.mark.parametrize("words, share", [([], 0.0), (["WAIT"], 0.25), (["wait", "so"], 0.5), (["wai"], 0.0)])
def test_words_of_reflection_are_whole_words_in_any_case(words, share, make_config):
    texts = ("", "Wait, what?", "So it is 7", "await 7")
    config = make_config(group_size=2, reflection_words=words)
    assert rollout_metrics([rollout(0.0, 3, text) for text in texts], config)["reflections"] == share


def test_parts_may_be_missing_here_and_there():
    rollouts = [rollout(1.0, 2, steps=3), rollout(0.0, 2, steps=None), rollout(0.0, 2), rollout(1.0, 2, tries=4)]
    means = part_means(rollouts)
    assert means == dict(correct=0.5, format=1.0, steps=3.0, tries=4.0)


@pytest.mark.parametrize("process", [0, 1])
def test_each_process_samples_its_own_problems_with_a_seed_of_its_own(process, tokenizer, make_config, monkeypatch):
    state = SimpleNamespace(num_processes=2, process_index=process)
    monkeypatch.setattr(parallel, "PartialState", lambda: state)
    monkeypatch.setattr(parallel, "join", lambda rows: rows)
    task, asked = FakeTask(), []

    class Sampler(FakeSampler):
        def generate(self, prompts, group_size, sampling, seed):
            asked.append((prompts, seed))
            return super().generate(prompts, group_size, sampling, seed)

    problems = [Problem(e, *encode_prompt(tokenizer, task, e)) for e in task.eval()]
    grpo.complete(Sampler(), tokenizer, task, problems, 2, grpo.Sampling(4), seed=5)
    ((prompts, seed),) = asked
    assert len(prompts) == 5 and all(p in [problem.ids for problem in problems] for p in prompts)
    assert (seed == 5) == (process == 0), "or both would give the same answers to the same prompt"


def test_prompts_that_were_too_long_are_counted_in_every_draw(tokenizer, make_config, monkeypatch):
    draw, counted = draw_prompts, []
    monkeypatch.setattr(
        grpo, "draw_prompts", lambda *args: (draw(*args)[0], counted.append(3 + len(counted)) or counted[-1])
    )
    config = make_config(prompts_per_step=2, group_size=2, dead_groups="resample", resample_rounds=2)

    class Dead(FakeTask):
        def reward(self, text, example):
            return super().reward(text, example) | {"reward": 0.0}

    _, counts = grpo.collect(FakeSampler(), tokenizer, Dead(), config, 1)
    assert counted == [3, 4, 5] and counts["prompts_too_long"] == 12
