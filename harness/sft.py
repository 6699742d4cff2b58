"""Supervised fine-tuning (SFT), a warm start: worked examples of a task teach a model its form, before it is rewarded.

    python -m harness.sft --output FOLDER --config FILE ... [--SETTING VALUE ...]

The settings are grpo.py's: those of the model, the task, the prompt, the optimizer and the memory mean what they mean
there. A step takes as many rows as one of GRPO's, prompts_per_step * group_size, and draws a problem for each.
Reinforcement learning cannot start from a model that is never right. A few minutes on worked examples teach it the
form; GRPO does the rest.

The loss is the mean of -log p over the tokens of the completions, the end-of-sequence token among them.
"""

import math
import random
import shutil
import sys
import time
from pathlib import Path

from harness.command_line import ArgumentParser, check_arguments, check_can_be_written, errors_as_lines, parse_config
from harness.settings import Config, Sample, UsageError


def parse_arguments(argv: list[str]) -> tuple[Config, Path, list[str]]:
    """The settings, the folder for the trained model, and the words that name the settings."""
    parser = ArgumentParser(prog="python -m harness.sft", add_help=False, allow_abbrev=False)
    parser.add_argument("--output", type=Path)
    options, words = parser.parse_known_args(argv)
    output = options.output
    if {"-h", "--help"} & set(words):
        print(f"{__doc__}\nusage: python -m harness.sft --output FOLDER, and the settings of grpo.py:\n")
    elif output is None:
        raise UsageError("--output is needed: the folder for the trained model")
    elif output.exists():
        raise UsageError(f"{output} exists already: choose another --output, or remove it")
    else:
        check_can_be_written(output)
    config = parse_config(words)
    if config.resume:
        raise UsageError("resume is for runs of grpo.py: here, start again")
    if config.lora_rank:
        raise UsageError("lora_rank is for runs of grpo.py: here, all weights are trained")
    if config.steps < 1:
        raise UsageError("steps is 0: there is nothing to train")
    return config, output, words


if __name__ == "__main__":
    with errors_as_lines():
        _, _, settings = parse_arguments(sys.argv[1:])  # torch takes seconds: a mistake is answered before
    check_arguments(settings)

import transformers
from safetensors import SafetensorError
from tqdm import tqdm

from grpo import Policy, TorchSampler, completion_mask
from harness import loading, optimizers, parallel, prompts, streams, terminal
from harness.batching import own_microbatches, policy_inputs
from harness.model_checks import check_model
from harness.weights import kept_weights


def end_of_answer(run) -> int:
    """The token that ends an answer: in a chat that of the turn, in a text that of the sequence."""
    is_text = isinstance(prompts.prompt_of(run.task, run.problems[0].example), str)
    turn_end = None if is_text else loading.end_of_turn(run.tokenizer)
    for end in (turn_end, run.tokenizer.eos_token_id):
        if end in run.eos_ids:
            return end
    return run.eos_ids[0]


def draw_rows(run, step: int) -> tuple[list[Sample], int]:
    """The rows of a step, and how many were too long and drawn again; the step's number seeds the draw."""
    config, rng = run.config, random.Random(f"{run.config.seed}/{step}/sft")
    rows, too_long, n, end = [], 0, config.prompts_per_step * config.group_size, end_of_answer(run)
    while len(rows) < n:
        example, text = prompts.demonstration(run.task, rng)
        _, prompt_ids, begun = prompts.encode_prompt(run.tokenizer, run.task, example, config)
        if "<think>" in begun:
            text = text.replace("<think>", "", 1)  # which the prompt has opened
        if prompts.BLANK_LINE in config.stop:
            text = prompts.without_blank_lines(text)  # one would end the answer in a run
        ids = prompts.ids_of(run.tokenizer, text, add_special_tokens=False) + [end]
        if len(prompt_ids) <= config.max_prompt_tokens and len(ids) <= config.max_completion_tokens:
            rows.append(Sample(prompt_ids, ids, [0.0] * len(ids), truncated=False))
        elif (too_long := too_long + 1) > 100 * n:
            raise UsageError(
                f"nearly all demonstrations are over max_prompt_tokens = {config.max_prompt_tokens} or "
                f"max_completion_tokens = {config.max_completion_tokens}: raise them"
            )
    return rows, too_long


def sft_step(run, rows: list[Sample]) -> float:
    """One optimizer step on these rows. Returns the loss: nats a token, before the step."""
    total, found = sum(row.length for row in rows), 0.0
    for batch, scale, last in own_microbatches(rows, run.config.tokens_per_microbatch):
        inputs = policy_inputs(batch, run.accelerator.device)
        mask = completion_mask(inputs["lengths"])  # [B, T]

        def loss_of(logps, entropy, mask=mask):
            return (-logps.masked_fill(~mask, 0.0).sum() / total,)

        with parallel.holds_gradients(run.accelerator, run.policy, last):
            (loss,) = loss_of(*run.policy(**inputs, loss_of=loss_of, entropy=False))
            run.accelerator.backward(loss * scale)
        found += loss.item() * bool(scale)
    norm = float(run.accelerator.clip_grad_norm_(run.policy.parameters(), run.config.grad_clip))
    found = sum(parallel.join([found]))
    overflows = not math.isfinite(norm) and not run.accelerator.scaler  # which leaves out what overflows in fp16
    if overflows or not math.isfinite(found):
        raise UsageError("the gradient is not finite: the model has diverged, and is not written. Lower lr")
    run.optimizer.step()
    run.optimizer.zero_grad()
    return found


def save(run, folder: Path) -> None:
    """An ordinary model folder, whole or not at all."""
    weights = kept_weights(run.model, run.optimizer)
    if run.accelerator.is_main_process:
        partial = folder.with_name(f".{folder.name}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            run.model.save_pretrained(partial, state_dict=weights)
            run.tokenizer.save_pretrained(partial)
            partial.rename(folder)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"the model cannot be written to {folder}: {error}") from error


def sft(config: Config, output: Path) -> list[float]:
    """Trains for `steps` steps, or until Ctrl-C, and writes the model to `output`. Returns the loss of each step.

    Raises:
        UsageError: before the first step for whatever grpo.py refuses, and for a task that shows nothing; later if the
            model diverges, or cannot be written.
    """
    run, started, losses, tokens = loading.load(config), time.monotonic(), [], 0
    config = run.config
    rows, too_long = draw_rows(run, 1)
    if too_long:
        print(f"{too_long} of {too_long + len(rows)} demonstrations are too long, others take their places")
    print(f"the first demonstration: {terminal.printable(run.tokenizer.decode(rows[0].completion_ids), 400)}")
    check_model(run, Policy, TorchSampler)
    policy = Policy(run.model)
    run.policy, run.optimizer = run.accelerator.prepare(
        policy, optimizers.make_optimizer(policy, config, run.accelerator)
    )
    run.policy.train()
    transformers.utils.logging.disable_progress_bar()  # of saving: it would break up our own
    with terminal.finish_step_on_signal() as stop:
        shown = run.accelerator.is_main_process
        with tqdm(total=config.steps, unit="step", dynamic_ncols=True, disable=not shown) as bar:
            for step in range(1, config.steps + 1):
                for group in run.optimizer.param_groups:
                    group["lr"] = optimizers.learning_rate(config, step)
                rows = rows if step == 1 else draw_rows(run, step)[0]
                losses.append(sft_step(run, rows))
                tokens += sum(row.length for row in rows)
                bar.update()
                bar.set_postfix_str(f"loss {losses[-1]:.3f} nats a token")
                if parallel.any_process(stop.is_set() or streams.LOST.is_set()):
                    tqdm.write(f"stopped after step {step}: the model is written as it is now")
                    break
    save(run, output)
    print(
        f"{time.monotonic() - started:.0f} s, {len(losses)} steps, {tokens:,} tokens, loss {losses[0]:.3f} -> "
        f"{losses[-1]:.3f} nats a token. The model is in {output}"
    )
    return losses


def main(argv: list[str] | None = None) -> None:
    with errors_as_lines():
        config, output, _ = parse_arguments(sys.argv[1:] if argv is None else argv)
        losses = sft(config, output)
    sys.exit(0 if len(losses) == config.steps else 130)


if __name__ == "__main__":
    main()
