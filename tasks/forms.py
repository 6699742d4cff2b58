"""Forms of mathematical answers, in which the order of terms and factors makes no difference, and values do not count.

A product is ("*", sign, numerals above, numerals below, factors above, factors below); a number has no factors. A sum
is ("+", ((sign, term), ...)). Everything else is a tuple, too, that begins with what it is: ("name", "x"), ("^", base,
power), ("root", degree, inside), ("list", (...)).
"""

from fractions import Fraction
from typing import NamedTuple


class Reading(NamedTuple):
    form: tuple  # nested, sorted where the order makes no difference
    unit: str = ""
    name: str = ""  # x, of x = 3


def same(gold: list[Reading], answer: list[Reading]) -> bool:
    """Whether they mean the same. Units and names, as in `x = 3`, must agree where both have one."""

    def agree(a: str, b: str) -> bool:
        return a == b or not a or not b

    return any(g.form == a.form and agree(g.unit, a.unit) and agree(g.name, a.name) for g in gold for a in answer)


def number(value: Fraction | int, sign: int = 1) -> tuple:
    above, below = (() if n == 1 else (n,) for n in Fraction(value).as_integer_ratio())
    return ("*", sign, above, below, (), ())


def product(above: list, below: list, sign: int = 1) -> tuple:
    """Of factors above and below a fraction bar. Numerals stay what they are: 2 * 3 is not 6, and 6/8 not 3/4."""
    numerals, factors = ([], []), ([], [])
    for side, nodes in enumerate((above, below)):
        for node in nodes:
            if node[0] == "^" and node[1][0] == "+" and (power := whole_number(node[2])):
                turned, base = oriented(node[1])
                sign, node = sign * turned**power, ("^", base, node[2])
            if node[0] == "*":
                sign *= node[1]
                for other in (0, 1):
                    numerals[side ^ other].extend(node[2 + other])
                    factors[side ^ other].extend(node[4 + other])
                continue
            turned, node = oriented(node)
            sign *= turned
            factors[side].append(node)
    if not numerals[0] and not numerals[1] and not factors[1] and len(factors[0]) == 1:
        return factors[0][0] if sign > 0 else negated(factors[0][0])
    if numerals == ([0], []) and factors == ([], []):
        sign = 1
    return ("*", sign, *(tuple(sorted(n)) for n in numerals), *(tuple(sorted(f, key=repr)) for f in factors))


def whole_number(node: tuple) -> int:
    """Its value, or 0 for anything else."""
    return node[2][0] if node[:2] == ("*", 1) and len(node[2]) == 1 and node[3:] == ((), (), ()) else 0


def negated(node: tuple) -> tuple:
    if node[0] == "+":
        return total([(-sign, term) for sign, term in node[1]])
    if node == number(0):
        return node
    return ("*", -node[1], *node[2:]) if node[0] == "*" else ("*", -1, (), (), (node,), ())


def oriented(node: tuple) -> tuple[int, tuple]:
    """A sum, or its opposite, whose first term is positive, and the sign that takes it there: 1 - x is -(x - 1)."""
    return (1, node) if node[0] != "+" or node[1][0][0] > 0 else (-1, negated(node))


def total(terms: list[tuple[int, tuple]]) -> tuple:
    """The sum of signed terms, in any order. Numbers are not added."""
    flat = []
    for sign, term in terms:
        if term[0] == "+":
            flat += [(sign * inner, t) for inner, t in term[1]]
        else:
            flat.append((-sign, negated(term)) if term[0] == "*" and term[1] < 0 else (sign, term))
    if len(flat) == 1:
        return flat[0][1] if flat[0][0] > 0 else negated(flat[0][1])
    return ("+", tuple(sorted(flat, key=lambda pair: (repr(pair[1]), -pair[0]))))


def is_name(node: tuple) -> bool:
    """x, x_1 or f(x): what is left of an equals sign where the answer is on the right."""
    if node[0] == "*":  # f(x)
        return node[1:4] == (1, (), ()) and not node[5] and len(node[4]) == 2 and ("name", "f") in node[4]
    if node[0] == "index":
        return is_name(node[1])
    return node[0] == "name" and node[1] not in ("pi", "infty", "emptyset", "e", "i")
