"""Tokens a second of the small model and of transformers' BLOOM with the same weights: pretraining and sampling.

    python benchmarks/mathformer_vs_bloom.py --threads 2

Both are measured in turns in one process, so that a drift of the machine's speed hits both; reported are medians and
the ratio of each turn's two figures, with its spread. Pretraining is forward, backward and AdamW on the same batches
of arithmetic. Sampling is 32 problems x 8 completions: `grpo.TorchSampler` with our model against BLOOM's `generate`,
once with the completions that the model ends by itself, and once with all of them 64 tokens long.
"""

import os
import random
import time
from statistics import median

import torch
import transformers
from common import ROOT, arguments

import grpo
from harness import loading
from mathformer import ArithmeticTask, MathformerForCausalLM
from mathformer.tokenizer import build_tokenizer
from mathformer.train import PretrainConfig, batches, build_model


def bloom_of(model: MathformerForCausalLM) -> transformers.BloomForCausalLM:
    c = model.config
    config = transformers.BloomConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, n_layer=c.num_hidden_layers, n_head=c.num_attention_heads,
        bos_token_id=c.bos_token_id, eos_token_id=c.eos_token_id, pad_token_id=c.pad_token_id, use_cache=True,
    )  # fmt: skip
    bloom = transformers.BloomForCausalLM(config)
    bloom.load_state_dict(model.state_dict())
    return bloom


def pretraining(model, data) -> float:
    """Tokens a second, padding not counted."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model.train()
    started = time.time()
    for ids, labels, _, _ in data:
        model(ids, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return sum(int(lengths.sum()) for _, _, lengths, _ in data) / (time.time() - started)


def ours(model, prompts, eos: list[int], max_tokens: int, seed: int) -> float:
    sampler = grpo.TorchSampler(model, eos)
    started = time.time()
    rollouts = sampler.generate(prompts, 8, grpo.Sampling(max_tokens), seed)
    return sum(rollout.length for rollout in rollouts) / (time.time() - started)


@torch.no_grad()
def bloom_generate(bloom, prompts, eos: list[int], max_tokens: int, seed: int) -> float:
    bloom.eval()
    torch.manual_seed(seed)
    longest = max(map(len, prompts))
    started = time.time()
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    stop = dict(eos_token_id=eos[0]) if eos else dict(eos_token_id=None, min_new_tokens=max_tokens)
    out = bloom.generate(
        ids, attention_mask=mask, do_sample=True, top_k=0, num_return_sequences=8, max_new_tokens=max_tokens,
        pad_token_id=0, **stop,
    )[:, longest:]  # fmt: skip
    seconds = time.time() - started
    if not eos:
        return out.numel() / seconds
    ended = (out == eos[0]).int()
    lengths = torch.where(ended.any(1), ended.argmax(1) + 1, out.shape[1])
    return int(lengths.sum()) / seconds


def main() -> None:
    parser = arguments(__doc__, tiny="one batch, two problems", turns=7, threads=os.cpu_count())
    trained = str(ROOT / "mathformer" / "pretrained")
    parser.add_argument("--trained", default=trained, help="the model that ends by itself")
    parser.add_argument("--sizes", nargs="+", default=["small", "medium"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    tokenizer = build_tokenizer()
    task = ArithmeticTask()
    prompts = [tokenizer(example["prompt"])["input_ids"] for example in task.eval()[: 2 if options.tiny else 32]]
    stream = batches(random.Random(0), PretrainConfig(output="-"), task, tokenizer, 0.5)
    data = [next(stream) for _ in range(1 if options.tiny else 8)]

    def compare(name: str, one, other) -> None:
        one(0), other(0)  # once without a clock
        figures = [(one(turn), other(turn)) for turn in range(options.turns)]
        ratios = [a / b for a, b in figures]
        a, b = (median(column) for column in zip(*figures, strict=True))
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"| {name} | {a:,.0f} | {b:,.0f} | {median(ratios):.2f} | {spread} |")

    print("| | ours, tokens/s | BLOOM, tokens/s | ratio | of all turns |\n| --- | --- | --- | --- | --- |")
    trained, _ = loading.load_model(options.trained)
    models = {"trained": (trained, bloom_of(trained))}
    for size in options.sizes:
        model = build_model(size, tokenizer)
        models[size] = (model, bloom_of(model))
    for size in options.sizes:
        model, bloom = models[size]
        compare(
            f"pretraining, {size}", lambda _, m=model: pretraining(m, data), lambda _, m=bloom: pretraining(m, data)
        )
    cases = [("trained", [tokenizer.eos_token_id], 72), *((size, [], 64) for size in options.sizes)]
    for size, eos, max_tokens in cases:
        model, bloom = models[size]
        compare(
            f"sampling, {'small, as it ends by itself' if eos else f'{size}, {max_tokens} tokens each'}",
            lambda turn, a=(model, prompts, eos, max_tokens): ours(*a, turn),
            lambda turn, a=(bloom, prompts, eos, max_tokens): bloom_generate(*a, turn),
        )


if __name__ == "__main__":
    main()
