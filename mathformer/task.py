"""The arithmetic task: what a problem looks like as text, what the model may answer, and what it is paid.

A problem is `<sos><big>(3+4)*5`. The model goes on in one of two ways, and which one is its own choice:

    <answer>35<eos>                               at once
    <scratchpad>3+4=7;7*5=35<answer>35<eos>       worked out
"""

import random
import re

from mathformer.expressions import OPERATORS, Tree, equations, evaluate, generate, held_out, parse, render
from mathformer.tokenizer import ANSWER, BIG, SCRATCHPAD, SOS

COMPLETION = re.compile(rf"(?:{SCRATCHPAD}(?P<steps>[^<]*))?{ANSWER}(?P<answer>-?[0-9]{{1,12}})")


def prompt_text(tree: Tree) -> str:
    return f"{SOS}{BIG}{render(tree)}"


def solution_text(tree: Tree, worked: bool) -> str:
    """The completion that pretraining teaches, without <eos>."""
    if not worked:
        return f"{ANSWER}{evaluate(tree)}"
    lines = list(equations(tree))
    return SCRATCHPAD + ";".join(f"{left}={value}" for left, value in lines) + f"{ANSWER}{lines[-1][1]}"


class ArithmeticTask:
    """Arithmetic expressions with an exact verifier; reward 1 for the right answer and 0 for any other.

    How the answer came about is not rewarded: a worked answer is paid no more than one given at once.

    Args:
        max_digits, max_depth, operators, max_value: see `expressions.generate`.
        eval_size: number of evaluation problems, all different; fewer if the settings hold out fewer.
        eval_seed: their seed. They are of the held-out expressions, which training never draws.
    """

    worked_prefix = SCRATCHPAD  # put behind the prompt, it makes the model show its steps

    def __init__(
        self,
        max_digits: int = 1,
        max_depth: int = 3,
        operators: str = "+-*",
        max_value: int | None = 99,
        eval_size: int = 500,
        eval_seed: int = 1234,
    ):
        if max_digits < 1 or max_depth < 1:
            raise ValueError(f"max_digits ({max_digits}) and max_depth ({max_depth}) must be 1 or more")
        unknown = [op for op in operators if op not in OPERATORS]
        if unknown or not operators:
            raise ValueError(f"operators {operators!r}: choose one or more of {' '.join(OPERATORS)}")
        self.problem = dict(max_digits=max_digits, max_depth=max_depth, operators=operators, max_value=max_value)
        self.eval_size, self.eval_seed = eval_size, eval_seed

    def draw(self, rng: random.Random, for_eval: bool) -> Tree:
        while held_out(tree := generate(rng, **self.problem)) != for_eval:
            pass
        return tree

    def train(self, rng: random.Random, step: int) -> dict:
        return self.example(self.draw(rng, for_eval=False))

    def eval(self) -> list[dict]:
        rng = random.Random(self.eval_seed)
        distinct: dict[str, dict] = {}
        for _ in range(100 * self.eval_size):  # small settings hold out fewer expressions than were asked for
            example = self.example(self.draw(rng, for_eval=True))
            distinct.setdefault(example["expression"], example)
            if len(distinct) == self.eval_size:
                break
        return list(distinct.values())

    def example(self, tree: Tree) -> dict:
        return {"expression": render(tree), "prompt": prompt_text(tree), "value": evaluate(tree)}

    def prompt(self, example: dict) -> str:
        return example["prompt"]

    def reward(self, text: str, example: dict) -> dict:
        match = COMPLETION.fullmatch(text)
        prediction = int(match["answer"]) if match else None
        correct = float(prediction == example["value"])
        shown = (match["steps"] or "").split(";") if match else []
        return {
            "reward": correct,
            "correct": correct,
            "format": float(match is not None),
            "worked": float(any(is_true_equation(step) for step in shown)),
            "prediction": prediction,
            "ground_truth": example["value"],
        }


def is_true_equation(step: str) -> bool:
    """Whether a step such as `3+4=7` holds; `7=7` is no step. Never raises."""
    left, _, right = step.partition("=")
    try:
        tree = parse(left)
        return not isinstance(tree, int) and evaluate(tree) == int(right)
    except ValueError:
        return False
