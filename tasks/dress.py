"""What a mathematical answer is dressed in: signs, spacing, boxes, separators of thousands."""

import re
from fractions import Fraction

from tasks.forms import Reading

FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp max min gcd lcm det".split()
SYMBOLS = {
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "⅕": r"\frac{1}{5}", "⅛": r"\frac{1}{8}", "√": r"\sqrt ", "∛": r"\sqrt[3]", "π": r"\pi ", "∞": r"\infty ",
    "°": r"^\circ ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "⁄": "/", "−": "-", "–": "-",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
    "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "≡": r"\equiv ", "º": r"^\circ ", "ℝ": r"\mathbb{R}", "α": r"\alpha ", "β": r"\beta ",
    "γ": r"\gamma ", "λ": r"\lambda ", "φ": r"\phi ", "ω": r"\omega ", "∅": r"\emptyset ",
    "θ": r"\theta ", "²": "^{2}", "³": "^{3}", "\u00a0": " ", "’": "'",
}  # fmt: skip
LOOKS = re.compile(  # of what it looks like alone
    r"\\(?:displaystyle|textstyle|limits|left|right|[Bb]igg?[lr]?|qquad|quad)(?![A-Za-z])"
    r"|(?<!\\)\\[,;:! ()\[\]]|~|(?<!\\)\$"
)
TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?![\d,])")
REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar)\s*(?:\{\s*(\d+)\s*\}|(\d))")


def without_looks(text: str) -> str:
    """Without what only changes how it looks: dollars, boxes, bold, spacing, a full stop, sizes of fractions."""
    text = re.sub(r"√\s*(\d+)", r"\\sqrt{\1}", text)
    for symbol, plain in SYMBOLS.items():
        text = text.replace(symbol, plain)
    text = re.sub(r"(?<=\d),?(?:\\[,!: ]|\{,\}|~)+,?(?=\d{3}(?!\d))", "", text).replace("{:}", ":")
    text, before = LOOKS.sub(" ", text.replace(r"\degree", r"^\circ ")), ""
    while before != text:
        before = text
        text = text.strip().removeprefix("=").strip()
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1].strip()
        for start, end in (("**", "**"), (r"\boxed{", "}"), (r"\fbox{", "}"), (r"\boldsymbol{", "}"), ("{", "}")):
            inside = text[len(start) : -len(end)]
            is_set = start == "{" and "," in inside  # as some write sets
            if text.startswith(start) and text.endswith(end) and is_balanced(inside) and not is_set:
                text = inside
    whole = TEXT.fullmatch(text)
    if whole and re.search(r"[,0-9]", whole[1]):  # a list, or a number with its unit
        text = whole[1].strip()
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    return TEXT.sub(lambda match: in_text(match[1].strip()), text)


def in_text(inside: str) -> str:
    if not re.search("[A-Za-z]", inside):
        return inside
    if inside in FUNCTIONS or inside == "mod":
        return rf"\{inside} "
    return rf"\text{{{inside}}}"


def is_balanced(text: str) -> bool:
    depth = 0
    for bracket in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if bracket == "{" else -1
        if depth < 0:
            return False
    return depth == 0


def without_thousands(text: str) -> str:
    """1,000 as 1000, but not in (1,000), which is a point."""
    depth, parts = 0, re.split(r"([()\[\]]|\\[{}])", text)
    for i, part in enumerate(parts):
        depth += (part in ("(", "[", r"\{")) - (part in (")", "]", r"\}"))
        if depth == 0:
            parts[i] = THOUSANDS.sub(lambda match: match[0].replace(",", ""), part)
    return "".join(parts)


def repeating(match: re.Match) -> str:
    """0.1\\overline{6} as a fraction."""
    whole, before, period = match[1] or "0", match[2], match[3] or match[4]
    if len(whole + before + period) > 100:  # too long to be read
        return match[0]
    if set(period) == {"9"}:  # 0.999... is for whoever asks what it is
        return match[0]
    value = Fraction(int(whole + before + period) - int(whole + before), 10 ** len(before) * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def words(text: str) -> list[Reading]:
    """A text of letters alone: a name, yes or no, (C). Its case makes a difference only where it may be variables."""
    plain = " ".join(re.sub(r"\\text\{([^{}]*)\}", r"\1", text).split())
    plain = re.sub(r"^\(([A-Za-z])\)$", r"\1", plain)
    has_word = re.search("[A-Za-z]{3}", plain)  # June 20, but not x 20
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9' -]*" if has_word else r"[A-Za-z][A-Za-z' -]*", plain):
        return []
    word = re.sub("^(an?|the) ", "", plain.lower())
    is_word = len(word) > 2 or (len(word) > 1 and r"\text" in text) or word == "no"
    is_word &= not plain.isupper()  # ABC is a triangle, TTH a row of coins
    return [Reading(("words", plain))] + [Reading(("word", word))] * is_word
