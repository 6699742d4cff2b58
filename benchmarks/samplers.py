"""Tokens a second of our torch sampler, transformers' `generate` and vLLM, on a CPU, by the size of the model.

    python benchmarks/samplers.py                                 in an environment that has vLLM
    python benchmarks/samplers.py --sizes SmolLM2 --model models/SmolLM2-135M-Instruct --out smollm2.md

`grpo.TorchSampler`, `generate` with the same settings, and `VLLMSampler`, with the same random weights in float32,
prompts of 4 to 12 tokens, 8 completions of each. (vLLM shares a prompt in whole blocks, on a CPU of 128 tokens: it
reads these 8 times, as `generate` does.) `generate` gives no log-probs, which GRPO needs. `fixed`: no token ends a
completion, all have the largest length. `ragged`: so many tokens end one that it has about a third of that. `0.2M` is
the shipped small model with 2 heads of 32 in the place of 4 of 16, which vLLM's kernels for CPUs do not take; `SmolLM2`
is the real one, on 8 prompts of the task `sentences`, with its own ends; the others are Qwen2s. Each sampler has a
process of its own, with as many threads as the others; they take turns, after a ragged call each as a warm-up. A
figure is the median over the turns, in brackets the smallest and the largest; a ratio is within a turn. `peak
GB` is of the whole process. `sync` is what new weights for vLLM take after each update; the others have the trainer's.
"""

import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from statistics import mean
from types import SimpleNamespace

import torch
from common import ROOT, arguments, in_turns, origin, spread, table, write
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from harness.loading import load_model
from harness.prompts import encode_prompt
from harness.vllm_sampler import VLLMSampler
from tasks.sentences import Sentences

WORK = {"toy": (2, 6), "0.2M": (32, 64), "2.8M": (32, 64), "30M": (32, 32), "121M": (8, 32), "0.5B": (2, 16)}
WORK["SmolLM2"] = (8, 32)  # prompts, and tokens of a completion at most
KINDS = {"torch": "torch, ours", "generate": "generate", "vllm": "vLLM"}
SHAPES = {  # vocabulary, width, MLP, layers, heads, heads of the keys
    "2.8M": (33, 256, 640, 4, 4, 2),
    "30M": (8192, 512, 1664, 8, 8, 2),
    "121M": (32000, 768, 2816, 12, 12, 4),
    "0.5B": (151936, 896, 4864, 24, 14, 2),
}


def make_model(size: str, folder: str):
    """Without an end-of-sequence token in its config: vLLM would stop there, whatever it is asked for."""
    torch.manual_seed(0)
    if size == "SmolLM2":
        model, _ = load_model(folder)
        model.config.eos_token_id = model.generation_config.eos_token_id = None
        return model.eval()
    if size in SHAPES:
        vocabulary, width, mlp, layers, heads, key_heads = SHAPES[size]
        shape = dict(vocab_size=vocabulary, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers)
        shape |= dict(num_attention_heads=heads, num_key_value_heads=key_heads, max_position_embeddings=512)
        return Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True)).eval()
    from mathformer import MathformerConfig, MathformerForCausalLM

    shape = dict(vocab_size=33, hidden_size=64, num_hidden_layers=4, num_attention_heads=2)
    return MathformerForCausalLM(MathformerConfig(**shape, eos_token_id=None)).eval()


def make_prompts(size: str, folder: str, rng: random.Random, vocabulary: int) -> list[list[int]]:
    if size != "SmolLM2":
        return [rng.choices(range(vocabulary), k=rng.randint(4, 12)) for _ in range(WORK[size][0])]
    tokenizer, task = AutoTokenizer.from_pretrained(folder), Sentences()
    return [encode_prompt(tokenizer, task, task.train(rng, 1))[1] for _ in range(WORK[size][0])]


class Generate:
    """transformers' `generate`, called as a sampler is; the lengths of its completions are all that is kept."""

    def __init__(self, model):
        self.model, self.eos = model, []

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], group_size: int, sampling, seed: int) -> list:
        torch.manual_seed(seed)
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        real = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        how = dict(do_sample=True, top_k=0, max_new_tokens=sampling.max_tokens, num_return_sequences=group_size)
        how |= dict(eos_token_id=self.eos) if self.eos else {}
        found = self.model.generate(ids, attention_mask=real, pad_token_id=0, **how)[:, longest:].tolist()
        ends = [next((i for i, token in enumerate(row, 1) if token in self.eos), len(row)) for row in found]
        return [SimpleNamespace(length=n) for n in ends]


def work(kind: str, size: str, folder: str, source: str) -> None:
    """In a process of its own: a line of numbers on stdout for each line `fixed`, `ragged` or `sync` on stdin."""
    import grpo

    model, (P, tokens) = make_model(size, source), WORK[size]
    rng, V = random.Random(0), model.config.vocab_size
    prompts = make_prompts(size, source, rng, V)
    if kind == "torch":
        sampler = grpo.TorchSampler(model, [])
    elif kind == "generate":
        sampler = Generate(model)
    else:
        model.save_pretrained(folder)
        lengths = dict(max_prompt_tokens=max(map(len, prompts)), max_completion_tokens=tokens)
        config = grpo.Config(folder, "arithmetic", prompts_per_step=P, **lengths, device="cpu")
        sampler = VLLMSampler(folder, model, [], config, dtype=torch.float32)
    ends = {"fixed": [], "ragged": [0, 2] if size == "SmolLM2" else rng.sample(range(V), round(3 * V / tokens))}
    for seed, line in enumerate(sys.stdin):
        started = time.perf_counter()
        if line.strip() == "sync":
            sampler.sync()
            found = {"seconds": time.perf_counter() - started}
        else:
            ids = ends[line.strip()]
            sampler.eos = torch.tensor(ids) if kind == "torch" else ids
            rollouts = sampler.generate(prompts, 8, grpo.Sampling(tokens), seed)
            seconds, written = time.perf_counter() - started, sum(r.length for r in rollouts)
            found = {"speed": written / seconds, "length": written / len(rollouts)}
        found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps(found | {"threads": torch.get_num_threads()}), flush=True)


class Worker:
    def __init__(self, *what: str):
        command = [sys.executable, __file__, "--one", *what]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, **pipes)

    def ask(self, what: str) -> dict:
        print(what, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("{"):  # vLLM prints too
                return json.loads(line)
        raise RuntimeError(f"a sampler ended: {' '.join(self.process.args)}")


def compare(size: str, kinds: list[str], turns: int, source: str) -> dict:
    """What each sampler answered, turn by turn, by lengths and sampler; `sync` of vLLM too."""
    with tempfile.TemporaryDirectory() as folder:
        workers = {kind: Worker(kind, size, folder, source) for kind in kinds}
        found = {}
        for worker in workers.values():
            worker.ask("ragged")  # a warm-up
        for lengths in ("fixed", "ragged"):
            for kind in in_turns(kinds, turns):
                found.setdefault((lengths, kind), []).append(workers[kind].ask(lengths))
        found["sync"] = [workers["vllm"].ask("sync") for _ in range(turns)] if "vllm" in kinds else []
        for worker in workers.values():
            worker.process.stdin.close()
            worker.process.wait()
    return found


def main() -> None:
    parser = arguments(
        __doc__, "samplers.md", "one turn of 2 x 8 completions of at most 6 tokens",
        one=4, sizes=WORK, turns=3, model="models/SmolLM2-135M-Instruct",
    )  # fmt: skip
    parser.set_defaults(sizes=["0.2M", "2.8M", "30M", "121M"])
    options = parser.parse_args()
    if options.one:
        work(*options.one)
        return
    kinds = list(KINDS)[: None if find_spec("vllm") else -1]
    if "vllm" not in kinds:
        print("vLLM is not installed here: it is not measured")
    sizes, turns = (["toy"], 1) if options.tiny else (options.sizes, options.turns)
    lines, threads = [], set()
    for size in sizes:
        found = compare(size, kinds, turns, options.model)
        for lengths, kind in itertools.product(("fixed", "ragged"), kinds):
            rows = found[lengths, kind]
            print(size, lengths, kind, rows, flush=True)
            threads |= {str(row["threads"]) for row in rows}
            ratios = [a["speed"] / b["speed"] for a, b in zip(rows, found[lengths, "torch"], strict=True)]
            sync = spread([row["seconds"] for row in found["sync"]], 3) if kind == "vllm" else ""
            drawn = f"{mean(row['length'] for row in rows):.1f}"
            cells = [KINDS[kind], drawn, spread([row["speed"] for row in rows], 0), spread(ratios, 2)]
            cells += [f"{max(row['peak'] for row in found['ragged', kind]):.2f}", sync]
            lines.append([size, WORK[size][0] * 8, lengths, *cells])
    versions = f"vLLM {version(packages_distributions()['vllm'][0])}." if "vllm" in kinds else "vLLM is not installed."
    used = f"{turns} turns, seed 0, threads of each sampler: {', '.join(sorted(threads))},"
    heads = (
        "model | completions | lengths | sampler | tokens of one | tokens a second | to ours | peak GB | sync, seconds"
    )
    write(options.out, f"{origin(f'`python benchmarks/samplers.py`, {used}')} {versions}", table(heads, lines))


if __name__ == "__main__":
    main()
