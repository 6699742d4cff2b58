"""What a mathematical answer is dressed in: signs, spacing, boxes, separators of thousands, units."""

import re
from fractions import Fraction

FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp max min gcd lcm det".split()
SYMBOLS = {
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "⅕": r"\frac{1}{5}", "⅛": r"\frac{1}{8}", "√": r"\sqrt ", "∛": r"\sqrt[3]", "π": r"\pi ", "∞": r"\infty ",
    "°": r"^\circ ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "⁄": "/", "−": "-", "–": "-",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
    "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "≡": r"\equiv ", "∅": r"\emptyset ", "θ": r"\theta ", "²": "^{2}", "³": "^{3}", "\u00a0": " ", "’": "'",
}  # fmt: skip
LOOKS = re.compile(  # of what it looks like alone
    r"\\(?:displaystyle|textstyle|limits|left|right|[Bb]igg?[lr]?|qquad|quad)(?![A-Za-z])"
    r"|(?<!\\)\\[,;:! ()\[\]]|~|(?<!\\)\$"
)
TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?![\d,])")
REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar)\s*(?:\{\s*(\d+)\s*\}|(\d))")
# units that may stand behind a number without \text, by what they are short for
UNITS = dict(cm="centimeter", mm="millimeter", km="kilometer", kg="kilogram", mg="milligram", ml="milliliter")
UNITS |= dict(hz="hertz", mph="mile per hour", ft="foot", feet="foot", inches="inch", sec="second", min="minute")
UNITS |= dict(hr="hour", hrs="hour", lb="pound", lbs="pound", yd="yard", metre="meter", litre="liter")
UNITS |= {"%": "percent", r"\%": "percent"}
UNITS |= {name: name for name in "inch foot yard mile meter gram pound ounce liter second minute hour day week".split()}
UNITS |= {name: name for name in "month year unit dollar cent degree percent centimeter kilometer kilogram".split()}
POWERS = {"sq": "2 ", "square": "2 ", "cu": "3 ", "cubic": "3 "}
# and those that need \text, or they might be variables
SHORT = {"in": "inch"} | dict(m="meter", s="second", h="hour", g="gram", l="liter", mi="mile", oz="ounce")
PARTS = set("am pm million billion thousand hundred dozen base mod and or".split())  # no units: the answer needs them


def without_looks(text: str) -> str:
    """Without what only changes how it looks: dollars, boxes, bold, spacing, a full stop, sizes of fractions."""
    text = re.sub(r"√\s*(\d+)", r"\\sqrt{\1}", text)
    for symbol, plain in SYMBOLS.items():
        text = text.replace(symbol, plain)
    text = re.sub(r"(?<=\d)(?:\\[,!: ]|\{,\}|~|,)+(?=\d{3}(?!\d))", ",", text).replace("{:}", ":")
    text, before = LOOKS.sub(" ", text), ""
    while before != text:
        before = text
        text = text.strip().removesuffix(".").strip()
        for start, end in (("**", "**"), (r"\boxed{", "}"), (r"\fbox{", "}"), (r"\boldsymbol{", "}")):
            inside = text[len(start) : -len(end)]
            if text.startswith(start) and text.endswith(end) and is_balanced(inside):
                text = inside
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    return TEXT.sub(lambda match: in_text(match[1].strip()), text)


def in_text(inside: str) -> str:
    if not re.search("[A-Za-z]", inside):
        return inside
    if inside in FUNCTIONS:
        return rf"\{inside} "
    return inside if len(inside) == 1 and inside.isalpha() else rf"\text{{{inside}}}"


def is_balanced(text: str) -> bool:
    depth = 0
    for bracket in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if bracket == "{" else -1
        if depth < 0:
            return False
    return depth == 0


def without_thousands(text: str) -> str:
    """1,000 as 1000, but not in (1,000), which is a point."""
    depth, parts = 0, re.split(r"([()\[\]{}])", text)
    for i, part in enumerate(parts):
        depth += (part in ("(", "[", "{")) - (part in (")", "]", "}"))
        if depth == 0:
            parts[i] = THOUSANDS.sub(lambda match: match[0].replace(",", ""), part)
    return "".join(parts)


def repeating(match: re.Match) -> str:
    """0.1\\overline{6} as a fraction."""
    whole, before, period = match[1] or "0", match[2], match[3] or match[4]
    if len(whole + before + period) > 100:  # too long to be read
        return match[0]
    value = Fraction(int(whole + before + period) - int(whole + before), 10 ** len(before) * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def cut_unit(tokens: list[str]) -> tuple[list[str], str]:
    """Takes a unit off the end, \\text{ cm}^2 or cm^2 or %, or off the beginning, \\$."""
    if tokens[:1] == [r"\$"]:
        return tokens[1:], "dollar"
    power = next((n for n in (2, 4) if "".join(tokens[-n:]) in ("^2", "^3", "^{2}", "^{3}")), 0)
    last = len(tokens) - power - 1
    if last < 1:
        return tokens, ""
    token = tokens[last]
    word = " ".join(re.sub(r"^\\text\{|\}$|\.", "", token).lower().split())
    is_text = token != word and re.fullmatch("[a-z][a-z -]*", word) and not set(word.split()) & PARTS
    if last > 1 and tokens[last - 1].lower() in POWERS:
        last, word = last - 1, f"{tokens[last - 1].lower()} {word}"
    prefix = POWERS.get(word.partition(" ")[0], "")
    word = word.partition(" ")[2] if prefix else word
    known = UNITS | (SHORT if is_text else {})
    unit = known.get(word) or known.get(word.removesuffix("s")) or (word.removesuffix("s") if is_text else "")
    if not unit:
        return tokens, ""
    if power:
        prefix = f"{re.sub('[^23]', '', ''.join(tokens[-power:]))} "
    return tokens[:last], "" if unit == "unit" else prefix + unit
