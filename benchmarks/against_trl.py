"""Seconds a step and peak memory, beside TRL's GRPOTrainer on the same work.

    pip install -r requirements-test.txt && python benchmarks/against_trl.py

Two Qwen2s with random weights: 0.3 M parameters (2 layers of width 128), 32 x 8 completions a step of at most 64
tokens; and 2.8 M (4 of 256), 16 x 8 of at most 128. The same prompts and reward, float32, token weights, no KL penalty,
one update a batch, torch sampling in both; all else as the two programs have it by default. The prompts are sums of
numbers of 1 to 3 digits, 5 to 9 tokens; with `--digits 1` all have 5, which no task's prompts do, and none is padded.
`ragged`: the model stops by itself. `fixed`: the end-of-sequence token is forbidden, all completions have the largest
length. The two programs run in turns, each in a process of its own; a figure is the median over a process's steps
without the first two.
"""

import json
import random
import resource
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import median

from common import arguments, flags, in_a_process, in_turns, origin, spread, table, train, write

G = 8
WORK = {"0.3M": (2, 128, 32, 64), "2.8M": (4, 256, 16, 128), "tiny": (1, 32, 2, 8)}  # layers, width, prompts, tokens
OF_TRL = dict(learning_rate=1e-6, lr_scheduler_type="constant", beta=0.0, loss_type="dapo", seed=0)
OF_TRL |= dict(report_to="none", save_strategy="no", disable_tqdm=True)
PROMPT = "<sos><big>{}+{}"


class Parity:
    """Any prompt; a completion is right if it has an odd number of symbols."""

    def __init__(self, digits: int = 3):
        self.digits = digits

    def problem(self, rng):
        return PROMPT.format(*(rng.randrange(10 ** rng.randint(1, self.digits)) for _ in range(2)))

    def train(self, rng, step):
        return {"prompt": self.problem(rng)}

    def eval(self):
        return [{"prompt": PROMPT.format(1, 2)}]

    def prompt(self, example):
        return example["prompt"]

    def is_right(self, text):
        return len(text) % 2

    def reward(self, text, example):
        right = float(self.is_right(text))
        return {"reward": right, "correct": right, "format": 1.0, "prediction": None, "ground_truth": None}


def make_model(folder: Path, size: str = "2.8M") -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from mathformer.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    layers, width, *_ = WORK[size]
    shape = dict(hidden_size=width, intermediate_size=5 * width // 2, num_hidden_layers=layers, num_attention_heads=4)
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True)
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=512, **shape, **ends)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def ours(model: str, size: str, lengths: str, digits: int, steps: int) -> list[dict]:
    from harness import loading

    *_, prompts, tokens = WORK[size]
    if lengths == "fixed":
        loading.find_eos = lambda model, tokenizer: []
    settings = dict(model=model, task=f"{__file__}:Parity", task_args={"digits": digits}, lr=1e-6, device="cpu")
    settings |= dict(prompts_per_step=prompts, group_size=G, max_completion_tokens=tokens, max_prompt_tokens=16)
    rows, _ = train(**settings, eval_steps=0, steps=steps, save_steps=steps)
    keys = ("seconds_sample", "seconds_train", "seconds_sync")
    return [{"seconds": sum(row[key] for key in keys), "length": row["length"]} for row in rows]


def theirs(model: str, size: str, lengths: str, digits: int, steps: int) -> list[dict]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    *_, prompts, tokens = WORK[size]
    rng, task, times = random.Random(0), Parity(digits), []
    data = Dataset.from_list([{"prompt": task.problem(rng)} for _ in range(prompts * (steps + 2))])

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            times.append(time.time())

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            **OF_TRL, output_dir=out, per_device_train_batch_size=prompts * G, num_generations=G, max_steps=steps,
            max_completion_length=tokens, use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1,
            generation_kwargs={"min_new_tokens": tokens} if lengths == "fixed" else {},
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model), args=config, train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"), callbacks=[Clock()],
            reward_funcs=lambda completions, **kwargs: [float(len(text) % 2) for text in completions],
        )  # fmt: skip
        trainer.train()
        mean_lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "loss" in row]
    seconds = [b - a for a, b in zip(times, times[1:], strict=False)]
    return [{"seconds": s, "length": n} for s, n in zip(seconds, mean_lengths[1:], strict=True)]


def main() -> None:
    parser = arguments(
        __doc__, "against_trl.md", "2 x 8 completions of 8 tokens, fixed only", one=4, pairs=5, steps=8, digits=3
    )
    options = parser.parse_args()
    if options.one:
        program, *how = options.one
        rows = {"ours": ours, "TRL": theirs}[program](*how, options.digits, options.steps)[2:]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        middle = {key: median(row[key] for row in rows) for key in ("seconds", "length")}
        print(json.dumps(middle | {"peak": peak}))
        return
    begin = f"`python benchmarks/against_trl.py --digits {options.digits}`, {options.pairs} pairs in turns, "
    begin += f"{options.steps} steps each, seed 0,"
    about = (
        f"{origin(begin, 'Python', 'torch', 'transformers', 'trl')} Medians of the pairs; in brackets the smallest and "
        "the largest. Memory is of the whole process."
    )
    heads = "parameters | lengths | tokens, ours | TRL | seconds a step, ours | TRL | TRL / ours | peak GB, ours | TRL"
    lines, how = [], flags(digits=options.digits, steps=options.steps)
    for size, lengths in [("tiny", "fixed")] if options.tiny else product(("0.3M", "2.8M"), ("ragged", "fixed")):
        found = {"ours": [], "TRL": []}
        with tempfile.TemporaryDirectory() as folder:
            make_model(Path(folder), size)
            for program in in_turns(list(found), options.pairs):
                found[program].append(in_a_process(__file__, "--one", program, folder, size, lengths, *how))
                print(size, lengths, program, found[program][-1], flush=True)
        a, b = ([row["seconds"] for row in rows] for rows in found.values())
        cells = [f"{median(row['length'] for row in rows):.1f}" for rows in found.values()]
        cells += [spread(values, 2) for values in (a, b, [y / x for x, y in zip(a, b, strict=True)])]
        cells += [f"{median(row['peak'] for row in rows):.2f}" for rows in found.values()]
        lines.append([size, lengths, *cells])
    write(options.out, about, table(heads, lines))


if __name__ == "__main__":
    main()
