"""LoRA (arXiv 2106.09685), by PEFT: the model stays as it is, and small matrices beside its large ones are trained.

    W x  becomes  W x + s B A x     W [out, in] frozen, A [rank, in], B [out, rank] 0 at the start, s = alpha / rank

What is trained, its gradients and AdamW's moments shrink to a few percent. The frozen weights need no more precision
than the forward pass has, and without the adapters they are the reference model of a KL penalty.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from harness import parallel
from harness.devices import DTYPES
from harness.files import local_name
from harness.model_checks import check_numbers, exact_products, one_row, refused
from harness.settings import Config, UsageError

ALL = "all-linear"  # PEFT's name for every linear layer but the output head
ADAPTER, ITS_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that can have an adapter, by name.

    The output head has none: its product is grpo.py's own. Nor have layers that share a weight, since that could not be
    merged with the adapters of both.
    """
    head = model.get_output_embeddings()
    owners = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)}
    return {name: layer for name, layer in linear.items() if layer is not head and owners[id(layer.weight)] == 1}


def targets(model: nn.Module, config: Config) -> dict[str, nn.Module]:
    """The layers that `lora_targets` names: all, those with one of these names, or those that a pattern matches.

    Of all layers, those that are narrower than `lora_rank` have no adapter, such as the router of a few experts.

    Raises:
        UsageError: there are none, `lora_rank` is more than one of them can have, or PEFT is not there.
    """
    if config.lora_rank and not find_spec("peft"):
        raise UsageError("lora_rank needs peft, which is not installed: pip install -r requirements.txt")
    layers, wanted = adaptable(model), config.lora_targets.strip()
    if wanted == ALL:
        wide = {name: layer for name, layer in layers.items() if min(layer.weight.shape) >= config.lora_rank}
        found = wide or layers
    elif re.fullmatch(r"[\w.-]+(\s*,\s*[\w.-]+)*", wanted):
        found = {}
        for target in re.split(r"\s*,\s*", wanted):
            matches = {name: layer for name, layer in layers.items() if f".{name}".endswith(f".{target}")}
            if not matches:
                hint = there_are(target, layers)
                raise UsageError(f"lora_targets has {target!r}, and no layer for an adapter has that name; {hint}")
            found |= matches
    else:
        try:
            found = {name: layer for name, layer in layers.items() if re.fullmatch(wanted, name)}
        except re.error as error:
            raise UsageError(f"lora_targets {wanted!r} is no regular expression: {error}") from error
        if not found:
            raise UsageError(f"the pattern lora_targets {wanted!r} matches no whole name; {there_are(wanted, layers)}")
    for name, layer in found.items():
        if config.lora_rank > min(layer.weight.shape):
            shape = " x ".join(map(str, layer.weight.shape))
            raise UsageError(
                f"lora_rank is {config.lora_rank}, and {name}, {shape}, has a smaller side: lower lora_rank, or leave "
                "that layer out of lora_targets"
            )
    return found


def there_are(target: str, layers: dict) -> str:
    """Which layers there are, those of similar names if there are any."""
    last = sorted({name.rpartition(".")[2] for name in layers})
    return f"there are {', '.join(get_close_matches(target.rpartition('.')[2], last, cutoff=0.5) or last)}"


@torch.no_grad()
def called(model: nn.Module, layers: dict[str, nn.Module], config: Config) -> dict[str, nn.Module]:
    """Those of the layers that a text goes through by a call, so that an adapter beside them has an effect.

    Towers for images are not, and layers whose weight a model multiplies with by itself. Of the experts of a mixture,
    all are if one is.

    Raises:
        UsageError: none is, or a layer is not that `lora_targets` names.
    """
    seen: set[str] = set()

    def kind(name: str) -> str:
        return re.sub(r"[0-9]+", "", name)

    def note(name: str):
        return lambda *_: seen.add(kind(name))

    hooks = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    was_training = model.training
    one_row(model.train())
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    found = {name: layer for name, layer in layers.items() if kind(name) in seen}
    if len(found) < len(layers) and (config.lora_targets.strip() != ALL or not found):
        name = next(name for name in layers if name not in found)
        raise UsageError(
            f"{name} is not called when {type(model).__name__} reads a text: an adapter there would do nothing. Leave "
            "it out of lora_targets"
        )
    return found


def check_checkpoint(checkpoint: Path, config: Config) -> None:
    """Raises UsageError if LoRA was on and is off now, or the other way around."""
    if holds_adapter(checkpoint) != bool(config.lora_rank):
        holds = "the whole model" if config.lora_rank else "an adapter alone"
        raise UsageError(
            f"lora_rank is {config.lora_rank}, and {checkpoint} holds {holds}: put lora_rank back in config.yaml, or "
            "start a new run from the model in final/"
        )


def holds_adapter(folder: Path) -> bool:
    """Whether this folder holds an adapter, and not a model."""
    return (folder / ITS_CONFIG).is_file()


def refuse_adapter(name: str) -> None:
    """Raises UsageError if this folder holds an adapter, and not a model."""
    if holds_adapter(Path(name)):
        its_config = json.loads((Path(name) / ITS_CONFIG).read_text(encoding="utf-8"))
        raise UsageError(
            f"model {name!r} is an adapter (LoRA) for {its_config.get('base_model_name_or_path')}, and not a whole "
            "model: give both merged. The final/ of a run is that; for others see docs/small_cards.md"
        )


def add_adapters(model: nn.Module, config: Config, accelerator: Accelerator, checkpoint: Path | None = None) -> None:
    """Adapters for the model, if the settings say so: new ones, or those of a checkpoint.

    All else is frozen, in the precision of the forward pass.
    """
    if not config.lora_rank:
        return
    peft = import_module("peft")
    chosen = targets(model, config)
    with refused(model, "cannot be trained with LoRA"):
        layers = called(model, chosen, config)
    left_out = len(adaptable(model)) - len(layers) if config.lora_targets.strip() == ALL else 0
    torch.manual_seed(config.seed)  # all processes begin with the same A
    settings = peft.LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=list(layers), task_type="CAUSAL_LM",
        base_model_name_or_path=local_name(config.model),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
    )  # fmt: skip
    with refused(model, "cannot be trained with LoRA"):
        peft.inject_adapter_in_model(settings, model)
        # it has rules of its own for layers beside fused experts
        if layers.keys() != adapted(model).keys():
            elsewhere = sorted({name.rpartition(".")[2] for name in layers.keys() - adapted(model).keys()})
            raise UsageError(
                f"PEFT puts adapters of {type(model).__name__} where they cannot be merged: name its other layers in "
                f"lora_targets, without {', '.join(elsewhere)}"
            )
        frozen = [weight for weight in model.parameters() if not weight.requires_grad]
        parallel.cast(frozen, DTYPES[accelerator.mixed_precision])
        check_numbers(model, accelerator.mixed_precision)
    if checkpoint:
        load(model, checkpoint)
    rest = f" ({left_out} others are too narrow for it, or not called)" if left_out else ""
    numbers = sum(weight.numel() for weight in trained(model).values())
    print(f"LoRA of rank {config.lora_rank} on {len(layers)} layers{rest}: {numbers:,} numbers are trained")


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def is_adapter(name: str) -> bool:
    """Whether this is the name of an adapter's matrix, among those of a model's parameters."""
    return bool(re.search(r"\.lora_[AB]\.", name))


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    """PEFT's layers, by the names of those that they stand for. None without LoRA."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def load(model: nn.Module, folder: Path) -> None:
    weights = {in_file(name): weight for name, weight in trained(model).items()}
    saved = load_file(folder / ADAPTER)
    for name in sorted(weights.keys() | saved.keys()):
        a, b = (list(found[name].shape) if name in found else None for found in (saved, weights))
        if a != b:
            raise UsageError(f"the adapter in {folder} does not fit lora_rank and lora_targets: {name} is {a}, not {b}")
    for name, weight in weights.items():
        weight.data.copy_(saved[name])


def in_file(name: str) -> str:
    """The name of an adapter's matrix in PEFT's files."""
    return "base_model.model." + name.replace(".default.", ".")


def save(model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """These weights of its adapters as PEFT saves them."""
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config["default"].save_pretrained(folder)
    save_file({in_file(name): weight.contiguous() for name, weight in weights.items()}, folder / ADAPTER)


def merged_weights(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and whole weights of the model as it would be without adapters, W + s B A, one at a time.

    Rounded once, to `dtype` or what W has. The same as `parallel.whole_weights` where there are no adapters.
    """
    layers = adapted(model)
    for name, weight in parallel.whole_weights(model):
        module, _, last = name.partition(".base_layer.")
        if last == "weight":
            weight = (weight.float() + change(layers[module])).to(weight.dtype if dtype is None else dtype)
        if not is_adapter(name):
            yield (f"{module}.{last}" if last else name), (weight if dtype is None else weight.to(dtype))


@exact_products()
def change(layer: nn.Module) -> torch.Tensor:
    """s B A, in float32, of the shape of W."""
    a, b = (parallel.whole(part["default"].weight.detach()).float() for part in (layer.lora_A, layer.lora_B))
    product = layer.scaling["default"] * (b @ a)
    return product.T if layer.fan_in_fan_out else product


@contextmanager
def switched_off(model: nn.Module):
    layers = adapted(model).values()
    for layer in layers:  # not by `enable_adapters`, which freezes them: FSDP would note that they have no gradient
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


class WithoutAdapters(nn.Module):
    """The policy as it was at the start: the reference model of a KL penalty, which needs no memory of its own."""

    def __init__(self, policy: nn.Module):
        super().__init__()
        self.policy = policy

    def forward(self, *args, **kwargs):
        with switched_off(self.policy):
            return self.policy(*args, **kwargs)


def noise_sizes(policy: nn.Module) -> dict[nn.Parameter, float]:
    """For each trained weight the size that noise must have to change what the model computes about as much again.

    Without adapters, the mean size of its numbers. A change of B by b changes W by s b |A|, and B may still be 0.
    """
    sizes = {weight: mean_size(weight) for weight in policy.parameters() if weight.requires_grad}
    for layer in adapted(policy).values():
        a = parallel.whole(layer.lora_A["default"].weight.detach())
        column = float(a.norm()) / a.shape[1] ** 0.5
        sizes[layer.lora_B["default"].weight] = mean_size(layer.base_layer.weight) / layer.scaling["default"] / column
    return sizes


def mean_size(weight: nn.Parameter) -> float:
    return float(parallel.whole(weight.detach().abs().mean(dtype=torch.float32)))
