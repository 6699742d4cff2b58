"""The tasks for language models that grpo.py knows by name: countdown, gsm8k, math.

Each is a class with the four methods that section 1 of grpo.py describes, and a verifier: a function that pays for a
text. A verifier is attacked by what it trains. It does bounded work, never raises, and never runs what it reads.
"""

import ast
import itertools
import random
import re
import zlib
from collections import Counter
from fractions import Fraction
from pathlib import Path


def load_rows(dataset: str, split: str, columns: list[str], subset: str | None = None):
    """The rows of a data set, as a `datasets.Dataset`.

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
            f"the data set {dataset!r} (split {split}) cannot be loaded: {(str(error) or repr(error)).splitlines()[0]} "
            "Give a name on the Hugging Face Hub, or a local folder or JSON or Parquet file"
        ) from error
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        found = ", ".join(rows.column_names)
        raise ValueError(f"the data set {dataset!r} has no column {', '.join(missing)}; it has {found}")
    return rows


MAX_CHARACTERS = 200_000  # some 50,000 tokens; a longer text is judged as an empty one, so that no text takes long


def final_part(text: str) -> str | None:
    """What follows the last `</think>`; None if thinking was begun, also by a prefill, and not ended."""
    after = text.rpartition("</think>")[2]
    return None if "<think>" in after else after


def answer_block(text: str) -> str | None:
    """The inside of the one `<answer>` block behind the thinking; None if there is none, or more than one."""
    part = final_part(text)
    if part is None or part.count("<answer>") != 1 or part.count("</answer>") != 1:
        return None
    match = re.search("<answer>(.*)</answer>", part, re.DOTALL)
    return match[1] if match else None


def is_think_then_answer(text: str) -> bool:
    """Whether the text ends in one `<think>...</think>` and, but for white space, one `<answer>...</answer>` behind it.

    By counting and cutting, in linear time: a pattern with several `.*` could be kept busy for minutes.
    """
    tags = [text.count(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")]
    before, _, after = text.partition("</think>")
    inside = after.strip()
    is_whole = inside.startswith("<answer>") and inside.endswith("</answer>")
    return tags[:2] == [1, 1] and "<think>" in before and is_whole and answer_block(text) is not None


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
    ):
        self.equation_weight, self.format_weight, self.format_gates = equation_weight, format_weight, format_gates
        self.is_chat = prompt_template == "r1"
        self.prefill = R1_PREFILL if self.is_chat else ""
        self.template = read_template(prompt_template, TEMPLATES, ("{nums}", "{target}"))
        if eval_size < 1:
            raise ValueError(f"eval_size is {eval_size}, it must be 1 or more")
        if dataset == "synthetic":
            self.rows, rng = None, random.Random(42)
            self.held_out = [countdown_problem(rng, for_eval=True) for _ in range(eval_size)]
            return
        rows = load_rows(dataset, "train", ["nums", "target"])
        if len(rows) <= eval_size:
            raise ValueError(f"{dataset!r} has {len(rows)} rows, too few to hold out eval_size = {eval_size}")
        if not all(type(n) is int for n in [*rows[0]["nums"], rows[0]["target"]]):
            raise ValueError(f"{dataset!r}: nums and target must be whole numbers, and the first row is {rows[0]}")
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
        return self.rows[rng.randrange(len(self.rows))] if self.rows else countdown_problem(rng, for_eval=False)

    def eval(self) -> list[dict]:
        return self.held_out

    def prompt(self, example: dict) -> str | list[dict]:
        text = self.template.replace("{nums}", str(example["nums"])).replace("{target}", str(example["target"]))
        if not self.is_chat:
            return text
        return [{"role": "system", "content": R1_SYSTEM}, {"role": "user", "content": text}]

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


def read_template(name: str, known: dict[str, str], fields: tuple[str, ...]) -> str:
    """A prompt's text: a known one by its name, a file's, or `name` itself; it must have all the fields."""
    text = known.get(name)
    if text is None:
        is_file = len(name) < 1000 and Path(name).is_file()
        text = Path(name).read_text() if is_file else name
        missing = [field for field in fields if field not in text]
        if missing:
            raise ValueError(
                f"prompt_template {name[:80]!r} has no {' and no '.join(missing)}; "
                f"give {', '.join(known)}, or text or a file with {' and '.join(fields)}"
            )
    return text


def countdown_problem(rng: random.Random, for_eval: bool) -> dict:
    """Three or four numbers from 1 to 99 and a whole target from 10 to 100 that some equation of all of them equals.

    One problem in twenty, by its numbers and target, is for the evaluation, the others are for training.
    """
    while True:
        nums = [rng.randint(1, 99) for _ in range(rng.choice((3, 4)))]
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


# ==== GSM8K ===========================================================================================================

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


# ==== MATH ============================================================================================================

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
        self.rows = rows.filter(lambda level: level in wanted, input_columns="level")
        if not len(self.rows):
            found = ", ".join(sorted(set(rows["level"])))
            raise ValueError(f"levels {list(levels)}: {dataset!r} has no such problem; its levels are {found}")
        tests = load_rows(eval_dataset, "test", ["problem", "answer"])
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
