"""Units behind a mathematical answer: 15 cm^2, 30 km/h, 50 %, 3 apples, 5 p.m.

A unit is a text. One that begins with `?` is any other noun, and one that begins with `!` is a part of the answer.
"""

import re

KNOWN = dict(cm="centimeter", mm="millimeter", km="kilometer", kg="kilogram", mg="milligram", ml="milliliter")
KNOWN |= dict(hz="hertz", mph="mile per hour", kph="kilometer per hour", ft="foot", feet="foot", inches="inch")
KNOWN |= dict(sec="second", min="minute", hr="hour", lb="pound", yd="yard", metre="meter", litre="liter", deg="degree")
KNOWN |= {
    "%": "percent",
    r"\%": "percent",
    "per cent": "percent",
    r"\$": "dollar",
    "usd": "dollar",
    "ways": "way",
    "way": "way",
}
KNOWN |= {name: name for name in "inch foot yard mile meter gram pound ounce liter second minute hour day week".split()}
KNOWN |= {name: name for name in "month year unit dollar cent degree percent centimeter kilometer kilogram".split()}
# with \text alone, or they might be variables
SHORT = {"in": "inch"} | dict(m="meter", s="second", h="hour", g="gram", l="liter", mi="mile", oz="ounce")
POWERS = {"sq": "2", "square": "2", "cu": "3", "cubic": "3"}
PARTS = {name: f"!{name}" for name in "am pm million billion trillion thousand hundred dozen".split()}
NO_UNITS = set("and or base mod in of to over pi squared cubed factorial half halves third thirds is not no".split())


def unit_of(words: str, power: str, is_text: bool) -> str:
    """The unit that some words are, or nothing.

    Args:
        words: as they are written, without \\text{}.
        power: 2, 3 or nothing.
        is_text: whether they were in \\text{}, where a letter is no variable.
    """
    words = re.sub(r"\s*/\s*", " per ", words.replace(".", "").lower()).split()
    if power or (words and words[0] in POWERS):
        prefix = f"{power or POWERS[words[0]]} "
        words = words[not power :]
    else:
        prefix = ""
    if " ".join(words) in KNOWN:
        words = KNOWN[" ".join(words)].split()
    if len(words) == 1 and words[0] in PARTS:
        return PARTS[words[0]]
    names = KNOWN | (SHORT if is_text else {})
    found = [names.get(word) or names.get(word.removesuffix("s")) for word in words if word != "per"]
    whole = len(words) == 1 or (len(words) == 3 and words[1] == "per")
    if whole and all(found):
        return prefix + " per ".join(found)
    noun = " ".join(words)
    is_noun = len(words) == 1 and re.fullmatch("[a-z]{3,}", noun) and noun not in NO_UNITS and not prefix
    return f"?{noun.removesuffix('s')}" if is_noun else ""


def cut_unit(tokens: list[str]) -> tuple[list[str], str]:
    """Takes a unit off the end, \\text{ cm}^2 or cm^2 or %, or off the beginning, \\$: the rest, and the unit."""
    if tokens[:1] == [r"\$"] or tokens[:2] == ["-", r"\$"]:
        return [token for i, token in enumerate(tokens) if i > 1 or token == "-" or token != r"\$"], "dollar"
    power = next((n for n in (2, 4) if "".join(tokens[-n:]) in ("^2", "^3", "^{2}", "^{3}")), 0)
    last = len(tokens) - power - 1
    exponent = re.sub("[^23]", "", "".join(tokens[last + 1 :]))
    for n in (4, 3, 2, 1):  # the most tokens that are a unit: miles per hour
        words = tokens[last - n + 1 : last + 1] if last - n >= 0 else []
        is_text = len(words) == 1 and words[0].startswith(r"\text{")
        plain = [re.sub(r"^\\text\{|\}$", "", word) for word in words]
        if not words or not (is_text or all(re.fullmatch(r"[A-Za-z]+|/|%|\\%|\\\$", word) for word in words)):
            continue
        if not is_text and n == 1 and plain[0].isupper() and plain[0] not in ("AM", "PM", "USD"):
            continue  # AB is a segment
        if unit := unit_of(" ".join(plain), exponent, is_text):
            if not is_text and unit.startswith("?") and n > 1:
                continue
            return tokens[: last - n + 1], unit
    return tokens, ""


def units_agree(gold: str, answer: str, is_whole: bool) -> bool:
    """Whether an answer with this unit may stand for a gold one with that; `is_whole`: both are one whole number."""
    if gold == answer:
        return True
    if "!" in (gold[:1], answer[:1]) or (gold and answer):
        return False
    if gold:
        return True
    return not answer.startswith("?") and (is_whole or answer not in ("percent", "degree"))
