"""Forms of mathematical answers, in which the order of terms and factors makes no difference, and values do not count.

A product is ("*", sign, numerals above, numerals below, factors above, factors below); a number has no factors. A sum
is ("+", ((sign, term), ...)). Everything else is a tuple, too, that begins with what it is: ("name", "x"), ("^", base,
power), ("root", degree, inside), ("list", (...)).
"""

from fractions import Fraction
from typing import NamedTuple

from tasks.units import units_agree


class Reading(NamedTuple):
    form: tuple  # nested, sorted where the order makes no difference
    unit: str = ""
    name: str = ""  # x, of x = 3


def same(gold: list[Reading], answer: list[Reading]) -> bool:
    """Whether they mean the same. Names, as in `x = 3`, must agree where both have one, and so must units."""
    return any(
        g.form == a.form
        and units_agree(g.unit, a.unit, whole_number(g.form) > 0)
        and (g.name == a.name or not g.name or not a.name)
        for g in gold
        for a in answer
    )


def number(value: Fraction | int, sign: int = 1) -> tuple:
    above, below = (() if n == 1 else (n,) for n in Fraction(value).as_integer_ratio())
    return ("*", sign, above, below, (), ())


ONE = number(1)


def product(above: list, below: list) -> tuple:
    """Of factors above and below a fraction bar.

    Numerals stay what they are: 2 * 3 is not 6, 6/8 and 3/4 * 1 are not 3/4, and to divide by a fraction is no other
    form of multiplying. Two minus signs do not cancel.
    """
    minus = sum(node[0] == "*" and node[1] < 0 for node in (*above, *below))
    sign = (-1) ** minus
    above, below = ([("*", 1, *node[2:]) if node[0] == "*" else node for node in side] for side in (above, below))
    if len(above) == 1 and not below:
        return above[0] if sign > 0 else negated(above[0])
    if above == [ONE]:
        above = []  # the one of 1/2
    numerals, factors = ([], []), ([], [])
    plain = [node for node in (*above, *below) if is_number(node)]
    is_fraction = len(plain) <= 1 or (
        len(plain) == 2 and sum(map(is_number, above)) == 1 and all(map(is_integer, plain))
    )
    for side, nodes in enumerate((above, below)):
        for node in nodes:
            if node[0] == "^" and node[1][0] == "+" and (power := whole_number(node[2])):
                turned, base = oriented(node[1])
                sign, node = sign * turned**power, ("^", base, node[2])
            if node[0] == "*":
                opens = node != ONE and (is_fraction or not is_number(node)) and not (side and (node[3] or node[5]))
                if opens:
                    for other in (0, 1):
                        numerals[side ^ other].extend(node[2 + other])
                        factors[side ^ other].extend(node[4 + other])
                else:
                    factors[side].append(("as it is", node))
                continue
            turned, node = oriented(node)
            sign *= turned
            factors[side].append(node)
    if minus > 1:
        factors[0].append(("minus signs", minus))
    return ("*", sign, *(tuple(sorted(n)) for n in numerals), *(tuple(sorted(f, key=repr)) for f in factors))


def is_number(node: tuple) -> bool:
    return node[0] == "*" and not node[4] and not node[5]


def is_integer(node: tuple) -> bool:
    return is_number(node) and not node[3]


def whole_number(node: tuple) -> int:
    """Its value, or 0 for anything else."""
    return node[2][0] if node[:2] == ("*", 1) and len(node[2]) == 1 and node[3:] == ((), (), ()) else 0


def negated(node: tuple) -> tuple:
    if node[0] == "+":
        return ("+", tuple((-sign, term) for sign, term in node[1]))
    if node == number(0):
        return node
    return ("*", -node[1], *node[2:]) if node[0] == "*" else ("*", -1, (), (), (node,), ())


def oriented(node: tuple) -> tuple[int, tuple]:
    """A sum, or its opposite, whose first term is positive, and the sign that takes it there: 1 - x is -(x - 1)."""
    return (1, node) if node[0] != "+" or node[1][0][0] > 0 else (-1, negated(node))


def total(terms: list[tuple[int, tuple]]) -> tuple:
    """The sum of signed terms, in any order. Numbers are not added, nor brackets opened, nor two signs cancelled."""
    if len(terms) == 1:
        sign, term = terms[0]
        if sign < 0 and term[0] == "*" and term[1] < 0:
            return ("*", -1, (), (), (("as it is", term),), ())
        return term if sign > 0 else negated(term)
    flat = []
    for sign, term in terms:
        if term[0] == "*" and term[1] < 0:
            flat.append((-1, negated(term)) if sign > 0 else (-1, ("as it is", term)))
        else:
            flat.append((sign, term))
    return ("+", tuple(sorted(flat, key=lambda pair: (repr(pair[1]), -pair[0]))))


def is_name(node: tuple) -> bool:
    """x, x_1, f(x), AB or (x, y): what is left of an equals sign where the answer is on the right."""
    if node[0] in ("call", "text", "angle"):
        return True
    if node[0] == "index":
        return is_name(node[1])
    if node[0] == "(":
        return all(map(is_name, node[2]))
    return node[0] == "name" and node[1] not in ("pi", "infty", "emptyset", "e", "i")


def base_name(node: tuple) -> tuple:
    """x of x_1."""
    return base_name(node[1]) if node[0] == "index" else node


def without_degrees(node: tuple) -> tuple | None:
    """x of x degrees, and of minus x degrees."""
    if node[0] == "degrees":
        return node[1]
    is_minus = node[:4] == ("*", -1, (), ()) and len(node[4]) == 1 and not node[5] and node[4][0][0] == "degrees"
    return negated(node[4][0][1]) if is_minus else None
