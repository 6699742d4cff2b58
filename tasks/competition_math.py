"""MATH: competition mathematics with answers in LaTeX, compared by their form (docs/answers.md)."""

import random
from functools import cache

from tasks.data import load_rows, read_template, usable
from tasks.forms import Reading, same
from tasks.latex import read
from tasks.tags import MAX_CHARACTERS, answer_block, is_think_then_answer

MATH_SYSTEM = (
    "Think about the problem inside <think> and </think>. Then give the final result in LaTeX inside <answer> and "
    "</answer>, for example <answer>$\\frac{1}{2}$</answer>."
)
TEMPLATES = {
    "plain": "Problem: {problem}\nThink inside <think> and </think>, then give the result in LaTeX inside <answer> and "
    "</answer>.\nSolution:"
}


@cache
def read_gold(answer: str) -> list[Reading]:
    return read(answer)


def math_reward(text: str, example: dict) -> dict:
    """`correct` if the answer has the form of the gold one; `format` for `<think>...</think><answer>...</answer>`.

    `reward` is their sum; the task weighs them as it was told. `unread` is 1 for an answer that was not understood.
    """
    text = text if len(text) <= MAX_CHARACTERS else ""
    answer = answer_block(text)
    found = read(answer) if answer is not None else []
    correct = same(read_gold(example["answer"]), found)
    form = text.lstrip().startswith("<think>") and is_think_then_answer(text)
    return {
        "reward": float(correct) + form,
        "correct": float(correct),
        "format": float(form),
        "prediction": None if answer is None else answer.strip()[:200],
        "ground_truth": example["answer"],
        "unread": float(answer is not None and not found),
    }


def last_boxed(text: str) -> str | None:
    """The inside of the last `\\boxed{...}` with its braces balanced; None if there is none."""
    start = text.rfind("\\boxed{")
    depth = 0
    for i in range(start + len("\\boxed"), len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : i]
    return None


class Math:
    """Competition mathematics, judged by the form of the answer.

    Args:
        dataset: training rows with `problem`, `solution` (with its result in \\boxed{}) and `level`.
        eval_dataset: evaluation rows with `problem` and `answer`; split `test`.
        levels: those to train on, 1 to 5.
        format_weight: what the right form is paid, beside 1 for the right answer.
        eval_size: use only the first so many evaluation rows; 0 for all.
        prompt_template: `chat` (messages), `plain` (text, for a base model), or text of your own or a file of it, with
            {problem}.
    """

    def __init__(
        self,
        dataset: str = "DigitalLearningGmbH/MATH-lighteval",
        eval_dataset: str = "HuggingFaceH4/MATH-500",
        levels: tuple[int, ...] | list[int] = (1, 2, 3, 4, 5),
        format_weight: float = 0.1,
        eval_size: int = 0,
        prompt_template: str = "chat",
    ):
        self.template = None if prompt_template == "chat" else read_template(prompt_template, TEMPLATES, ("{problem}",))
        if eval_size < 0:
            raise ValueError(f"eval_size is {eval_size}, it must be 0 (for all) or more")
        self.format_weight = format_weight
        wanted = {f"Level {level}" for level in levels}
        rows = load_rows(dataset, "train", ["problem", "solution", "level"])
        tests = load_rows(eval_dataset, "test", ["problem", "answer"])
        found = rows["level"]
        of_levels = [i for i, level in enumerate(found) if level in wanted]
        if not of_levels:
            known = ", ".join(sorted(set(map(str, found))))
            raise ValueError(f"levels {list(levels)}: {dataset!r} has no such problem; its levels are {known}")
        why = "their gold answers cannot be read as a whole"
        tests = tests.select(usable(tests, eval_dataset, lambda row: is_readable(row["problem"], row["answer"]), why))
        held_out = set(tests["problem"])
        rows = rows.select(of_levels)
        rows = rows.select([i for i, problem in enumerate(rows["problem"]) if problem not in held_out])
        if not len(rows):
            raise ValueError(f"{dataset!r} has no problem that is not in {eval_dataset!r}")
        self.rows = rows.select(usable(rows, dataset, lambda row: is_readable(row["problem"], gold_of(row)), why))
        self.held_out = [math_example(row["problem"], row["answer"]) for row in tests][: eval_size or None]

    def train(self, rng: random.Random, step: int) -> dict:
        row = self.rows[rng.randrange(len(self.rows))]
        return math_example(row["problem"], gold_of(row))

    def eval(self) -> list[dict]:
        return self.held_out

    def prompt(self, example: dict) -> str | list[dict]:
        if self.template:
            return self.template.replace("{problem}", example["problem"])
        return [{"role": "system", "content": MATH_SYSTEM}, {"role": "user", "content": example["problem"]}]

    def demonstration(self, rng: random.Random) -> tuple[dict, str]:
        """A training problem with the data set's own solution, in the form that is paid."""
        row = self.rows[rng.randrange(len(self.rows))]
        example = math_example(row["problem"], gold_of(row))
        text = f"<think>{row['solution'].strip()}</think>\n<answer>${example['answer']}$</answer>"
        return example, f"{' ' if self.template else ''}{text}"

    def typed(self, text: str) -> dict:
        """`What is ...? #### \\frac{1}{2}` as a problem."""
        problem, _, answer = (part.strip() for part in text.rpartition("####"))
        if not problem or not is_readable(problem, answer):
            raise ValueError("write the problem, #### and its answer in LaTeX")
        return math_example(problem, answer)

    def reward(self, text: str, example: dict) -> dict:
        parts = math_reward(text, example)
        return parts | {"reward": parts["correct"] + self.format_weight * parts["format"]}


def math_example(problem: str, answer: str) -> dict:
    return {"problem": problem, "answer": answer}


def gold_of(row: dict) -> str:
    """The result of a solution, or nothing."""
    return (last_boxed(row["solution"]) if isinstance(row["solution"], str) else None) or ""


def is_readable(problem, answer) -> bool:
    """Whether there is a problem, and the whole of its gold answer is understood: else wrong ones might be paid."""
    return isinstance(problem, str) and isinstance(answer, str) and bool(answer.strip()) and bool(read_gold(answer))
