"""Reasoning-gym: over a hundred kinds of problems that a program makes and another one judges (arXiv 2505.24760)."""

import random
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec

import numpy

from tasks.foreign import in_a_line
from tasks.names import near
from tasks.tags import MAX_CHARACTERS, answer_block

SYSTEM = "Answer the question. Think first if you want to, and end with the answer alone, in <answer> and </answer>."
FAR = 10**9  # problems of the evaluation have these numbers and more, those of the training lower ones
TRIES = 1000  # until a problem is drawn that the evaluation does not have


def known_names() -> dict[str, set[str]]:
    """The library's data sets, and their settings.

    Raises:
        ValueError: it is not installed.
    """
    if not find_spec("reasoning_gym"):
        raise ValueError("it needs the package reasoning-gym: pip install reasoning-gym")
    known = import_module("reasoning_gym.factory").DATASETS
    known = {name: config for name, (_, config) in known.items() if name != "composite"}  # which is made of others
    return {name: {field.name for field in fields(config)} - {"seed", "size"} for name, config in known.items()}


class Source:
    """One data set of the library: problems by their numbers, each always the same."""

    def __init__(self, name: str, config: dict):
        known = known_names()
        if name not in known:
            hint = near(name, known) or ";"
            raise ValueError(f"reasoning-gym has no {name!r}{hint} it has {', '.join(sorted(known))}")
        if unknown := sorted(config.keys() - known[name]):
            raise ValueError(f"{name} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known[name]))}")
        self.name, self.config, self.create = name, config, import_module("reasoning_gym").create_dataset
        try:
            self.dataset = self.create(name, seed=0, size=1, **config)
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(f"{name} does not take {config}: {in_a_line(error)}") from error
        try:  # most make a problem from its number; some make or read all of them at the start, here one
            self.is_endless = len({self.dataset[FAR + i]["question"] for i in range(4)}) > 1
        except (IndexError, KeyError):
            self.is_endless = False

    def problem(self, number: int) -> dict:
        with seeded(number):
            item = self.dataset[number] if self.is_endless else self.renewed(number)[0]
        return {"dataset": self.name, "question": item["question"], "answer": item["answer"], "entry": dict(item)}

    def renewed(self, seed: int):
        return self.create(self.name, seed=seed, size=1, **self.config)


@contextmanager
def seeded(seed: int):
    """Some of the library's data sets draw from Python's or numpy's own random numbers."""
    states = random.getstate(), numpy.random.get_state()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


class ReasoningGym:
    """Problems of reasoning-gym, judged by its own verifiers.

    Args:
        name: of one of its data sets, such as chain_sum; or several with their weights, {"chain_sum": 2, "gcd": 1}.
        config: settings of the data set, such as {"max_terms": 3}; of several, by their names.
        eval_size: problems of the evaluation. None of them is in the training.
        partial: whether an answer that is partly right is paid in part, as the library's verifiers do. Most of them pay
            a right answer with something around it by its share of the text, which a policy may learn to exploit.
        system_prompt: the system message.
    """

    def __init__(
        self, name: str | dict[str, float], config: dict | None = None, eval_size: int = 64, partial: bool = True,
        system_prompt: str = SYSTEM,
    ):  # fmt: skip
        self.weights = name if isinstance(name, dict) else {name: 1.0}
        config = config or {}
        configs = config if isinstance(name, dict) else {name: config}
        if not self.weights or not all(isinstance(w, int | float) and w > 0 for w in self.weights.values()):
            raise ValueError(f"name is {name!r}: one data set, or several with weights above 0")
        if unknown := sorted(configs.keys() - self.weights.keys()):
            raise ValueError(f"config has {', '.join(unknown)}: with several data sets, it has their settings by name")
        if eval_size < 1:
            raise ValueError(f"eval_size is {eval_size}: 1 or more")
        self.partial, self.system_prompt = partial, system_prompt
        self.sources = {key: Source(key, configs.get(key, {})) for key in self.weights}
        self.held_out = [self.draw(random.Random(f"reasoning_gym/{i}"), FAR) for i in range(eval_size)]
        self.taken = {example["question"] for example in self.held_out}

    def draw(self, rng: random.Random, first: int = 0) -> dict:
        name = rng.choices(list(self.weights), list(self.weights.values()))[0]
        return self.sources[name].problem(first + rng.randrange(FAR))

    def train(self, rng: random.Random, step: int) -> dict:
        for _ in range(TRIES):
            if (example := self.draw(rng))["question"] not in self.taken:
                return example
        raise ValueError(f"all of {TRIES} problems are in the evaluation: a lower eval_size, or harder problems")

    def eval(self) -> list[dict]:
        return self.held_out

    def prompt(self, example: dict) -> list[dict]:
        return [{"role": "system", "content": self.system_prompt}, {"role": "user", "content": example["question"]}]

    def demonstration(self, rng: random.Random) -> tuple[dict, str]:
        example = self.train(rng, 0)
        return example, f"<answer>{example['answer']}</answer>"

    def reward(self, text: str, example: dict) -> dict:
        answer = answer_block(text) if len(text) <= MAX_CHARACTERS else None
        score, failed = 0.0, 0.0
        if answer is not None:
            try:
                score = float(self.sources[example["dataset"]].dataset.score_answer(answer.strip(), example["entry"]))
            except Exception:  # verifiers of many authors, given anything
                failed = 1.0
        right = float(score >= 1)
        return {
            "reward": min(max(score, 0.0), 1.0) if self.partial else right,
            "correct": right,
            "format": float(answer is not None),
            "prediction": None if answer is None else answer.strip()[:200],
            "ground_truth": str(example["answer"])[:200],
            "verifier_failed": failed,
        }
