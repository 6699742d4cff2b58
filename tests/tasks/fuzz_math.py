"""Random answers for MATH: a gold answer, and the same thing in another dress, a calculated one, a wrong one, or noise.

Each expression is a tree of our own, which is written as LaTeX and evaluated with floating-point numbers: the verifier
under test has no part in what is expected of it.
"""

import cmath
import math
import random

LETTERS = "xyabnt"
NOISE = ["\\frac{", "}", "{", "(", ")", "^", "_", "\\pm", ",", "\\text{cm}", "=", "|", "!", "\\sqrt", "2", "x"]
NOISE += ["\\", "$", "&", "\x00", "\ud800", "\u202e", "\uff11", "½", "\\begin{pmatrix}", "\\cup", "<", "%", "."]


def tree(rng: random.Random, depth: int = 3):
    """("n", 3), ("/n", 3, 4), ("x", "a"), ("+", [terms]), ("*", [factors]), ("-", a), ("/", a, b), ("^", a, n), ..."""
    kind = rng.choice(["n", "n", "x", "/n"] if depth == 0 else "n x + + * * / ^ root f - /n".split())
    if kind == "n":
        return ("n", rng.choice([2, 3, 5, 7, 11, 12, 40, 1024]))
    if kind == "/n":
        below = rng.choice([2, 4, 5, 8, 3, 7])
        above = rng.choice([n for n in range(1, 30) if math.gcd(n, below) == 1])
        return ("/n", above, below)
    if kind == "x":
        return ("x", rng.choice(LETTERS))
    if kind in "+*":
        parts = [tree(rng, depth - 1) for _ in range(rng.choice([2, 2, 3]))]
        return (kind, parts)
    if kind == "/":
        return ("/", tree(rng, depth - 1), tree(rng, depth - 1))
    if kind == "^":
        return ("^", tree(rng, depth - 1), rng.choice([2, 3, 10]))
    if kind == "f":
        return ("f", rng.choice(["sin", "cos", "ln"]), tree(rng, depth - 1))
    return (kind, tree(rng, depth - 1))


def value(node, point: dict[str, float]) -> complex:
    kind = node[0]
    if kind == "n":
        return complex(node[1])
    if kind == "/n":
        return complex(node[1] / node[2])
    if kind == "x":
        return point[node[1]]
    if kind == "+":
        return sum(value(part, point) for part in node[1])
    if kind == "*":
        return math.prod(value(part, point) for part in node[1])
    inside = value(node[2] if kind == "f" else node[1], point)
    if kind == "-":
        return -inside
    if kind == "/":
        return inside / value(node[2], point)
    if kind == "^":
        return inside ** node[2]
    return cmath.sqrt(inside) if kind == "root" else getattr(cmath, {"ln": "log"}.get(node[1], node[1]))(inside)


def equal(a, b) -> bool | None:
    """Whether two trees have the same value wherever one looks; None if that cannot be told."""
    for seed in range(3):
        rng = random.Random(seed)
        point = {letter: rng.uniform(0.3, 2) for letter in LETTERS}
        try:
            left, right = value(a, point), value(b, point)
        except (ZeroDivisionError, ValueError, OverflowError):
            return None
        if not (cmath.isfinite(left) and cmath.isfinite(right)):
            return None
        if abs(left - right) > 1e-6 * (1e-6 + abs(left) + abs(right)):
            return False
    return True


def written(node, rng: random.Random) -> str:
    """LaTeX for the tree, with all that makes no difference chosen at random: order, spaces, kinds of fractions."""
    kind, space = node[0], rng.choice(["", "", " ", r"\,"])
    if kind in "nx":
        return str(node[1])
    if kind == "/n":
        above, below = node[1:]
        exact = below in (2, 4, 5, 8)
        form = rng.randrange(3 + exact)
        inside = f"{{{above}}}{{{below}}}"
        decimal = f"{above / below}" + "0" * rng.randrange(2)
        return ["\\frac" + inside, "\\dfrac" + inside, f"({above}/{below})", decimal][form]
    if kind == "+":
        parts = rng.sample(node[1], len(node[1]))
        text = written(parts[0], rng)
        for part in parts[1:]:
            minus = part[0] == "-"
            term = grouped(part[1], rng, "+-") if minus else written(part, rng)
            text += f"{space}{'-' if minus else '+'}{space}{term}" if minus or part[0] != "-" else term
        return text
    if kind == "*":
        parts = rng.sample(node[1], len(node[1]))
        sign = rng.choice(["\\cdot ", "*", "\\times "])
        return sign.join(grouped(part, rng, "+-/") for part in parts)
    if kind == "-":
        return "-" + grouped(node[1], rng, "+-")
    if kind == "/":
        if rng.random() < 0.3:
            return f"{grouped(node[1], rng, '+-*/^')}/{grouped(node[2], rng, '+-*/^')}"
        return f"\\frac{{{written(node[1], rng)}}}{{{written(node[2], rng)}}}"
    if kind == "^":
        base = str(node[1][1]) if node[1][0] == "n" else grouped(node[1], rng, "+-*/^frootn")
        return f"{base}^{{{node[2]}}}"
    if kind == "root":
        return f"\\sqrt{{{written(node[1], rng)}}}"
    left, right = rng.choice([("(", ")"), ("\\left(", "\\right)"), ("{", "}")])
    return f"\\{node[1]}{left}{written(node[2], rng)}{right}"


def grouped(node, rng: random.Random, weaker: str) -> str:
    text = written(node, rng)
    needs = node[0][0] in weaker or node[0] == "/n" and "/" in weaker
    return f"({text})" if needs else text


def dressed(text: str, rng: random.Random) -> str:
    dresses = [("", ""), ("$", "$"), ("\\boxed{", "}"), ("**", "**"), ("  ", "\n"), ("", "."), ("\\(", "\\)")]
    before, after = rng.choice(dresses)
    return before + text + after


def changed(node, rng: random.Random):
    """The tree with one number or letter exchanged, or one part left out."""
    kind = node[0]
    if kind == "n":
        return ("n", node[1] + rng.choice([1, 2, 10]))
    if kind == "/n":
        return ("/n", node[1] + node[2], node[2])
    if kind == "x":
        return ("x", rng.choice([letter for letter in LETTERS if letter != node[1]]))
    if kind in "+*":
        at = rng.randrange(len(node[1]))
        if rng.random() < 0.3 and len(node[1]) > 2:
            return (kind, node[1][:at] + node[1][at + 1 :])
        return (kind, [changed(part, rng) if i == at else part for i, part in enumerate(node[1])])
    if kind == "f":
        return ("f", node[1], changed(node[2], rng))
    if kind == "/" and rng.random() < 0.5:
        return ("/", node[1], changed(node[2], rng))
    if kind == "^" and rng.random() < 0.5:
        return ("^", node[1], node[2] + 1)
    return (kind, changed(node[1], rng), *node[2:])


def case(rng: random.Random) -> tuple[str, str, float | None]:
    """Gold, answer, and what is to be paid; None where nothing but a verdict is expected."""
    gold = tree(rng)
    text = written(gold, rng)
    kind = rng.random()
    if kind < 0.35:
        return text, dressed(written(gold, rng), rng), 1.0
    if kind < 0.7:
        other = changed(gold, rng) if kind < 0.6 else tree(rng)
        paid = None if equal(gold, other) in (True, None) else 0.0
        return text, dressed(written(other, rng), rng), paid
    if kind < 0.8:  # a power or a product of numbers is not its value
        n, power = rng.randrange(2, 12), rng.randrange(2, 5)
        copied = [(f"{n}^{power}", n**power), (f"{n}\\cdot {power}", n * power), (f"{n}+{power}", n + power)]
        copied += [(f"{power}!", math.factorial(power)), (f"\\sqrt{{{n * n}}}", n)]
        asked, result = rng.choice(copied)
        pair = [f"{result}", asked]
        rng.shuffle(pair)
        return pair[0], dressed(pair[1], rng), 0.0
    answer = written(gold, rng)
    for _ in range(rng.choice([1, 2, 5])):
        at = rng.randrange(len(answer) + 1)
        kind = rng.randrange(3)
        if kind == 0:
            answer = answer[:at] + rng.choice(NOISE) * rng.choice([1, 1, 30, 300]) + answer[at:]
        elif kind == 1:
            answer = answer[:at] + answer[at + 1 :]
        else:
            answer = answer[:at] + answer[at:] * rng.randrange(1, 4)
    return text, answer, None
