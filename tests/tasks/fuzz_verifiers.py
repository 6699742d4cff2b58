"""Attacks the verifiers with random answers, and compares each verdict with an independent judge.

    python tests/tasks/fuzz_verifiers.py                  200,000 answers for each of three verifiers, 2 minutes
    python tests/tasks/fuzz_verifiers.py --answers 3000   less

No answer may raise, be judged otherwise than by the judge, or take long: 99.9 % must take under 3 ms of CPU time and
none over 50 ms. Ends with 1 otherwise.
"""

import argparse
import gc
import random
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]

import fuzz_math  # noqa: E402

from tasks.competition_math import math_example, math_reward  # noqa: E402
from tasks.countdown import countdown_reward  # noqa: E402
from tasks.gsm8k import gsm8k_reward  # noqa: E402

JUNK = ["**", "//", "_", ".5", "e3", "0x1F", "٣", "３", "×", "÷", "−", "=", "#", "\\", "__import__('os')", "\x00", "½"]
JUNK += ["²", ",", "()", "<answer>", "</answer>", "<think>", "</think>", "1if", "lambda:", "\u200b", "\n", "\r", "NaN"]


def judge_equation(text: str) -> tuple[Fraction, Counter] | None:
    """Value and numbers of an equation, by precedence climbing over single characters; None if it is none.

    Shares nothing with the verifier: no `ast`, no regular expression, its own rules of what a number is.
    """
    if not 0 < len(text) <= 200 or any(c not in "0123456789+-*/() \t\n" for c in text):
        return None
    numbers, position = Counter(), 0

    def peek() -> str:
        nonlocal position
        while position < len(text) and text[position] in " \t\n":
            position += 1
        return text[position] if position < len(text) else ""

    def climb(lowest: int) -> Fraction:
        nonlocal position
        left = atom()
        while True:
            operator = peek()
            level = {"+": 1, "-": 1, "*": 2, "/": 2}.get(operator, 0)
            if not level or level < lowest:
                return left
            position += 1
            if operator in "*/" and text[position : position + 1] == operator:
                raise ValueError("no ** and no //")
            right = climb(level + 1)
            left = {"+": left.__add__, "-": left.__sub__, "*": left.__mul__, "/": left.__truediv__}[operator](right)

    def atom() -> Fraction:
        nonlocal position
        first = peek()
        if first == "-":
            position += 1
            return -atom()
        if first == "(":
            position += 1
            inside = climb(1)
            if peek() != ")":
                raise ValueError("parenthesis")
            position += 1
            return inside
        start = position
        while position < len(text) and text[position] in "0123456789":
            position += 1
        digits = text[start:position]
        if not digits or (digits[0] == "0" and digits.strip("0")):
            raise ValueError("no number")
        numbers[int(digits)] += 1
        return Fraction(int(digits))

    try:
        value = climb(1)
        if peek():
            return None
        return value, numbers
    except (ValueError, ZeroDivisionError):
        return None


def judge_countdown(text: str, example: dict) -> float:
    if len(text) > 200_000:
        return 0.0
    tail = text.split("</think>")[-1]
    if "<think>" in tail or tail.count("<answer>") != 1 or tail.count("</answer>") != 1:
        return 0.0
    if tail.index("<answer>") > tail.index("</answer>"):
        return 0.0
    inside = tail.split("<answer>")[1].split("</answer>")[0]
    found = judge_equation(inside)
    right = found is not None and found[0] == example["target"] and found[1] == Counter(example["nums"])
    return float(right)


def judge_gsm8k(text: str, example: dict) -> float:
    """1, 0.1 or 0, reading the last line by hand."""
    if len(text) > 200_000:
        return 0.0
    lines = text.rstrip().split("\n")
    if sum(is_final(line) is not None for line in lines) != 1 or (number := is_final(lines[-1])) is None:
        return 0.0
    return 1.0 if number == example["target"] else 0.1


def is_final(line: str) -> Fraction | None:
    line = line.strip(" \t")
    if not line.startswith("Final:"):
        return None
    number = line[6:].strip(" \t")
    signs = [c for c in number if c in "+-$"]
    if signs.count("$") > 1 or len(signs) - signs.count("$") > 1 or not number.startswith("".join(signs)):
        return None
    sign, number = -1 if "-" in signs else 1, number[len(signs) :]
    whole, dot, decimals = number.partition(".")
    if dot and not (decimals.isascii() and decimals.isdigit() and len(decimals) <= 15):
        return None
    groups = whole.split(",")
    if any(not (g.isascii() and g.isdigit()) for g in groups):
        return None
    if len(groups) > 1 and not (len(groups) <= 5 and 1 <= len(groups[0]) <= 3 and all(len(g) == 3 for g in groups[1:])):
        return None
    if len(groups) == 1 and len(whole) > 15:
        return None
    return sign * (Fraction(int("".join(groups))) + (Fraction(int(decimals), 10 ** len(decimals)) if decimals else 0))


def random_equation(rng: random.Random, numbers: list[int]) -> str:
    parts = [str(n) for n in numbers]
    rng.shuffle(parts)
    while len(parts) > 1:
        i = rng.randrange(len(parts) - 1)
        joined = f"{parts[i]}{rng.choice(['+', '-', '*', '/', ' + ', ' - ', ' * ', ' / '])}{parts[i + 1]}"
        parts[i : i + 2] = [f"({joined})" if rng.random() < 0.5 else joined]
    return ("-" if rng.random() < 0.05 else "") + parts[0]


def mutate(rng: random.Random, text: str) -> str:
    for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
        at = rng.randrange(len(text) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            text = text[:at] + rng.choice(JUNK) + text[at:]
        elif kind == 1:
            text = text[:at] + rng.choice("0123456789+-*/() ") + text[at:]
        elif kind == 2:
            text = text[:at] + text[at + 1 :]
        elif kind == 3:
            text = text[:at] + text[at:] * rng.randrange(1, 4)
        elif kind == 4:  # whatever a pattern may repeat
            end = at + rng.choice([1, 2, 4, 4, 8])
            text = text[:at] + text[at:end] * rng.choice([2, 3, 6, 40, 1500]) + text[end:]
        else:
            text = text[:at] + rng.choice(["(", ")", "-", "9", " ", "**9"]) * rng.choice([5, 150, 1000]) + text[at:]
    return text if rng.random() > 0.001 else text * 10_000


def countdown_case(rng: random.Random) -> tuple[str, dict]:
    """A problem, and an answer that is often right and often nearly so."""
    numbers = [rng.randrange(1, 100) for _ in range(rng.choice([3, 4]))]
    equation = random_equation(rng, numbers)
    found = judge_equation(equation)
    target = found[0] if found and found[0].denominator == 1 and rng.random() < 0.8 else Fraction(rng.randrange(100))
    equation = mutate(rng, equation)
    thought = rng.choice(["", "so\n", mutate(rng, "<answer>1+2</answer>")])
    text = f"<think>{thought}</think>\n<answer>{equation}</answer>"
    if rng.random() < 0.2:
        text = mutate(rng, text)
    return text, {"nums": numbers, "target": int(target)}


def gsm8k_case(rng: random.Random) -> tuple[str, dict]:
    target = Fraction(rng.randrange(-5000, 1_000_000), rng.choice([1, 1, 1, 2, 4, 10]))
    number = float(target)
    written = rng.choice([f"{number}", f"{number:,}", f"${number:,}", str(int(number)), f"{int(number):,}"])
    end = rng.choice(["", "", "\n", " ", ".", "\nFinal: 3"])
    text = f"some reasoning 5 + 5 = {rng.randrange(100)}\nFinal: {written}{end}"
    return (mutate(rng, text) if rng.random() < 0.5 else text), {"target": target}


def math_case(rng: random.Random) -> tuple[str, dict]:
    gold, answer, paid = fuzz_math.case(rng)
    return f"<think>so</think><answer>{answer}</answer>", math_example("P", gold) | {"paid": paid}


# verifier: how a case is made, what is paid, and what is to be paid; None where a verdict of any kind will do
VERIFIERS = {
    "countdown": (countdown_case, lambda text, e: countdown_reward(text, e)["correct"], judge_countdown),
    "gsm8k": (gsm8k_case, lambda text, e: gsm8k_reward(text, e)["reward"], judge_gsm8k),
    "math": (math_case, lambda text, e: math_reward(text, e)["correct"], lambda text, e: e["paid"]),
}


def fuzz(verifier: str, answers: int, seed: int = 0) -> dict:
    """Counts, and the slowest answers; raises whatever a verifier raises."""
    make, reward, judge = VERIFIERS[verifier]
    rng, seconds, wrong, right = random.Random(seed), [], [], 0
    for _ in range(answers):
        text, example = make(rng)
        started = time.process_time_ns()
        found = reward(text, example)
        seconds.append(((time.process_time_ns() - started) / 1e9, len(text), text[:300]))
        expected = judge(text, example)
        right += expected == 1
        if expected is not None and found != expected:
            wrong.append((found, expected, text[:300], example))
    seconds.sort(reverse=True)
    return {"right ones": right, "wrongly judged": wrong, "slowest": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=200_000, help="for each verifier")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed = False
    gc.disable()  # a collection would count as an answer's time
    for verifier in VERIFIERS:
        result = fuzz(verifier, options.answers, options.seed)
        slowest, slow = result["slowest"][0], result["slowest"][options.answers // 1000][0]
        wrong = result["wrongly judged"]
        print(f"{verifier}: {options.answers} answers, {result['right ones']} right, {len(wrong)} wrongly judged")
        print(f"  CPU time: 99.9 % within {1000 * slow:.2f} ms, the slowest {1000 * slowest[0]:.2f} ms,")
        print(f"  of {slowest[1]} characters: {slowest[2][:80]!r}")
        for found, expected, text, example in wrong[:5]:
            print(f"  paid {found}, the judge says {expected}: {text!r} {example}")
        failed |= bool(wrong) or slow > 3e-3 or slowest[0] > 50e-3
    sys.exit(failed)


if __name__ == "__main__":
    main()
