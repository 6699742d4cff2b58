"""Sampling with `vllm serve`: answers come over HTTP, new weights go there by NCCL or in files.

A server is vLLM's own; `python -m harness.serve` starts it with the flags that it needs. Its weights have a name, which
every answer carries: `<run>-<n>` after this run has sent them for the n-th time. An answer with another name is not
used. So it does not matter when a server dies or starts again: it is given the weights once more, and is asked again.
"""

import asyncio
import atexit
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from concurrent.futures import Future
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from harness import parallel
from harness.serve import OwnServer, free_port, serve_line
from harness.settings import Config, Sample, Sampling, UsageError
from harness.vllm_client import NAMELESS, Server, ServerGone, is_here, warn_of_strangers
from harness.vllm_sampler import longest_row, request_settings


class ServerSampler:
    """Samples with one or several servers, among which the prompts are shared out.

    `begin` does not wait for the answers: they are written while the caller does something else.
    """

    PULSE = 10.0  # seconds between looks at a server that is writing

    def __init__(self, folder: str, model: nn.Module, eos_ids: list[int], config: Config, bf16: bool):
        self.model, self.eos, self.minutes, self.state = model, eos_ids, config.server_minutes, PartialState()
        self.loop = asyncio.new_event_loop()
        # a daemon: what still waits for a server does not keep the program from ending
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.own: dict[str, OwnServer] = {}
        addresses = config.servers
        if config.serve_on:
            if self.state.is_main_process:
                self.own = OwnServer.start_all(folder, model.config, config, bf16)
            addresses = parallel.of_main_process(list(self.own))
        self.servers = [Server(address, 60 * config.server_minutes) for address in addresses]
        self.name = parallel.of_main_process(f"grpo-{uuid.uuid4().hex[:8]}")
        self.sent, self.weights = 0, "none"
        for process in range(self.state.num_processes):  # the first one knows how long its own servers need to start
            if process == self.state.process_index:
                self.now(self._look_at_servers(config, longest_row(model.config, config), bf16))
            self.state.wait_for_everyone()
        asyncio.run_coroutine_threadsafe(self._watch_own(), self.loop)
        self.home = self._folder_for_weights(config)
        self.engines = [] if self.home else [self._nccl(server) for server in self.servers]
        self.sync()

    def now(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    # The start

    async def _look_at_servers(self, config: Config, longest: int, bf16: bool) -> None:
        """Raises UsageError for one that is not there, or that does not sample as this run needs it."""
        for server in self.servers:
            try:
                server.kind = await self._its_start(server)
            except ServerGone as error:
                raise UsageError(f"the server at {server.address} {error}. {serve_line(server.address)}") from error
            server.check(config, longest, bf16)
            warn_of_strangers(server.address)

    async def _its_start(self, server: Server) -> dict:
        """What it says of itself; one that this run has started gets the time that it needs."""
        while True:
            try:
                return await server.describe()
            except ServerGone:
                if server.address not in self.own:
                    raise
                self.own[server.address].check()
                await asyncio.sleep(0.5)

    async def _watch_own(self) -> None:
        """One that has died starts again, also while another process of the run is the one that waits for it."""
        while self.own:
            await asyncio.sleep(1)
            for server in self.own.values():
                server.revive(time.monotonic())

    def _folder_for_weights(self, config: Config) -> Path | None:
        """Where files of weights go, which the servers read too; None where NCCL takes them there."""
        transfers = {server.kind["transfer"] for server in self.servers}
        if not config.weights_folder and self.state.device.type == "cuda" and transfers == {"nccl"}:
            return None
        if not config.weights_folder and not all(is_here(server.address) for server in self.servers):
            raise UsageError(
                "new weights reach a server on another machine by NCCL, between GPUs, if it was started with "
                """--weight-transfer-config '{"backend": "nccl"}', or in files: --weights_folder, a folder that both """
                "machines see"
            )
        home = None
        if self.state.is_main_process:
            where = Path(config.weights_folder or "/dev/shm")
            size = sum(4 * p.numel() for p in self.model.parameters())
            if not config.weights_folder and not (where.is_dir() and shutil.disk_usage(where).free > 2.5 * size):
                where = Path(tempfile.gettempdir())  # in a container, /dev/shm often is small
            remove_what_dead_runs_left(where)
            home = where / f"{prefix_of_folders()}{os.getpid()}-{self.name}"
            with of_the_folder(where):
                home.mkdir(parents=True)
            atexit.register(shutil.rmtree, home, ignore_errors=True)
        return parallel.of_main_process(home)

    # Sampling

    def generate(self, prompts: list[list[int]], group_size: int, sampling: Sampling, seed: int) -> list[Sample]:
        """As `TorchSampler.generate`."""
        return self.begin(prompts, group_size, sampling, seed).result()

    def begin(self, prompts: list[list[int]], group_size: int, sampling: Sampling, seed: int) -> Future:
        """The same, but begun at once, with the weights that the servers have now; the result comes later."""
        asked = [(ids, request_settings(self.eos, group_size, sampling, seed, i)) for i, ids in enumerate(prompts)]
        return asyncio.run_coroutine_threadsafe(self._answers(asked, self.weights), self.loop)

    async def _answers(self, asked: list[tuple], name: str) -> list[Sample]:
        """Of all servers together, in the order of the prompts. Each prompt has its seed, whoever answers it."""
        n = len(self.servers)
        shares = [self._share(server, asked[i::n], name) for i, server in enumerate(self.servers)]
        shares = await asyncio.gather(*shares)
        return [sample for i in range(len(asked)) for sample in shares[i % n][i // n]]

    async def _share(self, server: Server, asked: list[tuple], name: str) -> list[list[Sample]]:
        answers: list = [None] * len(asked)

        async def ask(i: int):
            answers[i] = await server.answer(*asked[i], name)

        async def ask_for_the_rest():
            rest = [i for i, answer in enumerate(answers) if answer is None]
            writing = asyncio.gather(*map(ask, rest), return_exceptions=True)
            try:
                while not (await asyncio.wait([writing], timeout=self.PULSE))[0]:
                    await server.weights()  # an answer may take as long as it likes, but the engine must be alive
            except ServerGone:
                writing.cancel()
                raise
            if errors := [error for error in writing.result() if error]:
                raise next((error for error in errors if not isinstance(error, ServerGone)), errors[0])

        await self._persist(server, ask_for_the_rest, name)
        return answers

    async def _persist(self, server: Server, do, name: str) -> None:
        """Runs `do`, and runs it again when a server that was gone has come back and been given the weights.

        Raises:
            UsageError: it did not come back within `server_minutes`, or came back as another one.
        """
        gone, wait = 0.0, 1.0
        while True:
            try:
                await do()
                break
            except ServerGone as error:
                gone, reason = gone or time.monotonic(), error
                if wait == 1.0:
                    tqdm.write(f"the server at {server.address} {error}: trying for {self.minutes:g} minutes")
            while True:
                if time.monotonic() - gone > 60 * self.minutes:
                    raise UsageError(
                        f"the server at {server.address} {reason}, for {self.minutes:g} minutes. When it is back, "
                        "go on from the last checkpoint with --resume"
                    ) from reason
                await asyncio.sleep(wait)
                wait = min(2 * wait, 10.0)
                try:
                    await self._bring_back(server, name, gone)
                    break
                except ServerGone as error:
                    reason = error
        if gone:
            tqdm.write(f"the server at {server.address} is back, after {time.monotonic() - gone:.0f} s")

    async def _bring_back(self, server: Server, name: str, gone: float) -> None:
        """Gives it the weights again, if it has lost them.

        Raises:
            ServerGone: it is not there yet. UsageError: it is another one now, or another run has taken it.
        """
        if server.address in self.own:
            self.own[server.address].revive(gone)
        kind = await server.describe()
        if changed := [key for key in kind if kind[key] != server.kind[key]]:
            key = changed[0]
            raise UsageError(
                f"the server at {server.address} came back as another one: {key} is {kind[key]}, and was "
                f"{server.kind[key]}. Start it as it was, and go on from the last checkpoint with --resume"
            )
        async with server.is_brought_back:
            if (found := await server.weights()) == name:
                await server.post("/resume")  # all that can be missing
                return
            if found not in NAMELESS and not found.startswith(self.name):
                raise UsageError(
                    f"the server at {server.address} has the weights {found} of another run: give each run a server of "
                    "its own, and go on from the last checkpoint with --resume"
                )
            if not self.home:
                raise UsageError(
                    f"the server at {server.address} has lost its weights, and NCCL's connection with them: go on from "
                    "the last checkpoint with --resume (with --weights_folder, a run can give them again)"
                )
            await server.load(self.home / name, name)

    # New weights

    def sleep(self) -> None:
        """Before each update. A server has memory of its own."""

    def sync(self) -> None:
        """Gives all servers the trainer's weights. What was begun before must have been fetched."""
        self.state.wait_for_everyone()  # by all processes: here a server's weights change under all of them
        before, self.sent = self.weights, self.sent + 1
        self.weights = f"{self.name}-{self.sent}"
        if self.home:
            weights = {name: weight.cpu() for name, weight in parallel.whole_weights(self.model)}
            if self.state.is_main_process:
                self._write(weights)
                self.now(self._load_all())
                shutil.rmtree(self.home / before, ignore_errors=True)
        else:
            for server, engine in zip(self.servers, self.engines, strict=True):
                self._send(server, engine)
        self.state.wait_for_everyone()

    def _write(self, weights: dict) -> None:
        """All weights, and the head by its own name too, which a server on a CPU needs where it is tied."""
        head = self.model.get_output_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is head) + ".weight"
        weights.setdefault(name, weights_of_tied_head(self.model, weights))
        folder = self.home / self.weights
        with of_the_folder(folder):
            folder.mkdir()
            save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")

    async def _load_all(self) -> None:
        name = self.weights
        await asyncio.gather(*(
            self._persist(server, lambda server=server: server.load(self.home / name, name), name)
            for server in self.servers
        ))  # fmt: skip

    def _nccl(self, server: Server):
        """vLLM's sender of weights for this server, connected with it."""
        nccl = import_module("vllm.distributed.weight_transfer.nccl_engine")
        base, clients = (import_module(f"vllm.distributed.weight_transfer.{part}") for part in ("base", "clients"))
        place = None
        if self.state.is_main_process:
            workers = self.now(server.get("/get_world_size"))["world_size"]
            place = own_address(server.address), free_port(), 1 + workers
        info = nccl.NCCLTrainerInitInfo(*parallel.of_main_process(place), rank=self.state.process_index)
        client = clients.HTTPVLLMWeightSyncClient(server.address, timeout=60 * self.minutes)
        try:
            return nccl.NCCLTrainerWeightTransferEngine.trainer_init(
                info, client=client, source=base.ModuleSource(self.model)
            )
        except Exception as error:  # of vLLM, NCCL or HTTP
            raise UsageError(
                f"NCCL does not connect this GPU with the server at {server.address}: {str(error).splitlines()[0]}. "
                "--weights_folder takes the weights there in files"
            ) from error

    def _send(self, server: Server, engine) -> None:
        """By NCCL: all processes take part, since with FSDP all of them hold parts."""
        try:
            if self.state.is_main_process:
                self.now(server.begin_change())
            engine.send_weights()
            if self.state.is_main_process:
                self.now(server.end_change(self.weights))
        except Exception as error:
            raise UsageError(
                f"the server at {server.address} did not take new weights: {str(error).splitlines()[0]}. Go on from "
                "the last checkpoint with --resume"
            ) from error


def weights_of_tied_head(model: nn.Module, weights: dict):
    """Those of the embeddings, as a copy: a file of weights has each tensor once."""
    table = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is table) + ".weight"
    return weights[name].clone()


def own_address(server: str) -> str:
    """This machine's address, as that one sees it."""
    parts = urlsplit(server)
    with socket.create_connection((parts.hostname, parts.port or 80)) as connection:
        return connection.getsockname()[0]


@contextmanager
def of_the_folder(folder: Path):
    """What cannot be written there is one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"weights for the servers cannot be written to {folder}: {error}. Another place: --weights_folder"
        ) from error


def prefix_of_folders() -> str:
    return f"grpo-weights-{socket.gethostname()}-"


def remove_what_dead_runs_left(where: Path) -> None:
    """A run that was killed leaves its last weights behind."""
    for folder in where.glob(f"{prefix_of_folders()}*"):
        process = folder.name.removeprefix(prefix_of_folders()).partition("-")[0]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(folder, ignore_errors=True)
