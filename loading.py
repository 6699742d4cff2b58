"""From names to things: the task, the model with its tokenizer, the device; each checked before any long work."""

import inspect
import json
import runpy
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn

from settings import HERE, Config, UsageError

TASKS = {"arithmetic": "mathformer:ArithmeticTask", "countdown": "tasks:Countdown"}
TASKS |= {"gsm8k": "tasks:GSM8K", "math": "tasks:Math"}


def load_task(name: str, task_args: dict[str, Any]):
    """The task called `name`: built-in, `module:Class`, or `path/to/file.py:Class`.

    Raises:
        UsageError: there is no such task, or it does not take these arguments.
    """
    where, _, class_name = TASKS.get(name, name).rpartition(":")
    if not where:
        known = ", ".join(TASKS)
        raise UsageError(f"unknown task {name!r}; built in: {known}; your own: module:Class or path/to/file.py:Class")
    try:
        if where.endswith(".py"):
            sys.path.insert(0, str(Path(where).parent))  # so that the file can import its neighbours
            found = runpy.run_path(where)
        else:
            found = vars(import_module(where))
    except Exception as error:  # anyone's code may be in there
        raise UsageError(f"task {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if class_name not in found:
        raise UsageError(f"task {name!r}: {where} has no class {class_name}")
    try:
        return found[class_name](**task_args)
    except Exception as error:
        raise UsageError(f"task {name!r}: {error}; its arguments: {inspect.signature(found[class_name])}") from error


def local_name(name: str) -> str:
    """A model's folder that comes with this file is found from anywhere."""
    return str(HERE / name) if not Path(name).exists() and (HERE / name).exists() else name


def load_model(name: str):
    """The causal language model in float32, without dropout, and its tokenizer; from a folder or the Hub."""
    transformers.utils.logging.disable_progress_bar()  # of loading and saving: they would break up our own
    name = local_name(name)
    if not Path(name).exists():
        print(f"there is no folder {name} here: looking for it on the Hugging Face Hub")
    config_file = Path(name) / "config.json"
    try:
        if config_file.is_file() and json.loads(config_file.read_text()).get("model_type") == "mathformer":
            import_module("mathformer")  # registers the architecture
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        # Float32 weights: at a learning rate of 1e-6 most updates are smaller than bf16 can represent.
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        misfits = [f"{key} is missing" for key in sorted(report["missing_keys"])]
        misfits += [f"{key} is {list(a)}, not {list(b)}" for key, a, b in sorted(report["mismatched_keys"])]
        if misfits:  # these would be random numbers
            raise ValueError(f"its weights do not fit its config.json: {misfits[0]}, and {len(misfits) - 1} more.")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"model {name!r} cannot be loaded: {reason} Give a folder, or a name on the Hub.") from error
    for module in model.modules():  # with dropout, the policy that is trained would not be the one that was sampled
        for setting, value in list(vars(module).items()):
            is_dropout = "drop" in setting or (setting == "p" and isinstance(module, nn.modules.dropout._DropoutNd))
            if is_dropout and isinstance(value, float):
                setattr(module, setting, 0.0)
    return model, tokenizer


def find_eos(model, tokenizer) -> list[int]:
    """Every token that ends an answer: chat models often have more than one."""
    ids = model.generation_config.eos_token_id
    eos = {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}
    if not eos:
        raise UsageError("neither the tokenizer nor the generation config of this model names an end-of-sequence token")
    return sorted(eos)


def make_accelerator(config: Config) -> Accelerator:
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(config.device, True):
        here = ", ".join(device for device in present if present[device])
        raise UsageError(f"there is no device {config.device!r} here, only {here}")
    on_cuda = present["cuda"] and config.device in ("auto", "cuda")
    has_bf16 = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.precision == "bf16" and on_cuda and not has_bf16:
        raise UsageError("this GPU has no bf16: use --precision fp32")
    use_bf16 = {"auto": has_bf16, "fp32": False, "bf16": True}[config.precision]
    return Accelerator(cpu=config.device == "cpu", mixed_precision="bf16" if use_bf16 else "no")
