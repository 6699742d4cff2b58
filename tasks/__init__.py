"""The tasks: what a model is asked and what its answers are paid. Here: what makes a class a task, and loading by name.

A task is a class with four methods:

    train(rng, step) -> example       one training problem, a dict; all randomness comes from `rng`, a random.Random
    eval() -> [example, ...]          the evaluation problems, always the same
    prompt(example) -> str or list    text, or chat messages [{"role": ..., "content": ...}, ...]
    reward(text, example) -> dict     `REWARD_KEYS`, and any parts of the task's own. Numbers among those are averaged
                                      and logged under their names, which must not be names of the run's own figures

It may also have `prefill`, text that is put behind each prompt and begins the answer (`text` is prefill and
completion); `stop`, strings that end a completion; `worked_prefix`, which makes the model show its steps in the
evaluation; `typed(text) -> example`, for `python -m view play`; and `demonstration(rng) -> (example, text)`, a problem
and a right completion of it, for the setting `few_shot` and for `python -m harness.sft`.

A verifier, which pays for a text, is attacked by what it trains. It does bounded work, never raises, and never runs
what it reads.
"""

import inspect
import runpy
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

REWARD_KEYS = ("reward", "correct", "format", "prediction", "ground_truth")
TASKS = {"arithmetic": "mathformer:ArithmeticTask", "countdown": "tasks.countdown:Countdown"}
TASKS |= {"gsm8k": "tasks.gsm8k:GSM8K", "math": "tasks.competition_math:Math", "sentences": "tasks.sentences:Sentences"}
TASKS |= {"reasoning_gym": "tasks.gym:ReasoningGym"}
# what runs of an earlier layout have in their config.yaml
TASKS |= {"tasks:Countdown": TASKS["countdown"], "tasks:GSM8K": TASKS["gsm8k"], "tasks:Math": TASKS["math"]}


class UsageError(Exception):
    """Something a person has to change: shown as one line, without a traceback."""


def load_task(name: str, task_args: dict[str, Any], reward_seconds: float = 0.0):
    """The task called `name`: built-in, `module:Class`, or `path/to/file.py:Class`.

    With `reward_seconds` it has `workers`, which build it anew, and judge its answers within that time each.

    Raises:
        UsageError: there is no such task, or it does not take these arguments.
    """
    where, _, class_name = TASKS.get(name, name).rpartition(":")
    if not where:
        known = ", ".join(name for name in TASKS if ":" not in name)
        raise UsageError(f"unknown task {name!r}; built in: {known}; your own: module:Class or path/to/file.py:Class")
    try:
        if where.endswith(".py"):
            sys.path.insert(0, str(Path(where).parent))  # so that the file can import its neighbours
            found = runpy.run_path(where)
        else:
            found = vars(import_module(where))
    except Exception as error:  # anyone's code may be in there
        raise UsageError(f"task {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if class_name not in found:
        raise UsageError(f"task {name!r}: {where} has no class {class_name}")
    try:
        task = found[class_name](**task_args)
    except Exception as error:
        raise UsageError(f"task {name!r}: {error}; its arguments: {inspect.signature(found[class_name])}") from error
    if reward_seconds:
        from tasks.workers import Workers

        task.workers = Workers(name, task_args, reward_seconds)
    return task
