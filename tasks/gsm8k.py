"""GSM8K: grade-school word problems whose answer is a number."""

import random
import re
from fractions import Fraction
from pathlib import Path

from tasks.data import load_rows, read_template, usable, without
from tasks.foreign import shortened
from tasks.tags import MAX_CHARACTERS

NUMBER = r"(?:[-+]?\$?|\$[-+])(?:[0-9]{1,3}(?:,[0-9]{3}){1,4}|[0-9]{1,15})(?:\.[0-9]{1,15})?"
NEARLY = re.compile(rf"final(?: answer)?:[ \t]*(?P<number>{NUMBER})(?:[ \t]?[a-z%]{{1,20}}){{0,3}}", re.IGNORECASE)
FINAL_LINE = re.compile(rf"^[ \t]*Final:[ \t]*(?P<number>{NUMBER})[ \t]*$", re.MULTILINE)
GSM8K_SYSTEM = (
    "Solve the problem with brief reasoning. End with one line that has only the word Final, a colon and the number: "
    "Final: 42"
)

TEMPLATES = {"plain": "Question: {question}\nReason briefly. The last line is Final: and the number.\nAnswer:"}
COMPUTED = re.compile("<<[^<>]*>>")  # what the data set has for a calculator


def plain_number(text: str) -> Fraction:
    """The value of a number as people write it: `$1,450.50`, `-$3`."""
    return Fraction(text.replace("$", "").replace(",", "").replace("+", ""))


def gsm8k_reward(text: str, example: dict) -> dict:
    """1 for the right number in the right form, 0.1 for the right form alone, else 0.

    The form is one line `Final: <number>` at the very end, and no other such line. `near_miss` is 1 where the number is
    right and the form nearly so (docs/answers.md).
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
        "near_miss": float(not found and is_near_miss(text, example["target"])),
    }


def is_near_miss(text: str, target: Fraction) -> bool:
    """Whether the last line is of the form but for bold type, a box, a full stop, a unit, or the sign of its minus."""
    line = text.rpartition("\n")[2][-200:].replace("\u2212", "-").replace("*", "").replace("\\boxed", "")
    found = NEARLY.fullmatch(line.translate({ord(bracket): None for bracket in "{}"}).strip(" \t.!"))
    return found is not None and plain_number(found["number"]) == target


class GSM8K:
    """Grade-school word problems with a number as the answer.

    Args:
        dataset: rows with `question` and `answer`, which ends in `#### 42`: a name on the Hub, a local folder with the
            splits train and test, or a file, of which the last `eval_size` rows (one in ten, if that is 0) are for the
            evaluation and the others for training. Rows whose gold answer is no number are left out, and so are
            questions that are there twice, or in training and in the evaluation.
        train_size, eval_size: use only the first so many rows of a split; 0 for all.
        prompt_template: `chat` (messages), `plain` (text, for a base model), or text of your own or a file of it, with
            {question}.
    """

    def __init__(
        self, dataset: str = "openai/gsm8k", train_size: int = 0, eval_size: int = 0, prompt_template: str = "chat"
    ):
        self.template = (
            None if prompt_template == "chat" else read_template(prompt_template, TEMPLATES, ("{question}",))
        )
        if min(train_size, eval_size) < 0:
            raise ValueError(f"train_size is {train_size} and eval_size {eval_size}, they must be 0 (for all) or more")
        columns = ["question", "answer"]
        if Path(dataset).is_file():
            examples = without(gsm8k_examples(load_rows(dataset, "train", columns), dataset), [], question)
            size = eval_size or max(1, len(examples) // 10)
            if len(examples) <= size:
                raise ValueError(f"{dataset!r} has {len(examples)} problems, too few to hold out eval_size = {size}")
            train, test = examples[:-size], examples[-size:]
        else:
            subset = "main" if dataset == "openai/gsm8k" and not Path(dataset).exists() else None
            train, test = (
                gsm8k_examples(load_rows(dataset, split, columns, subset), f"{dataset}, {split}")
                for split in ("train", "test")
            )
            test = without(test, [], question)
        self.held_out = test[: eval_size or None]
        self.examples = without(train, test, question)[: train_size or None]
        if not self.examples:
            raise ValueError(f"{dataset!r} has no problem that is not in its evaluation")

    def train(self, rng: random.Random, step: int) -> dict:
        return rng.choice(self.examples)

    def eval(self) -> list[dict]:
        return self.held_out

    def prompt(self, example: dict) -> str | list[dict]:
        if self.template:
            return self.template.replace("{question}", example["question"])
        return [{"role": "system", "content": GSM8K_SYSTEM}, {"role": "user", "content": example["question"]}]

    def demonstration(self, rng: random.Random) -> tuple[dict, str]:
        """A training problem with the data set's own solution, in the form that is paid."""
        example = rng.choice(self.examples)
        steps = COMPUTED.sub("", example["solution"])
        return example, f"{' ' if self.template else ''}{steps}\nFinal: {example['number']}"

    def typed(self, text: str) -> dict:
        """`How many ...? #### 42` as a problem, as the data set writes it."""
        return gsm8k_example({"question": text.rpartition("####")[0].strip(), "answer": text})

    def reward(self, text: str, example: dict) -> dict:
        return gsm8k_reward(text, example)


def question(example: dict) -> str:
    """What makes two problems the same."""
    return " ".join(example["question"].lower().split())


def gsm8k_examples(rows, dataset: str) -> list[dict]:
    def is_usable(row: dict) -> bool:
        try:
            return bool(gsm8k_example(row))
        except ValueError:
            return False

    kept = usable(rows, dataset, is_usable, "their answers have no number behind ####")
    return [gsm8k_example(row) for row in rows.select(kept)]


def gsm8k_example(row: dict) -> dict:
    """Raises ValueError if the row's answer has no number behind `####`: it would be paid for nothing, or never."""
    if not isinstance(row["question"], str) or not isinstance(row["answer"], str):
        raise ValueError(f"question and answer must be text, not {shortened(row)}")
    number = row["answer"].rpartition("####")[2].strip()
    if not re.fullmatch(NUMBER, number):
        raise ValueError(f"no number behind #### in the answer of {row['question'][:80]!r}: {row['answer'][-80:]!r}")
    solution = row["answer"].rpartition("####")[0].strip()
    return {"question": row["question"], "target": plain_number(number), "number": number, "solution": solution}
