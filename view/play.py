"""A playground: the base's and the trained model's answers to a problem, side by side with their rewards.

    python -m view play runs/<run>

Type a problem as the task writes it (arithmetic: `3*(4+5)`; countdown: `3 7 25 = 46`; gsm8k and math: a question, ####
and its answer), or press Enter for one of the evaluation problems. Ctrl-D ends it.
"""

import random
import shutil
import sys
import textwrap
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import grpo
from harness import devices, loading, lora, prompts
from harness.run_folder import RunFolder
from harness.settings import Config
from harness.terminal import printable
from tasks import UsageError, load_task


def trained_model(run: Path, config: Config) -> str:
    """final/, or the newest whole checkpoint of a run that has none yet."""
    found = run / "final" if (run / "final").exists() else RunFolder(run).newest_whole(config.steps)
    if not found:
        raise UsageError(f"{run} has no trained model yet: neither final/ nor a checkpoint")
    return str(found)


def problem_of(text: str, task, tokenizer, rng: random.Random, problems: list[dict], config: Config) -> prompts.Problem:
    """What was typed as a problem, or a random one of the evaluation if nothing was."""
    if text and not hasattr(task, "typed"):
        raise ValueError(f"{type(task).__name__} takes no typed problems (it has no method `typed`): press Enter")
    example = task.typed(text) if text else rng.choice(problems)
    return prompts.Problem(example, *prompts.encode_prompt(tokenizer, task, example, config))


def answer_lines(title: str, rollout: grpo.Rollout, width: int) -> list[str]:
    verdict = "right" if rollout.parts["correct"] else "wrong"
    lines = [f"{title}: {verdict}, reward {rollout.reward:.2f}, {rollout.length} tokens"]
    lines[0] += ", cut off" if rollout.truncated else ""
    for paragraph in rollout.text.splitlines() or [""]:
        wrapped = textwrap.wrap(printable(paragraph, len(paragraph)), width - 2)
        lines += [f"  {line}" for line in wrapped or [""]]
    return lines


def side_by_side(left: list[str], right: list[str], width: int) -> str:
    return "\n".join(f"{a:{width}} | {b}".rstrip() for a, b in zip_longest(left, right, fillvalue=""))


def play(run: Path, config: Config, samples: int, seed: int) -> None:
    task = load_task(config.task, config.task_args, config.reward_seconds)
    if config.precision == "fp16":  # the run's card may be another one
        config = replace(config, precision="auto")
    accelerator = devices.make_accelerator(config)
    samplers, trusted = {}, config.trust_remote_code
    for title, name in (("base", config.model), ("trained", trained_model(run, config))):
        adapter = Path(name) if lora.holds_adapter(Path(name)) else None  # of a run that has no final/ yet
        model, tokenizer = loading.load_model(config.model if adapter else name, False, trusted, adapter)
        if adapter:
            lora.add_adapters(model, config, accelerator, adapter)
        loading.limit_threads(model.to(accelerator.device).eval())
        eos = loading.find_eos(model, tokenizer)
        samplers[title] = grpo.TorchSampler(model, eos, config.sample_rows, accelerator.autocast, tokenizer=tokenizer)
    problems, rng = task.eval(), random.Random(seed)
    greedy = config.most_likely
    print(f"{config.model} and {run}. A problem, or Enter for a random one; Ctrl-D ends it.")
    for turn in range(sys.maxsize):
        try:
            text = input("> ").strip()
        except EOFError:
            return
        try:
            problem = problem_of(text, task, tokenizer, rng, problems, config)
        except (ValueError, ZeroDivisionError) as error:
            why = "it divides by 0" if isinstance(error, ZeroDivisionError) else error
            print(f"  that is no problem of this task: {why}")
            continue
        width = (min(160, shutil.get_terminal_size().columns) - 3) // 2
        columns = []
        for title, sampler in samplers.items():
            found = grpo.complete(sampler, tokenizer, task, [problem], 1, greedy, seed)
            if samples:
                found += grpo.complete(sampler, tokenizer, task, [problem], samples, config.sampling, seed + turn)
            right = sum(int(r.parts["correct"]) for r in found[1:])
            lines = [f"{title.upper()}" + (f", {right} of {samples} samples right" if samples else "")]
            for i, rollout in enumerate(found):
                lines += answer_lines("most likely" if i == 0 else f"sample {i}", rollout, width)
            columns.append(lines)
        for line in problem.prompt.splitlines():
            print(printable(line, len(line)))
        print(f"the answer is {printable(str(found[0].parts['ground_truth']))}\n{side_by_side(*columns, width)}\n")
