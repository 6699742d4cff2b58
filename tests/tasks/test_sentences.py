"""The rewards of Sentences: what each rule pays, and the answers that it pays although nobody wanted them."""

import random

import pytest

from harness.metrics import RESERVED
from tasks import REWARD_KEYS, load_task
from tasks.sentences import EXAMPLES, HELD_OUT, NOUNS, RULES, TRAINED, Sentences, sentence_reward, skeleton

MOUSE = {"words": ["mouse", "foot", "cat"]}


@pytest.mark.parametrize(
    "text, words, strict, own",
    [
        # an honest sentence is right by each rule
        ("The mouse ran over my foot while our cat slept.", 1, 1, 1),
        ("While the cat was asleep, a mouse bit his left foot!", 1, 1, 1),
        # what the first rule pays: a list; the words twice; one behind the other
        ("The mouse, foot and cat are a mouse, foot and cat.", 1, 0, 0),
        ("Mouse foot cat.", 1, 0, 0),
        ("Mouse, foot, cat are the three words of this.", 1, 0, 0),
        # what the second rule pays: the first worked example with other words
        ("The mouse left a foot in the cat.", 1, 1, 0),
        ("The mouse hid a foot in the cat.", 1, 1, 0),
        ("The old mouse quickly put a foot in the cat.", 1, 1, 0),
        # not right by any
        ("The mouse ran over my foot.", 0, 0, 0),
        ("the mouse ran over my foot while our cat slept.", 0, 0, 0),
        ("The mouse ran over my foot. The cat slept.", 0, 0, 0),
        ("The mouse ran over my foot while our cat slept", 0, 0, 0),
        ("The mice ran over my feet while our cats slept.", 0, 0, 0),
        ("The mousefoot ran over my foot while our cat slept.", 0, 0, 0),
        ("", 0, 0, 0),
        ("The mouse ran over my foot while our cat slept.\nIt is a nice day.", 0, 0, 0),
        (f"The mouse and {'very ' * 20}big foot and my cat.", 1, 0, 0),
        (f"A mouse {'x' * 10**6} foot cat.", 0, 0, 0),
    ],
)
def test_what_each_rule_pays(text, words, strict, own):
    found = [sentence_reward(text, MOUSE, rule) for rule in RULES]
    assert [parts["correct"] for parts in found] == [words, strict, own]
    for parts in found:
        assert (parts["reward"] == 1) == (parts["correct"] == 1) and 0 <= parts["reward"] <= 1
        assert set(REWARD_KEYS) <= parts.keys() and not parts.keys() & RESERVED


def test_what_is_nearly_right_is_paid_in_part():
    def paid(text, rule="words"):
        return sentence_reward(text, MOUSE, rule)["reward"]

    assert paid("My mouse sleeps.") == pytest.approx(1 / 6) and paid("My mouse has a foot.") == pytest.approx(2 / 6)
    assert paid("my mouse sleeps") == 0, "no sentence"
    # two of three words once, neither of the two other demands: too short, and too close
    assert paid("A mouse foot cat cat.", "strict") == pytest.approx(0.5 * 2 / 5)
    assert paid("The mouse ran over my foot while our dog slept.", "strict") == pytest.approx(0.5 * 4 / 5)


def test_parts_tell_how_it_was_done():
    parts = sentence_reward("The mouse, foot and cat left a mouse in the barn.", MOUSE, "own")
    assert [parts[key] for key in ("words_used", "listed", "copied", "sentence_length")] == [1, 1, 0, 11]
    assert sentence_reward("A mouse left a foot in the cat.", MOUSE)["copied"] == 0
    assert " ".join(skeleton("The Painter left a ladder in the barn.", EXAMPLES[0][0])) == "the _ a _ in the _"


def test_words_of_the_evaluation_are_in_no_training_and_in_no_example():
    task, rng = Sentences(words=[3, 5]), random.Random(0)
    trained = {word for step in range(400) for word in task.train(rng, step)["words"]}
    evaluated = {word for example in task.eval() for word in example["words"]}
    assert trained <= set(TRAINED) and evaluated <= set(HELD_OUT) and not set(TRAINED) & set(HELD_OUT)
    assert len(set(NOUNS)) == len(NOUNS) and len(trained) > 100 and len(evaluated) > 25
    assert not set(NOUNS) & {word for words, _ in EXAMPLES for word in words}
    assert {len(example["words"]) for example in task.eval()} == {3, 5} == {len(task.train(rng, 0)["words"]), 3, 5}
    assert task.eval() == Sentences(words=[3, 5]).eval()
    for words, sentence in EXAMPLES:
        assert sentence_reward(sentence, {"words": words}, "strict")["correct"] == 1


def test_the_prompt_asks():
    task = load_task("sentences", {})
    system, asked = task.prompt({"words": ["snow", "road", "water"]})
    assert asked == {"role": "user", "content": "Write one short sentence with the words snow, road and water."}
    assert system["role"] == "system"
    assert Sentences(words=1).prompt({"words": ["snow"]})[1]["content"].endswith("with the word snow.")
    assert task.typed("Snow, road; water") == {"words": ["snow", "road", "water"]}


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(words=0), "1 to 8"), (dict(words=[]), "1 to 8"), (dict(words=[3, 9]), "1 to 8"),
        (dict(rule="kind"), "one of words, strict, own"),
        (dict(eval_size=0), "1 or more"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(given, said):
    from tasks import UsageError

    with pytest.raises(UsageError, match=said):
        load_task("sentences", given)
