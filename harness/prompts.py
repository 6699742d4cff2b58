"""Between the task and the model: problems drawn and encoded, completions judged, all of it checked."""

import math
import random
import threading
import time
from contextlib import contextmanager
from typing import NamedTuple

from tqdm import tqdm

from harness.metrics import RESERVED, is_number
from harness.settings import Config
from harness.terminal import printable
from tasks import REWARD_KEYS, UsageError


class Problem(NamedTuple):
    """A problem of the task, ready to be sampled from."""

    example: dict
    prompt: str
    ids: list[int]


def encode_prompt(tokenizer, task, example: dict) -> tuple[str, list[int]]:
    """The prompt as text and as token ids; chat messages go through the model's chat template, text through nothing."""
    prompt = task.prompt(example)
    is_chat = not isinstance(prompt, str)
    if is_chat:
        if not tokenizer.chat_template:
            raise UsageError(
                "the task gives chat messages, but this model's tokenizer has no chat template: "
                "take a chat (instruct) model, or let prompt() return a string"
            )
        prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    prompt += getattr(task, "prefill", "")
    # a chat template writes the special tokens itself; plain text gets those that the tokenizer always adds
    ids = tokenizer(prompt, add_special_tokens=not is_chat)["input_ids"]
    if not ids:
        raise UsageError(f"the prompt of {example!r} is empty: there is no token to go on from")
    return prompt, ids


def draw_prompts(task, tokenizer, config: Config, step: int, attempt: int = 0) -> tuple[list[Problem], int]:
    """The step's P problems, and how many were too long and drawn again.

    The step's number seeds the draw, so a resumed run needs no memory of what was drawn before.
    """
    rng = random.Random(f"{config.seed}/{step}" + (f"/{attempt}" if attempt else ""))
    drawn, too_long = [], 0
    while len(drawn) < config.prompts_per_step:
        example = task.train(rng, step)
        problem = Problem(example, *encode_prompt(tokenizer, task, example))
        if len(problem.ids) <= config.max_prompt_tokens:
            drawn.append(problem)
        elif (too_long := too_long + 1) > 1000 * config.prompts_per_step:
            raise UsageError(f"nearly all prompts are over max_prompt_tokens = {config.max_prompt_tokens}: raise it")
    return drawn, too_long


class Patience:
    """Says once which call of reward() does not return, from a thread that looks every second."""

    SECONDS = 10

    def __init__(self):
        self.since, self.where, self.said, self.thread = None, "", False, None

    @contextmanager
    def waiting_for(self, where: str):
        if self.thread is None:
            self.thread = threading.Thread(target=self.look, daemon=True)
            self.thread.start()
        self.since, self.where = time.monotonic(), where
        try:
            yield
        finally:
            self.since = None

    def look(self) -> None:
        while not self.said:
            time.sleep(1)
            since = self.since
            if since and time.monotonic() - since > self.SECONDS:
                self.said = True
                where = printable(self.where, 400)
                tqdm.write(f"{where} has not returned for {self.SECONDS} s: --reward_seconds would end it")


PATIENCE = Patience()


def judge(task, text: str, problem: Problem) -> dict:
    """What the task's reward() returns for `text`; a UsageError that names the completion if that is unusable."""
    where = f"{type(task).__name__}.reward() for the prompt {problem.prompt!r} and the completion {text!r}"
    try:
        with PATIENCE.waiting_for(where):
            parts = task.reward(text, problem.example)
    except Exception as error:  # the task may be anyone's code: say which completion it failed on
        raise UsageError(f"{where} raised {type(error).__name__}: {error}") from error
    if not isinstance(parts, dict) or any(key not in parts for key in REWARD_KEYS):
        raise UsageError(f"{where} must be a dict with the keys {', '.join(REWARD_KEYS)}, but is {parts!r}")
    if taken := sorted(parts.keys() & RESERVED):
        raise UsageError(f"{where} gives {', '.join(taken)}: the run's own figures have that name, choose another")
    parts = {key: value.item() if hasattr(value, "item") else value for key, value in parts.items()}  # numpy, torch
    for key in ("reward", "correct", "format"):
        if not is_number(parts[key]) or not math.isfinite(parts[key]):
            raise UsageError(f"{where} gives the {key} {parts[key]!r}, which is no finite number")
    if parts["correct"] not in (0, 1):
        raise UsageError(f"{where} gives the correct {parts['correct']!r}, which must be 0 or 1; parts go into reward")
    return parts


def evaluation_problems(task, tokenizer, config: Config) -> list[Problem]:
    """The evaluation problems whose prompts fit; checks the task and the lengths on the way, before any long work."""
    problems = [Problem(example, *encode_prompt(tokenizer, task, example)) for example in task.eval()]
    fitting = [problem for problem in problems if len(problem.ids) <= config.max_prompt_tokens]
    if not fitting:
        shortest = min((len(problem.ids) for problem in problems), default=0)
        raise UsageError(
            f"no prompt fits: the shortest of {len(problems)} evaluation prompts has {shortest} tokens, "
            f"and max_prompt_tokens is {config.max_prompt_tokens}"
        )
    if len(fitting) < len(problems):
        print(f"{len(problems) - len(fitting)} evaluation prompts over {config.max_prompt_tokens} tokens are left out")
    judge(task, "", fitting[0])
    draw_prompts(task, tokenizer, config, step=1)
    return fitting
