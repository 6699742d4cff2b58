"""On what a run computes: the device, the precision, and the processes that `accelerate launch` has started."""

import os
import sys
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from harness import trackers
from harness.settings import Config, UsageError

# What products are computed in, by accelerate's names. Weights that are trained stay in float32: autocast rounds them.
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(config: Config) -> str:
    """A name of `DTYPES`: as the settings say, or what this card has.

    Raises:
        UsageError: what they say does not run here.
    """
    on_cuda = torch.cuda.is_available() and config.device in ("auto", "cuda")
    has_bf16 = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    is_spread = any(parse_flag_from_env(f"ACCELERATE_USE_{kind}") for kind in ("FSDP", "DEEPSPEED"))
    has_fp16 = on_cuda and not is_spread and config.optimizer == "adamw"
    if config.precision == "auto":
        return "bf16" if has_bf16 else "fp16" if has_fp16 else "no"
    if config.precision == "bf16" and on_cuda and not has_bf16:
        raise UsageError(f"this GPU has no bf16: use --precision {'fp16' if has_fp16 else 'fp32'}")
    if config.precision == "fp16" and not on_cuda:
        raise UsageError("precision fp16 is for CUDA GPUs: elsewhere, use --precision fp32 (or bf16 on a CPU)")
    if config.precision == "fp16" and is_spread:
        raise UsageError("precision fp16 is for whole models: with FSDP or DeepSpeed, use --precision bf16")
    return "no" if config.precision == "fp32" else config.precision


def make_accelerator(config: Config) -> Accelerator:
    """Device, precision and processes; a UsageError if they, or the trackers of `report_to`, are not there."""
    trackers.chosen(config.report_to)
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(config.device, True):
        here = ", ".join(device for device in present if present[device])
        raise UsageError(f"there is no device {config.device!r} here, only {here}")
    on_cuda = present["cuda"] and config.device in ("auto", "cuda")
    on_cpu = config.device == "cpu" or not (present["cuda"] or present["mps"])
    precision = choose_precision(config)
    started, here = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if on_cuda and here > torch.cuda.device_count():
        raise UsageError(
            f"{here} processes were started on this machine, each needs a GPU, and it has {torch.cuda.device_count()}: "
            "accelerate launch --num_processes N"
        )
    if started > config.prompts_per_step:
        raise UsageError(f"{started} processes are to share {config.prompts_per_step} prompts_per_step: start fewer")
    handlers = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]  # or DDP would hold all gradients twice
    handlers += [InitProcessGroupKwargs(timeout=timedelta(minutes=30 + 3 * config.server_minutes))]
    fsdp = None
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        # left to itself, accelerate rounds to bf16 what comes out of the policy too: its log-probs
        policy = MixedPrecisionPolicy(torch.bfloat16 if precision == "bf16" else None, torch.float32, None, False)
        fsdp = FullyShardedDataParallelPlugin(mixed_precision_policy=policy)
    torch.backends.cuda.enable_cudnn_sdp(config.cudnn_attention)
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision, fsdp_plugin=fsdp, kwargs_handlers=handlers)
    if accelerator.num_processes != started:  # they would be runs of their own, each like the others
        raise UsageError(f"{started} processes on {accelerator.device} cannot work together: try --device cpu")
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        shard_on_cpu(accelerator, fsdp)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.deepspeed_plugin.deepspeed_config["gradient_clipping"] = config.grad_clip
        accelerator.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1  # it insists on a number
    if precision != "no" and on_cuda:
        # the logits are products of float32; without this they would take longer than the rest of the model
        torch.set_float32_matmul_precision("high")
    if not accelerator.is_main_process:
        sys.stdout = open(os.devnull, "w")  # one process talks; the errors of all are seen
    return accelerator


def shard_on_cpu(accelerator: Accelerator, fsdp: FullyShardedDataParallelPlugin | None) -> None:
    """FSDP or DeepSpeed as the launch asks for them, which accelerate has for GPUs only: here one can try and test."""
    state = accelerator.state
    if fsdp:
        state.fsdp_plugin = fsdp
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    elif parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        state.deepspeed_plugins = DeepSpeedPlugin()
        state.deepspeed_plugins.set_mixed_precision(accelerator.mixed_precision)
        PartialState().distributed_type = state.distributed_type = DistributedType.DEEPSPEED
        state.deepspeed_plugins.select(_from_accelerator_state=True)
