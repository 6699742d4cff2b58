"""What a run needs of a card's memory, by arithmetic, before anything is loaded.

With N parameters, the trainer holds 4N bytes of float32 weights, 4N of gradients and 8N of AdamW's moments, or less
with another `optimizer`; under autocast, 2N of 16-bit copies of what is multiplied. With LoRA that is so for the
adapters alone, and the model takes 2N or 4N bytes, as the precision is. What a token adds to a layer was read off the
tensors that autograd keeps for Qwen2, Qwen3 and Llama. tests/harness/test_memory.py compares that, and the whole of the
training column with what an update really holds. What vLLM and CUDA take besides is an estimate.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import psutil
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType

from harness import lora, parallel
from harness.settings import Config, UsageError

LOGITS_CHUNK, KEPT_LOGITS = 2048, 2**26
CUDA_ITSELF, VLLM_REST = 0.6e9, 3e9  # bytes: the context of CUDA; vLLM's CUDA graphs and workspace. Not measured


def size_of(config, name: str, otherwise: int) -> int:
    """A size in a config; the largest, if it differs by layer; `otherwise`, if there is none."""
    try:
        found = getattr(config, name, None)
    except RuntimeError:  # what transformers raises then
        found = [getattr(layer, name, None) for layer in config.per_layer_config]
    sizes = [size for size in (found if isinstance(found, list) else [found]) if size]
    return max(sizes, default=otherwise)


class Shape(NamedTuple):
    """The sizes of a decoder-only transformer that decide its memory."""

    parameters: int
    layers: int
    hidden: int
    queries: int  # heads * width of a head
    keys_values: int  # 2 * heads of the keys * width of a head
    mlp: int
    vocabulary: int
    chunk: int  # `logits_chunk`
    embeddings: int  # parameters of input and output embedding, tied ones counted once
    normalises_queries: bool  # and keys, as Qwen3 does
    adaptable: int  # parameters of the adapters of a LoRA of rank 1

    @classmethod
    def of(cls, model_config, config: Config | None = None) -> "Shape":
        """From a model's config, without weights. Mixtures of experts count all experts, but the MLP of a dense layer.

        Raises:
            UsageError: the LoRA of `config`, if one is given, does not fit the model.
        """
        c = model_config.get_text_config()
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(model_config)
        hidden = c.hidden_size
        heads = size_of(c, "num_attention_heads", 1)
        width = size_of(c, "head_dim", hidden // heads)
        adapted = lora.targets(model, config) if config else lora.adaptable(model)
        ends = [m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            layers=c.num_hidden_layers,
            hidden=hidden,
            queries=heads * width,
            keys_values=2 * size_of(c, "num_key_value_heads", heads) * width,
            mlp=size_of(c, "intermediate_size", 4 * hidden),
            vocabulary=c.vocab_size,
            chunk=logits_chunk(c),
            embeddings=sum({id(weight): weight.numel() for weight in ends}.values()),
            normalises_queries=any(name.endswith("q_norm") for name, _ in model.named_modules()),
            adaptable=sum(sum(layer.weight.shape) for layer in adapted.values()),
        )

    def cache_bytes(self, half: bool) -> int:
        """Keys and values of one token, in all layers; `half`: in 16 bits."""
        return self.layers * self.keys_values * (2 if half else 4)

    def activation_bytes(self, half: bool, checkpointing: bool, rank: int = 0) -> int:
        """What autograd keeps of one token for the backward pass, in all layers; with LoRA of this rank, if not 0."""
        h, q, kv, f = self.hidden, self.queries, self.keys_values, self.mlp
        # in and out of two RMSNorms in float32 | inputs of q, k, v, gate, up | q, k, v and the output | gate, up, SiLU
        # and product; autocast makes a 16-bit copy of its own for each of the five products
        layer = 16 * h + (10 * h + 4 * q + 2 * kv + 8 * f if half else 8 * h + 8 * q + 4 * kv + 16 * f)
        normalised = 6 * q + 3 * kv if half else 8 * q + 4 * kv
        if rank:  # norms that are not trained need no output; the adapters' inputs, and what is between A and B
            layer += (2 * q - 8 * h if half else -8 * h) + 7 * rank * (2 if half else 4)
            normalised = 4 * q + 2 * kv
        layer += normalised * self.normalises_queries
        between = h * (2 if half and rank else 4)  # what goes from layer to layer: frozen weights are in 16 bits
        return between * self.layers + layer if checkpointing else layer * self.layers


def logits_chunk(model_config) -> int:
    """Tokens whose logits exist at the same time: those of 16k tokens of a 152k vocabulary would be 9.3 GiB."""
    return max(LOGITS_CHUNK, KEPT_LOGITS // model_config.get_text_config().vocab_size)


def free_memory(device: torch.device) -> int:
    """Bytes: of the GPU, or of the machine."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def own_rows(config: Config, processes: int) -> int:
    """The completions that a process samples in a step, at most."""
    return math.ceil(config.prompts_per_step / processes) * config.group_size


def vllm_cache_bytes(shape: Shape, config: Config, half: bool, free: int, processes: int) -> int:
    """vLLM's key-value cache: as set, or what a step's completions need, at least 0.1 GB, at most half of `free`."""
    if config.kv_cache_gb:
        return int(1e9 * config.kv_cache_gb)
    tokens = own_rows(config, processes) * (config.max_prompt_tokens + config.max_completion_tokens)
    return int(min(max(1.2 * tokens * shape.cache_bytes(half), 1e8), free / 2))


class Spread(NamedTuple):
    """Over how many processes the parts of the trainer are spread; each has a card of its own."""

    processes: int = 1
    weights: int = 1  # FSDP: all processes
    gradients: int = 1
    moments: int = 1  # DeepSpeed ZeRO-2: gradients and moments

    @classmethod
    def of(cls, accelerator: Accelerator) -> "Spread":
        n, kind = accelerator.num_processes, accelerator.distributed_type
        if kind == DistributedType.FSDP:
            return cls(n, n, n, n)
        return cls(n, 1, n, n) if kind == DistributedType.DEEPSPEED else cls(n)


ALONE = Spread()
# bytes a parameter on the card: weights, gradients, AdamW's moments; and what is on the CPU instead
OPTIMIZER_BYTES = {"adamw": (4, 4, 8, 0), "adamw_8bit": (2, 2, 2, 0), "adamw_offload": (2, 2, 0, 12)}


def needs(
    shape: Shape, config: Config, half: bool, vllm: bool, on_gpu: bool, free: int, spread: Spread = ALONE
) -> dict[str, list[float]]:
    """Bytes of each part, on the card of one process, while sampling, in the pass of the reference, in the update.

    `half`: it is computed in 16 bits, bf16 or fp16; `vllm`: with vLLM in this process.
    """
    n, s, rank = shape.parameters, shape, config.lora_rank
    trained = rank * shape.adaptable if rank else n
    longest = config.max_prompt_tokens + config.max_completion_tokens
    rows = own_rows(config, spread.processes)
    weights, gradients, moments, on_cpu = OPTIMIZER_BYTES[config.optimizer]
    frozen = (2 if half else 4) * n if rank else 0
    in_16_bits = weights == 2 or (half and rank > 0)  # the model's weights
    trainer_half = half or weights == 2  # what the trainer computes in
    held = weights * trained + frozen
    tokens = max(longest, min(config.tokens_per_microbatch, rows * longest))
    reference = held if config.kl_coef and not rank else 0
    on_card = not (config.offload_reference and on_gpu)  # on a CPU it is in the same memory, wherever it is
    copies = 2 * (trained if rank else n - s.embeddings) if half and weights == 4 else 0
    # logits and probabilities, and a third of them in the plain head; the gradient of the head's weight, if that is
    # trained, and where it is in 16 bits a float32 copy of it
    chunk = min(s.chunk, math.ceil(tokens * config.max_completion_tokens / longest))
    logits = 4 * chunk * s.vocabulary * (3 if config.entropy_coef else 2)
    logits += 4 * s.vocabulary * s.hidden * ((not rank) + in_16_bits)
    by_torch = not (vllm or config.samples_with_servers)
    sample_rows = max(config.sample_rows, config.group_size, config.eval_samples)  # the evaluation fills them
    sampled_logits = 12 * sample_rows * s.vocabulary + in_16_bits * 4 * s.vocabulary * s.hidden
    # with gradient checkpointing, the logits are gone when the activations of a layer are made again
    again = tokens * s.activation_bytes(trainer_half, False, rank) / s.layers if config.gradient_checkpointing else 0
    awake = not config.vllm_sleep
    vllm_weights = n * (2 if half else 4) if vllm else 0
    cache = vllm_cache_bytes(shape, config, half, free, spread.processes) if vllm else 0
    torch_cache = by_torch * 1.25 * sample_rows * longest * s.cache_bytes(trainer_half)
    table = {
        "weights": [held / spread.weights] * 3,
        "AdamW": [moments * trained / spread.moments + (0 if on_gpu else on_cpu * n)] * 3,
        "gradients": [0, 0, gradients * trained / spread.gradients],
        "reference": [reference * on_card, reference, reference * on_card],
        "older weights": [by_torch * bool(config.staleness) * held] * 3,
        "16-bit copies of the weights": [by_torch * copies, copies, copies],
        "activations": [0, 0, tokens * s.activation_bytes(trainer_half, config.gradient_checkpointing, rank)],
        "logits": [by_torch * sampled_logits, logits, max(logits - again, 0)],
        "vLLM: weights": [vllm_weights, awake * vllm_weights, awake * vllm_weights],
        "key-value cache": [cache or torch_cache, awake * cache, awake * cache],
        "vLLM: the rest": [VLLM_REST if vllm and on_gpu else 0] * 3,
        "CUDA": [CUDA_ITSELF if on_gpu else 0] * 3,
    }  # fmt: skip
    return {name: parts for name, parts in table.items() if any(parts)}


def peak(table: dict[str, list[float]]) -> float:
    return max(map(sum, zip(*table.values(), strict=True)))


def fitted(model_config, config: Config, accelerator: Accelerator, vllm: bool) -> Config:
    """The settings, with a number for `tokens_per_microbatch` auto: the largest that fits, up to a whole step.

    Prints that number; and, but for small models, what the run needs beside what is free, and what to lower if that
    may be too little.

    Raises:
        UsageError: it needs clearly more than there is.
    """
    shape, device = Shape.of(model_config, config), accelerator.device
    free, on_gpu = free_memory(device), device.type == "cuda"
    half, spread = accelerator.mixed_precision != "no", Spread.of(accelerator)
    free //= 1 if on_gpu else spread.processes  # that of the machine is for all

    def table_of(config: Config) -> dict[str, list[float]]:
        return needs(shape, config, half, vllm, on_gpu, free, spread)

    if config.tokens_per_microbatch == "auto":
        config = largest_microbatch(table_of, config, 0.9 * free, spread.processes)
    table = table_of(config)
    if (needed := peak(table)) < 2e9:
        return config
    print(f"memory in GB, by arithmetic{'':11}sampling  reference   training")
    for name, parts in (table | {"together": [sum(column) for column in zip(*table.values(), strict=True)]}).items():
        print(f"  {name:32}" + "".join(f"{part / 1e9:11.1f}" for part in parts))
    print(f"  {'free on this ' + ('card' if on_gpu else 'machine'):32}{free / 1e9:11.1f}")
    if needed < 0.95 * free:
        return config
    advice = lower(table_of, config, 0.9 * free, vllm and on_gpu)
    if needed > 1.15 * free:  # the arithmetic is not exact
        raise UsageError(f"the run needs about {needed / 1e9:.0f} GB of memory, {free / 1e9:.1f} are free. {advice}")
    print(f"  this may not fit. {advice}")
    return config


def largest_microbatch(table_of, config: Config, limit: float, processes: int) -> Config:
    """With the most `tokens_per_microbatch` for which the update needs less than `limit`: at least one row's tokens."""
    longest = config.max_prompt_tokens + config.max_completion_tokens
    whole_step = own_rows(config, processes) * longest

    def fits(tokens: int) -> bool:
        return sum(parts[2] for parts in table_of(replace(config, tokens_per_microbatch=tokens)).values()) < limit

    sizes = [longest, *range(1024 * (longest // 1024 + 1), whole_step, 1024), whole_step]
    found = max(filter(fits, sizes), default=longest)
    found = min(parallel.join([found]))  # all processes cut the rows of a step alike
    print(f"tokens_per_microbatch auto is {found:,}; all completions of a step have at most {whole_step:,}")
    return replace(config, tokens_per_microbatch=found)


def lower(table_of, config: Config, limit: float, can_sleep: bool) -> str:
    """Which settings bring the peak under `limit`, the cheapest in time first, and to what it comes then."""
    changed, needed = cheapest(table_of, config, limit, can_sleep)
    flags, fits = as_flags(changed), needed <= limit
    if not config.lora_rank and not (fits and changed.keys() <= COST_NO_TIME):
        adapters = dict(lora_rank=ADVISED_RANK, optimizer="adamw")
        more, with_lora = cheapest(table_of, replace(config, **adapters), limit, can_sleep)
        if with_lora <= limit:
            other_optimizer = {} if config.optimizer == "adamw" else {"optimizer": "adamw"}
            more = dict(lora_rank=ADVISED_RANK, lr=f"{10 * config.lr:g}") | other_optimizer | more
            told = f"With {as_flags(more)} (LoRA: it wants a larger learning rate) it needs about"
            other = f"; with all weights trained and {flags}, about {needed / 1e9:.0f} GB" if fits else ""
            return f"{told} {with_lora / 1e9:.0f} GB{other}"
        if with_lora < needed:
            changed, flags, needed = more, as_flags(dict(lora_rank=ADVISED_RANK) | more), with_lora
    if fits:
        return f"With {flags} it needs about {needed / 1e9:.0f} GB"
    with_flags = f"Even with {flags} it needs" if changed else "It needs"
    return f"{with_flags} about {needed / 1e9:.0f} GB: take a smaller model, a smaller group_size or a larger card"


ADVISED_RANK = 16
COST_NO_TIME = {"offload_reference", "tokens_per_microbatch"}  # or little


def as_flags(changed: dict[str, object]) -> str:
    return " ".join(f"--{name} {str(value).lower()}" for name, value in changed.items())


def cheapest(table_of, config: Config, limit: float, can_sleep: bool) -> tuple[dict[str, object], float]:
    """Settings that bring the peak under `limit`, or as far as they can; and that peak."""
    longest = config.max_prompt_tokens + config.max_completion_tokens
    steps = [("offload_reference", True), ("tokens_per_microbatch", max(longest, config.tokens_per_microbatch // 4))]
    steps += [("gradient_checkpointing", True), ("sample_rows", config.group_size)]
    steps += [("vllm_sleep", True)] if can_sleep else []
    steps += [("tokens_per_microbatch", longest)]
    steps += steps  # a setting may help only after another, where the peak then is elsewhere
    steps += [] if config.lora_rank else [("optimizer", "adamw_8bit"), ("optimizer", "adamw_offload")]
    changed: dict[str, object] = {}
    now = peak(table_of(config))
    for name, value in steps:
        if now <= limit:
            break
        trial = replace(config, **{name: value})
        if (then := peak(table_of(trial))) < 0.99 * now:
            config, now = trial, then
            changed[name] = value
    return changed, now
