"""AdamW in three sizes: where weights and moments are kept, and in how many bytes; and its learning rate."""

import math
from importlib.util import find_spec

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from harness import parallel
from harness.settings import Config, UsageError


def make_optimizer(policy: nn.Module, config: Config, accelerator: Accelerator) -> torch.optim.Optimizer:
    """The optimizer of `policy`, whose weights go to bf16 where the setting says so. Bytes a parameter on the card:

        adamw          16   float32: weights 4, gradients 4, moments 8
        adamw_8bit      6   weights and gradients in bf16, moments in 8 bits (arXiv 2110.02861)
        adamw_offload   4   weights and gradients in bf16; float32 weights and moments on the CPU

    Raises:
        UsageError: what the setting needs is not installed, or does not go with FSDP or DeepSpeed.
    """
    settings = dict(lr=config.lr, weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        fused = accelerator.device.type == "cuda"  # one kernel, without a copy of all moments on the way
        trained = [weight for weight in policy.parameters() if weight.requires_grad]  # not all, with LoRA
        return torch.optim.AdamW(trained, fused=fused, **settings)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UsageError(f"optimizer {config.optimizer} is for whole models: with FSDP or DeepSpeed take adamw")
    if config.optimizer == "adamw_offload":
        optimizer = OffloadedAdamW(policy.parameters(), **settings)  # takes the float32 weights first
        parallel.cast(policy.parameters(), torch.bfloat16)
        return optimizer
    if not find_spec("torchao"):
        raise UsageError("optimizer adamw_8bit needs torchao, which is not installed: pip install torchao==0.18.0")
    parallel.cast(policy.parameters(), torch.bfloat16)
    return make_8bit(policy, settings)


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW on float32 copies of the weights that stay on the CPU, as its moments do.

    The weights on the card follow at each step, rounded to what precision they have there. (torchao's offloading
    takes the gradients away during the backward pass, before anyone could clip them.)
    """

    def __init__(self, params, **settings):
        self.on_card = list(params)
        super().__init__([nn.Parameter(p.detach().float().cpu().clone()) for p in self.on_card], fused=True, **settings)

    @property
    def float32_weights(self) -> list[torch.Tensor]:
        """In the order of the parameters that were given."""
        return self.param_groups[0]["params"]

    @torch.no_grad()
    def step(self, closure=None):
        for p, weight in zip(self.on_card, self.float32_weights, strict=True):
            weight.grad = None if p.grad is None else p.grad.cpu().float()  # None: frozen, or not used
        super().step()
        for p, weight in zip(self.on_card, self.float32_weights, strict=True):
            if weight.grad is not None:
                weight.grad = None
                p.copy_(weight)

    def zero_grad(self, set_to_none: bool = True):
        for p in self.on_card:
            p.grad = None


def make_8bit(policy: nn.Module, settings: dict) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    class StochasticAdamW8bit(AdamW8bit):
        """Rounds a weight up or down at random, so that also a step much smaller than bf16's gaps moves it on average.

        The noise is that of the step's number: of each process the same, and after --resume too.
        """

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)
            torch.manual_seed(max((int(state["step"]) for state in self.state.values() if state), default=0))
            super().step()

    return StochasticAdamW8bit(policy.parameters(), bf16_stochastic_round=True, **settings)


def packed_moments(optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as plain tensors on the CPU, by the names `<parameter>.<moment>` or `....<part>`.

    With it goes the state of the loss scaler, if there is one, by the names `scaler.<setting>`.
    """
    scaler = getattr(optimizer, "scaler", None)
    packed = {f"scaler.{key}": torch.tensor(value) for key, value in (scaler.state_dict() if scaler else {}).items()}
    for i, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            value = parallel.whole(value)
            parts = value.__tensor_flatten__()[0] if hasattr(value, "codes") else []  # of 8 bits: codes and scales
            packed |= {f"{i}.{key}.{part}": getattr(value, part).cpu() for part in parts}
            packed |= {} if parts else {f"{i}.{key}": value.cpu()}
    return packed


def load_moments(optimizer, packed: dict[str, torch.Tensor]) -> None:
    """Undoes `packed_moments`. Raises UsageError if they are not those of this optimizer's parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scaling = {name.removeprefix("scaler."): packed[name].item() for name in packed if name.startswith("scaler.")}
    if scaling and (scaler := getattr(optimizer, "scaler", None)):
        scaler.load_state_dict(scaling)
    packed = {name: value for name, value in packed.items() if not name.startswith("scaler.")}
    states: dict[int, dict] = {}
    for name, value in packed.items():
        i, key, *part = name.split(".")
        if not i.isdigit() or int(i) >= len(parameters):
            raise UsageError(f"the optimizer's state has {name}, and there are {len(parameters)} parameters")
        if value.ndim and not part and value.shape != parameters[int(i)].shape:
            raise UsageError(f"the optimizer's state has {name} of the shape {list(value.shape)}, not the parameter's")
        state = states.setdefault(int(i), {})
        if part:
            state.setdefault(key, {})[part[0]] = value
        else:
            state[key] = parallel.spread(value, parameters[int(i)])
    for i, state in states.items():
        for key, value in state.items():
            if isinstance(value, dict):
                from torchao.optim.subclass_8bit import OptimState8bit

                state[key] = OptimState8bit(**value, signed=key == "exp_avg", dtype=parameters[i].dtype)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": states})


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of step 1, 2, ..., steps. A function of the step alone, so a resumed run needs no memory."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    done = (step - config.warmup_steps - 1) / max(1, config.steps - config.warmup_steps)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.lr * shape[config.lr_schedule]
