"""Supervised pretraining of the small model on worked and unworked arithmetic.

    python -m mathformer.train --output my_base --steps 2000

Two phases. In the first, most answers show their steps: the model learns to work problems out. In the second, short
one, most answers are given at once: the model gets into the habit of answering without steps, and still knows how.
That habit is what reinforcement learning then finds does not pay. (A model that was never shown the second phase has
nothing to discover; one that was never shown the first has nothing to discover it with.)
"""

import csv
import dataclasses
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser, set_parsing_settings
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from mathformer.model import SIZES, MathformerConfig, MathformerForCausalLM
from mathformer.task import ArithmeticTask, prompt_text, solution_text
from mathformer.tokenizer import build_tokenizer


@dataclasses.dataclass
class PretrainConfig:
    output: str
    """folder for the trained model; it must not exist yet"""
    modelsize: str = "small"
    """tiny, small, medium or large"""
    max_digits: int = 1
    """digits of the numbers in a problem"""
    max_depth: int = 3
    """operators on the longest path of a problem"""
    operators: str = "+-*"
    """operators that problems use"""
    max_value: int = 99
    """problems that meet a larger number on the way are left out"""
    steps: int = 26000
    """optimizer steps of both phases together"""
    batch_size: int = 128
    """problems a step"""
    lr: float = 3e-3
    """peak learning rate: linear warm-up over 2 % of the steps, then a cosine to 1 % of it"""
    weight_decay: float = 0.01
    """AdamW's weight decay"""
    prob_scratchpad: float = 0.9
    """share of answers that show their steps, in the first phase"""
    final_prob_scratchpad: float = 0.1
    """the same in the second phase"""
    final_share: float = 0.15
    """share of the steps that belong to the second phase"""
    seed: int = 0
    """seed of the weights and of the problems"""
    log_csv: str | None = None
    """file for step, loss, accuracy and seconds"""

    def __post_init__(self):
        if self.modelsize not in SIZES:
            raise ValueError(f"modelsize {self.modelsize!r}: choose one of {', '.join(SIZES)}")
        if Path(self.output).exists():
            raise ValueError(f"{self.output} exists already: choose another --output or remove it")


def build_model(modelsize: str, tokenizer: PreTrainedTokenizerFast) -> MathformerForCausalLM:
    """A freshly initialised model of one of the `SIZES`; torch's global seed decides its weights."""
    width, layers, heads = SIZES[modelsize]
    return MathformerForCausalLM(
        MathformerConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batches(rng: random.Random, task: ArithmeticTask, tokenizer, batch_size: int, prob_scratchpad: float, pool: int):
    """Draws `pool` batches of problems and yields (ids, labels, weight): two tensors [batch_size, T] and a number.

    Sorting the pool by length before it is cut into batches leaves little padding. Labels are -100 on the prompt and
    on padding: the model learns to answer, not to invent problems. `weight` times the summed loss of a batch is the
    token mean over the pool. (The mean inside a batch would count a token of a long answer less than one of a short
    answer, and the model would learn to start too few long ones.)
    """
    trees = [task.draw(rng, for_eval=False) for _ in range(pool * batch_size)]
    prompts = tokenizer([prompt_text(tree) for tree in trees])["input_ids"]
    answers = tokenizer([solution_text(t, rng.random() < prob_scratchpad) for t in trees])["input_ids"]
    rows = sorted(zip(prompts, answers, strict=True), key=lambda row: len(row[0]) + len(row[1]))
    weight = pool / sum(len(answer) + 1 for answer in answers)
    chunks = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    rng.shuffle(chunks)
    eos, pad = [tokenizer.eos_token_id], [tokenizer.pad_token_id]
    for chunk in chunks:
        length = max(len(prompt) + len(answer) for prompt, answer in chunk) + 1
        gaps = [length - len(prompt) - len(answer) - 1 for prompt, answer in chunk]
        ids = [prompt + answer + eos + pad * gap for (prompt, answer), gap in zip(chunk, gaps, strict=True)]
        labels = [
            [-100] * len(prompt) + answer + eos + [-100] * gap
            for (prompt, answer), gap in zip(chunk, gaps, strict=True)
        ]
        yield torch.tensor(ids), torch.tensor(labels), weight


def pretrain(config: PretrainConfig) -> None:
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    task = ArithmeticTask(config.max_digits, config.max_depth, config.operators, config.max_value)
    tokenizer = build_tokenizer()
    model = build_model(config.modelsize, tokenizer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.98))
    first_phase = round(config.steps * (1 - config.final_share))
    warmup = max(1, config.steps // 50)
    rows, started, stream = [], time.time(), iter(())
    tokens = right = answers = 0
    bar = tqdm(range(config.steps), unit="step", smoothing=0.05, mininterval=1)
    for step in bar:
        share = config.prob_scratchpad if step < first_phase else config.final_prob_scratchpad
        batch = next(stream, None) if step != first_phase else None  # the second phase starts with a pool of its own
        if batch is None:
            stream = batches(rng, task, tokenizer, config.batch_size, share, pool=32)
            batch = next(stream)
        ids, labels = batch[0].to(device), batch[1][:, 1:].to(device)

        progress = step / config.steps
        lr = config.lr * min((step + 1) / warmup, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        logits = model(ids[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        (batch[2] * loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        # an answer counts as right if each token is the most likely one after the right tokens before it
        right += int(((logits.argmax(-1) == labels) | (labels == -100)).all(1).sum())
        answers += len(labels)
        batch_tokens = int((labels != -100).sum())
        tokens += batch_tokens
        if (step + 1) % 100 == 0 or step + 1 == config.steps:
            row = dict(step=step + 1, loss=round(loss.item() / batch_tokens, 4), accuracy=round(right / answers, 4))
            rows.append(row | dict(lr=round(lr, 6), tokens=tokens, seconds=round(time.time() - started, 1)))
            bar.set_postfix(row)
            right = answers = 0
    output_dir = Path(config.output)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    record = {key: value for key, value in dataclasses.asdict(config).items() if key not in ("output", "log_csv")}
    record |= dict(seconds=round(time.time() - started), answer_tokens=tokens)
    (output_dir / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n")
    if config.log_csv:
        with open(config.log_csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    print(f"saved {output_dir} after {time.time() - started:.0f} s and {tokens:,} answer tokens")


def main(args: list[str] | None = None) -> None:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_class_arguments(PretrainConfig, as_group=False)
    try:
        pretrain(PretrainConfig(**vars(parser.parse_args(args))))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
