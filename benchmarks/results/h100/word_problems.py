"""Word problems of one step, for a small chat model; no download. The task of the run beside this file.

Two forms of an answer. `final`: the last line is `Final: 11`; worked examples, as earlier turns of the chat, show it.
`end`: any text whose last word, or last but one, is the number: `She has 6 + 5 = 11 pens.`; needs no examples.
"""

import random
import re
import zlib

NAMES = ("Tom", "Anna", "Ben", "Lucy", "Max", "Sara", "Leo", "Mia", "Sam", "Eva")
THINGS = ("apples", "books", "coins", "cards", "eggs", "shells", "stamps", "toys", "cups", "keys")
SHOTS = (
    ("Kim has 6 pens and gets 5 more. How many pens does Kim have?", "6 + 5 = 11\nFinal: 11"),
    ("Kim has 9 pens and loses 4. How many pens are left?", "9 - 4 = 5\nFinal: 5"),
    ("Kim buys 3 boxes with 4 pens in each. How many pens does Kim buy?", "3 * 4 = 12\nFinal: 12"),
)
FINAL = re.compile(r"^Final: (-?[0-9]{1,9})$", re.MULTILINE)
END = re.compile(r"(?:^|[\s=$*(])(-?[0-9]{1,9})[.)*]{0,3}(?: [a-z]{1,12}[.!]?)?$")
SUM = re.compile(r"(-?[0-9]{1,9}) ([-+*/]) (-?[0-9]{1,9}) = (-?[0-9]{1,9})")


def word_problem(rng: random.Random) -> dict:
    """One step, small numbers, eight ways to ask."""
    n, m = rng.sample(NAMES, 2)
    t, a, b, c = rng.choice(THINGS), rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 5)
    kinds = (
        (f"{n} has {a} {t} and buys {b} more. How many {t} does {n} have now?", a + b),
        (f"{n} has {a + b} {t} and gives {b} to {m}. How many {t} does {n} have left?", a),
        (f"{n} has {b} bags with {c} {t} in each. How many {t} does {n} have?", b * c),
        (f"{n} has {a} {t}. {m} has {b} more than {n}. How many {t} does {m} have?", a + b),
        (f"{n} has {a + b} {t}. {m} has {b} fewer. How many {t} does {m} have?", a),
        (f"{n} finds {b} {t} a day. How many {t} does {n} find in {c} days?", b * c),
        (f"{n} has {a} {t} and {m} has {b}. How many {t} do they have together?", a + b),
        (f"{n} had {a + b} {t} and lost {b}. How many {t} are left?", a),
    )
    kind = rng.randrange(len(kinds))
    return {"question": kinds[kind][0], "target": kinds[kind][1], "kind": kind}


class WordProblems:
    """Grade-school word problems of one step.

    Args:
        eval_size: problems held out; one question in ten, by a checksum of its text, is never trained on.
        form: `final` or `end`, see above.
        shots: worked examples before the question, 0 to 3; -1 is 3 for `final` and 0 for `end`.
        system: the system message; empty takes the chat template's own.
    """

    def __init__(self, eval_size: int = 200, form: str = "final", shots: int = -1, system: str = "Solve the problem."):
        if form not in ("final", "end"):
            raise ValueError(f"form is {form!r}, it must be final or end")
        self.form, shots = form, shots if shots >= 0 else {"final": 3, "end": 0}[form]
        self.shots = [m for q, a in SHOTS[:shots] for m in (message("user", q), message("assistant", a))]
        self.system = [message("system", system)] if system else []
        rng = random.Random(42)
        self.held_out = [self.draw(rng, for_eval=True) for _ in range(eval_size)]

    def draw(self, rng: random.Random, for_eval: bool) -> dict:
        while True:
            problem = word_problem(rng)
            if (zlib.crc32(problem["question"].encode()) % 10 == 0) == for_eval:
                return problem

    def train(self, rng: random.Random, step: int) -> dict:
        return self.draw(rng, for_eval=False)

    def eval(self) -> list[dict]:
        return self.held_out

    def prompt(self, example: dict) -> list[dict]:
        return [*self.system, *self.shots, message("user", example["question"])]

    def reward(self, text: str, example: dict) -> dict:
        """1 for the right number in the right form, 0.1 for the form alone, else 0."""
        text = text[-2000:].rstrip()
        if self.form == "final":  # one line `Final: 7`, the last one
            found = list(FINAL.finditer(text))
            found = found[0] if len(found) == 1 and found[0].end() == len(text) else None
        else:
            found = END.search(text[-60:])
        form = found is not None
        right = form and int(found[1]) == example["target"]
        sums = [value(*m.groups()[:3]) == int(m[4]) for m in SUM.finditer(text)]
        return {
            "reward": 1.0 if right else 0.1 * form,
            "correct": float(right),
            "format": float(form),
            "prediction": found[1] if form else None,
            "ground_truth": str(example["target"]),
            "true_sum": float(any(sums)),  # shows at least one sum that is true; not paid
        }


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def value(a: str, operator: str, b: str) -> int | None:
    a, b = int(a), int(b)
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b and a % b == 0 else None}[operator]
