"""The tasks for language models that grpo.py knows by name: countdown, gsm8k, math.

Each is a class with the four methods that section 2 of grpo.py describes, and a verifier: a function that pays for a
text. A verifier is attacked by what it trains. It does bounded work, never raises, and never runs what it reads.
"""

import ast
import itertools
import random
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path


def load_rows(dataset: str, split: str, columns: list[str], subset: str | None = None) -> list[dict]:
    """All rows of a data set, as dicts.

    Args:
        dataset: a JSON, JSON Lines or Parquet file, a folder of such files (of one split, or with the split's name in
            the file names), or a name on the Hugging Face Hub.
        split: train, test, ...; a single file has no splits and is taken whole.
        columns: those that the task reads.
        subset: the data set's configuration on the Hub.

    Raises:
        ValueError: it cannot be loaded, or lacks a column.
    """
    import datasets

    path = Path(dataset)
    try:
        if path.is_file():
            kind = "parquet" if path.suffix == ".parquet" else "json"
            rows = datasets.load_dataset(kind, data_files=str(path), split="train")
        else:
            rows = datasets.load_dataset(dataset, subset, split=split)
    except Exception as error:  # of many kinds: network, file system, format
        raise ValueError(
            f"the data set {dataset!r} (split {split}) cannot be loaded: {str(error).splitlines()[0]} "
            "Give a name on the Hugging Face Hub, or a local folder or JSON or Parquet file"
        ) from error
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        found = ", ".join(rows.column_names)
        raise ValueError(f"the data set {dataset!r} has no column {', '.join(missing)}; it has {found}")
    return list(rows)


def final_part(text: str) -> str | None:
    """What follows the last `</think>`; None if thinking was begun, also by a prefill, and not ended."""
    before, ended, after = text.rpartition("</think>")
    if "<think>" in after:
        return None
    return after


def answer_block(text: str) -> str | None:
    """The inside of the one `<answer>` block behind the thinking; None if there is none, or more than one."""
    part = final_part(text)
    if part is None or part.count("<answer>") != 1 or part.count("</answer>") != 1:
        return None
    match = re.search("<answer>(.*)</answer>", part, re.DOTALL)
    return match[1] if match else None


# ==== Countdown =======================================================================================================

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
        if isinstance(node, ast.Constant) and type(node.value) is int:
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
    """The parts `format` and `correct`; the caller weighs them.

    Right is: one `<answer>` block behind the thinking, whose equation uses each number of the problem exactly once and
    has the target's value. The form is `<think>...</think>` and `<answer>...</answer>` with nothing else behind it,
    worth 1; 0.5 if the answer has characters that belong in no equation.
    """
    shape = re.fullmatch(r".*?<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", text, re.DOTALL)
    answer = answer_block(text)
    found = equation_value(answer) if answer is not None else None
    right = found is not None and found[0] == example["target"] and Counter(found[1]) == Counter(example["nums"])
    well_formed = shape is not None and answer is not None
    return {
        "correct": float(right),
        "format": (1.0 if EQUATION.fullmatch(answer) else 0.5) if well_formed else 0.0,
        "prediction": None if answer is None else answer.strip()[:200],
        "ground_truth": example["target"],
    }
