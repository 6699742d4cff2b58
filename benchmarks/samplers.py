"""Tokens a second of sampling with torch and with vLLM, on a CPU, by the size of the model.

    python benchmarks/samplers.py                                 in an environment that has vLLM
    python benchmarks/samplers.py --sizes 0.5B --out 0.5B.md      a model of the shape of Qwen2.5-0.5B

`grpo.TorchSampler` and `VLLMSampler` with the same random weights in float32, prompts of 4 to 12 tokens, 8
completions of each. (vLLM shares a prompt in whole blocks, on a CPU of 128 tokens: it reads these 8 times.) `fixed`:
no token ends a completion, all have the largest length. `ragged`: so many tokens end one that it has about a third of
that. `0.2M` is the shipped small model with 2 heads of 32 in the place of 4 of 16, which vLLM's kernels for CPUs do
not take; the others are Qwen2s. Each sampler has a process of its own, with as many threads as the other one; they
take turns, after a ragged call each as a warm-up. A figure is the median over the turns, in brackets the smallest and
the largest; the ratio is that of neighbours. `sync` is what new weights for vLLM take after each update; torch's
sampler has the trainer's own.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from statistics import mean

import torch
from common import ROOT, arguments, in_turns, origin, spread, table, write
from transformers import Qwen2Config, Qwen2ForCausalLM

from harness.vllm_sampler import VLLMSampler

WORK = {"toy": (2, 6), "0.2M": (32, 64), "2.8M": (32, 64), "30M": (32, 32), "121M": (8, 32), "0.5B": (2, 16)}
SHAPES = {  # vocabulary, width, MLP, layers, heads, heads of the keys
    "2.8M": (33, 256, 640, 4, 4, 2),
    "30M": (8192, 512, 1664, 8, 8, 2),
    "121M": (32000, 768, 2816, 12, 12, 4),
    "0.5B": (151936, 896, 4864, 24, 14, 2),
}


def make_model(size: str):
    """Without an end-of-sequence token in its config: vLLM would stop there, whatever it is asked for."""
    torch.manual_seed(0)
    if size in SHAPES:
        vocabulary, width, mlp, layers, heads, key_heads = SHAPES[size]
        shape = dict(vocab_size=vocabulary, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers)
        shape |= dict(num_attention_heads=heads, num_key_value_heads=key_heads, max_position_embeddings=512)
        return Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True)).eval()
    from mathformer import MathformerConfig, MathformerForCausalLM

    shape = dict(vocab_size=33, hidden_size=64, num_hidden_layers=4, num_attention_heads=2)
    return MathformerForCausalLM(MathformerConfig(**shape, eos_token_id=None)).eval()


def work(kind: str, size: str, folder: str) -> None:
    """In a process of its own: a line of numbers on stdout for each line `fixed`, `ragged` or `sync` on stdin."""
    import grpo

    model, (P, tokens) = make_model(size), WORK[size]
    if kind == "torch":
        sampler = grpo.TorchSampler(model, [])
    else:
        model.save_pretrained(folder)
        lengths = dict(max_prompt_tokens=12, max_completion_tokens=tokens)
        config = grpo.Config(folder, "arithmetic", prompts_per_step=P, **lengths, device="cpu")
        sampler = VLLMSampler(folder, model, [], config, bf16=False)
    rng, V = random.Random(0), model.config.vocab_size
    prompts = [rng.choices(range(V), k=rng.randint(4, 12)) for _ in range(P)]
    ends = {"fixed": [], "ragged": rng.sample(range(V), round(3 * V / tokens))}
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
        print(json.dumps(found | {"threads": torch.get_num_threads()}), flush=True)


class Worker:
    def __init__(self, kind: str, size: str, folder: str):
        command = [sys.executable, __file__, "--one", kind, size, folder]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, **pipes)

    def ask(self, what: str) -> dict:
        print(what, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("{"):  # vLLM prints too
                return json.loads(line)
        raise RuntimeError(f"a sampler ended: {' '.join(self.process.args)}")


def compare(size: str, kinds: list[str], turns: int) -> dict:
    """What each sampler answered, turn by turn, by lengths and sampler; `sync` of vLLM too."""
    with tempfile.TemporaryDirectory() as folder:
        workers = {kind: Worker(kind, size, folder) for kind in kinds}
        found = {}
        for worker in workers.values():
            worker.ask("ragged")  # a warm-up
        for lengths in ("fixed", "ragged"):
            for kind in in_turns(kinds, turns):
                found.setdefault((lengths, kind), []).append(workers[kind].ask(lengths))
        found["sync"] = [workers[kinds[-1]].ask("sync") for _ in range(turns)]
        for worker in workers.values():
            worker.process.stdin.close()
            worker.process.wait()
    return found


def main() -> None:
    parser = arguments(
        __doc__, "samplers.md", "one turn of 2 x 8 completions of at most 6 tokens", one=3, sizes=WORK, turns=3
    )
    parser.set_defaults(sizes=["0.2M", "2.8M", "30M", "121M"])
    options = parser.parse_args()
    if options.one:
        work(*options.one)
        return
    kinds = ["torch", "vllm"] if find_spec("vllm") else ["torch"]
    if len(kinds) == 1:
        print("vLLM is not installed here: only torch is measured")
    sizes, turns = (["toy"], 1) if options.tiny else (options.sizes, options.turns)
    lines, threads = [], set()
    for size in sizes:
        found = compare(size, kinds, turns)
        for lengths in ("fixed", "ragged"):
            answers = [found[lengths, kind] for kind in kinds]
            print(size, lengths, answers, found["sync"], flush=True)
            threads |= {str(row["threads"]) for rows in answers for row in rows}
            speeds = [[row["speed"] for row in rows] for rows in answers]
            cells = [spread(values, 0) for values in speeds]
            if len(kinds) == 2:
                cells.append(spread([b / a for a, b in zip(*speeds, strict=True)], 2))
                cells.append(spread([row["seconds"] for row in found["sync"]], 3))
            cells += ["not measured"] * (4 - len(cells))
            drawn = ", ".join(f"{mean(row['length'] for row in rows):.1f}" for rows in answers)
            lines.append([size, WORK[size][0] * 8, f"{lengths}: {drawn}", *cells])
    vllm = f"vLLM {version(packages_distributions()['vllm'][0])}." if len(kinds) == 2 else "vLLM is not installed."
    used = f"{turns} turns, seed 0, threads of each sampler: {', '.join(sorted(threads))},"
    heads = "model | completions | tokens of one (torch, vLLM) | torch, tokens a second | vLLM, tokens a second"
    heads += " | vLLM / torch | sync of vLLM, seconds"
    write(options.out, f"{origin(f'`python benchmarks/samplers.py`, {used}')} {vllm}", table(heads, lines))


if __name__ == "__main__":
    main()
