"""Arithmetic expressions: generate, evaluate exactly, write as text, parse back, and work out step by step.

A tree is an integer or `Operation(symbol, left, right)`. As text, `(3+4)*5` is worked out as `3+4=7;7*5=35`:
one equation a node, innermost first, left before right, each true by itself.
"""

import random
import re
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Operator(NamedTuple):
    precedence: int
    associative: bool  # a-(b-c) needs its parentheses, a+(b+c) does not
    function: Callable[[int, int], int]


OPERATORS = {
    "+": Operator(1, True, lambda a, b: a + b),
    "-": Operator(1, False, lambda a, b: a - b),
    "*": Operator(2, True, lambda a, b: a * b),
}
MAX_PARSE_LENGTH = 1000  # what a model writes is parsed too: the work has a bound
MAX_PARSE_DEPTH = 50


class Operation(NamedTuple):
    symbol: str
    left: "Tree"
    right: "Tree"


Tree = int | Operation


def evaluate(tree: Tree) -> int:
    """The exact value."""
    if isinstance(tree, int):
        return tree
    return OPERATORS[tree.symbol].function(evaluate(tree.left), evaluate(tree.right))


def equations(tree: Tree) -> Iterator[tuple[str, int]]:
    """The worked steps in order: ("3+4", 7), ("7*5", 35). Yields nothing for a bare number; returns its value."""
    if isinstance(tree, int):
        return tree
    left = yield from equations(tree.left)
    right = yield from equations(tree.right)
    value = OPERATORS[tree.symbol].function(left, right)
    yield f"{left}{tree.symbol}{right}", value
    return value


def steps(tree: Tree) -> list[str]:
    """The worked steps as text: ["3+4=7", "7*5=35"]."""
    return [f"{expression}={value}" for expression, value in equations(tree)]


def largest_value(tree: Tree) -> int:
    """The largest absolute value of any number that is met on the way, the leaves included."""
    if isinstance(tree, int):
        return abs(tree)
    return max(abs(evaluate(tree)), largest_value(tree.left), largest_value(tree.right))


def depth(tree: Tree) -> int:
    """Operators on the longest path from the root to a number; 0 for a number."""
    return 0 if isinstance(tree, int) else 1 + max(depth(tree.left), depth(tree.right))


def render(tree: Tree) -> str:
    """The tree as text, with parentheses only where the tree needs them. `parse` inverts it up to associativity."""
    if isinstance(tree, int):
        return str(tree)
    op = OPERATORS[tree.symbol]

    def operand(child: Tree, is_right: bool) -> str:
        text = render(child)
        if isinstance(child, int):
            return text
        inner = OPERATORS[child.symbol]
        # the right operand of equal precedence keeps its parentheses: parsing is left to right
        looser = inner.precedence < op.precedence or (is_right and inner.precedence == op.precedence)
        return f"({text})" if looser else text

    return operand(tree.left, False) + tree.symbol + operand(tree.right, True)


def parse(text: str) -> Tree:
    """The tree of an expression.

    Raises:
        ValueError: the text is no expression; the message says where.
    """
    if len(text) > MAX_PARSE_LENGTH:
        raise ValueError(f"expression of {len(text)} characters, at most {MAX_PARSE_LENGTH} are parsed")
    tokens = re.findall(r"[0-9]+|\S", text)
    position = 0

    def fail(what: str):
        raise ValueError(f"{what} at symbol {position + 1} of {text!r}")

    def peek() -> str:
        return tokens[position] if position < len(tokens) else ""

    def advance() -> str:
        nonlocal position
        position += 1
        return tokens[position - 1]

    def number_or_group(level: int) -> Tree:
        sign = -1 if peek() == "-" else 1  # a minus in front of digits belongs to the number
        if sign == -1:
            advance()
        if re.fullmatch("[0-9]+", peek()):
            return sign * int(advance())
        if peek() != "(" or sign == -1:
            fail("a number or ( was expected")
        if level > MAX_PARSE_DEPTH:
            fail(f"more than {MAX_PARSE_DEPTH} nested parentheses")
        advance()
        tree = operation(1, level + 1)
        if peek() != ")":
            fail("a ) was expected")
        advance()
        return tree

    def operation(lowest: int, level: int) -> Tree:  # precedence climbing
        tree = number_or_group(level)
        while (op := OPERATORS.get(peek())) and op.precedence >= lowest:
            symbol = advance()
            tree = Operation(symbol, tree, operation(op.precedence + 1, level))
        return tree

    tree = operation(1, 0)
    if position < len(tokens):
        fail(f"unexpected {peek()!r}")
    return tree


def generate(
    rng: random.Random, max_digits: int, max_depth: int, operators: str = "+-*", max_value: int | None = None
) -> Tree:
    """A random tree with at least one operator.

    Args:
        rng: all randomness comes from here.
        max_digits: digits of the numbers in the expression, uniform over the numbers of that many digits or fewer.
        max_depth: operators on the longest path. Below the root, a branch ends early with probability 0.5.
        operators: the symbols to choose from.
        max_value: trees that meet a larger absolute value on the way are drawn again, so that each worked step
            stays a small one.
    """

    def grow(levels: int) -> Tree:
        if levels == 0 or (levels < max_depth and rng.random() < 0.5):
            return int(rng.random() * 10**max_digits)
        symbol = operators[int(rng.random() * len(operators))]
        return Operation(symbol, grow(levels - 1), grow(levels - 1))

    while True:
        tree = grow(max_depth)
        if max_value is None or largest_value(tree) <= max_value:
            return tree


def held_out(tree: Tree) -> bool:
    """Whether this expression belongs to the evaluation: one in twenty, by a checksum of its text.

    Pretraining and RL skip these, the evaluation uses only these, whatever their seeds.
    """
    return zlib.crc32(render(tree).encode()) % 20 == 0
