"""Between the task and the model: problems drawn and encoded, completions judged, all of it checked."""

import itertools
import random
import re
import threading
import time
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

from tqdm import tqdm

from harness.metrics import RESERVED, is_finite, is_number
from harness.settings import Config
from harness.stopping import up_to_stop
from harness.terminal import printable
from tasks import REWARD_KEYS, UsageError
from tasks.foreign import in_a_line, plain, shortened

BLANK_LINE = "\n\n"  # it ends a worked example in a text, and then the model's answer


class Problem(NamedTuple):
    """A problem of the task, ready to be sampled from."""

    example: dict
    prompt: str
    ids: list[int]
    begun: str = ""  # the beginning of the answer, if the prompt has it: it is judged with the completion


@contextmanager
def of_the_task(task, call: str):
    """Whatever is raised in anyone's code becomes one line that says where."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{type(task).__name__}.{call} raised {in_a_line(error)}") from error


def checked_example(task, call: str, example) -> dict:
    if not isinstance(example, dict):
        given = shortened(example)
        raise UsageError(f"{type(task).__name__}.{call} must give problems, which are dicts, but gave {given}")
    return example


def is_chat(prompt) -> bool:
    """Whether it is a list of messages, each with text as its role and its content."""
    keys = ("role", "content")
    return isinstance(prompt, list) and bool(prompt) and all(
        isinstance(m, dict) and all(isinstance(m.get(key), str) for key in keys) for m in prompt
    )  # fmt: skip


def render(tokenizer, messages: list[dict], **more) -> str:
    """The messages through the model's chat template; a system message that it refuses goes into the user's turn."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **more)
    except Exception as error:  # jinja2's, and whatever a template raises
        if len(messages) > 1 and messages[0]["role"] == "system" and messages[1]["role"] == "user":
            both = f"{messages[0]['content']}\n\n{messages[1]['content']}"
            rendered = render(tokenizer, [{"role": "user", "content": both}, *messages[2:]], **more)
            say_once("this model's chat template takes no system message: it goes into the user's turn")
            return rendered
        raise UsageError(f"the model's chat template cannot be used: {in_a_line(error)}") from error


@cache
def say_once(note: str) -> None:
    print(note)


def prompt_of(task, example: dict) -> str | list[dict]:
    """What the task asks: a text, or chat messages."""
    with of_the_task(task, "prompt()"):
        prompt = task.prompt(example)
    if not isinstance(prompt, str) and not is_chat(prompt):
        raise UsageError(
            f"{type(task).__name__}.prompt() must give a text, or a list of messages like "
            f"{{'role': 'user', 'content': 'text'}}, but gave {shortened(prompt)}"
        )
    return prompt


def demonstration(task, rng: random.Random) -> tuple[dict, str]:
    """A problem and a right completion of it, from the task's `demonstration(rng)`."""
    if not hasattr(task, "demonstration"):
        raise UsageError(
            f"{type(task).__name__} has no method `demonstration(rng) -> (example, text)`, which gives a problem and a "
            "right answer to it: few_shot and harness.sft need one"
        )
    with of_the_task(task, "demonstration()"):
        example, text = task.demonstration(rng)
    checked_example(task, "demonstration()", example)
    if not isinstance(text, str):
        raise UsageError(f"{type(task).__name__}.demonstration() must give text, but gave {shortened(text)}")
    return example, text


def without_blank_lines(text: str) -> str:
    return re.sub(r"\n\s*\n", "\n", text)


WORKED: dict = {}  # by the task's id, since a task need not be hashable; it is stored too, so that no other gets the id


def worked_examples(task, count: int) -> list[tuple[str | list[dict], str]]:
    """So many different problems of the task, or all it has, as (prompt, right completion); always the same ones."""
    key = (id(task), count)
    if key in WORKED:
        return WORKED[key][1]
    rng, found = random.Random("few_shot"), []
    for _ in range(100 * count):
        example, text = demonstration(task, rng)
        if (prompt := prompt_of(task, example)) not in [other for other, _ in found]:
            found.append((prompt, getattr(task, "prefill", "") + text))
        if len(found) == count:
            break
    WORKED[key] = task, found
    return found


def with_worked_examples(task, prompt: str | list[dict], count: int) -> str | list[dict]:
    """The prompt behind `count` other problems and their right answers: as earlier turns, or with blank lines between.

    Raises:
        UsageError: the task does not have that many.
    """
    shown = [pair for pair in worked_examples(task, count + 1) if pair[0] != prompt][:count]
    if len(shown) < count:
        raise UsageError(f"few_shot is {count}, and {type(task).__name__} has {len(shown)} other worked examples")
    if isinstance(prompt, str):
        return "".join(asked + without_blank_lines(text) + BLANK_LINE for asked, text in shown) + prompt
    turns = [turn for asked, text in shown for turn in (asked[-1], {"role": "assistant", "content": text})]
    return [*prompt[:-1], *turns, prompt[-1]]


def ids_of(tokenizer, text: str, **more) -> list[int]:
    """The text's token ids. Raises UsageError for a text that the tokenizer has no tokens for."""
    try:
        return tokenizer(text, **more)["input_ids"]
    except Exception as error:  # of the tokenizers library, a bare Exception
        raise UsageError(f"this model's tokenizer cannot read {shortened(text)}: {in_a_line(error)}") from error


def encode_prompt(tokenizer, task, example: dict, config: Config | None = None) -> tuple[str, list[int], str]:
    """The prompt as text and as token ids, and what of it is the beginning of the answer.

    Chat messages go through the model's chat template, with `chat_template_args`, text through nothing; `few_shot`
    worked examples come first. The answer begins where the template ends with `<think>`, as those of some reasoning
    models do, or with the task's `prefill`.
    """
    system, more = (config.system_prompt, config.chat_template_args) if config else ("", {})
    prompt, prefill = prompt_of(task, example), getattr(task, "prefill", "")
    if config and config.few_shot:
        prompt = with_worked_examples(task, prompt, config.few_shot)
    in_chat, opened = not isinstance(prompt, str), ""
    if in_chat:
        if not tokenizer.chat_template:
            raise UsageError(
                "the task gives chat messages, but this model's tokenizer has no chat template: "
                "take a chat (instruct) model, or let prompt() return a string"
            )
        if system:
            prompt = [{"role": "system", "content": system}, *prompt[prompt[0]["role"] == "system" :]]
        answers = [m["content"] for m in prompt if m["role"] == "assistant"]
        prompt = render(tokenizer, prompt, add_generation_prompt=True, **more)
        if config and config.few_shot and not all(text.strip() in prompt for text in answers):
            raise UsageError(
                "few_shot: this model's chat template leaves out parts of earlier answers (some drop the thinking): "
                "the model would see another form than the one that is paid. Take a prompt_template of text, if the "
                "task has one, another --chat_template, or python -m harness.sft"
            )
        if prompt.rstrip().endswith("<think>"):
            opened, prefill = prompt[prompt.rindex("<think>") :], prefill.replace("<think>", "")
    elif system or more:
        given = "system_prompt" if system else "chat_template_args"
        raise UsageError(f"{given} is for tasks that give chat messages: {type(task).__name__}.prompt() gives text")
    prompt += prefill
    # a chat template writes the special tokens itself; plain text gets those that the tokenizer always adds
    ids = ids_of(tokenizer, prompt, add_special_tokens=not in_chat)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if not in_chat and ids[:2] == [bos, bos]:  # the text has its own
        ids = ids[1:]
    if not in_chat and len(ids) > 1 and ids[-1] == eos and not prompt.endswith(tokenizer.eos_token):
        ids = ids[:-1]  # some tokenizers end every text: there would be nothing to go on with
    if not ids:
        raise UsageError(f"the prompt of {shortened(example)} is empty: there is no token to go on from")
    return prompt, ids, opened + prefill


def written_text(tokenizer, rollout, stop: tuple[str, ...] = ()) -> str:
    """What the model wrote, special tokens included, except the end-of-sequence token; to the end of a stop string.

    An id that the tokenizer does not have is shown as such. Left to itself it would vanish: 7, an unknown id and 2
    would be judged as 72.
    """
    ids = rollout.completion_ids
    if rollout.truncated:
        return decoded(tokenizer, ids)
    whole = decoded(tokenizer, ids) if stop else ""
    if any(string in whole for string in stop):  # it was not the end-of-sequence token that ended it
        return up_to_stop(whole, stop)
    return decoded(tokenizer, ids[:-1])


def decoded(tokenizer, ids: list[int]) -> str:
    """With the ids that the tokenizer does not have."""
    if max(ids, default=0) < len(tokenizer):
        return tokenizer.decode(ids)
    runs = itertools.groupby(ids, key=lambda token: token < len(tokenizer))
    return "".join(
        tokenizer.decode(list(run)) if known else "".join(f"<unknown token {token}>" for token in run)
        for known, run in runs
    )


def draw_prompts(task, tokenizer, config: Config, step: int, attempt: int = 0) -> tuple[list[Problem], int]:
    """The step's P problems, and how many were too long and drawn again.

    The step's number seeds the draw, so a resumed run needs no memory of what was drawn before.
    """
    rng = random.Random(f"{config.seed}/{step}" + (f"/{attempt}" if attempt else ""))
    drawn, too_long = [], 0
    while len(drawn) < config.prompts_per_step:
        with of_the_task(task, "train()"):
            example = checked_example(task, "train()", task.train(rng, step))
        problem = Problem(example, *encode_prompt(tokenizer, task, example, config))
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


def judge_all(task, rollouts: list, problems: list[Problem]) -> list[dict]:
    """What the task's reward() returns for the text of each rollout; in parallel where its time is limited.

    Rollouts of one problem are neighbours, as many of each.

    Raises:
        UsageError: it raised, or gave what cannot be used; names the completion.
    """
    asked = [(r.text, problems[i * len(problems) // len(rollouts)]) for i, r in enumerate(rollouts)]
    if workers := getattr(task, "workers", None):
        results = workers.rewards([(text, problem.example) for text, problem in asked])
    else:
        results = (judged(task, *pair) for pair in asked)
    judgements = []
    for pair, result in zip(asked, results, strict=True):
        where = where_judged(task, *pair)
        if "error" in result:
            raise UsageError(f"{where} raised {result['error']}")
        parts = checked_parts(where, result["parts"])
        judgements.append({"timed_out": 0.0, "worker_died": 0.0} | parts if workers else parts)
    return judgements


def judge(task, text: str, problem: Problem) -> dict:
    return judge_all(task, [SimpleNamespace(text=text)], [problem])[0]


def where_judged(task, text: str, problem: Problem) -> str:
    return f"{type(task).__name__}.reward() for the prompt {problem.prompt!r} and the completion {text!r}"


def judged(task, text: str, problem: Problem) -> dict:
    """In this process, without a limit."""
    try:
        with PATIENCE.waiting_for(where_judged(task, text, problem)):
            return {"parts": task.reward(text, problem.example)}
    except Exception as error:  # the task may be anyone's code
        return {"error": in_a_line(error)}


def checked_parts(where: str, parts) -> dict:
    if not isinstance(parts, dict) or any(key not in parts for key in REWARD_KEYS):
        raise UsageError(f"{where} must be a dict with the keys {', '.join(REWARD_KEYS)}, but is {shortened(parts)}")
    if taken := sorted(parts.keys() & RESERVED):
        raise UsageError(f"{where} gives {', '.join(taken)}: the run's own figures have that name, choose another")
    parts = {str(key): plain(value) for key, value in parts.items()}
    for key in ("reward", "correct", "format"):
        if not is_number(parts[key]) or not is_finite(parts[key]):
            raise UsageError(f"{where} gives the {key} {shortened(parts[key])}, which is no finite number")
    for key, value in parts.items():
        if isinstance(value, int) and not is_finite(value):
            raise UsageError(f"{where} gives the {key} {shortened(value)}, which is too large to be averaged")
    if parts["correct"] not in (0, 1):
        raise UsageError(f"{where} gives the correct {parts['correct']!r}, which must be 0 or 1; parts go into reward")
    return parts


def evaluation_problems(task, tokenizer, config: Config) -> list[Problem]:
    """The evaluation problems whose prompts fit; checks the task and the lengths on the way, before any long work."""
    with of_the_task(task, "eval()"):
        examples = task.eval()
        examples = [checked_example(task, "eval()", example) for example in examples]
    if not examples:
        raise UsageError(f"{type(task).__name__}.eval() gave no problems: there is nothing to evaluate on")
    problems = [Problem(example, *encode_prompt(tokenizer, task, example, config)) for example in examples]
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
