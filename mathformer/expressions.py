"""Arithmetic expressions: generate, evaluate exactly, write as text, parse back, and work out step by step.

A tree is an integer or an `Operation(symbol, operands)`. As text, `(3+4)*5` is worked out as `3+4=7;7*5=35`: true
equations, innermost first, left before right. Division is exact, so a value is an integer or a reduced fraction, and
an operation on fractions takes more than one equation: `1/2+1/3=3/6+2/6;3/6+2/6=5/6`.
"""

import math
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple


class Operator(NamedTuple):
    arity: int
    precedence: int  # of an infix operator; 0 for one that is written as a function, `max(a,b)`
    function: Callable[..., int | Fraction]


OPERATORS = {
    "+": Operator(2, 1, lambda a, b: a + b),
    "-": Operator(2, 1, lambda a, b: a - b),
    "*": Operator(2, 2, lambda a, b: a * b),
    "/": Operator(2, 2, lambda a, b: Fraction(a) / b),
    "%": Operator(2, 2, lambda a, b: a % b),  # a - b*floor(a/b): of the sign of b, as in Python, for fractions too
    "max": Operator(2, 0, max),
    "min": Operator(2, 0, min),
    "next": Operator(1, 0, lambda a: a + 1),
    "prev": Operator(1, 0, lambda a: a - 1),
    "abs": Operator(1, 0, abs),
}
# what a model writes is parsed too: the work has a bound
MAX_PARSE_LENGTH = 1000
MAX_PARSE_DEPTH = 50
MAX_PARSE_OPERATORS = 200
MAX_DRAWS = 100_000  # of random problems, until one keeps to the limits


class Operation(NamedTuple):
    symbol: str
    operands: tuple["Tree", ...]


Tree = int | Operation
Value = int | Fraction  # equal values compare equal whichever the type


def parse_operators(text: str) -> tuple[str, ...]:
    """The operators named in a text such as `+-*`, `+ - max` or `all`.

    Raises:
        ValueError: one of them does not exist; the message names it and those that do.
    """
    if text.strip() == "all":
        return tuple(OPERATORS)
    found = re.findall(r"[a-z]+|[^\s,a-z]", text)
    unknown = [name for name in found if name not in OPERATORS]
    if unknown or not found:
        which = f"there is no operator {unknown[0]!r}" if unknown else "none is named"
        raise ValueError(f"operators {text!r}: {which}; choose from {' '.join(OPERATORS)}, or all")
    return tuple(dict.fromkeys(found))


def evaluate(tree: Tree) -> Value:
    """The exact value. Raises ZeroDivisionError where something is divided by zero, or taken modulo zero."""
    if isinstance(tree, int):
        return tree
    return OPERATORS[tree.symbol].function(*map(evaluate, tree.operands))


def depth(tree: Tree) -> int:
    """Operators on the longest path from the root to a number; 0 for a number."""
    return 0 if isinstance(tree, int) else 1 + max(map(depth, tree.operands))


def symbols(tree: Tree) -> set[str]:
    """The operators in the tree."""
    return set() if isinstance(tree, int) else {tree.symbol}.union(*map(symbols, tree.operands))


def leaves(tree: Tree) -> list[int]:
    """The numbers in the tree, from left to right."""
    return [tree] if isinstance(tree, int) else [number for operand in tree.operands for number in leaves(operand)]


# As text


def render(tree: Tree, rng: random.Random | None = None, parentheses: float = 0.0, spaces: float = 0.0) -> str:
    """The tree as text, which `parse` inverts. The canonical text has no space, and no parenthesis without need.

    Args:
        rng: randomness of the next two.
        parentheses: probability that a number or an operation gets parentheses that it does not need.
        spaces: probability of a space between two symbols.
    """

    def write(tree: Tree, binding: int) -> list[str]:  # `binding`: an infix operator below it needs its parentheses
        if isinstance(tree, int):
            text, needed = [str(tree)], False
        else:
            op = OPERATORS[tree.symbol]
            needed = 0 < op.precedence < binding
            if op.precedence:  # parsing is left to right: a right operand of equal precedence needs its parentheses
                left, right = tree.operands
                text = write(left, op.precedence) + [tree.symbol] + write(right, op.precedence + 1)
            else:
                text = [tree.symbol, "("]
                for operand in tree.operands:
                    text += write(operand, 0) + [","]
                text[-1] = ")"
        return ["(", *text, ")"] if needed or (parentheses and rng.random() < parentheses) else text

    parts = write(tree, 0)
    return "".join(part + " " * (spaces > 0 and rng.random() < spaces) for part in parts[:-1]) + parts[-1]


def parse(text: str) -> Tree:
    """The tree of an expression. A minus in front of digits, where a number may stand, belongs to the number.

    Raises:
        ValueError: the text is no expression; the message says where.
    """
    if len(text) > MAX_PARSE_LENGTH:
        raise ValueError(f"expression of {len(text)} characters, at most {MAX_PARSE_LENGTH} are parsed")
    tokens = re.findall(r"[0-9]+|[a-z]+|\S", text)
    position = 0

    def fail(what: str):
        raise ValueError(f"{what} at symbol {position + 1} of {text!r}")

    def peek() -> str:
        return tokens[position] if position < len(tokens) else ""

    def advance() -> str:
        nonlocal position
        position += 1
        return tokens[position - 1]

    def expect(symbol: str) -> None:
        if peek() != symbol:
            fail(f"a {symbol} was expected")
        advance()

    def group(count: int, level: int) -> list[Tree]:  # `count` expressions in parentheses, with commas between them
        if level >= MAX_PARSE_DEPTH:
            fail(f"more than {MAX_PARSE_DEPTH} nested parentheses")
        found = []
        for symbol in ["(", *[","] * (count - 1)]:
            expect(symbol)
            found.append(operation(1, level + 1))
        expect(")")
        return found

    def operand(level: int) -> Tree:
        if peek() == "(":
            return group(1, level)[0]
        if (op := OPERATORS.get(peek())) and not op.precedence:
            return Operation(advance(), tuple(group(op.arity, level)))
        sign = ""
        if peek() == "-":
            sign = advance()
        if not re.fullmatch("[0-9]+", peek()):
            fail("a number, a function or ( was expected" if not sign else "a number was expected")
        return int(sign + advance())

    def operation(lowest: int, level: int) -> Tree:  # precedence climbing
        tree = operand(level)
        while (op := OPERATORS.get(peek())) and op.precedence >= lowest:
            symbol = advance()
            tree = Operation(symbol, (tree, operation(op.precedence + 1, level)))
        return tree

    if sum(token in OPERATORS for token in tokens) > MAX_PARSE_OPERATORS:
        raise ValueError(f"more than {MAX_PARSE_OPERATORS} operators in {text!r}")
    tree = operation(1, 0)
    if position < len(tokens):
        fail(f"unexpected {peek()!r}")
    return tree


def swap_endian(text: str) -> str:
    """The text with the digits of every number in the opposite order: `12*3=36` and `21*3=63`. Inverts itself."""
    return re.sub(r"[0-9]+", lambda digits: digits[0][::-1], text)


# Worked steps


class Equation(NamedTuple):
    """`left=right`, a true equation between two expressions as text; `left` is not `right`."""

    left: str
    right: str


def equations(tree: Tree, columns: bool = False) -> Iterator[Equation]:
    """The worked steps in order. Yields nothing for a bare number; returns the value.

    Args:
        columns: write operations on numbers of several digits out digit by digit as well, with carries and borrows:
            `7+8=15;4+3+1=8;47+38=85`, `12-7=5;5-1-3=1;52-37=15`, `7*8=56;4*8+5=37;47*8=376`.
    """
    if isinstance(tree, int):
        return tree
    values = []
    for operand in tree.operands:
        values.append((yield from equations(operand, columns)))
    if columns and all(value.denominator == 1 for value in values):
        yield from column_equations(tree.symbol, *map(int, values))
    chain = rewritings(tree.symbol, values)
    yield from (Equation(a, b) for a, b in zip(chain, chain[1:], strict=False))
    return OPERATORS[tree.symbol].function(*values)


def applications(tree: Tree) -> list[Equation]:
    """Each operation of the tree with its value, in the order of the steps: `3+4=7`, `7*5=35` for `(3+4)*5`.

    This is the work that has to be done, in one equation or in a chain of them. A reduced fraction, `1/3`, is no work.
    """
    if isinstance(tree, int):
        return []
    inner = [application for operand in tree.operands for application in applications(operand)]
    whole = Equation(applied(tree.symbol, list(map(evaluate, tree.operands))), str(evaluate(tree)))
    return inner if whole.left == whole.right else [*inner, whole]


def as_tree(value: Value) -> Tree:
    return int(value) if value.denominator == 1 else Operation("/", (value.numerator, value.denominator))


def applied(symbol: str, values: list[Value]) -> str:
    return render(Operation(symbol, tuple(map(as_tree, values))))


def rewritings(symbol: str, values: list[Value]) -> list[str]:
    """The operation as text, and what it is rewritten to until only its value is left: equal expressions."""
    value = OPERATORS[symbol].function(*values)
    chain = [applied(symbol, values)]
    if symbol == "/" or (symbol == "*" and any(v.denominator > 1 for v in values)):
        (n1, d1), (n2, d2) = (v.as_integer_ratio() for v in values)
        if symbol == "/":  # multiplied by the inverse, which is a step of its own if that is a fraction's
            n2, d2 = d2, n2
            if n2 > 1:
                chain.append(applied("*", [values[0], Fraction(n2, d2)]))
        chain += reductions(n1 * n2, d1 * d2)
    elif len(values) == 2 and any(v.denominator > 1 for v in values):  # over the common denominator first
        common = math.lcm(*(v.denominator for v in values))
        numerators = [int(v * common) for v in values]
        fractions = tuple(Operation("/", (n, common)) for n in numerators)
        chain.append(render(Operation(symbol, fractions)))
        chain += reductions(int(OPERATORS[symbol].function(*numerators)), common)
    chain.append(str(value))
    return [text for i, text in enumerate(chain) if i == 0 or text != chain[i - 1]]


def reductions(numerator: int, denominator: int) -> list[str]:
    """A fraction, divided by one prime factor after the other until it is reduced: 84/36, 42/18, 21/9, 7/3."""
    if denominator < 0:
        numerator, denominator = -numerator, -denominator
    if numerator % denominator == 0:
        return [str(numerator // denominator)]
    chain = [f"{numerator}/{denominator}"]
    while (common := math.gcd(numerator, denominator)) > 1:
        prime = next(p for p in range(2, common + 1) if common % p == 0)
        numerator, denominator = numerator // prime, denominator // prime
        chain.append(f"{numerator}/{denominator}")
    return chain


def column_equations(symbol: str, a: int, b: int = 0) -> Iterator[Equation]:
    """What an operation on integers is made of, digit by digit; nothing where one fact is enough."""
    if symbol in ("+", "-") and max(abs(a), abs(b)) > 9:
        other = b if symbol == "+" else -b
        if (a < 0) == (other < 0):
            yield from sum_columns(abs(a), abs(b))
            text, value = f"{abs(a)}+{abs(b)}", abs(a) + abs(b)
        else:
            large, small = max(abs(a), abs(b)), min(abs(a), abs(b))
            yield from difference_columns(large, small)
            text, value = f"{large}-{small}", large - small
        if text != applied(symbol, [a, b]):  # the signs come last: 37-52 is worked out as 52-37=15;37-52=-15
            yield Equation(text, str(value))
    elif symbol == "*" and max(abs(a), abs(b)) > 9 and a and b:
        large, small = max(abs(a), abs(b)), min(abs(a), abs(b))
        total = 0
        for place, digit in enumerate(digits(small)):
            if not digit:
                continue
            part, carry = large * digit, 0
            for position, other in enumerate(digits(large)):
                product = other * digit + carry
                yield Equation(f"{other}*{digit}" + (f"+{carry}" if position else ""), str(product))
                carry = product // 10
            shifted = part * 10**place
            text = f"{large}*{digit * 10**place}"
            if len(digits(small)) > 1:
                yield Equation(text, str(shifted))
            if total:
                yield from sum_columns(total, shifted)
                yield Equation(f"{total}+{shifted}", str(total + shifted))
            total += shifted
    elif symbol == "%" and abs(a) >= abs(b) and max(abs(a), abs(b)) > 9:  # how often b is in a, and what is left
        yield Equation(f"{a // b}*{b}+{a % b}", str(a))


def digits(number: int) -> list[int]:
    """The digits of a number >= 0, the last one first."""
    return [int(digit) for digit in reversed(str(number))]


def sum_columns(a: int, b: int) -> Iterator[Equation]:
    """a+b from the right, while there are two things to add: `7+8=15;4+3+1=8` for 47+38."""
    if max(a, b) < 10:
        return
    first, second, carry = digits(a), digits(b), 0
    for place in range(max(len(first), len(second))):
        terms = [number[place] for number in (first, second) if place < len(number)] + [1] * carry
        carry = sum(terms) > 9
        if len(terms) > 1:
            yield Equation("+".join(map(str, terms)), str(sum(terms)))


def difference_columns(a: int, b: int) -> Iterator[Equation]:
    """a-b for a >= b from the right, with 10 borrowed where it is needed: `12-7=5;5-1-3=1` for 52-37."""
    if a < 10:
        return
    first, second, borrow = digits(a), digits(b), 0
    for place in range(len(first)):
        terms = [1] * borrow + second[place : place + 1]
        borrow = first[place] < sum(terms)
        if terms:
            top = first[place] + 10 * borrow
            yield Equation("-".join(map(str, [top, *terms])), str(top - sum(terms)))


def largest_number(tree: Tree) -> int:
    """The largest number, in digits without a sign, that is in the expression or in its worked steps."""
    text = render(tree) + "".join(f" {left} {right}" for left, right in equations(tree))
    return max(map(int, re.findall("[0-9]+", text)))


# Problems


def generate(
    rng: random.Random, max_digits: int, max_depth: int, operators: Sequence[str] = ("+", "-", "*"),
    max_value: int | None = None, negatives: float = 0.0, for_eval: bool | None = None,
) -> Tree:  # fmt: skip
    """A random tree with at least one operator, and without a division by zero.

    Args:
        rng: all randomness comes from here.
        max_digits: digits of the numbers in the expression, uniform over the numbers of that many digits or fewer.
        max_depth: operators on the longest path. Below the root, a branch ends early with probability 0.5.
        operators: the symbols to choose from.
        max_value: trees with a larger number in them or in their worked steps are drawn again, so that each step
            stays a small one. It holds for numerators and denominators too.
        negatives: probability of a minus in front of a number.
        for_eval: only trees that are held out for the evaluation, or only those that are not; None takes both.

    Raises:
        ValueError: none of many trees is of the wanted kind, keeps to `max_value` and divides by no zero.
    """

    def grow(levels: int) -> Tree:
        if levels == 0 or (levels < max_depth and rng.random() < 0.5):
            number = int(rng.random() * 10**max_digits)
            return -number if negatives and rng.random() < negatives else number
        symbol = operators[int(rng.random() * len(operators))]
        return Operation(symbol, tuple(grow(levels - 1) for _ in range(OPERATORS[symbol].arity)))

    for _ in range(MAX_DRAWS):
        tree = grow(max_depth)
        if for_eval is not None and held_out(tree) != for_eval:  # first: of what comes next, each step is computed
            continue
        try:
            largest = largest_number(tree)
        except ZeroDivisionError:
            continue
        if max_value is None or largest <= max_value:
            return tree
    kind = {None: "", True: " is held out for the evaluation,", False: " is left for training,"}[for_eval]
    raise ValueError(
        f"too few different problems: none of {MAX_DRAWS} random ones{kind} keeps to max_value {max_value} and divides "
        "by no zero; take more digits, depth or operators, or a larger max_value"
    )


def held_out(tree: Tree) -> bool:
    """Whether this expression belongs to the evaluation: one in twenty, by a checksum of its canonical text.

    Pretraining and RL skip these, the evaluation uses only these, whatever their seeds.
    """
    return zlib.crc32(render(tree).encode()) % 20 == 0
