"""Answers in LaTeX or in plain text, read as a whole, into forms in which only plain rewriting makes no difference.

`read` gives the forms of a text, and two answers are the `same` (forms.py) if they have one in common. Nothing is
calculated: 2^{10} is not 1024, and a product is not what it expands to, or problems that say "compute" and "expand"
would be solved by copying them. The tables of docs/answers.md say what is the same; they are the tests, too.
"""

import re
from fractions import Fraction
from math import gcd

from tasks.dress import FUNCTIONS, REPEATING, repeating, without_looks, without_thousands, words
from tasks.forms import Reading, base_name, is_name, negated, number, product, total, without_degrees
from tasks.units import cut_unit

MAX_CHARACTERS, MAX_TOKENS, MAX_DEPTH, MAX_DIGITS = 1000, 400, 30, 60
TOKEN = re.compile(
    r"\s+|\\(?:begin|end)\{[a-z]+\}|\\text\{[^{}]*\}|\\[A-Za-z]+|\\.|\d+(?:\.\d+)?|\.\d+|[A-Za-z]+|\*\*|[<>!]=|."
)
NAMES = "alpha beta gamma delta epsilon theta lambda mu pi rho sigma tau phi psi omega infty emptyset".split()
NAMES += "Gamma Delta Lambda Phi Omega".split()
PLAIN = {"infinity": "infty", "inf": "infty", "varnothing": "emptyset", "varphi": "phi", "leq": "le", "geq": "ge"}
PLAIN |= dict(leqslant="le", geqslant="ge", vert="|", lbrace="{", rbrace="}", Bbb="mathbb", neq="ne", lt="<", gt=">")
PLAIN |= dict(bmod="pmod", mod="pmod", tbinom="binom", dbinom="binom")
RELATIONS = {"=": "=", r"\in": "∈", r"\equiv": "≡", "<": "<", "<=": "≤", r"\le": "≤", ">": ">", ">=": "≥", r"\ge": "≥"}
RELATIONS |= {r"\ne": "≠", "!=": "≠", ":": ":"}
TURNED = {"<": ">", "≤": "≥", ">": "<", "≥": "≤"}
CLOSING = {"{": "}", "(": ")", "[": "]", r"\{": r"\}", r"\langle": r"\rangle", r"\lfloor": r"\rfloor"}
CLOSING |= {r"\lceil": r"\rceil", r"\lvert": r"\rvert", "|": "|"}


class Unread(Exception):
    """It was not understood as a whole."""


def read(text: str) -> list[Reading]:
    """All that the text may mean; [] if no reading takes in the whole of it."""
    if not isinstance(text, str) or len(text) > MAX_CHARACTERS:
        return []
    text, found = without_looks(text), []
    for variant in dict.fromkeys((without_thousands(text), text)):
        try:
            found.append(Reader(variant).whole())
            break  # 1,000 is a thousand, if it may be
        except Unread:
            continue
    return found + words(text)


class Reader:
    """Recursive descent over the tokens of one answer; raises Unread for whatever it does not know."""

    def __init__(self, text: str):
        tokens = [token for token in TOKEN.findall(REPEATING.sub(repeating, text)) if not token.isspace()]
        longest = max((len(token) for token in tokens if token[-1].isdigit()), default=0)
        if not text.isascii() or len(tokens) > MAX_TOKENS or longest > MAX_DIGITS:
            raise Unread
        tokens, self.unit = cut_unit(tokens)
        self.tokens, self.at, self.depth, self.choice, self.chose = [], 0, 0, 1, False
        for token in tokens:
            bare = token.removeprefix("\\")
            if bare in PLAIN:
                token = PLAIN[bare] if PLAIN[bare] in "<>|" else "\\" + PLAIN[bare]
            elif token in FUNCTIONS or token in NAMES:
                token = "\\" + token
            known = token in ("and", "or", "sqrt") or token.isupper()  # AB is a segment, and not A times B
            if token.isalpha() and token.islower() and len(token) > 3 and not known:
                raise Unread  # a word
            self.tokens += token if token.isalpha() and not known else [token]  # xy is x times y
        self.bars = self.choices = 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def accept(self, *wanted: str) -> str:
        if self.peek() in wanted and self.peek():
            self.at += 1
            return self.tokens[self.at - 1]
        return ""

    def expect(self, *wanted: str) -> str:
        if not (found := self.accept(*wanted)):
            raise Unread
        return found

    def whole(self) -> Reading:
        items, unit, name = self.items("", choose=True), self.unit, ""
        named = [item for item in items if item[0] == "named"]
        if len({base_name(item[1]) for item in named}) == 1 and items[0] in named:  # x = 1, x = 2, or x = 1, 2
            name, items = repr(base_name(named[0][1])), [item[2] if item in named else item for item in items]
        if len(items) == 1 and items[0][0] == "set":  # braces around solutions make no difference
            items = list(items[0][1])
        if items and all(without_degrees(item) for item in items):
            unit, items = "degree", [without_degrees(item) for item in items]
        if self.unit and unit in ("percent", "degree") and (len(items) != 1 or items[0][0] in ("(", "[")):
            raise Unread
        return Reading(items[0] if len(items) == 1 else ("list", tuple(sorted(items, key=repr))), unit, name)

    def items(self, end: str, choose: bool = False) -> list[tuple]:
        """What stands between commas, semicolons, `and`, `or`; with `choose`, 1 \\pm 2 is two of them."""
        found, more = [], True
        while more:
            start = self.at
            found.append(self.relation())
            if choose and self.chose:
                self.at, self.choice = start, -1
                other = self.relation()
                if found[-1][0] == other[0] == "set":
                    found[-1] = ("set", tuple(sorted({*found[-1][1], *other[1]}, key=repr)))
                else:
                    found.append(other)
                self.choice, self.chose = 1, False
            more = bool(self.accept(",", ";"))
            if choose:
                more |= bool(self.accept("and", "or", r"\text{and}", r"\text{or}"))
        if self.peek() != end:
            raise Unread
        self.at += 1
        return found

    def union(self) -> tuple:
        """Sums, or intervals that are joined by unions or intersections."""
        parts, operators = [self.sum()], set()
        while operator := self.accept(r"\cup", r"\cap"):
            operators.add(operator)
            parts.append(self.sum())
        if len(operators) > 1:
            raise Unread
        return (*operators, tuple(sorted(parts, key=repr))) if operators else parts[0]

    def relation(self) -> tuple:
        parts, operators = [self.union()], []
        while self.peek() in RELATIONS:
            operators.append(RELATIONS[self.accept(*RELATIONS)])
            parts.append(self.union())
        if self.accept(r"\pmod") or (self.peek() == "(" and self.tokens[self.at + 1 : self.at + 2] == [r"\pmod"]):
            in_brackets = self.accept("(") and self.accept(r"\pmod")
            parts[-1] = ("modulo", parts[-1], self.argument())
            operators = ["=" if operator == "≡" else operator for operator in operators]
            if in_brackets:
                self.expect(")")
        if not operators:
            return parts[0]
        if operators == ["="]:
            parts.sort(key=is_name, reverse=True)
            return ("named", *parts) if is_name(parts[0]) else ("=", tuple(sorted(parts, key=repr)))
        if operators == ["∈"] and is_name(parts[0]):
            return ("named", *parts)
        if operators == ["≠"]:
            parts.sort(key=repr)
        if operators[0] in ">≥":
            parts, operators = parts[::-1], [TURNED.get(operator, operator) for operator in operators[::-1]]
        return ("relation", tuple(operators), tuple(parts))

    def sum(self) -> tuple:
        terms = [(self.sign() or 1, self.term())]
        while sign := self.sign():
            if sign > 0 and self.accept("-"):  # 3 + -2
                sign = -1
            terms.append((sign, self.term()))
        return total(terms)

    def sign(self) -> int:
        token = self.accept("+", "-", r"\pm", r"\mp")
        self.chose |= len(token) > 1
        self.choices += len(token) > 1
        if self.choices > 2:  # of the first reading and the second: which signs go together?
            raise Unread
        return {"": 0, "+": 1, "-": -1, r"\pm": self.choice, r"\mp": -self.choice}[token]

    def term(self) -> tuple:
        """Factors, from left to right: 1/2x is half of x."""
        above, below = [self.mixed_number() or self.factor()], []
        while True:
            if self.accept("*", r"\cdot", r"\times"):
                above.append(self.signed_factor())
            elif self.accept("/"):
                below.append(self.signed_factor())
            elif self.accept(r"\div"):
                below.append(("divided by", self.signed_factor()))
            elif self.begins_factor() or (self.peek().isdigit() and above[-1][0] in ("^", "!")):
                above.append(self.factor())
            else:
                return product(above, below)

    def signed_factor(self) -> tuple:
        return negated(self.factor()) if self.accept("-") else self.factor()

    def begins_factor(self) -> bool:
        """Whether what follows is multiplied without a sign; a number beside another one is not."""
        token = self.peek()
        known = (r"\frac", r"\sqrt", "sqrt", r"\binom", *CLOSING)
        if token == "{" or (token == "|" and self.bars) or self.tokens[self.at : self.at + 2] == ["(", r"\pmod"]:
            return False
        is_letter = token not in ("and", "or") and (token.isalpha() or re.fullmatch(r"\\text\{[A-Za-z]\}", token))
        return bool(token in known or token[1:] in NAMES + FUNCTIONS or is_letter or token.startswith(r"\begin"))

    def mixed_number(self) -> tuple | None:
        """4 2/3 and 4\\frac{2}{3} are 4 + 2/3, in lowest terms."""
        ahead = "\0".join(self.tokens[self.at : self.at + 8]) + "\0"
        half = "\\\\frac\0{\0(\\d+)\0}\0{\0(\\d+)\0}\0|\\\\frac\0(\\d)\0?(\\d)\0|(\\d+)\0/\0(\\d+)\0"
        found = re.match(f"([1-9]\\d*)\0(?:{half})(?![\\^_!])", ahead)
        whole, above, below = (int(digits) for digits in found.groups() if digits) if found else (0, 0, 0)
        if not 0 < above < below or gcd(above, below) > 1:
            return None
        self.at += found[0].count("\0")
        return number(whole + Fraction(above, below))

    def factor(self) -> tuple:
        is_call = self.peek()[1:] in FUNCTIONS
        node = self.base()
        while operator := self.accept("^", "**", "!", "_"):
            if operator == "!":
                node = ("!!", node) if self.accept("!") else ("!", node)
            elif operator == "_":
                node = ("index", node, self.argument())
            elif self.accept(r"\circ") or self.tokens[self.at : self.at + 3] == ["{", r"\circ", "}"]:
                self.at += 3 * (self.tokens[self.at : self.at + 3] == ["{", r"\circ", "}"])
                node = ("degrees", node)
            else:
                node = ("power of a call" if is_call else "^", node, self.argument())  # sin(x)^2 may be sin(x^2)
        return node

    def argument(self) -> tuple:
        """Of a power, an index, a root: a group, or the one thing that stands there."""
        return negated(self.base()) if self.accept("-") else self.base()

    def argument_of_tex(self) -> tuple:
        """Without braces it is one digit: \\frac12 is 1/2."""
        if self.peek().isdigit():
            self.tokens[self.at : self.at + 1] = self.peek()
        return self.base()

    def base(self) -> tuple:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unread
        node = self.atom()
        self.depth -= 1
        return node

    def atom(self) -> tuple:
        token = self.peek()
        if token in CLOSING:
            return self.group()
        self.at += 1
        if re.fullmatch(r"\d*\.?\d+", token):
            return self.numeral(token)
        if token == r"\frac":
            above = self.argument_of_tex()
            return product([above], [self.argument_of_tex()])
        if token == r"\binom":
            return ("binomial", self.argument_of_tex(), self.argument_of_tex())
        if token == "sqrt":
            return ("root", number(2), self.argument())
        if token == r"\sqrt":
            degree = number(2)
            if self.accept("["):
                degree = self.sum()
                self.expect("]")
            return ("root", degree, self.argument_of_tex())
        if token.startswith(r"\begin{"):
            return self.matrix(token[7:-1])
        if token[1:] in FUNCTIONS:
            return self.function(token[1:])
        if token in (r"\angle", r"\mathbb"):
            return (token[1:], self.base())
        if token.startswith(r"\text{"):
            inside = token[6:-1]
            return ("name", inside) if re.fullmatch("[A-Za-z]", inside) else ("text", inside.lower())
        if re.fullmatch("[fghpFGHPQ]", token) and self.peek() == "(":
            return ("call", token, self.group())
        if token[1:] in NAMES or (token.isalpha() and token not in ("and", "or")):
            return ("name", token.removeprefix("\\"))
        raise Unread

    def group(self) -> tuple:
        start = self.accept(*CLOSING)
        if start == r"\{" and self.accept(r"\}"):
            return ("name", "emptyset")
        if start == r"\{":
            return ("set", tuple(sorted(set(self.items(r"\}")), key=repr)))
        end = self.end_of_interval() if start in ("(", "[") else CLOSING[start]
        self.bars += start == "|"
        items = self.items(end)
        self.bars -= start == "|"
        if start == "{" and len(items) > 1:
            if self.depth > 1:  # an argument is one thing
                raise Unread
            return ("set", tuple(sorted(set(items), key=repr)))
        if start in "{([" and len(items) == 1:
            return items[0]
        return ({r"\lvert": "|"}.get(start, start), {r"\rvert": "|"}.get(end, end), tuple(items))

    def end_of_interval(self) -> str:
        """The bracket that closes this one: an interval may begin and end with different ones."""
        depth = 1
        for token in self.tokens[self.at :]:
            depth += (token in ("(", "[")) - (token in (")", "]"))
            if depth == 0:
                return token
        raise Unread

    def numeral(self, token: str) -> tuple:
        if "." not in token and self.accept("_"):
            return ("digits", token, self.argument())
        if len(token) > 1 and token.isdigit() and token[0] == "0":
            if self.tokens[self.at - 2 : self.at - 1] != [":"]:
                raise Unread
            return ("digits", token)  # 2:05
        return number(Fraction(token))

    def function(self, name: str) -> tuple:
        """sin x, sin^2 x, sin(x), log_2 x, sin 2x."""
        given = {}
        while operator := self.accept("^", "_"):
            given[operator] = self.argument()
        if given.get("^") == number(1, -1):  # the inverse function
            name, given = f"arc{name}", {"_": given.get("_", ())}
        if self.peek() in CLOSING:
            inside = self.group()
        else:
            factors = [self.factor()]
            while self.begins_factor() and self.peek()[1:] not in FUNCTIONS:
                factors.append(self.factor())
            inside = product(factors, [])
        node = ("function", name, given.get("_", ()), inside)
        return ("^", node, given["^"]) if "^" in given else node

    def matrix(self, kind: str) -> tuple:
        rows, end = [[self.sum()]], rf"\end{{{kind}}}"
        while (separator := self.expect("&", "\\\\", end)) != end:
            if separator == "&":
                rows[-1].append(self.sum())
            elif self.peek() != end:
                rows.append([self.sum()])
        return ("matrix" if kind in ("pmatrix", "bmatrix", "smallmatrix") else kind, tuple(map(tuple, rows)))
