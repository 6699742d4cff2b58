"""One test for each argument of the tasks, and of pretrain, train_rl, evaluate, report and play: it does what it says.

Arguments reach a task as `task_args` of a run, and a command as flags. An argument without a test here fails.
"""

import csv
import dataclasses
import inspect
import io
import json
import random
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PRETRAINED, pass_flags
from safetensors.torch import load_file

import grpo
from harness import curves
from mathformer import ArithmeticTask, evaluate, expressions, train, train_rl
from tasks import load_task
from tasks.competition_math import Math
from tasks.countdown import Countdown
from tasks.gsm8k import GSM8K
from tasks.gym import SYSTEM, ReasoningGym
from tasks.sentences import Sentences
from view import __main__ as view
from view import report

THINKING = "<think>so</think>"


def arguments(function) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self"}


def fields(settings) -> set[str]:
    return {f.name for f in dataclasses.fields(settings)}


# what has the argument -> its name -> its value, settings that both sides have, and what to find with it and without
CHECKS: dict[Any, dict[str, tuple]] = defaultdict(dict)


def check(what, base: dict | None = None, **argument):
    ((name, value),) = argument.items()

    def register(function):
        assert name not in CHECKS[what]
        CHECKS[what][name] = (value, base or {}, function)

    return register


# ==== Tasks ===========================================================================================================


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Names in capitals stand for files of problems."""
    folder = tmp_path_factory.mktemp("data")

    def write(name: str, rows: list[dict]) -> str:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder / name)

    def maths(start: int) -> list[dict]:
        return [
            dict(problem=f"P{i}", solution=f"It is \\boxed{{{i}}}.", answer=str(i), level=f"Level {1 + i % 5}")
            for i in range(start, start + 20)
        ]

    questions = [dict(question=f"Q{i}", answer=f"So. #### {i}") for i in range(30)]
    (folder / "template.txt").write_text("Make {target} of {nums}!")
    return {
        "COUNTDOWN": write("countdown.jsonl", [dict(nums=[i, 1, 1], target=i + 2) for i in range(30)]),
        "QUESTIONS": write("questions.jsonl", questions),
        "SPLITS": str(Path(write("train-questions.jsonl", questions[:20])).parent / "splits"),
        "MATH": write("maths.jsonl", maths(0)),
        "OTHER_MATH": write("other.jsonl", maths(100)),
        "THIRD_MATH": write("third.jsonl", maths(200)),
        "TEMPLATE": str(folder / "template.txt"),
    }


@dataclass
class Used:
    """What there is to see of a task."""

    task: Any
    drawn: list[dict]  # 60 training problems, of steps 1 to 60

    @property
    def held_out(self) -> list[dict]:
        return self.task.eval()

    def paid(self, text: str, example: dict | None = None) -> float:
        return self.task.reward(text, example or self.drawn[0])["reward"]


@pytest.fixture(scope="module")
def use(data):
    folder = Path(data["SPLITS"])
    folder.mkdir()
    for name, rows in (("train", range(20)), ("test", range(20, 30))):
        lines = [json.dumps(dict(question=f"Q{i}", answer=f"So. #### {i}")) + "\n" for i in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))

    def load(name: str, task_args: dict) -> Used:
        task_args = {k: data.get(v, v) if isinstance(v, str) else v for k, v in task_args.items()}
        task = load_task(name, task_args)
        return Used(task, [task.train(random.Random(step), step) for step in range(1, 61)])

    return load


def numbers(example: dict) -> list[int]:
    return expressions.leaves(expressions.parse(example["expression"]))


def depth(example: dict) -> int:
    return expressions.depth(expressions.parse(example["expression"]))


def operators(example: dict) -> set[str]:
    return expressions.symbols(expressions.parse(example["expression"]))


def largest(example: dict) -> int:
    return expressions.largest_number(expressions.parse(example["expression"]))


def every(used: Used) -> list[dict]:
    return used.drawn + used.held_out


def solved(example: dict) -> str:  # of COUNTDOWN
    return f"{THINKING}<answer>{'+'.join(map(str, example['nums']))}</answer>"


WRONG = f"{THINKING}<answer>1+1</answer>"


def asked(used: Used) -> set[str]:
    return {e.get("question") or e.get("problem") for e in used.drawn}


GYM = dict(name="gcd", eval_size=10)
ARITHMETIC, COUNTDOWN = dict(eval_size=20, max_depth=3), dict(dataset="COUNTDOWN", eval_size=10)
GSM8K_FILE, MATH_FILES = dict(dataset="QUESTIONS"), dict(dataset="MATH", eval_dataset="OTHER_MATH")
BASES = {ArithmeticTask: ARITHMETIC, Countdown: COUNTDOWN, GSM8K: GSM8K_FILE, Math: MATH_FILES, Sentences: {}}
NAMES = {ArithmeticTask: "arithmetic", Countdown: "countdown", GSM8K: "gsm8k", Math: "math", Sentences: "sentences"}
if find_spec("reasoning_gym"):
    BASES, NAMES = BASES | {ReasoningGym: GYM}, NAMES | {ReasoningGym: "reasoning_gym"}


@check(ArithmeticTask, max_digits=2)
def _(a, b):
    assert max(map(abs, sum(map(numbers, every(a)), []))) < 10 <= max(map(abs, sum(map(numbers, every(b)), []))) < 100


@check(ArithmeticTask, max_depth=1)
def _(a, b):
    assert set(map(depth, every(a))) == {1, 2, 3} and set(map(depth, every(b))) == {1}


@check(ArithmeticTask, operators="- next")
def _(a, b):
    assert set().union(*map(operators, every(b))) == {"-", "next"}


@check(ArithmeticTask, max_value=12)
def _(a, b):
    assert max(map(largest, every(b))) <= 12 < max(map(largest, every(a)))


@check(ArithmeticTask, negatives=0.9)
def _(a, b):
    plain, signed = (sum(map(numbers, every(used)), []) for used in (a, b))
    assert min(plain) >= 0 and sum(n < 0 for n in signed) > sum(n > 0 for n in signed)


@check(ArithmeticTask, parentheses=0.9)
def _(a, b):
    assert all(e["prompt"].endswith(e["expression"]) for e in every(a))
    assert sum(e["prompt"].count("(") > e["expression"].count("(") for e in every(b)) > 70


@check(ArithmeticTask, spaces=0.9)
def _(a, b):
    assert not any(" " in e["prompt"] for e in every(a)) and sum(" " in e["prompt"] for e in every(b)) > 70


@check(ArithmeticTask, endian="both")
def _(a, b):
    assert {e["endian"] for e in every(a)} == {"<big>"}
    assert {e["endian"] for e in b.drawn} == {e["endian"] for e in b.held_out} == {"<big>", "<little>"}


@check(ArithmeticTask, partial_credit=0.5)
def _(a, b):
    example = next(e for e in b.drawn if len(e["steps"]) == 2)
    step = example["steps"][0]
    half, right = f"<scratchpad>{step.left}={step.right}<answer>-1", f"<answer>{example['value']}"
    assert a.paid(half, example) == 0 and b.paid(half, example) == 0.5 * 0.5
    assert b.paid(right, example) == a.paid(right, example) == 1


@check(ArithmeticTask, curriculum_steps=60)
def _(a, b):
    assert max(map(depth, b.drawn[:10])) == 1 and max(map(depth, b.drawn[40:])) == 3
    assert max(map(depth, a.drawn[:10])) > 1


@check(ArithmeticTask, eval_size=7)
def _(a, b):
    assert (len(a.held_out), len(b.held_out)) == (20, 7)


@check(ArithmeticTask, eval_seed=1)
def _(a, b):
    assert a.held_out != b.held_out and a.drawn == b.drawn


@check(Countdown, dataset="synthetic")
def _(a, b):
    assert all(e["nums"][1:] == [1, 1] for e in every(a))
    assert len(b.held_out) == 10 and any(e["nums"][1:] != [1, 1] for e in every(b))


@check(Countdown, prompt_template="TEMPLATE")
def _(a, b):
    problem = b.drawn[0]
    assert b.task.prompt(problem) == f"Make {problem['target']} of {problem['nums']}!" and b.task.prefill == ""
    assert isinstance(a.task.prompt(problem), list) and a.task.prefill.endswith("<think>")


@check(Countdown, equation_weight=0.25)
def _(a, b):
    assert (a.paid(solved(a.drawn[0])), a.paid(WRONG)) == (2, 1)
    assert (b.paid(solved(b.drawn[0])), b.paid(WRONG)) == (1.25, 1)
    assert a.held_out == b.held_out, "the same problems each time"


@check(Countdown, format_weight=0.25)
def _(a, b):
    assert (b.paid(solved(b.drawn[0])), b.paid(WRONG)) == (1.25, 0.25)


@check(Countdown, format_gates=True)
def _(a, b):
    loose = solved(a.drawn[0]) + " That is it."
    assert a.paid(loose) == 1 and b.paid(loose) == 0 and b.paid(solved(b.drawn[0])) == 2


@check(Countdown, dict(dataset="synthetic"), numbers=[2, 6])
def _(a, b):
    assert [{len(e["nums"]) for e in used.drawn} for used in (a, b)] == [{3, 4}, {2, 6}]
    assert [{len(e["nums"]) for e in used.held_out} for used in (a, b)] == [{3, 4}, {2, 6}]


@check(Countdown, eval_size=4)
def _(a, b):
    assert (len(a.held_out), len(b.held_out)) == (10, 4) and len(b.task.rows) == 26


def lengths(used: Used) -> set[int]:
    return {len(example["words"]) for example in [*used.drawn, *used.held_out]}


@check(ReasoningGym, name="lcm")
def _(a, b):
    assert "Greatest Common Divisor" in a.drawn[0]["question"] and "Least Common Multiple" in b.drawn[0]["question"]


@check(ReasoningGym, config={"max_numbers": 4, "min_numbers": 4})
def _(a, b):
    asked = zip(every(a), every(b), strict=True)
    assert {(few["question"].count(","), many["question"].count(",")) for few, many in asked} == {(1, 3)}


@check(ReasoningGym, eval_size=3)
def _(a, b):
    assert len(a.held_out) == 10 and b.held_out == a.held_out[:3]


@check(ReasoningGym, partial=False)
def _(a, b):
    wordy = f"<answer>It is {a.drawn[0]['answer']}.</answer>"
    assert a.paid(wordy) > 0 == b.paid(wordy)


@check(ReasoningGym, system_prompt="Be brief.")
def _(a, b):
    (one, asked), (other, same) = (used.task.prompt(used.drawn[0]) for used in (a, b))
    assert other["content"] == "Be brief." != one["content"] and asked == same


@check(Sentences, words=[2, 5])
def _(a, b):
    assert (lengths(a), lengths(b)) == ({3}, {2, 5})


@check(Sentences, rule="strict")
def _(a, b):
    listed, example = "The sun, moon and sea are here now.", {"words": ["sun", "moon", "sea"]}
    assert a.paid(listed, example) == 1 > b.paid(listed, example) > 0


@check(Sentences, eval_size=5)
def _(a, b):
    assert len(a.held_out) == 64 and b.held_out == a.held_out[:5]


@check(GSM8K, dataset="SPLITS")
def _(a, b):
    assert len(a.held_out) == 3 and [e["target"] for e in b.held_out] == list(range(20, 30))


@check(GSM8K, train_size=2)
def _(a, b):
    assert asked(b) == {"Q0", "Q1"} and len(asked(a)) > 10


@check(GSM8K, eval_size=5)
def _(a, b):
    assert [e["target"] for e in b.held_out] == list(range(25, 30))


@check(GSM8K, prompt_template="plain")
def _(a, b):
    problem = b.drawn[0]
    assert b.task.prompt(problem).startswith(f"Question: {problem['question']}\n")
    assert [m["role"] for m in a.task.prompt(problem)] == ["system", "user"]


@check(Math, prompt_template="{problem} = ?")
def _(a, b):
    problem = b.drawn[0]
    assert b.task.prompt(problem) == f"{problem['problem']} = ?"
    assert [m["role"] for m in a.task.prompt(problem)] == ["system", "user"]


@check(Math, dataset="THIRD_MATH")
def _(a, b):
    assert not asked(a) & asked(b) and a.held_out == b.held_out


@check(Math, eval_dataset="THIRD_MATH")
def _(a, b):
    assert asked(a) == asked(b) and (a.held_out[0]["problem"], b.held_out[0]["problem"]) == ("P100", "P200")


@check(Math, levels=[2, 5])
def _(a, b):
    assert {int(name[1:]) % 5 for name in asked(b)} == {1, 4} and len(asked(a)) > 8


@check(Math, format_weight=0.5)
def _(a, b):
    right, wrong = (f"{THINKING}<answer>{answer}</answer>" for answer in (b.drawn[0]["answer"], "-7"))
    assert (a.paid(right), a.paid(wrong)) == (pytest.approx(1.1), pytest.approx(0.1))
    assert (b.paid(right), b.paid(wrong)) == (pytest.approx(1.5), pytest.approx(0.5))


@check(Math, eval_size=6)
def _(a, b):
    assert (len(a.held_out), len(b.held_out)) == (20, 6)


@pytest.mark.parametrize("task, argument", [(task, name) for task in BASES for name in CHECKS[task]])
def test_an_argument_of_a_task(task, argument, use):
    value, base, check = CHECKS[task][argument]
    check(use(NAMES[task], BASES[task] | base), use(NAMES[task], BASES[task] | base | {argument: value}))


@pytest.mark.parametrize("task", BASES)
def test_every_argument_of_a_task_has_a_test(task):
    assert CHECKS[task].keys() == arguments(task)


# ==== python -m mathformer.train ======================================================================================


@pytest.fixture(scope="module")
def pretrain(tmp_path_factory, tokenizer):
    """A pretraining of four steps from the command line: two of the first phase, two of the second."""

    def start(**settings) -> SimpleNamespace:
        folder = tmp_path_factory.mktemp("pretraining") / "base"
        base = dict(output=folder, modelsize="tiny", steps=4, batch_size=8, final_share=0.5, max_depth=2)
        pools, rates, saved, draw = [], [], [], train.batches

        def watched(rng, config, task, tokenizer, share):
            found = list(draw(rng, config, task, tokenizer, share))
            pools.append([row for ids, labels, _, _ in found for row in zip(ids, labels, strict=True)])
            return iter(found)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "batches", watched)
            rate, save = train.learning_rate, grpo.RunFolder.save_checkpoint
            patch.setattr(train, "learning_rate", lambda *args: rates.append(rate(*args)) or rates[-1])
            patch.setattr(
                grpo.RunFolder,
                "save_checkpoint",
                lambda self, step, *a, **k: (saved.append(step), save(self, step, *a, **k)),
            )
            with pytest.raises(SystemExit) as stopped:
                train.main(pass_flags({k: v for k, v in (base | settings).items() if v is not None}))
        assert stopped.value.code == 0
        prompts, answers = [], []
        for pool in pools:
            prompts.append([tokenizer.decode(ids[: int((labels != -100).float().argmax())]) for ids, labels in pool])
            answers.append([tokenizer.decode(labels[labels != -100]) for _, labels in pool])
        config = json.loads((folder / "config.json").read_text())
        row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        return SimpleNamespace(
            folder=folder, config=config, row=row, prompts=prompts, answers=answers, rates=rates, saved=saved,
            rows=[len(pool) for pool in pools], weights=load_file(folder / "model.safetensors"),
        )  # fmt: skip

    return start


@pytest.fixture(scope="module")
def plain(pretrain):
    return pretrain()


def share_worked(run, phase: int) -> float:
    return sum("<scratchpad>" in answer for answer in run.answers[phase]) / len(run.answers[phase])


def texts(run) -> list[str]:
    return [prompt for pool in run.prompts for prompt in pool]


def learns_the_same(a, b) -> bool:
    return all(torch.equal(value, b.weights[name]) for name, value in a.weights.items())


def size(run) -> float:
    return sum(value.square().sum().item() for value in run.weights.values())


def moved(run) -> float:
    """Mean distance of the biases from 0, where they began."""
    return torch.cat([value.abs() for name, value in run.weights.items() if "h_to_4h.bias" in name]).mean().item()


def drawn_numbers(run) -> list[int]:
    return [n for text in texts(run) for n in expressions.leaves(expressions.parse(text.split(">")[-1]))]


def stated(run) -> list[int]:
    """All numbers in problems and answers."""
    return [int(n) for pool in run.prompts + run.answers for text in pool for n in re.findall("[0-9]+", text)]


def drawn_depths(run) -> set[int]:
    return {expressions.depth(expressions.parse(text.split(">")[-1])) for text in texts(run)}


@check("pretraining", output=None)
def _(a, b):
    assert (b.folder / "model.safetensors").exists() and learns_the_same(a, b)


@check("pretraining", modelsize="small")
def _(a, b):
    assert (a.config["hidden_size"], b.config["hidden_size"]) == (48, 64)


@check("pretraining", num_experts=2)
def _(a, b):
    assert b.config["num_experts"] == 2 and "balance" in b.row and "balance" not in a.row


@check("pretraining", base=dict(num_experts=3), active_experts=2)
def _(a, b):
    assert (a.config["active_experts"], b.config["active_experts"]) == (1, 2)


@check("pretraining", dropout=0.3)
def _(a, b):
    assert b.config["hidden_dropout"] == 0.3 and a.prompts == b.prompts and not learns_the_same(a, b)


@check("pretraining", max_digits=2)
def _(a, b):
    assert max(drawn_numbers(a)) < 10 <= max(drawn_numbers(b)) < 100


@check("pretraining", max_depth=3)
def _(a, b):
    assert drawn_depths(a) == {1, 2} and drawn_depths(b) == {1, 2, 3}


@check("pretraining", operators="-")
def _(a, b):
    assert any("+" in text for text in texts(a)) and not any("+" in text or "*" in text for text in texts(b))


@check("pretraining", max_value=9)
def _(a, b):
    assert max(stated(b)) <= 9 < max(stated(a))


@check("pretraining", negatives=0.9)
def _(a, b):
    assert min(drawn_numbers(a)) >= 0 > min(drawn_numbers(b))


@check("pretraining", parentheses=0.9)
def _(a, b):
    assert sum("(" in text for text in texts(b)) > 2 * sum("(" in text for text in texts(a))


@check("pretraining", spaces=0.9)
def _(a, b):
    assert not any(" " in text for text in texts(a)) and sum(" " in text for text in texts(b)) > 230


@check("pretraining", endian="little")
def _(a, b):
    assert all("<big>" in text for text in texts(a)) and all("<little>" in text for text in texts(b))


@check("pretraining", base=dict(max_digits=2), columns=True)
def _(a, b):
    assert sum(map(len, b.answers[0])) > 1.1 * sum(map(len, a.answers[0]))


@check("pretraining", prob_scratchpad=0)
def _(a, b):
    assert share_worked(a, 0) > 0.8 and share_worked(b, 0) == 0 < share_worked(b, 1)


@check("pretraining", final_prob_scratchpad=1)
def _(a, b):
    assert share_worked(a, 1) < 0.2 and share_worked(b, 1) == 1 > share_worked(b, 0)


@check("pretraining", final_share=0)
def _(a, b):
    assert len(a.rows) == 2 and len(b.rows) == 1


@check("pretraining", steps=6)
def _(a, b):
    assert (a.row["step"], b.row["step"]) == (4, 6) and len(b.rates) == len(a.rates) + 2


@check("pretraining", batch_size=4)
def _(a, b):
    assert (a.rows, b.rows) == ([256, 256], [128, 128])


@check("pretraining", lr=1e-3)
def _(a, b):
    assert [rate / 3 for rate in a.rates] == pytest.approx(b.rates)
    assert moved(b) == pytest.approx(moved(a) / 3, rel=0.3), "it reaches the optimizer"


@check("pretraining", weight_decay=5)
def _(a, b):
    assert size(b) < 0.999 * size(a)


@check("pretraining", base=dict(num_experts=2), balance_coef=5)
def _(a, b):
    assert a.prompts == b.prompts and not learns_the_same(a, b)


@check("pretraining", seed=1)
def _(a, b):
    assert a.prompts != b.prompts and not learns_the_same(a, b)


@check("pretraining", save_steps=1)
def _(a, b):
    assert a.saved == [] and b.saved == [2] and learns_the_same(a, b)


@check("pretraining", log_csv="log.csv")
def _(a, b):
    with open("log.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["4"]


@pytest.mark.parametrize("argument", CHECKS["pretraining"])
def test_an_argument_of_pretraining(argument, pretrain, plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value, base, check = CHECKS["pretraining"][argument]
    check(pretrain(**base) if base else plain, pretrain(**base, **{argument: value} if value is not None else {}))


def test_every_argument_of_pretraining_has_a_test():
    # of `resume`: test_commands.py::test_stopped_and_resumed_pretraining_equals_uninterrupted
    assert CHECKS["pretraining"].keys() | {"resume"} == fields(train.PretrainConfig)


def test_pretraining_teaches_answers_and_their_end_on_problems_that_are_not_held_out(plain):
    for prompts, answers in zip(plain.prompts, plain.answers, strict=True):
        for prompt, answer in zip(prompts, answers, strict=True):
            tree = expressions.parse(prompt.removeprefix("<sos><big>"))
            assert answer.endswith(f"<answer>{expressions.evaluate(tree)}<eos>") and answer.count("<answer>") == 1
            assert not expressions.held_out(tree), "an evaluation problem"


# ==== python -m mathformer.train_rl ===================================================================================

RL = {  # flag: its value, and what it comes to in the settings of the run
    "steps": (7, dict(steps=7)),
    "batch_size": (5, dict(prompts_per_step=5)),
    "group_size": (6, dict(group_size=6)),
    "lr": (1e-3, dict(lr=1e-3)),
    "max_gen_len": (30, dict(max_completion_tokens=30)),
    "kl_coef": (0.2, dict(kl_coef=0.2)),
    "kl_target": (0.3, dict(kl_target=0.3)),
    "clip_ratio": (0.1, dict(clip_low=0.1, clip_high=0.1)),
    "epochs": (2, dict(epochs=2)),
    "temperature": (0.9, dict(temperature=0.9)),
    "top_k": (9, dict(top_k=9)),
    "grad_clip": (2.0, dict(grad_clip=2.0)),
    "save_interval": (11, dict(save_steps=11)),
    "eval_interval": (13, dict(eval_steps=13)),
    "runs": ("elsewhere", dict(runs="elsewhere")),
    "seed": (3, dict(seed=3)),
    "max_digits": (2, dict(task_args=dict(max_digits=2))),
    "max_depth": (2, dict(task_args=dict(max_depth=2))),
    "operators": ("+-", dict(task_args=dict(operators="+-"))),
    "max_value": (50, dict(task_args=dict(max_value=50))),
    "partial_credit": (0.25, dict(task_args=dict(partial_credit=0.25))),
    "curriculum_steps": (50, dict(task_args=dict(curriculum_steps=50))),
    "modelsize": (
        "small",
        {},
    ),  # the checkpoint's own; others are refused: test_commands.py::test_bad_input_of_train_rl
    "num_experts": (1, {}),
    "active_experts": (1, {}),
}


@pytest.fixture
def rl(monkeypatch, tmp_path):
    """Settings of the run that flags start, which ends at once with these evaluations."""

    def start(first=(0.3, 0.2, 0.4), last=(0.3, 0.2, 0.4), **flags) -> grpo.Config:
        found = []

        def train(config):
            found.append(config)
            (tmp_path / "metrics.csv").write_text("step\n1\n")
            rows = [dict(zip(("accuracy", "accuracy_low", "accuracy_high"), row, strict=True)) for row in (first, last)]
            return dict(first=rows[0], last=rows[1], run=tmp_path)

        monkeypatch.setattr(grpo, "train", train)
        with pytest.raises(SystemExit) as stopped:
            train_rl.main(pass_flags(dict(checkpoint=PRETRAINED) | flags))
        assert stopped.value.code == 0
        return found[0]

    return start


@pytest.mark.parametrize("flag", RL)
def test_an_argument_of_train_rl(flag, rl):
    value, expected = RL[flag]
    plain, config = rl(), rl(**{flag: value})
    for name in fields(grpo.Config):
        was, now = getattr(plain, name), getattr(config, name)
        if name == "task_args":
            was = was | expected.get(name, {})
        assert now == (was if name == "task_args" else expected.get(name, was)), name
    assert not expected or config != plain


def test_train_rl_copies_the_log_and_trains_the_checkpoint(rl, tmp_path):
    config = rl(log_csv=tmp_path / "log.csv")
    assert (tmp_path / "log.csv").read_text() == "step\n1\n"
    assert (config.model, config.task) == (PRETRAINED, "arithmetic")


def test_every_argument_of_train_rl_has_a_test():
    assert RL.keys() | {"checkpoint", "log_csv"} == fields(train_rl.RLConfig)


@pytest.mark.parametrize(
    "first, last, said",
    [
        ((0.3, 0.2, 0.4), (0.6, 0.5, 0.7), "Improvement: +30.0 points, the 95 % intervals are apart"),
        ((0.6, 0.5, 0.7), (0.3, 0.2, 0.4), "Improvement: -30.0 points, the 95 % intervals are apart"),
        ((0.3, 0.2, 0.4), (0.45, 0.35, 0.55), "Improvement: +15.0 points, the 95 % intervals overlap"),
        ((0.45, 0.35, 0.55), (0.3, 0.2, 0.4), "Improvement: -15.0 points, the 95 % intervals overlap"),
    ],
)
def test_train_rl_says_whether_the_intervals_are_apart(first, last, said, rl, capsys):
    rl(first, last)
    assert said in capsys.readouterr().out


# ==== python -m mathformer.evaluate ===================================================================================


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """An evaluation of the shipped model from the command line, and how `complete` was called for it."""

    def start(**flags) -> SimpleNamespace:
        out, calls, printed, complete = (
            tmp_path_factory.mktemp("evaluation") / "out.json",
            [],
            io.StringIO(),
            grpo.complete,
        )

        def watched(sampler, tokenizer, task, problems, group_size, sampling, seed, *prefix):
            calls.append(SimpleNamespace(problems=problems, group_size=group_size, sampling=sampling, seed=seed))
            return complete(sampler, tokenizer, task, problems, group_size, sampling, seed, *prefix)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grpo, "complete", watched)
            patch.setattr(sys, "stdout", printed)
            evaluate.main(
                pass_flags(dict(checkpoint=PRETRAINED, problems=12, samples=2, max_gen_len=32, out=out) | flags)
            )
        result = json.loads(out.read_text()) if out.exists() else None
        problems = [problem.example for problem in calls[0].problems]
        return SimpleNamespace(calls=calls, printed=printed.getvalue(), result=result, problems=problems)

    return start


@check("evaluate", problems=9)
def _(a, b):
    assert (a.result["evaluation"]["n"], b.result["evaluation"]["n"]) == (12, 9)


@check("evaluate", samples=3)
def _(a, b):
    assert set(b.result["evaluation"]["pass_at_k"]) == {"1", "2", "3"} and b.calls[1].group_size == 3


@check("evaluate", temperature=0.5)
def _(a, b):
    assert [call.sampling.temperature for call in b.calls] == [0, 0.5, 0, 0, 0]
    assert a.result["evaluation"]["accuracy"] == b.result["evaluation"]["accuracy"]


@check("evaluate", max_gen_len=3)
def _(a, b):
    assert {call.sampling.max_tokens for call in b.calls} == {3} and b.result["evaluation"]["length"] <= 3


@check("evaluate", max_digits=2)
def _(a, b):
    assert max(max(map(numbers, a.problems))) < 10 <= max(max(map(numbers, b.problems)))


@check("evaluate", max_depth=1)
def _(a, b):
    assert set(map(depth, a.problems)) > {1} and set(map(depth, b.problems)) == {1}


@check("evaluate", operators="-")
def _(a, b):
    assert set().union(*map(operators, b.problems)) == {"-"}


@check("evaluate", max_value=9)
def _(a, b):
    assert max(map(largest, b.problems)) <= 9 < max(map(largest, a.problems))


@check("evaluate", seed=5)
def _(a, b):
    assert {call.seed for call in a.calls} == {0} and {call.seed for call in b.calls} == {5}
    assert a.problems == b.problems


@check("evaluate", expression="2+3*4")
def _(a, b):
    assert b.result is None and [p["expression"] for p in b.problems] == ["2+3*4"] and "value" in b.printed


@pytest.fixture(scope="module")
def plainly_evaluated(evaluated):
    return evaluated()


@pytest.mark.parametrize("argument", CHECKS["evaluate"])
def test_an_argument_of_evaluate(argument, evaluated, plainly_evaluated):
    value, _, check = CHECKS["evaluate"][argument]
    check(plainly_evaluated, evaluated(**{argument: value}))


def test_every_argument_of_evaluate_has_a_test(evaluated, plainly_evaluated, tmp_path):
    assert CHECKS["evaluate"].keys() | {"checkpoint", "out"} == fields(evaluate.EvaluationConfig)
    assert plainly_evaluated.result["checkpoint"] == PRETRAINED


# ==== view report and view play =======================================================================================


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """Two short runs of the shipped model."""
    folder = tmp_path_factory.mktemp("runs")
    settings = dict(
        model=PRETRAINED, task="arithmetic", task_args=dict(eval_size=3), runs=str(folder), prompts_per_step=2
    )
    settings |= dict(group_size=4, max_completion_tokens=40, max_prompt_tokens=48, steps=2, eval_samples=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "plot", lambda folder: folder / "config.yaml")
        return [grpo.train(grpo.Config(**settings, seed=seed))["run"] for seed in (0, 1)]


def page_of(path: Path) -> dict:
    text = path.read_text()
    return json.loads(text[text.index('{"runs"') :].split("</script>")[0])


def test_the_arguments_of_report(two_runs, tmp_path, capsys):
    parser = {action.dest for action in all_actions(report.parse_arguments)} - {"help"}
    assert parser == {"runs", "out", "max_rollouts", "prompt_id"}
    one, two = two_runs
    report.main([str(one)])
    page = page_of(one / "report.html")
    assert [run["name"] for run in page["runs"]] == [one.name] and page["runs"][0]["shown"] == 16
    report.main([str(one), str(two), "--out", str(tmp_path / "both.html")])
    assert [run["name"] for run in page_of(tmp_path / "both.html")["runs"]] == [one.name, two.name]
    report.main([str(one), "--max_rollouts", "8", "--out", str(tmp_path / "few.html")])
    assert page_of(tmp_path / "few.html")["runs"][0]["shown"] == 8
    report.main([str(one), "--max_rollouts", "1", "--out", str(tmp_path / "few.html")])
    assert page_of(tmp_path / "few.html")["runs"][0]["shown"] == 4, "a whole group at least"
    name = json.loads((one / "rollouts.jsonl").read_text().splitlines()[0])["prompt_id"]
    report.main([str(one), "--prompt_id", name])
    assert (one / f"prompt-{name}.png").stat().st_size > 5000 and capsys.readouterr().out.endswith(
        f"prompt-{name}.png\n"
    )


def all_actions(parse: Callable) -> list:
    """Of the parser that a function makes."""
    import argparse

    found, add = [], argparse.ArgumentParser.add_argument
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            argparse.ArgumentParser, "add_argument", lambda self, *a, **k: found.append(add(self, *a, **k)) or found[-1]
        )
        with pytest.raises(SystemExit):
            parse(["--help"])
    return found


def test_the_arguments_of_play(two_runs, monkeypatch, capsys):
    found = {action.dest for action in all_actions(view.play)} - {"help"}
    assert found == {"run", "samples", "seed", "trust_remote_code"}
    capsys.readouterr()

    def played(*flags: str, text: str = "7*(8-9)-3*(4+5)\n") -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        view.play([str(two_runs[0]), *flags])
        return capsys.readouterr().out.splitlines()

    for checkpoint in two_runs[0].glob("checkpoint-*"):  # as one does to save space: final/ is enough
        shutil.rmtree(checkpoint)
    plain, other, fewer = played(), played("--seed", "1"), played("--samples", "1")
    assert sum("sample 3: " in line for line in plain) == 1 and sum("sample 2: " in line for line in fewer) == 0
    assert "of 3 samples right" in plain[2] + plain[3] and any("of 1 samples right" in line for line in fewer)
    most_likely = [next(line for line in out if "most likely" in line) for out in (plain, other)]
    assert most_likely[0] == most_likely[1] and plain != other, "the seed is that of the samples"
    twice = played(text="7*(8-9)-3*(4+5)\n" * 2)
    first, second = (twice[i : i + len(plain) - 2] for i in (1, len(plain) - 2))
    assert first != second, "asked again, other samples"
    trusted = []
    monkeypatch.setattr("view.play.play", lambda run, config, *args: trusted.append(config.trust_remote_code))
    view.play([str(two_runs[0])])
    view.play([str(two_runs[0]), "--trust_remote_code"])
    assert trusted == [False, True]


# ==== Defaults, which README, recipes and the shipped model rest on ===================================================

DEFAULTS = {
    ArithmeticTask: dict(max_digits=1, max_depth=3, operators="+-*", max_value=99, negatives=0, parentheses=0, spaces=0)
    | dict(endian="big", partial_credit=0, curriculum_steps=0, eval_size=500, eval_seed=1234),
    Countdown: dict(dataset="Jiayi-Pan/Countdown-Tasks-3to4", prompt_template="r1", equation_weight=1, format_weight=1)
    | dict(format_gates=False, eval_size=500, numbers=(3, 4)),
    Sentences: dict(words=3, rule="words", eval_size=64),
    ReasoningGym: dict(name=inspect.Parameter.empty, config=None, eval_size=64, partial=True, system_prompt=SYSTEM),
    GSM8K: dict(dataset="openai/gsm8k", train_size=0, eval_size=0, prompt_template="chat"),
    Math: dict(dataset="DigitalLearningGmbH/MATH-lighteval", eval_dataset="HuggingFaceH4/MATH-500")
    | dict(levels=(1, 2, 3, 4, 5), format_weight=0.1, eval_size=0, prompt_template="chat"),
    evaluate.EvaluationConfig: dict(
        problems=500, samples=8, temperature=1, max_gen_len=256, expression="", out="", seed=0
    )
    | dict.fromkeys(("max_digits", "max_depth", "operators", "max_value")),
    train_rl.RLConfig: dict(steps=1000, batch_size=32, group_size=4, lr=5e-4, max_gen_len=256, kl_coef=0.1, kl_target=0)
    | dict(clip_ratio=0.2, epochs=1, temperature=1, top_k=0, grad_clip=1, partial_credit=0, curriculum_steps=0, seed=0)
    | dict(save_interval=100, eval_interval=50, runs="runs")
    | dict.fromkeys(("max_digits", "max_depth", "operators", "max_value", "modelsize", "num_experts", "active_experts"))
    | dict(log_csv=None),
    grpo.Config: dict(
        reward_seconds=0, trust_remote_code=False, seed=0, device="auto", precision="auto", sampler="auto"
    )
    | dict(kv_cache_gb=0, vllm_sleep=False, prompts_per_step=32, group_size=8, max_prompt_tokens=512, temperature=1)
    | dict(max_completion_tokens=1024, top_p=1, top_k=0, sample_rows=256, advantage="grpo", loss_weight="token")
    | dict(ratio="token", surrogate="clip", clip_low=0.2, clip_high=0.2, kl_coef=0, kl_kind="k3", kl_in="loss")
    | dict(kl_target=0, entropy_coef=0, old_logps="sampler", epochs=1, minibatches=1, importance_cap=0, steps=500)
    | dict(dead_groups="auto", resample_rounds=0, mask_truncated=False, overlong_share=0, offload_reference=False)
    | dict(lora_rank=0, lora_alpha=32, lora_targets="all-linear")
    | dict(optimizer="adamw", lr=1e-6, lr_schedule="constant", warmup_steps=0, weight_decay=0, grad_clip=1)
    | dict(tokens_per_microbatch=8192, gradient_checkpointing=False, eval_steps=50, eval_samples=8, runs="runs")
    | dict(save_steps=50, keep_last=2, keep_best=True, max_minutes=0, print_groups=50, cudnn_attention=False)
    | dict(system_prompt="", chat_template="", few_shot=0, server_minutes=5, staleness=0)
    | dict.fromkeys(("model", "task", "about", "report_to", "project", "run_name", "resume", "allow_changed"), "")
    | dict.fromkeys(("server", "serve_on", "weights_folder"), ""),
}


@pytest.mark.parametrize("what", DEFAULTS, ids=lambda what: what.__name__)
def test_defaults_are_a_contract(what):
    found = {name: p.default for name, p in inspect.signature(what).parameters.items()}
    factories = {"task_args", "reflection_words", "chat_template_args", "stop", "checkpoint"}  # the last has none
    assert {name: value for name, value in found.items() if name not in factories} == DEFAULTS[what]


def test_the_defaults_of_pretraining_made_the_shipped_model():
    made = json.loads((Path(PRETRAINED) / "pretraining.json").read_text())
    config = train.PretrainConfig(output="x")
    assert {name: getattr(config, name) for name in made if name not in ("seconds", "answer_tokens")} == {
        name: value for name, value in made.items() if name not in ("seconds", "answer_tokens")
    }
    off = ("dropout", "negatives", "parentheses", "spaces", "columns")
    assert not any(getattr(config, name) for name in off) and (config.num_experts, config.active_experts) == (1, 1)
    assert (config.endian, config.save_steps, config.balance_coef) == ("big", 2000, 0.01)


@pytest.mark.parametrize(
    "main, settings",
    [
        (train.main, train.PretrainConfig),
        (train_rl.main, train_rl.RLConfig),
        (evaluate.main, evaluate.EvaluationConfig),
    ],
)
def test_the_help_of_a_command_has_every_flag_with_its_sentence(main, settings, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    source = inspect.getsource(settings)
    assert stopped.value.code == 0
    for f in dataclasses.fields(settings):
        sentence = source.split(f"\n    {f.name}: ")[1].split('"""')[1]
        assert f"--{f.name}" in out and " ".join(sentence.split()) in out, f.name
