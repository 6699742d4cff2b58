"""Answers in LaTeX or in plain text, read as a whole, into forms in which only plain rewriting makes no difference.

`read` gives the forms of a text, and two answers are the `same` (forms.py) if they have one in common. Nothing is
calculated: 2^{10} is not 1024, and a product is not what it expands to, or problems that say "compute" and "expand"
would be solved by copying them. The tables of docs/answers.md say what is the same; they are the tests, too.
"""

import re
from fractions import Fraction

from tasks.dress import FUNCTIONS, REPEATING, cut_unit, repeating, without_looks, without_thousands
from tasks.forms import Reading, is_name, negated, number, product, total

MAX_CHARACTERS, MAX_TOKENS, MAX_DEPTH, MAX_DIGITS = 1000, 400, 30, 60
TOKEN = re.compile(
    r"\s+|\\(?:begin|end)\{[a-z]+\}|\\text\{[^{}]*\}|\\[A-Za-z]+|\\.|\d+(?:\.\d+)?|\.\d+|[A-Za-z]+|\*\*|[<>!]=|."
)
NAMES = "alpha beta gamma delta epsilon theta lambda mu pi rho sigma tau phi psi omega infty emptyset mathbb".split()
NAMES += "Gamma Delta Lambda Phi Omega".split()
PLAIN = {"infinity": "infty", "inf": "infty", "varnothing": "emptyset", "varphi": "phi", "leq": "le", "geq": "ge"}
PLAIN |= {"neq": "ne", "lt": "<", "gt": ">", "bmod": "pmod", "mod": "pmod", "tbinom": "binom", "dbinom": "binom"}
RELATIONS = {"=": "=", r"\in": "=", r"\equiv": "≡", "<": "<", "<=": "≤", r"\le": "≤", ">": ">", ">=": "≥", r"\ge": "≥"}
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
        except Unread:
            continue
    return found + words(text)


def words(text: str) -> list[Reading]:
    """A text of letters alone: a name, yes or no, (C). Its case makes a difference only where it may be variables."""
    plain = " ".join(re.sub(r"\\text\{([^{}]*)\}", r"\1", text).split())
    plain = re.sub(r"^\(([A-Za-z])\)$", r"\1", plain)
    has_word = re.search("[A-Za-z]{3}", plain)  # June 20, but not x 20
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9' -]*" if has_word else r"[A-Za-z][A-Za-z' -]*", plain):
        return []
    word = re.sub("^(an?|the) ", "", plain.lower())
    is_word = len(word) > 3 or (len(word) > 1 and r"\text" in text) or word in ("yes", "no", "odd")
    return [Reading(("words", plain))] + [Reading(("word", word))] * is_word


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
                token = PLAIN[bare] if PLAIN[bare] in "<>" else "\\" + PLAIN[bare]
            elif token in FUNCTIONS or token in NAMES:
                token = "\\" + token
            split = token.isalpha() and token not in ("and", "or", "sqrt")
            self.tokens += token if split else [token]  # xy is x times y

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
        if all(item[0] == "set" for item in items):  # braces around solutions make no difference
            items = [inside for item in items for inside in item[1]]
        if len({item[1] for item in items if item[0] == "named"}) == 1 and all(i[0] == "named" for i in items):
            name, items = repr(items[0][1]), [value for _, _, value in items]
        if all(item[0] == "degrees" for item in items):
            unit, items = "degree", [value for _, value in items]
        return Reading(items[0] if len(items) == 1 else ("list", tuple(sorted(items, key=repr))), unit, name)

    def items(self, end: str, choose: bool = False) -> list[tuple]:
        """What stands between commas, semicolons, `and`, `or`; with `choose`, 1 \\pm 2 is two of them."""
        found, more = [], True
        while more:
            start = self.at
            found.append(self.relation())
            if choose and self.chose:
                self.at, self.choice = start, -1
                found.append(self.relation())
                self.choice, self.chose = 1, False
            more = bool(self.accept(",", ";"))
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
        if operators[0] in ">≥":
            parts, operators = parts[::-1], [TURNED.get(operator, operator) for operator in operators[::-1]]
        return ("relation", tuple(operators), tuple(parts))

    def sum(self) -> tuple:
        terms = [(self.sign() or 1, self.term())]
        while sign := self.sign():
            sign = -sign if self.accept("-") else sign  # 3 + -2
            terms.append((sign, self.term()))
        return total(terms)

    def sign(self) -> int:
        token = self.accept("+", "-", r"\pm", r"\mp")
        self.chose |= len(token) > 1
        return {"": 0, "+": 1, "-": -1, r"\pm": self.choice, r"\mp": -self.choice}[token]

    def term(self) -> tuple:
        """Factors, from left to right: 1/2x is half of x."""
        above, below = [self.factor()], []
        while True:
            if self.accept("*", r"\cdot", r"\times"):
                above.append(self.signed_factor())
            elif self.accept("/", r"\div"):
                below.append(self.signed_factor())
            elif self.begins_factor():
                above.append(self.factor())
            else:
                return product(above, below)

    def signed_factor(self) -> tuple:
        return negated(self.factor()) if self.accept("-") else self.factor()

    def begins_factor(self) -> bool:
        """Whether what follows is multiplied without a sign; a number beside another one is not."""
        token = self.peek()
        known = (r"\frac", r"\sqrt", "sqrt", r"\binom", *CLOSING)
        is_name = token[1:] in NAMES + FUNCTIONS or (token.isalpha() and len(token) == 1) or token.startswith(r"\begin")
        return (token in known and token != "|") or is_name

    def factor(self) -> tuple:
        node = self.base()
        while operator := self.accept("^", "**", "!", "_"):
            if operator == "!":
                node = ("!", node)
            elif operator == "_":
                node = ("index", node, self.argument())
            elif self.accept(r"\circ") or self.tokens[self.at : self.at + 3] == ["{", r"\circ", "}"]:
                self.at += 3 * (self.tokens[self.at : self.at + 3] == ["{", r"\circ", "}"])
                node = ("degrees", node)
            else:
                power = self.argument()
                node = node if power == number(1) else ("^", node, power)
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
        if token[1:] in NAMES or (token.isalpha() and len(token) == 1):
            return ("name", token.removeprefix("\\"))
        raise Unread

    def group(self) -> tuple:
        start = self.accept(*CLOSING)
        if start == r"\{":
            return ("set", tuple(sorted(set(self.items(r"\}")), key=repr)))
        end = self.end_of_interval() if start in ("(", "[") else CLOSING[start]
        items = self.items(end)
        if start == "{" and len(items) > 1:
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
            raise Unread
        value = Fraction(token)
        # 4 2/3 and 4\frac{2}{3} are 4 + 2/3
        ahead = "\0".join(self.tokens[self.at : self.at + 7]) + "\0"
        found = re.match("\\\\frac\0{\0(\\d+)\0}\0{\0(\\d+)\0}\0|\\\\frac\0(\\d)\0?(\\d)\0|(\\d+)\0/\0(\\d+)\0", ahead)
        if found and value.denominator == 1:
            above, below = (int(digits) for digits in found.groups() if digits)
            if 0 < above < below:
                self.at += found[0].count("\0")
                value += Fraction(above, below)
        return number(value)

    def function(self, name: str) -> tuple:
        """sin x, sin^2 x, sin(x), log_2 x, sin 2x."""
        given = {}
        while operator := self.accept("^", "_"):
            given[operator] = self.argument()
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
        return ("matrix" if kind in ("pmatrix", "bmatrix") else kind, tuple(map(tuple, rows)))
