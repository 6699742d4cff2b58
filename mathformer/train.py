"""Supervised pretraining of the small model on worked and unworked arithmetic.

    python -m mathformer.train --output my_base --steps 2000
    python -m mathformer.train --resume my_base          go on after Ctrl-C

Two phases. In the first, most answers show their steps: the model learns to work problems out. In the second, short
one, most answers are given at once: the model gets into the habit of answering without steps, and still knows how.
That habit is what reinforcement learning then finds does not pay. (A model that was never shown the second phase has
nothing to discover; one that was never shown the first has nothing to discover it with.)
"""

import dataclasses
import json
import math
import random
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from harness.command_line import check_folder_of, errors_as_lines, parse_settings
from harness.files import quoted
from harness.loading import load_model
from harness.run_folder import RunFolder
from harness.terminal import finish_step_on_signal
from mathformer.model import SIZES, MathformerConfig, MathformerForCausalLM, load_balancing_loss
from mathformer.task import ArithmeticTask, solution_text
from mathformer.tokenizer import build_tokenizer

SETTINGS_FILE = "pretraining.json"  # in the model's folder: how it was made
POOL = 32  # batches whose problems are drawn together


@dataclasses.dataclass
class PretrainConfig:
    output: str = ""
    """folder for the trained model; it must not exist yet"""
    resume: str = ""
    """folder of a pretraining that was stopped, to go on with; its settings are used"""

    # The model
    modelsize: str = "small"
    """tiny, small, medium or large"""
    num_experts: int = 1
    """MLPs of each block; more than 1 makes a mixture of experts"""
    active_experts: int = 1
    """how many of them each token goes through"""
    dropout: float = 0.0
    """dropout on what each block adds, in pretraining only"""

    # The problems
    max_digits: int = 1
    """digits of the numbers in a problem"""
    max_depth: int = 3
    """operators on the longest path of a problem"""
    operators: str = "+-*"
    """operators that problems use: `+-*`, `+ - max next`, or `all`"""
    max_value: int = 99
    """problems with a larger number in them or in their steps are left out"""
    negatives: float = 0.0
    """probability of a minus in front of a number of the problem"""
    parentheses: float = 0.0
    """probability of parentheses that are not needed"""
    spaces: float = 0.0
    """probability of a space between two symbols"""
    endian: str = "big"
    """digits of numbers: big (most significant first), little, or both"""
    columns: bool = False
    """steps show carries and borrows, digit by digit; worth it with more than one digit"""
    prob_scratchpad: float = 0.9
    """share of answers that show their steps, in the first phase"""
    final_prob_scratchpad: float = 0.1
    """the same in the second phase"""
    final_share: float = 0.15
    """share of the steps that belong to the second phase"""

    # The training
    steps: int = 26000
    """optimizer steps of both phases together"""
    batch_size: int = 128
    """problems a step"""
    lr: float = 3e-3
    """peak learning rate: linear warm-up over 2 % of the steps, then a cosine to 1 % of it"""
    weight_decay: float = 0.01
    """AdamW's weight decay"""
    balance_coef: float = 0.01
    """weight of the loss that keeps the experts evenly loaded"""
    seed: int = 0
    """seed of the weights and of the problems"""
    save_steps: int = 2000
    """write a checkpoint, from which --resume goes on, every so many steps"""
    log_csv: str | None = None
    """file for step, loss, accuracy and seconds"""

    def __post_init__(self):
        if bool(self.output) == bool(self.resume):
            raise ValueError("give --output, a folder for the trained model, or --resume, one to go on with")
        if self.modelsize not in SIZES:
            raise ValueError(f"modelsize {self.modelsize!r}: choose one of {', '.join(SIZES)}")
        for name in ("steps", "batch_size", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be 1 or more")
        for name in ("prob_scratchpad", "final_prob_scratchpad", "final_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be from 0 to 1")
        if not self.lr > 0:
            raise ValueError(f"lr is {self.lr}, it must be greater than 0")
        check_folder_of(self.log_csv)
        self.task()
        self.model_config(build_tokenizer())

    def task(self) -> ArithmeticTask:
        return ArithmeticTask(**task_settings(dataclasses.asdict(self)))

    def model_config(self, tokenizer: PreTrainedTokenizerFast) -> MathformerConfig:
        return model_config(self.modelsize, tokenizer, self.num_experts, self.active_experts, self.dropout)


def task_settings(pretraining: dict) -> dict:
    """Of the settings of a pretraining, those that say what its problems were: arguments of `ArithmeticTask`."""
    names = ("max_digits", "max_depth", "operators", "max_value", "negatives", "parentheses", "spaces", "endian")
    return {name: pretraining[name] for name in names if name in pretraining}


def model_config(
    modelsize: str,
    tokenizer: PreTrainedTokenizerFast,
    num_experts: int = 1,
    active_experts: int = 1,
    dropout: float = 0,
) -> MathformerConfig:
    width, layers, heads = SIZES[modelsize]
    return MathformerConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_experts=num_experts,
        active_experts=active_experts,
        hidden_dropout=dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_model(modelsize: str, tokenizer: PreTrainedTokenizerFast, **settings) -> MathformerForCausalLM:
    """A freshly initialised model of one of the `SIZES`; torch's global seed decides its weights."""
    return MathformerForCausalLM(model_config(modelsize, tokenizer, **settings))


def batches(rng: random.Random, config: PretrainConfig, task: ArithmeticTask, tokenizer, prob_scratchpad: float):
    """Draws a pool of problems and yields batches (ids [B, T], labels [B, T], lengths [B], weight).

    Sorting the pool by length before it is cut into batches leaves little padding. Labels are -100 on the prompt and
    on padding: the model learns to answer, not to invent problems. `weight` times the summed loss of a batch is the
    token mean over the pool. (The mean inside a batch would count a token of a long answer less than one of a short
    answer, and the model would learn to start too few long ones.)
    """
    trees = [task.draw(rng, for_eval=False) for _ in range(POOL * config.batch_size)]
    problems = [task.example(tree, rng) for tree in trees]
    texts = [
        solution_text(tree, rng.random() < prob_scratchpad, problem["endian"], config.columns)
        for tree, problem in zip(trees, problems, strict=True)
    ]
    prompts, answers = (tokenizer(t)["input_ids"] for t in ([problem["prompt"] for problem in problems], texts))
    rows = sorted(zip(prompts, answers, strict=True), key=lambda row: len(row[0]) + len(row[1]))
    weight = POOL / sum(len(answer) + 1 for answer in answers)
    chunks = [rows[i : i + config.batch_size] for i in range(0, len(rows), config.batch_size)]
    rng.shuffle(chunks)
    eos, pad = [tokenizer.eos_token_id], [tokenizer.pad_token_id]
    for chunk in chunks:
        lengths = [len(prompt) + len(answer) + 1 for prompt, answer in chunk]
        ids, labels = [], []
        for (prompt, answer), length in zip(chunk, lengths, strict=True):
            gap = max(lengths) - length
            ids.append(prompt + answer + eos + pad * gap)
            labels.append([-100] * len(prompt) + answer + eos + [-100] * gap)
        yield torch.tensor(ids), torch.tensor(labels), torch.tensor(lengths), weight


def learning_rate(config: PretrainConfig, step: int) -> float:
    """The rate of step 0, 1, ..., steps - 1."""
    warmup = max(1, config.steps // 50)
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.lr * min((step + 1) / warmup, 0.01 + 0.99 * cosine)


def pretrain(config: PretrainConfig) -> bool:
    """Trains and saves the model; stopped and resumed, it comes to the same one. Returns False if stopped."""
    resume = bool(config.resume)
    if resume:
        config = interrupted_config(config)
    folder, rng, task = RunFolder(Path(config.output)), random.Random(config.seed), config.task()
    if not resume and folder.path.exists():
        go_on = f", or go on with --resume {folder.path}" if folder.checkpoints() else " or remove it"
        raise ValueError(f"{folder.path} exists already: choose another --output{go_on}")
    transformers.utils.logging.disable_progress_bar()  # of saving: it would break up our own
    torch.manual_seed(config.seed)
    if resume:
        checkpoint = folder.newest_whole(config.steps)
        model, tokenizer = load_model(str(checkpoint))
        for module in model.modules():  # load_model is made for RL, and takes dropout out
            if isinstance(module, torch.nn.Dropout):
                module.p = config.dropout
        model.config.hidden_dropout = config.dropout
    else:
        tokenizer = build_tokenizer()
        model = MathformerForCausalLM(config.model_config(tokenizer))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.98))
    state = dict(step=0, seconds=0.0, tokens=0, right=0, answers=0)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("output", "resume", "log_csv")}
    if resume:
        state = folder.resume(checkpoint, optimizer)
        version, numbers, gauss = state.pop("rng")
        rng.setstate((version, tuple(numbers), gauss))
    else:
        folder.path.mkdir(parents=True)
        (folder.path / "metrics.jsonl").touch()
        (folder.path / SETTINGS_FILE).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    started, saved = time.monotonic() - state["seconds"], state["step"]
    tokens, right, answers = state["tokens"], state["right"], state["answers"]
    first_phase = round(config.steps * (1 - config.final_share))
    stream = iter(())
    bar = tqdm(total=config.steps, initial=saved, unit="step", smoothing=0.05, mininterval=1, dynamic_ncols=True)
    with finish_step_on_signal() as stop:
        for step in range(saved, config.steps):
            batch = next(stream, None) if step != first_phase else None  # the second phase starts a pool of its own
            if batch is None:
                # Between two pools, everything random follows from these two: the place for a checkpoint.
                torch.manual_seed(config.seed * 1_000_003 + step)  # dropout
                if step > saved and (stop.is_set() or step - saved >= config.save_steps):
                    state = dict(seconds=time.monotonic() - started, tokens=tokens, right=right, answers=answers)
                    folder.save_checkpoint(step, model, tokenizer, optimizer, 1, **state, rng=rng.getstate())
                    saved = step
                if stop.is_set():
                    bar.close()
                    if not saved:
                        raise KeyboardInterrupt
                    again = f"python -m mathformer.train --resume {quoted(folder.path)}"
                    print(f"stopped after step {saved}; go on with: {again}")
                    return False
                share = config.prob_scratchpad if step < first_phase else config.final_prob_scratchpad
                stream = batches(rng, config, task, tokenizer, share)
                batch = next(stream)
            ids, labels, lengths, weight = (b.to(device) if torch.is_tensor(b) else b for b in batch)
            ids, labels = ids[:, :-1], labels[:, 1:]

            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            out = model(ids, output_router_logits=True)
            loss = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
            objective = weight * loss
            if config.num_experts > 1:
                real = torch.arange(ids.shape[1], device=device) < lengths[:, None]
                balance = load_balancing_loss(out.router_logits, real.flatten(), config.active_experts)
                objective = objective + config.balance_coef * balance
            objective.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

            # an answer counts as right if each token is the most likely one after the right tokens before it
            right += int(((out.logits.argmax(-1) == labels) | (labels == -100)).all(1).sum())
            answers += len(labels)
            batch_tokens = int((labels != -100).sum())
            tokens += batch_tokens
            bar.update()
            if (step + 1) % 100 == 0 or step + 1 == config.steps:
                row = dict(step=step + 1, loss=round(loss.item() / batch_tokens, 4), accuracy=round(right / answers, 4))
                if config.num_experts > 1:
                    row["balance"] = round(balance.item(), 4)
                bar.set_postfix({key: value for key, value in row.items() if key != "step"})
                row |= dict(lr=round(learning_rate(config, step), 6), tokens=tokens)
                folder.append("metrics.jsonl", [row | dict(seconds=round(time.monotonic() - started, 1))])
                right = answers = 0
    bar.close()
    folder.write_csv()
    model.save_pretrained(folder.path)
    tokenizer.save_pretrained(folder.path)
    settings |= dict(seconds=round(time.monotonic() - started), answer_tokens=tokens)
    (folder.path / SETTINGS_FILE).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    for checkpoint in folder.checkpoints():
        shutil.rmtree(checkpoint)
    if config.log_csv:
        shutil.copy(folder.path / "metrics.csv", config.log_csv)
    print(f"saved {folder.path} after {time.monotonic() - started:.0f} s and {tokens:,} answer tokens")
    return True


def interrupted_config(config: PretrainConfig) -> PretrainConfig:
    """The settings of the pretraining that `config.resume` names."""
    if config != PretrainConfig(resume=config.resume, log_csv=config.log_csv):
        raise ValueError("--resume uses the settings of before: leave the others out, but for --log_csv")
    settings = Path(config.resume) / SETTINGS_FILE
    if not settings.exists() or not RunFolder(Path(config.resume)).checkpoints():
        raise ValueError(f"{config.resume} holds no checkpoint of a pretraining to go on from")
    kept = json.loads(settings.read_text(encoding="utf-8"))
    return PretrainConfig(output=config.resume, log_csv=config.log_csv, **kept)


def main(args: list[str] | None = None) -> None:
    with errors_as_lines(ValueError):
        sys.exit(0 if pretrain(parse_settings(PretrainConfig, __doc__, args)) else 130)


if __name__ == "__main__":
    main()
