"""The arithmetic task: what a problem looks like as text, what the model may answer, and what it is paid.

A problem is `<sos><big>(3+4)*5`. The model goes on in one of two ways, and which one is its own choice:

    <answer>35<eos>                               at once
    <scratchpad>3+4=7;7*5=35<answer>35<eos>       worked out

With `<little>` for `<big>`, all numbers have their last digit first, in the problem and in the answer: `<answer>53`.
"""

import functools
import math
import random
import re
from fractions import Fraction

from mathformer.expressions import (
    Tree,
    applications,
    equations,
    evaluate,
    generate,
    parse,
    parse_operators,
    render,
    swap_endian,
)
from mathformer.tokenizer import ANSWER, BIG, LITTLE, SCRATCHPAD, SOS

NUMBER = r"-?[0-9]{1,100}(?:/[0-9]{1,100})?"
COMPLETION = re.compile(rf"(?:{SCRATCHPAD}(?P<steps>[^<]*))?{ANSWER}(?P<answer>{NUMBER})")
ENDIANS = {"big": (BIG,), "little": (LITTLE,), "both": (BIG, LITTLE)}


def prompt_text(expression: str, endian: str = BIG) -> str:
    return f"{SOS}{endian}{swap_endian(expression) if endian == LITTLE else expression}"


def solution_text(tree: Tree, worked: bool, endian: str = BIG, columns: bool = False) -> str:
    """The completion that pretraining teaches, without <eos>."""
    lines = [f"{left}={right}" for left, right in equations(tree, columns)] if worked else []
    text = (SCRATCHPAD + ";".join(lines) if lines else "") + f"{ANSWER}{evaluate(tree)}"
    return swap_endian(text) if endian == LITTLE else text


class ArithmeticTask:
    """Arithmetic expressions with an exact verifier; reward 1 for the right answer.

    How a right answer came about is not rewarded: a worked one is paid no more than one given at once. A fraction must
    be reduced: otherwise `4/6` could be answered by copying it.

    Args:
        max_digits, max_depth, max_value, negatives: see `expressions.generate`.
        operators: those that problems use, as text: `+-*`, `+ - max`, or `all`.
        parentheses, spaces: probabilities of parentheses and spaces that are not needed; see `expressions.render`.
        endian: digits of numbers: `big` (most significant first), `little` (last), or `both`, for half the problems.
        partial_credit: what a wrong answer is paid if every step was right; in proportion if only some were. Less than
            a right answer. The steps are those of the problem: other true equations are not paid.
        curriculum_steps: training problems grow from one operator and one digit to `max_depth` and `max_digits` over
            so many steps; 0 is off.
        eval_size: number of evaluation problems, all different; fewer if the settings hold out fewer.
        eval_seed: their seed. They are of the held-out expressions, which training never draws.

    Raises:
        ValueError: a setting is not allowed; the message says which.
    """

    worked_prefix = SCRATCHPAD  # put behind the prompt, it makes the model show its steps

    def __init__(
        self,
        max_digits: int = 1,
        max_depth: int = 3,
        operators: str = "+-*",
        max_value: int | None = 99,
        negatives: float = 0.0,
        parentheses: float = 0.0,
        spaces: float = 0.0,
        endian: str = "big",
        partial_credit: float = 0.0,
        curriculum_steps: int = 0,
        eval_size: int = 500,
        eval_seed: int = 1234,
    ):
        for name, value in (("max_digits", max_digits), ("max_depth", max_depth), ("eval_size", eval_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}, it must be 1 or more")
        for name, value in (("negatives", negatives), ("parentheses", parentheses), ("spaces", spaces)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}, it is a probability: from 0 to less than 1")
        if not 0 <= partial_credit < 1:
            raise ValueError(
                f"partial_credit is {partial_credit}, it must be from 0 to less than 1, a right answer's pay"
            )
        if endian not in ENDIANS:
            raise ValueError(f"endian is {endian!r}, it must be one of {', '.join(ENDIANS)}")
        if max_value is not None and max_value < 1:
            raise ValueError(f"max_value is {max_value}, it must be 1 or more, or null for no limit")
        if max_value is not None and max_value < 10 ** (max_digits - 1):
            raise ValueError(f"max_digits {max_digits} needs a max_value of {10 ** (max_digits - 1)} or more, or null")
        if curriculum_steps < 0:
            raise ValueError(f"curriculum_steps is {curriculum_steps}, it must be 0 or more")
        self.max_digits, self.max_depth, self.operators = max_digits, max_depth, parse_operators(operators)
        self.max_value, self.negatives = max_value, negatives
        self.parentheses, self.spaces, self.endians = parentheses, spaces, ENDIANS[endian]
        self.partial_credit, self.curriculum_steps = partial_credit, curriculum_steps
        self.eval_size, self.eval_seed = eval_size, eval_seed

    def draw(self, rng: random.Random, for_eval: bool, progress: float = 1.0) -> Tree:
        """A held-out expression or one that is not; `progress` below 1 gives fewer digits and operators."""
        digits, depth = (max(1, math.ceil(progress * most)) for most in (self.max_digits, self.max_depth))
        return generate(rng, digits, depth, self.operators, self.max_value, self.negatives, for_eval)

    def train(self, rng: random.Random, step: int) -> dict:
        progress = min(1.0, step / self.curriculum_steps) if self.curriculum_steps else 1.0
        return self.example(self.draw(rng, for_eval=False, progress=progress), rng)

    def eval(self) -> list[dict]:
        rng = random.Random(self.eval_seed)
        distinct: dict[str, dict] = {}
        repeats = 0
        while len(distinct) < self.eval_size and repeats < 1000:  # small settings hold out fewer than were asked for
            example = self.example(self.draw(rng, for_eval=True), rng)
            repeats = repeats + 1 if example["expression"] in distinct else 0
            distinct.setdefault(example["expression"], example)
        return list(distinct.values())

    def example(self, tree: Tree, rng: random.Random) -> dict:
        """The problem as a dict; `rng` chooses spaces, parentheses and the order of digits, where there is a choice."""
        endian = self.endians[0] if len(self.endians) == 1 else rng.choice(self.endians)
        text = render(tree, rng, self.parentheses, self.spaces)
        return {
            "expression": render(tree),
            "prompt": prompt_text(text, endian),
            "endian": endian,
            "value": evaluate(tree),
            "steps": applications(tree),
        }

    def typed(self, text: str) -> dict:
        """`3*(4+5)` as a problem."""
        return self.example(parse(text), random.Random(0))

    def prompt(self, example: dict) -> str:
        return example["prompt"]

    def demonstration(self, rng: random.Random) -> tuple[dict, str]:
        """A training problem, worked out."""
        tree = self.draw(rng, for_eval=False)
        example = self.example(tree, rng)
        return example, solution_text(tree, True, example["endian"])

    def reward(self, text: str, example: dict) -> dict:
        match = COMPLETION.fullmatch(text)
        read = swap_endian if example["endian"] == LITTLE else str
        prediction = reduced(read(match["answer"])) if match else None
        correct = float(prediction is not None and prediction == example["value"])
        shown = [read(step) for step in match["steps"].split(";")] if match and match["steps"] else []
        true = dict(sides(step) for step in shown if is_true_equation(step))
        # of the steps that this problem needs, those that are there: other true equations count for nothing
        share = sum(leads_to(true, *step) for step in example["steps"]) / max(1, len(example["steps"]))
        return {
            "reward": correct or self.partial_credit * share,
            "correct": correct,
            "format": float(match is not None),
            "worked": float(bool(true)),
            "steps_right": share,
            "prediction": None if prediction is None else str(prediction),
            "ground_truth": str(example["value"]),
        }


def reduced(text: str) -> Fraction | None:
    """The number that an answer states; None for a fraction that is not reduced, `2/6` or `3/1`."""
    numerator, slash, denominator = text.partition("/")
    if slash and (int(denominator) < 2 or math.gcd(int(numerator), int(denominator)) > 1):
        return None
    return Fraction(int(numerator), int(denominator or 1))


def sides(step: str) -> tuple[str, str]:
    left, _, right = step.replace(" ", "").partition("=")
    return left, right


def leads_to(equations: dict[str, str], start: str, value: str) -> bool:
    """Whether a chain of the equations goes from `start` to `value`: `7*8=8*7` alone works nothing out."""
    for _ in range(len(equations)):
        start = equations.get(start, start)
        if start == value:
            return True
    return False


@functools.lru_cache(10_000)  # small equations come again and again
def is_true_equation(step: str) -> bool:
    """Whether a step such as `3+4=7` holds; `7=7` and `3+4=3+4` are no steps. Never raises."""
    left, _, right = step.partition("=")
    try:
        one, other = parse(left), parse(right)
        return not isinstance(one, int) and one != other and evaluate(one) == evaluate(other)
    except (ValueError, ZeroDivisionError):
        return False
