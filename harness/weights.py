"""What a run keeps of its model: all weights, or with LoRA the adapters alone; and at the end the model to be used."""

from pathlib import Path

import torch

from harness import lora, parallel


def kept_weights(model, optimizer) -> dict[str, torch.Tensor]:
    """What a checkpoint holds, on the CPU: the adapters, if there are any; else all weights and buffers.

    Tied weights are there once. In float32 where the optimizer has them so, or a resumed run would round them.
    """
    if lora.adapted(model):
        return {name: parallel.whole(weight.detach()).cpu() for name, weight in lora.trained(model).items()}
    weights = buffers(model) | {name: weight.cpu() for name, weight in parallel.whole_weights(model)}
    float32 = getattr(getattr(optimizer, "optimizer", optimizer), "float32_weights", [])
    return weights | dict(zip(dict(model.named_parameters()), float32, strict=False))


def final_weights(model, optimizer) -> dict[str, torch.Tensor]:
    """What final/ holds: as `kept_weights`, or with adapters the weights with them merged in, in float32."""
    if not lora.adapted(model):
        return kept_weights(model, optimizer)
    return buffers(model) | {name: weight.cpu() for name, weight in lora.merged_weights(model, torch.float32)}


def buffers(model) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: value for name, value in model.state_dict().items() if name not in parameters}


def write_model(model, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """A model of this architecture with these weights, as `from_pretrained` and vLLM load it."""
    if lora.adapted(model):  # its modules have other names than these weights
        settings = model.generation_config
        with torch.device("meta"):
            model = type(model)(model.config)
        model.generation_config = settings
    model.save_pretrained(folder, state_dict=weights)
