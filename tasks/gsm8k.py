"""GSM8K: grade-school word problems whose answer is a number."""

import itertools
import random
import re
from fractions import Fraction
from pathlib import Path

from tasks.data import load_rows
from tasks.tags import MAX_CHARACTERS

NUMBER = r"(?:[-+]?\$?|\$[-+])(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,15})(?:\.[0-9]{1,15})?"
FINAL_LINE = re.compile(rf"^[ \t]*Final:[ \t]*(?P<number>{NUMBER})[ \t]*$", re.MULTILINE)
GSM8K_SYSTEM = (
    "Solve the problem with brief reasoning. End with one line that has only the word Final, a colon and the number: "
    "Final: 42"
)


def plain_number(text: str) -> Fraction:
    """The value of a number as people write it: `$1,450.50`, `-$3`."""
    return Fraction(text.replace("$", "").replace(",", "").replace("+", ""))


def gsm8k_reward(text: str, example: dict) -> dict:
    """1 for the right number in the right form, 0.1 for the right form alone, else 0.

    The form is one line `Final: <number>` at the very end, and no other such line.
    """
    text = text.rstrip() if len(text) <= MAX_CHARACTERS else ""
    found = list(FINAL_LINE.finditer(text))
    well_formed = len(found) == 1 and found[0].end() == len(text)
    prediction = plain_number(found[0]["number"]) if well_formed else None
    correct = prediction is not None and prediction == example["target"]
    return {
        "reward": 1.0 if correct else 0.1 * well_formed,
        "correct": float(correct),
        "format": float(well_formed),
        "prediction": found[0]["number"] if well_formed else None,
        "ground_truth": str(example["target"]),
    }


class GSM8K:
    """Grade-school word problems with a number as the answer.

    Args:
        dataset: rows with `question` and `answer`, which ends in `#### 42`: a name on the Hub, a local folder with the
            splits train and test, or a file, of which the last `eval_size` rows (one in ten, if that is 0) are for the
            evaluation and the others for training.
        train_size, eval_size: use only the first so many rows of a split; 0 for all.
    """

    def __init__(self, dataset: str = "openai/gsm8k", train_size: int = 0, eval_size: int = 0):
        if min(train_size, eval_size) < 0:
            raise ValueError(f"train_size is {train_size} and eval_size {eval_size}, they must be 0 (for all) or more")
        columns = ["question", "answer"]
        if Path(dataset).is_file():
            rows = load_rows(dataset, "train", columns)
            size = eval_size or max(1, len(rows) // 10)
            if len(rows) <= size:
                raise ValueError(f"{dataset!r} has {len(rows)} rows, too few to hold out eval_size = {size}")
            train, test = rows.select(range(len(rows) - size)), rows.select(range(len(rows) - size, len(rows)))
        else:
            subset = "main" if dataset == "openai/gsm8k" and not Path(dataset).exists() else None
            train, test = (load_rows(dataset, split, columns, subset) for split in ("train", "test"))
        self.examples = [gsm8k_example(row) for row in itertools.islice(train, train_size or None)]
        self.held_out = [gsm8k_example(row) for row in itertools.islice(test, eval_size or None)]

    def train(self, rng: random.Random, step: int) -> dict:
        return rng.choice(self.examples)

    def eval(self) -> list[dict]:
        return self.held_out

    def prompt(self, example: dict) -> list[dict]:
        return [{"role": "system", "content": GSM8K_SYSTEM}, {"role": "user", "content": example["question"]}]

    def typed(self, text: str) -> dict:
        """`How many ...? #### 42` as a problem, as the data set writes it."""
        return gsm8k_example({"question": text.rpartition("####")[0].strip(), "answer": text})

    def reward(self, text: str, example: dict) -> dict:
        return gsm8k_reward(text, example)


def gsm8k_example(row: dict) -> dict:
    """Raises ValueError if the row's answer has no number behind `####`: it would be paid for nothing, or never."""
    number = row["answer"].rpartition("####")[2].strip()
    if not re.fullmatch(NUMBER, number):
        raise ValueError(f"no number behind #### in the answer of {row['question'][:80]!r}: {row['answer'][-80:]!r}")
    return {"question": row["question"], "target": plain_number(number)}
