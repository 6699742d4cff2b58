"""MATH: competition mathematics with answers in LaTeX, which math-verify compares."""

import random
import re

from tasks.data import load_rows
from tasks.tags import MAX_CHARACTERS, answer_block, is_think_then_answer

MATH_SYSTEM = (
    "Think about the problem inside <think> and </think>. Then give the final result in LaTeX inside <answer> and "
    "</answer>, for example <answer>$\\frac{1}{2}$</answer>."
)
SECONDS = 3  # for each reading and comparison: a hostile answer can keep a computer algebra system busy for ever


def math_reward(text: str, example: dict) -> dict:
    """`correct` if math-verify finds the answer equal to the gold one; `format` for `<think>...</think><answer>...`.

    `reward` is their sum; the task weighs them as it was told.
    """
    from math_verify import verify

    text = text if len(text) <= MAX_CHARACTERS else ""
    answer = answer_block(text)
    found = parse_math(answer) if answer is not None and len(answer) <= 1000 else []
    correct = bool(found) and verify(example["gold"], found, timeout_seconds=SECONDS)
    form = text.lstrip().startswith("<think>") and is_think_then_answer(text)
    return {
        "reward": float(correct) + form,
        "correct": float(correct),
        "format": float(form),
        "prediction": None if answer is None else answer.strip()[:200],
        "ground_truth": example["answer"],
    }


def parse_math(text: str) -> list:
    """What math-verify reads in the text; [] for nothing.

    LaTeX without dollars is read as LaTeX: as plain text, math-verify would take one number out of `2\\sqrt{3}`.
    """
    from math_verify import parse

    if re.search(r"(?<!\\)\$|\\boxed|\\\(|\\\[", text):
        return parse(text, parsing_timeout=SECONDS)
    return parse(f"${text}$", parsing_timeout=SECONDS) or parse(text, parsing_timeout=SECONDS)


def last_boxed(text: str) -> str | None:
    """The last `\\boxed{...}` with its braces balanced, whole; None if there is none."""
    start = text.rfind("\\boxed{")
    depth = 0
    for i in range(start + len("\\boxed"), len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start : i + 1]
    return None


class Math:
    """Competition mathematics, judged by math-verify.

    Args:
        dataset: training rows with `problem`, `solution` (with its result in \\boxed{}) and `level`.
        eval_dataset: evaluation rows with `problem` and `answer`; split `test`.
        levels: those to train on, 1 to 5.
        format_weight: what the right form is paid, beside 1 for the right answer.
        eval_size: use only the first so many evaluation rows; 0 for all.
    """

    def __init__(
        self,
        dataset: str = "DigitalLearningGmbH/MATH-lighteval",
        eval_dataset: str = "HuggingFaceH4/MATH-500",
        levels: tuple[int, ...] | list[int] = (1, 2, 3, 4, 5),
        format_weight: float = 0.1,
        eval_size: int = 0,
    ):
        if eval_size < 0:
            raise ValueError(f"eval_size is {eval_size}, it must be 0 (for all) or more")
        wanted = {f"Level {level}" for level in levels}
        rows = load_rows(dataset, "train", ["problem", "solution", "level"])
        tests = load_rows(eval_dataset, "test", ["problem", "answer"])
        levels_of, problems = rows["level"], rows["problem"]
        of_levels = [i for i, level in enumerate(levels_of) if level in wanted]
        if not of_levels:
            found = ", ".join(sorted(set(levels_of)))
            raise ValueError(f"levels {list(levels)}: {dataset!r} has no such problem; its levels are {found}")
        held_out = set(tests["problem"])
        self.rows = rows.select([i for i in of_levels if problems[i] not in held_out])
        if not len(self.rows):
            raise ValueError(f"{dataset!r} has no problem that is not in {eval_dataset!r}")
        self.format_weight, self.unreadable = format_weight, set()
        examples = [self.example(row["problem"], row["answer"], f"${row['answer']}$") for row in tests]
        self.held_out = [example for example in examples if example][: eval_size or None]
        if not self.held_out:
            raise ValueError(f"{eval_dataset!r} has no problem whose answer can be read")

    def example(self, problem: str, answer: str, source: str) -> dict | None:
        """None, and said once, if the gold answer cannot be read: it would be paid for nothing, or never."""
        gold = parse_math(source) if answer else []
        if gold:
            return {"problem": problem, "answer": answer, "gold": gold}
        if problem not in self.unreadable:
            self.unreadable.add(problem)
            print(f"left out: the gold answer of {problem[:80]!r} cannot be read: {source[-80:]!r}")
        return None

    def train(self, rng: random.Random, step: int) -> dict:
        for _ in range(1000):
            row = self.rows[rng.randrange(len(self.rows))]
            boxed = last_boxed(row["solution"]) or ""
            if example := self.example(row["problem"], boxed, f"${boxed}$"):
                return example
        raise ValueError("no training problem has a gold answer that can be read")

    def eval(self) -> list[dict]:
        return self.held_out

    def prompt(self, example: dict) -> list[dict]:
        return [{"role": "system", "content": MATH_SYSTEM}, {"role": "user", "content": example["problem"]}]

    def typed(self, text: str) -> dict:
        """`What is ...? #### \\frac{1}{2}` as a problem."""
        problem, _, answer = (part.strip() for part in text.rpartition("####"))
        example = self.example(problem, answer, f"\\boxed{{{answer}}}") if problem else None
        if not example:
            raise ValueError("write the problem, #### and its answer in LaTeX")
        return example

    def reward(self, text: str, example: dict) -> dict:
        parts = math_reward(text, example)
        return parts | {"reward": parts["correct"] + self.format_weight * parts["format"]}
