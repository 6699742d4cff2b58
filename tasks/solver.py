"""Worked Countdown problems: a search that is written down, with its dead ends, and a check at the end."""

import random
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple


class Value(NamedTuple):
    """A number and the expression that gives it; by the last operator, one knows where that needs parentheses."""

    number: int
    text: str
    operator: str = ""  # the last one; none for a given number


def combined(a: Value, operator: str, b: Value) -> Value | None:
    """The value of `a operator b`, or None where it is no whole number from 0."""
    if operator == "/" and (b.number == 0 or a.number % b.number):
        return None
    number = {
        "+": a.number + b.number,
        "-": a.number - b.number,
        "*": a.number * b.number,
        "/": a.number // max(1, b.number),
    }[operator]
    if number < 0:
        return None
    loose = ("+", "-") if operator in "*/" else ()
    left = f"({a.text})" if a.operator in loose else a.text
    also = ("*", "/") if operator == "/" else ("+", "-") if operator == "-" else ()
    right = f"({b.text})" if b.operator in (*loose, *also) else b.text
    return Value(number, f"{left} {operator} {right}", operator)


def searches(rng: random.Random, values: list[Value], steps: tuple = ()) -> Iterator[tuple[Value, tuple[str, ...]]]:
    """Every way to combine all the values, in random order: what it comes to, and its steps, `25 - 7 = 18`."""
    if len(values) == 1:
        yield values[0], steps
        return
    n = range(len(values))
    moves = [(i, j, operator) for i in n for j in n if i != j for operator in "+-*/" if i < j or operator in "-/"]
    for i, j, operator in rng.sample(moves, len(moves)):
        a, b = values[i], values[j]
        if (made := combined(a, operator, b)) is not None:
            rest = [value for k, value in enumerate(values) if k not in (i, j)]
            step = f"{a.number} {operator} {b.number} = {made.number}"
            yield from searches(rng, [*rest, made], (*steps, step))


def worked_solution(rng: random.Random, nums: list[int], target: int, dead_ends: int = 3) -> tuple[str, str] | None:
    """What one would think, with up to `dead_ends` ways that fail before the one that does not; and the equation.

    None where none of the first 50,000 ways leads to the target: only whole numbers from 0 are tried.
    """
    values = [Value(n, str(n)) for n in nums]
    ways = islice(searches(rng, values), 50_000)
    found = next(((made, steps) for made, steps in ways if made.number == target), None)
    if found is None:
        return None
    tried = []
    for _ in range(rng.randint(0, dead_ends)):
        made, steps = next(searches(rng, values))
        if made.number != target and steps not in tried:
            tried.append(steps)
    made, steps = found
    lines = [f"{', '.join(failed)}, no." for failed in tried]
    return "\n".join([*lines, f"{', '.join(steps)}, yes.", f"So {made.text} = {target}."]), made.text
