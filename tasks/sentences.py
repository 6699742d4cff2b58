"""Sentences: write one short sentence with some given words. A task for language models that know little.

Any sentence is easy to write and easy to check, and there is always something between right and wrong. It is also easy
to be right in a way that nobody wanted: three rules are here, each of which closes what the one before it left open.
"""

import random
import re

NOUNS = """
apple arm baby bag ball bank basket bath bear bed bee bell bird boat book bottle box boy bread bridge brother bus
butter button cake camera candle car cat chair cheese chicken child church circle clock cloud coat coffee cow cup
desk doctor dog door dress duck ear egg engine eye face family farm farmer fire fish flag floor flower foot forest
friend game garden gate girl glass goat gold grass hair hand hat head heart hill horse hospital house ice island
jacket key king kitchen knife lake lamp leaf leg letter lion map market meat milk mirror money monkey moon mother
mountain mouse mouth music neck nest night nurse ocean orange paper park pen pencil phone picture pig plane plate
pocket potato queen rabbit radio rain ring river road rock roof room rope sail salt school sea seed sheep ship shirt
shoe shop sister skirt snow soap sock song soup spoon star stone storm street sugar summer sun table teacher tent
ticket tiger tomato town toy train tree truck uncle village wall watch water wheel wind window winter wolf wood
""".split()
HELD_OUT, TRAINED = NOUNS[::5], [noun for i, noun in enumerate(NOUNS) if i % 5]
EXAMPLES = [  # those that `few_shot` shows, of nouns that are in no problem
    (["painter", "ladder", "barn"], "The painter left a ladder in the barn."),
    (["kite", "cousin", "beach"], "My cousin flew a red kite at the beach."),
    (["lawyer", "taxi", "thunder"], "The thunder was so loud that a lawyer missed his taxi."),
]
SENTENCE = re.compile(r"[A-Z][^.!?\n]*[.!?]")
FUNCTION_WORDS = set("a an and are as at be but by for from had has her his in is it its my of on or our that".split())
FUNCTION_WORDS |= set("the their then there they this to was were when while who with your because".split())
LONGEST = 2000  # characters that are looked at
RULES = ("words", "strict", "own")


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def skeleton(text: str, given: list[str]) -> tuple[str, ...]:
    """The function words of a sentence, and `_` for each given word: what is left if one fills in other words."""
    return tuple("_" if w in given else w for w in words_of(text) if w in given or w in FUNCTION_WORDS)


def sentence_reward(text: str, example: dict, rule: str = "words") -> dict:
    """How far the text is one sentence with the given words, as `rule` has it.

    words: one sentence, from a capital letter to the first of .!?, with every given word in it.
    strict: also 6 to 16 words long, each given word once, and at least two words between any two of them.
    own: also with another skeleton than each of the EXAMPLES, which the model may have been shown.

    The reward is half the share of what is asked for, and half for all of it; 0 where it is not one sentence.
    """
    text, given = text.strip()[:LONGEST], example["words"]
    form, found = bool(SENTENCE.fullmatch(text)), words_of(text)
    places = [i for i, word in enumerate(found) if word in given]
    close = any(b - a < 3 for a, b in zip(places, places[1:], strict=False))
    copied = any(skeleton(text, given) == skeleton(sentence, words) for words, sentence in EXAMPLES)
    asked = [float(word in found) for word in given]
    if rule != "words":
        asked = [float(found.count(word) == 1) for word in given]
        asked += [float(6 <= len(found) <= 16), float(not close)]
    if rule == "own":
        asked.append(float(not copied))
    right = form and all(asked)
    return {
        "reward": 0.5 * form * sum(asked) / len(asked) + 0.5 * right,
        "format": float(form),
        "correct": float(right),
        "prediction": text,
        "ground_truth": ", ".join(given),
        "words_used": sum(word in found for word in given) / len(given),
        "sentence_length": len(found),
        "listed": float(close),  # given words with less than two words between them
        "copied": float(copied),
    }


class Sentences:
    """`words` of them, a number or several to choose from; paid by `rule`.

    The words of the evaluation are in no problem of the training.
    """

    def __init__(self, words: int | list[int] = 3, rule: str = "words", eval_size: int = 64):
        self.sizes = words if isinstance(words, list) else [words]
        if not self.sizes or not all(isinstance(n, int) and 1 <= n <= 8 for n in self.sizes):
            raise ValueError(f"words is {words!r}: 1 to 8, or a list of such numbers")
        if rule not in RULES:
            raise ValueError(f"rule is {rule!r}: one of {', '.join(RULES)}")
        if eval_size < 1:
            raise ValueError(f"eval_size is {eval_size}: 1 or more")
        self.rule, self.eval_size = rule, eval_size

    def train(self, rng: random.Random, step: int) -> dict:
        return {"words": rng.sample(TRAINED, rng.choice(self.sizes))}

    def eval(self) -> list[dict]:
        rng = random.Random("sentences")
        return [{"words": rng.sample(HELD_OUT, self.sizes[i % len(self.sizes)])} for i in range(self.eval_size)]

    def prompt(self, example: dict) -> list[dict]:
        system = {"role": "system", "content": "Write one short sentence."}
        return [system, {"role": "user", "content": request(example["words"])}]

    def demonstration(self, rng: random.Random) -> tuple[dict, str]:
        words, sentence = rng.choice(EXAMPLES)
        return {"words": words}, sentence

    def reward(self, text: str, example: dict) -> dict:
        return sentence_reward(text, example, self.rule)

    def typed(self, text: str) -> dict:
        """For `python -m view play`: the words, with anything between them."""
        return {"words": words_of(text)}


def request(words: list[str]) -> str:
    *first, last = words
    listed = f"words {', '.join(first)} and {last}" if first else f"word {last}"
    return f"Write one short sentence with the {listed}."
