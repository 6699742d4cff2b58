"""Where the time of an update goes on a GPU, for the shapes of gpu.py: `python benchmarks/gpu.py --profile` calls this.

Only training, without a sampler: rows of random tokens, of the lengths that gpu.py's completions have, new in each
update but for two that repeat the one before. An update that meets its lengths for the first time may be slower than
one that repeats them: some kernels plan anew for each shape.

The kernels of one more update are counted by the names that libraries give them. Products in TF32 and whatever works
along the vocabulary (softmax) are the head's, all others in bf16 are the layers'. `waiting` is the median of the
updates with new lengths, less all kernels: the GPU has nothing to do, as the CPU has not told it yet. On a CPU the same
is done with torch's operators, whose names say less.

The head is timed in one more update, in which the CPU waits for the GPU before and after each pass through it.
"""

import random
import re
import time
from collections import Counter
from statistics import median

import torch

KINDS = {  # the first whose pattern is found in the name of a kernel
    "attention": r"sdpa|flash|fmha|attention",
    "head": r"tf32|f32f32|sgemm|softmax|scatter_add|scatter_gather|cross_entropy",
    "products of the layers": r"gemm|nvjet|xmma|cutlass|cublas|aten::(mm|bmm|addmm|matmul|linear)",
    "optimizer": r"adam|multi_tensor|foreach|lpnorm|norm_kernel",
    "copies and casts": r"memcpy|memset|copy|cast|fill|cat|index|gather",
    "elementwise": "",
}


def kind_of(kernel: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel.lower()))


def rows_of(work: dict, seed: int) -> list:
    """The rollouts of a step: prompts of 80 to 120 tokens, lengths of a geometric distribution, with gpu.py's mean."""
    import grpo

    rng, rows = random.Random(seed), []
    for _ in range(work["P"] * work["G"]):
        prompt = [rng.randrange(10, 900) for _ in range(rng.randrange(80, 121))]
        n = min(work["longest"], 1 + int(rng.expovariate(1 / work["mean"])))
        rows.append(grpo.Rollout(prompt, [rng.randrange(10, 900) for _ in range(n)], [-11.9] * n, False))
        rows[-1].advantage = rng.choice([-1.0, 1.0])
    return rows


def padding(rows: list, budget: int) -> float:
    """The share of positions in the microbatches that hold no token."""
    from harness.batching import microbatches, row_tokens

    batches = microbatches(rows, budget)
    return 1 - sum(map(row_tokens, rows)) / sum(len(batch) * max(map(row_tokens, batch)) for batch in batches)


def profile(shape: str, how: dict, partial) -> dict:
    """The figures of one shape, with the settings of gpu.py's runs and those of `--set`."""
    import transformers
    from gpu import figures
    from shapes import MAX_PROMPT, WORK, model_config

    import grpo
    from harness import devices, fast_head, optimizers

    work, on_gpu = WORK[shape], torch.cuda.is_available()
    settings = dict(tokens_per_microbatch=work["microbatch"], gradient_checkpointing=work["checkpointing"], lr=1e-6)
    settings |= dict(prompts_per_step=work["P"], group_size=work["G"], max_prompt_tokens=MAX_PROMPT)
    config = grpo.Config(model=shape, task="none", max_completion_tokens=work["longest"], **settings | how["set"])
    accelerator = devices.make_accelerator(config)
    torch.manual_seed(0)
    with torch.device(accelerator.device):
        model = transformers.AutoModelForCausalLM.from_config(model_config(shape), dtype=torch.float32)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    policy = grpo.Policy(model)
    policy, optimizer = accelerator.prepare(policy, optimizers.make_optimizer(policy, config, accelerator))

    def wait() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def update(rows: list) -> float:
        started = wait()
        grpo.update(policy, optimizer, accelerator, rows, config, step=1)
        return wait() - started

    first, new = update(rows_of(work, 0)), [update(rows_of(work, seed)) for seed in (1, 2, 3)]
    again = [update(rows_of(work, 3)) for _ in range(2)]
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None

    in_head, token_logps, backward = [], fast_head.token_logps, fast_head.FastHead.backward

    def timed(function):
        def run(*args, **kwargs):
            started = wait()
            result = function(*args, **kwargs)
            in_head.append(wait() - started)
            return result

        return run

    fast_head.token_logps, fast_head.FastHead.backward = timed(token_logps), staticmethod(timed(backward))
    update(rows_of(work, 3))
    fast_head.token_logps, fast_head.FastHead.backward = token_logps, staticmethod(backward)

    # without the CPU's events: with them, a profile of a large model takes minutes
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        update(rows_of(work, 3))
    kernels, launches, slowest = Counter(), 0, Counter()
    for event in profiler.key_averages():
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        kernels[kind_of(event.key)] += seconds
        slowest[event.key[:80]] += seconds
        launches += event.count if seconds else 0
    rows = rows_of(work, 3)
    tokens = [[len(row.prompt_ids), row.length] for row in rows]
    flops = figures(shape, 1.0, 1.0, 0.0, [row.length for row in rows], tokens)["training TFLOP/s"]
    return dict(
        first=first, new=new, again=again, head=sum(in_head), kernels={kind: kernels[kind] for kind in KINDS},
        waiting=max(0.0, median(new) - kernels.total()), launches=launches, peak=peak,
        padding=padding(rows, config.tokens_per_microbatch), tflop=flops, slowest=slowest.most_common(12),
    )  # fmt: skip


def text(row: dict) -> str:
    """What there is to read of `profile`."""
    if "failed" in row:
        return f"{row['shape']}: {row['failed']}"
    update, rate = median(row["new"]), row["matmul_tflops"]
    lines = [f"{row['shape']}, {row['program']}: seconds of an update of {row['tflop']:.0f} TFLOP"]
    for name, seconds in (
        ("the first", row["first"]),
        ("new lengths", update),
        ("the same again", median(row["again"])),
    ):
        share = 100 * row["tflop"] / seconds / rate
        lines.append(f"  {name:24}{seconds:8.2f}  {row['tflop'] / seconds:6.1f} TFLOP/s, {share:.1f} % of matmul")
    lines.append(f"of it, by {row['launches']:,} kernels ({100 * row['padding']:.1f} % of all positions are padding)")
    for kind, seconds in [*row["kernels"].items(), ("waiting", row["waiting"])]:
        lines.append(f"  {kind:24}{seconds:8.2f}  {100 * seconds / update:6.1f} %")
    lines.append(f"  {'(head, with waits)':24}{row['head']:8.2f}  {100 * row['head'] / update:6.1f} %")
    return "\n".join(lines)
