"""Strings that end a completion, such as `</answer>`: noticed with the token that completes them, and not decoded each
time.

The token ids and log-probs stay those that were sampled, so that the last token is trained with all others. What it
has behind the string is not judged.
"""

from functools import cache

import torch

NOT_WHOLE = "\ufffd"  # what bytes decode to that are only a part of a character


def up_to_stop(text: str, stops: tuple[str, ...]) -> str:
    """The text, to the end of the string that is complete in it first; a string of white space is not part of it."""
    found = [(text.index(stop) + len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text
    end, stop = min(found)
    return text[: end - len(stop) * stop.isspace()]


@cache
def closing_tokens(tokenizer, stops: tuple[str, ...]) -> torch.Tensor:
    """The tokens that can complete one of the strings: their text has its last character, or a part of a character."""
    last = {stop[-1] for stop in stops} | {NOT_WHOLE}
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return torch.tensor([token for token, text in enumerate(texts) if not last.isdisjoint(text)])


def completes(tokenizer, stops: tuple[str, ...], so_far: torch.Tensor) -> torch.Tensor:
    """[b, t] to [b]: whether the last token of a row completes a stop string.

    Only the ends of rows whose last token can are decoded: a string of n bytes lies in n tokens.
    """
    found = torch.isin(so_far[:, -1], closing_tokens(tokenizer, stops).to(so_far.device))
    tail = max(len(stop.encode()) for stop in stops) + 4  # in front, bytes of a character may be missing
    for row in found.nonzero()[:, 0].tolist():
        text = tokenizer.decode(so_far[row, -tail:].tolist())
        found[row] = any(stop in text for stop in stops)
    return found
