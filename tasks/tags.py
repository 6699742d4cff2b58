"""How an answer is cut out of a completion: the tags <think> and <answer>, in linear time."""

import re

MAX_CHARACTERS = 200_000  # some 50,000 tokens; a longer text is judged as an empty one, so that no text takes long


def final_part(text: str) -> str | None:
    """What follows the last `</think>`; None if thinking was begun, also by a prefill, and not ended."""
    after = text.rpartition("</think>")[2]
    return None if "<think>" in after else after


def answer_block(text: str) -> str | None:
    """The inside of the one `<answer>` block behind the thinking; None if there is none, or more than one."""
    part = final_part(text)
    if part is None or part.count("<answer>") != 1 or part.count("</answer>") != 1:
        return None
    match = re.search("<answer>(.*)</answer>", part, re.DOTALL)
    return match[1] if match else None


def is_think_then_answer(text: str) -> bool:
    """Whether the text ends in one `<think>...</think>` and, but for white space, one `<answer>...</answer>` behind it.

    By counting and cutting, in linear time: a pattern with several `.*` could be kept busy for minutes.
    """
    tags = [text.count(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")]
    before, _, after = text.partition("</think>")
    inside = after.strip()
    is_whole = inside.startswith("<answer>") and inside.endswith("</answer>")
    return tags[:2] == [1, 1] and "<think>" in before and is_whole and answer_block(text) is not None
