"""Seconds a step and peak memory, beside TRL's GRPOTrainer on the same work.

    pip install -r requirements-test.txt && python benchmarks/against_trl.py

Two Qwen2s with random weights: 0.3 M parameters (2 layers of width 128), 32 x 8 completions a step of at most 64
tokens; and 2.8 M (4 of 256), 16 x 8 of at most 128. The same prompts and reward, float32, token weights, no KL penalty,
one update a batch, torch sampling in both; all else as the two programs have it by default. The prompts are sums of
numbers of 1 to 3 digits, 5 to 9 tokens; with `--digits 1` all have 5, which no task's prompts do, and none is padded.
`ragged`: the model stops by itself. `fixed`: the end-of-sequence token is forbidden, all completions have the largest
length. The two programs run in turns, each in a process of its own; a figure is the median over a process's steps
without the first two. Writes results/against_trl.md.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import median

from arithmetic_seeds import ROOT, cpu_name

sys.path.insert(0, str(ROOT))
G = 8
WORK = {"0.3M": (2, 128, 32, 64), "2.8M": (4, 256, 16, 128), "tiny": (1, 32, 2, 8)}  # layers, width, prompts, tokens
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

    def reward(self, text, example):
        right = float(len(text) % 2)
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
    import grpo
    from harness import loading
    from harness.run_folder import RunFolder

    *_, prompts, tokens = WORK[size]
    if lengths == "fixed":
        loading.find_eos = lambda model, tokenizer: []
    with tempfile.TemporaryDirectory() as runs:
        settings = dict(model=model, task=f"{__file__}:Parity", task_args={"digits": digits}, lr=1e-6)
        settings |= dict(prompts_per_step=prompts, group_size=G, max_completion_tokens=tokens, max_prompt_tokens=16)
        settings |= dict(eval_steps=0, print_groups=0, runs=runs)
        folder = RunFolder(grpo.train(grpo.Config(**settings, steps=steps, save_steps=steps, device="cpu"))["run"])
        rows = folder.read("metrics.jsonl")
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
            output_dir=out, per_device_train_batch_size=prompts * G, num_generations=G, max_completion_length=tokens,
            learning_rate=1e-6, lr_scheduler_type="constant", beta=0.0, loss_type="dapo", max_steps=steps, use_cpu=True,
            bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1, seed=0,
            generation_kwargs={"min_new_tokens": tokens} if lengths == "fixed" else {}, disable_tqdm=True,
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


def measure(program: str, model: str, size: str, lengths: str, options) -> dict:
    """In a process of its own: the median of its steps."""
    command = [sys.executable, __file__, "--one", program, model, size, lengths]
    command += ["--digits", str(options.digits), "--steps", str(options.steps)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--digits", type=int, default=3, help="of the numbers in the prompts, at most")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "against_trl.md")
    parser.add_argument("--tiny", action="store_true", help="2 x 8 completions of 8 tokens, fixed only")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        program, *how = options.one
        rows = {"ours": ours, "TRL": theirs}[program](*how, options.digits, options.steps)[2:]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        middle = {key: median(row[key] for row in rows) for key in ("seconds", "length")}
        print(json.dumps(middle | {"peak": peak}))
        return
    import torch
    import transformers
    import trl

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    lines = [
        f"`python benchmarks/against_trl.py --digits {options.digits}`, {options.pairs} pairs in turns, "
        f"{options.steps} steps each, seed 0, "
        f"{os.cpu_count()} cores of {cpu_name()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, trl {trl.__version__}, commit {commit.strip()}. Medians of the "
        "pairs; in brackets the smallest and the largest. Memory is of the whole process.\n",
        "| parameters | lengths | tokens, ours | TRL | seconds a step, ours | TRL | TRL / ours | peak GB, ours | TRL |",
        "| --- " * 9 + "|",
    ]
    for size, lengths in [("tiny", "fixed")] if options.tiny else product(("0.3M", "2.8M"), ("ragged", "fixed")):
        pairs = []
        with tempfile.TemporaryDirectory() as folder:
            make_model(Path(folder), size)
            for i in range(options.pairs):
                order = ("ours", "TRL") if i % 2 == 0 else ("TRL", "ours")
                pair = {program: measure(program, folder, size, lengths, options) for program in order}
                print(size, lengths, pair, flush=True)
                pairs.append((pair["ours"], pair["TRL"]))
        cells = [f"{median(pair[j]['length'] for pair in pairs):.1f}" for j in (0, 1)]
        ratios = [b["seconds"] / a["seconds"] for a, b in pairs]
        for values in ([a["seconds"] for a, _ in pairs], [b["seconds"] for _, b in pairs], ratios):
            cells.append(f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        cells += [f"{median(pair[j]['peak'] for pair in pairs):.2f}" for j in (0, 1)]
        lines.append(f"| {size} | {lengths} | {' | '.join(cells)} |")
    options.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
