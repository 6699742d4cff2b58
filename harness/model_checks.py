"""Whether a model is one that sampler and trainer compute alike; and what has to be set so that they do."""

from contextlib import contextmanager

import torch
from torch import nn

from harness.batching import policy_inputs
from harness.devices import DTYPES
from harness.settings import Sample, Sampling, UsageError

CLOSE = 1e-3  # of log-probs in float32; a tiny part of what a wrong mask, position or cache would make of them
PROMPT = 32  # tokens: enough to see what is wrong, and little work for a large model


def switch_off_noise(model: nn.Module) -> None:
    """No dropout and no noise of routers: with them, the policy that is trained would not be the one that sampled."""
    for module in model.modules():
        for setting, value in list(vars(module).items()):
            is_noise = "drop" in setting or "jitter" in setting
            is_noise |= setting == "p" and isinstance(module, nn.modules.dropout._DropoutNd)
            if is_noise and isinstance(value, float):
                setattr(module, setting, 0.0)


def scale_and_cap(config) -> tuple[float, float | None]:
    """What the model does with its logits behind the output head: times the first, and softly capped at the second.

    `logits_scaling` is Granite's, `logit_scale` Cohere's, `lm_head_multiplier` Falcon-H1's, and the cap Gemma's.
    """
    text = config.get_text_config()
    scale = (getattr(text, "logit_scale", None) or 1.0) * (getattr(text, "lm_head_multiplier", None) or 1.0)
    return scale / (getattr(text, "logits_scaling", None) or 1.0), getattr(text, "final_logit_softcapping", None)


def scaled_and_capped(model: nn.Module, logits: torch.Tensor) -> torch.Tensor:
    scale, cap = scale_and_cap(model.config)
    logits = logits if scale == 1 else logits * scale
    return (logits / cap).tanh() * cap if cap else logits


def check_positions(model_config, config) -> None:
    """Raises UsageError where a row's positions depend on the other rows of its batch.

    That is so with RoPE that changes its frequencies once any row is longer than the model's original window (LongRoPE,
    dynamic NTK): log-probs of a short row would be others beside a long one.
    """
    text, longest = model_config.get_text_config(), config.max_prompt_tokens + config.max_completion_tokens
    found = getattr(text, "rope_parameters", None) or {}
    for rope in [found, *(value for value in found.values() if isinstance(value, dict))]:
        original = rope.get("original_max_position_embeddings")
        original = original or getattr(text, "original_max_position_embeddings", None)
        original = original or getattr(text, "max_position_embeddings", None)
        if rope.get("rope_type") in ("longrope", "dynamic") and longest > original:
            raise UsageError(
                f"max_prompt_tokens {config.max_prompt_tokens} + max_completion_tokens {config.max_completion_tokens} "
                f"is more than {original} positions, beyond which this model's {rope['rope_type']} positions depend on "
                "the batch: lower one of them"
            )


@contextmanager
def refused(model: nn.Module, what: str):
    """Whatever is raised becomes one line: the architecture may be any."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UsageError(f"{type(model).__name__} {what}: {type(error).__name__}: {reason}") from error


def one_row(model: nn.Module) -> torch.Tensor:
    """The hidden states of 16 tokens."""
    table = model.get_input_embeddings()
    ids = torch.arange(16, device=table.weight.device) % table.num_embeddings
    return model.base_model(ids[None], use_cache=False).last_hidden_state


@torch.no_grad()
def check_numbers(model: nn.Module, precision: str) -> None:
    """Raises UsageError if the model computes what is no number in this precision, as many do in fp16.

    Args:
        precision: a name of `devices.DTYPES`.
    """
    device = model.get_input_embeddings().weight.device
    with torch.autocast(device.type, DTYPES[precision], enabled=precision != "no"):
        hidden = one_row(model)
    if not hidden.isfinite().all():
        raise UsageError(
            f"{type(model).__name__} computes numbers that {precision} cannot hold: use --precision fp32, or bf16 on a "
            "card that has it"
        )


@contextmanager
def exact_products():
    """Products of float32 in float32, also where a run wants them faster."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
@exact_products()
def check_model(run, make_policy, make_sampler) -> None:
    """Refuses a model that the trainer, or the sampler of torch, would compute otherwise than it computes itself.

    It is looked at where it will run, if that is one CUDA GPU with room for it in float32, and else on the CPU.

    Args:
        run: a `loading.Run` with model, problems, and the name of the sampler.
        make_policy: `grpo.Policy`. make_sampler: `grpo.TorchSampler`.

    Raises:
        UsageError: says in one line what is not as it must be.
    """
    device = run.accelerator.device
    alone_on_cuda = device.type == "cuda" and run.accelerator.num_processes == 1
    size = sum(weight.nbytes for weight in run.model.parameters())  # with LoRA, it is rounded to 16 bits later
    has_room = alone_on_cuda and torch.cuda.mem_get_info(device)[0] > 1.2 * size
    device = device if has_room else torch.device("cpu")
    model, prompt = run.model.to(device), run.problems[0].ids
    name, table = type(model).__name__, model.get_input_embeddings()
    rows = [prompt[:PROMPT], prompt[: max(1, min(PROMPT, len(prompt)) // 3)]]
    vocabulary = getattr(table, "num_embeddings", 0)
    with refused(model, "is not a causal language model of the usual make"):
        if max(rows[0]) >= vocabulary:
            raise UsageError(f"the prompt has the token {max(rows[0])}, and the model knows {vocabulary} tokens only")
        samples = [Sample(row[:1], row[1:] or row, [], False) for row in rows]
        ids = [torch.tensor([s.prompt_ids + s.completion_ids], device=device) for s in samples]
        own = [logps_of(model(row).logits, s) for row, s in zip(ids, samples, strict=True)]
    if not all(row.isfinite().all() for row in own):
        raise UsageError(f"{name} computes numbers that are not finite: its weights are broken")
    if model.base_model is model:
        raise UsageError(f"{name} has no decoder under the name {model.base_model_prefix!r} that gives hidden states")
    policy = make_policy(model)
    with refused(model, "cannot be trained here"):
        batch = policy_inputs(samples, device)
        alone = [policy(**policy_inputs([s], device))[0][0] for s in samples]
        together = policy(**batch)[0]
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            training = policy.train()(**batch)[0]
    model.eval()
    if far(own, alone):
        raise UsageError(
            f"the logits of {name} are not those of one linear head, scaled or capped as its config says: "
            "what is trained would not be what it computes"
        )
    if far(own, together):
        raise UsageError(f"{name} gives a row other log-probs beside a longer one: is it causal?")
    if far(own, training):
        raise UsageError(f"{name} computes otherwise in training: it would not train what was sampled")
    if run.accelerator.mixed_precision != "no":  # float32 is what was looked at above
        with refused(model, "cannot be computed in this precision"):
            check_numbers(model, run.accelerator.mixed_precision)
    if run.sampler_name != "torch":  # vLLM proves itself
        return
    with refused(model, "cannot be sampled from with torch (vLLM may serve it: --sampler vllm)"):
        sampler = make_sampler(model, list(range(0, vocabulary, 3)))  # so that rows end at different times
        drawn = sampler.generate(rows, 3, Sampling(max_tokens=4), 0)
        trained = policy(**policy_inputs(drawn, device))[0]
    if far([torch.tensor(s.logps, device=device) for s in drawn], trained):
        raise UsageError(f"{name} is another model where its past is cached: --sampler vllm may be right for it")


def logps_of(logits: torch.Tensor, row: Sample) -> torch.Tensor:
    """Log-probs of the completion, from the logits [1, L, V] of the whole row."""
    logps = logits[0, len(row.prompt_ids) - 1 : -1].float().log_softmax(-1)
    return logps.gather(1, torch.tensor(row.completion_ids, device=logps.device)[:, None])[:, 0]


def far(rows, others) -> bool:
    """Whether log-probs differ by more than rounding; `others` may be padded."""
    return not all((a - b[: len(a)]).abs().max() < CLOSE for a, b in zip(rows, others, strict=True))
