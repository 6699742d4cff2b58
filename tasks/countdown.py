"""Countdown: make an equation from given numbers that equals a target."""

import ast
import random
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from tasks.data import load_rows, read_template, usable
from tasks.solver import worked_solution
from tasks.tags import MAX_CHARACTERS, answer_block, is_think_then_answer

EQUATION = re.compile(r"[0-9+\-*/() \t\n]{1,200}")  # ASCII digits, and nothing of Python but arithmetic
OPERATORS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


def equation_value(text: str) -> tuple[Fraction, list[int]] | None:
    """The exact value of `+ - * /` over plain integers, and the integers; None for anything else.

    Parsed, not evaluated: `**` and `//` are refused, and with at most 200 characters nothing can grow large.
    """
    if not EQUATION.fullmatch(text):
        return None
    used: list[int] = []

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant):
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError("not arithmetic")

    try:
        return value(ast.parse(" ".join(text.split()), mode="eval").body), used
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def countdown_reward(text: str, example: dict) -> dict:
    """The parts `format` and `correct`, and `reward`, their sum; the task weighs them as it was told.

    Right is: one `<answer>` block behind the thinking, whose equation uses each number of the problem exactly once and
    has the target's value. The form is `<think>...</think>` and `<answer>...</answer>` with nothing else behind it,
    worth 1; 0.5 if the answer has characters that belong in no equation.
    """
    text = text if len(text) <= MAX_CHARACTERS else ""
    answer = answer_block(text)
    found = equation_value(answer) if answer is not None else None
    right = found is not None and found[0] == example["target"] and Counter(found[1]) == Counter(example["nums"])
    form = (1.0 if EQUATION.fullmatch(answer) else 0.5) if is_think_then_answer(text) else 0.0
    return {
        "reward": right + form,
        "correct": float(right),
        "format": form,
        "prediction": None if answer is None else answer.strip()[:200],
        "ground_truth": example["target"],
    }


TEMPLATES = {
    # The form of DeepSeek-R1-zero: the answer's beginning is put into the model's mouth, so that it starts to think.
    "r1": "Make an equation from the numbers {nums} that equals {target}. You may use + - * / and parentheses, and "
    "each number must be used exactly once. Think first, inside <think> and </think>. Then give only the equation in "
    "<answer> and </answer>, for example <answer>(1 + 2) / 3</answer>.",
    # Plain text for a base model without a chat template.
    "plain": "Numbers: {nums}. Target: {target}. Find an equation of + - * / and parentheses that uses each number "
    "exactly once and equals the target. Think it through, and end with the equation in answer tags, for example "
    "<answer>(1 + 2) / 3</answer>.\nSolution:",
}
R1_SYSTEM = "You think about a problem before you answer it."
R1_PREFILL = "Let me solve this step by step.\n<think>"


class Countdown:
    """Make an equation from given numbers that equals a target.

    Args:
        dataset: rows with `nums` and `target`: a name on the Hub, a local folder or file, or `synthetic` for problems
            of our own of the same kind, without a download.
        numbers: how many numbers the problems of our own have: 2 to 6, or a list of such sizes.
        prompt_template: `r1` (chat messages, and the answer begins with a prefilled `<think>`), `plain` (text), or text
            of your own or a file of it, with {nums} and {target}.
        equation_weight, format_weight: what a right equation and the right form are paid; a weight of 0 makes the part
            a metric only.
        format_gates: pay for the equation only in an answer of the right form.
        eval_size: problems held out, drawn with seed 42 from a data set of one split.
    """

    def __init__(
        self,
        dataset: str = "Jiayi-Pan/Countdown-Tasks-3to4",
        prompt_template: str = "r1",
        equation_weight: float = 1.0,
        format_weight: float = 1.0,
        format_gates: bool = False,
        eval_size: int = 500,
        numbers: int | list[int] | tuple[int, ...] = (3, 4),
    ):
        self.equation_weight, self.format_weight, self.format_gates = equation_weight, format_weight, format_gates
        self.is_chat = prompt_template == "r1"
        self.prefill = R1_PREFILL if self.is_chat else ""
        self.template = read_template(prompt_template, TEMPLATES, ("{nums}", "{target}"))
        if eval_size < 1:
            raise ValueError(f"eval_size is {eval_size}, it must be 1 or more")
        self.sizes = list(numbers) if isinstance(numbers, (list, tuple)) else [numbers]
        if not self.sizes or not all(isinstance(n, int) and 2 <= n <= 6 for n in self.sizes):
            raise ValueError(f"numbers is {numbers!r}: 2 to 6, or a list of such sizes")
        if dataset == "synthetic":
            self.rows, rng = None, random.Random(42)
            self.held_out = [countdown_problem(rng, True, self.sizes) for _ in range(eval_size)]
            return
        if self.sizes != [3, 4]:
            raise ValueError(f"numbers is for the dataset synthetic: {dataset!r} has problems of its own")
        rows = load_rows(dataset, "train", ["nums", "target"])
        rows = rows.select(usable(rows, dataset, can_be_written, "nums and target must be whole numbers, nums from 0"))
        if len(rows) <= eval_size:
            raise ValueError(f"{dataset!r} has {len(rows)} problems, too few to hold out eval_size = {eval_size}")
        parts = rows.train_test_split(test_size=eval_size, seed=42)
        self.held_out = list(parts["test"])
        # the same problem may be there twice, with its numbers in another order: it is then for the evaluation alone
        taken = {(*sorted(row["nums"]), row["target"]) for row in self.held_out}
        problems = zip(parts["train"]["nums"], parts["train"]["target"], strict=True)
        kept = [i for i, (nums, target) in enumerate(problems) if (*sorted(nums), target) not in taken]
        if not kept:
            raise ValueError(f"{dataset!r} has no problem that is not in its evaluation")
        self.rows = parts["train"].select(kept)

    def train(self, rng: random.Random, step: int) -> dict:
        return self.rows[rng.randrange(len(self.rows))] if self.rows else countdown_problem(rng, False, self.sizes)

    def eval(self) -> list[dict]:
        return self.held_out

    def prompt(self, example: dict) -> str | list[dict]:
        text = self.template.replace("{nums}", str(example["nums"])).replace("{target}", str(example["target"]))
        if not self.is_chat:
            return text
        return [{"role": "system", "content": R1_SYSTEM}, {"role": "user", "content": text}]

    def demonstration(self, rng: random.Random) -> tuple[dict, str]:
        """A training problem and a right answer, behind the prefill: a search with dead ends, written by a program."""
        for _ in range(1000):  # there may be rows without an equation
            example = self.train(rng, 0)
            if found := worked_solution(rng, example["nums"], example["target"]):
                thinking, equation = found
                return example, f" {thinking}{'</think>' * self.is_chat}\n<answer>{equation}</answer>"
        raise ValueError("no equation was found for any of 1,000 problems")

    def typed(self, text: str) -> dict:
        """`3 7 25 = 46` as a problem."""
        numbers, equals, target = text.partition("=")
        nums = re.findall(r"[0-9]{1,9}", numbers)
        if not equals or not nums or not re.fullmatch(r"\s*-?[0-9]{1,9}\s*", target):
            raise ValueError("write the numbers, an equals sign and the target: 3 7 25 = 46")
        return {"nums": [int(n) for n in nums], "target": int(target)}

    def reward(self, text: str, example: dict) -> dict:
        parts = countdown_reward(text, example)
        if not self.is_chat:  # without a prompt that asks for <think>, the form is one answer block
            parts["format"] = float(answer_block(text) is not None)
        paid = parts["correct"] if parts["format"] == 1 or not self.format_gates else 0.0
        return parts | {"reward": self.equation_weight * paid + self.format_weight * parts["format"]}


def can_be_written(row: dict) -> bool:
    """Not whether there is an equation, only whether its numbers can be written: there is no -3 in one, only a 3."""
    nums, target = row["nums"], row["target"]
    return isinstance(nums, list) and bool(nums) and all(type(n) is int for n in [*nums, target]) and min(nums) >= 0


def countdown_problem(rng: random.Random, for_eval: bool, sizes: Sequence[int] = (3, 4)) -> dict:
    """Numbers from 1 to 99, as many as one of the `sizes`, and a whole target from 10 to 100 that some equation equals.

    One problem in twenty, by its numbers and target, is for the evaluation, the others are for training.
    """
    size = rng.choice(sizes)
    while True:
        nums = [rng.randint(1, 99) for _ in range(size)]
        values = [Fraction(n) for n in nums]
        while len(values) > 1:
            a = values.pop(rng.randrange(len(values)))
            b = values.pop(rng.randrange(len(values)))
            operator = rng.choice(list(OPERATORS.values()))
            values.append(operator(a, b) if b else a)
        target = values[0]
        is_held_out = zlib.crc32(f"{sorted(nums)} {target}".encode()) % 20 == 0
        if target.denominator == 1 and 10 <= target <= 100 and is_held_out == for_eval:
            return {"nums": nums, "target": int(target)}
