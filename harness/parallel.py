"""What changes when `accelerate launch` starts several processes; with one process, all of this does nothing.

Every process draws the same problems, samples and judges a part of them with a sampler of its own, and gets the
rollouts of all. So each of them knows the whole step: the advantages, the metrics and the weight of each token are
those of one process. The rows of an update are then dealt out again, by length, and only gradients are added up.
Processes may not lose step: whatever they do together (a gather, a pass through a model that is spread over them) all
of them do equally often.
"""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def own_seed(seed: int) -> int:
    """What this process draws with, so that no two of them draw alike; the first one's is `seed` itself."""
    return seed + 7_368_787 * PartialState().process_index


def share(items: list) -> list:
    """This process's part of `items`: neighbours, and as many as any other process has, or one fewer."""
    state = PartialState()
    n, i = state.num_processes, state.process_index
    return items[len(items) * i // n : len(items) * (i + 1) // n]


def join(items: list) -> list:
    """The lists of all processes, one behind the other, for each process: undoes `share`."""
    return gather_object(items)


def total(own: Counter) -> Counter:
    """The sum of the processes' counters."""
    result: Counter = Counter()
    for one in join([own]):
        result.update(one)  # and not +, which leaves out what is not positive
    return result


def any_process(flag: bool) -> bool:
    return any(join([flag]))


def of_main_process(value):
    """What the main process has."""
    return broadcast_object_list([value])[0]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, put together if FSDP has spread it over the processes: all of them have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Undoes `whole`: the part of `value` that this process holds, if it holds a part of `like`, a weight."""
    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value, like.device_mesh, like.placements)
    return value


def cast(weights: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """Parameters alone: a module's `to` would round its buffers too, among them the frequencies of its positions."""
    for weight in weights:
        weight.data = weight.data.to(dtype)


def whole_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The names and weights of a model, one whole weight at a time."""
    for name, parameter in model.named_parameters():
        yield name, whole(parameter.detach())


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    for p, (_, weight) in zip(target.parameters(), whole_weights(source), strict=True):
        p.copy_(weight)


def samplable(run) -> nn.Module:
    """The model of a `loading.Run`, as this process alone can sample from it.

    A copy, where FSDP is going to spread the model over processes, and where older weights are to sample.
    """
    needed = run.sampler_name == "torch" and (run.accelerator.is_fsdp2 or run.config.staleness)
    return copy.deepcopy(run.model).to(run.accelerator.device) if needed else run.model


def holds_gradients(accelerator: Accelerator, policy: nn.Module, last: bool):
    """A context in which gradients are added up within the process; on the `last` microbatch, over all of them.

    FSDP adds them up each time: to hold them would take the memory of whole gradients, which it is there to save.
    """
    accelerator.sync_gradients = last  # DeepSpeed takes its step where this is so
    return nullcontext() if last or accelerator.is_fsdp2 else accelerator.no_sync(policy)


def engine(policy: nn.Module) -> nn.Module | None:
    """The policy where DeepSpeed has wrapped it, and keeps its optimizer's state to itself."""
    return policy if hasattr(policy, "save_checkpoint") else None
