"""How new weights get to the servers: in files that they reload, or by NCCL, with vLLM's own sender."""

import atexit
import os
import shutil
import socket
import tempfile
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from harness import lora, parallel
from harness.messages import reason_of
from harness.serve import free_port
from harness.settings import Config, UsageError
from harness.vllm_client import Server, is_here


def folder_for_weights(run: str, model: nn.Module, servers: list[Server], config: Config) -> Path | None:
    """Where files of weights go, which the servers read too; None where NCCL takes them there.

    Raises:
        UsageError: it cannot be written, or the servers would not see it.
    """
    by_nccl = PartialState().device.type == "cuda" and {server.kind["transfer"] for server in servers} == {"nccl"}
    if not config.weights_folder and by_nccl and find_spec("vllm"):
        return None
    if not config.weights_folder and not all(is_here(server.address) for server in servers):
        raise UsageError(
            "new weights reach a server on another machine by NCCL, between GPUs, if both sides have vLLM and the "
            """server was started with --weight-transfer-config '{"backend": "nccl"}', or in files: """
            "--weights_folder, a folder that both machines see"
        )
    home = None
    if PartialState().is_main_process:
        where = Path(config.weights_folder or "/dev/shm")
        size = sum(4 * p.numel() for p in model.parameters())
        if not config.weights_folder and not (where.is_dir() and shutil.disk_usage(where).free > 2.5 * size):
            where = Path(tempfile.gettempdir())  # in a container, /dev/shm often is small
        remove_what_dead_runs_left(where)
        home = (where / run).absolute()
        with of_the_folder(where):
            home.mkdir(parents=True)
        atexit.register(shutil.rmtree, home, ignore_errors=True)
    return parallel.of_main_process(home)


def write_weights(model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """All weights, and the head by its own name too, which a server on a CPU needs where it is tied."""
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    head, table = names[model.get_output_embeddings()], names[model.get_input_embeddings()]
    if head not in weights:
        weights[head] = weights[table].clone()  # a file has each tensor once
    with of_the_folder(folder):
        folder.mkdir()
        save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")


@contextmanager
def of_the_folder(folder: Path):
    """Turns what goes wrong in writing there into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"weights for the servers cannot be written to {folder}: {error}. Another place: --weights_folder"
        ) from error


def name_of_run(digits: str) -> str:
    """With machine and process in it, so that others can see whether this run is still there."""
    return f"grpo-weights-{socket.gethostname()}-{os.getpid()}-{digits}"


def process_of(run: str) -> int | None:
    """The process of a run that goes on, on this machine."""
    host, _, rest = run.removeprefix("grpo-weights-").rpartition("-")[0].rpartition("-")
    is_ours = run.startswith("grpo-weights-") and host == socket.gethostname() and rest.isdecimal()
    return int(rest) if is_ours and psutil.pid_exists(int(rest)) else None


def remove_what_dead_runs_left(where: Path) -> None:
    """A run that was killed leaves its last weights behind."""
    for folder in where.glob(f"grpo-weights-{socket.gethostname()}-*"):
        if process_of(folder.name) is None:
            shutil.rmtree(folder, ignore_errors=True)


def nccl_sender(server: Server, workers: int, model: nn.Module, minutes: float):
    """vLLM's sender of weights for this server with so many GPUs, connected with it. All processes take part.

    Raises:
        UsageError: they do not come together.
    """
    try:
        nccl = import_module("vllm.distributed.weight_transfer.nccl_engine")
        base, clients = (import_module(f"vllm.distributed.weight_transfer.{part}") for part in ("base", "clients"))
        place = own_address(server.address), free_port(), 1 + workers
        info = nccl.NCCLTrainerInitInfo(*parallel.of_main_process(place), rank=PartialState().process_index)
        client = clients.HTTPVLLMWeightSyncClient(server.address, timeout=60 * minutes)
        source = merged_source(base, model) if lora.adapted(model) else base.ModuleSource(model)
        return nccl.NCCLTrainerWeightTransferEngine.trainer_init(info, client=client, source=source)
    except Exception as error:  # of vLLM, NCCL, HTTP or sockets
        raise UsageError(
            f"NCCL does not connect this GPU with the server at {server.address}: {reason_of(error)}. --weights_folder "
            "takes the weights there in files"
        ) from error


def merged_source(base, model: nn.Module):
    """What vLLM's `ModuleSource` is for a model without adapters; `base` is the module of vLLM that has it."""

    class MergedSource(base.WeightSource):
        def metadata(self):
            names = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters()}
            return [base.ParamMeta(n, p.dtype, tuple(p.shape)) for n, p in names.items() if not lora.is_adapter(n)]

        def __iter__(self):
            return lora.merged_weights(model)

    return MergedSource()


def own_address(server: str) -> str:
    """This machine's address, as that one sees it."""
    parts = urlsplit(server)
    with socket.create_connection((parts.hostname, parts.port or 80)) as connection:
        return connection.getsockname()[0]
