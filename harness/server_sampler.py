"""Sampling with `vllm serve`: answers come over HTTP, new weights go there by NCCL or in files.

A server is vLLM's own; `python -m harness.serve` starts it with the flags that it needs. Its weights have a name, which
every answer carries: `<run>-<n>` after this run has sent them for the n-th time. An answer with another name is not
used. So it does not matter when a server dies or starts again: it is given the weights once more, and is asked again.
"""

import asyncio
import fcntl
import os
import shutil
import threading
import time
import uuid
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn
from tqdm import tqdm

from harness import lora, parallel
from harness.messages import reason_of
from harness.serve import OwnServer, serve_line
from harness.settings import Config, Sample, Sampling, UsageError
from harness.vllm_client import NAMELESS, Server, ServerGone, on_their_way, warn_of_strangers
from harness.vllm_sampler import longest_row, request_settings
from harness.weight_transfer import folder_for_weights, name_of_run, nccl_sender, process_of, write_weights


class ServerSampler:
    """Samples with one or several servers, among which the prompts are shared out.

    `begin` does not wait for the answers: they are written while the caller does something else.
    """

    PULSE = 10.0  # seconds between looks at a server that is writing

    def __init__(self, folder: str, model: nn.Module, eos_ids: list[int], config: Config, dtype: torch.dtype):
        self.model, self.eos, self.minutes, self.state = model, eos_ids, config.server_minutes, PartialState()
        self.loop = asyncio.new_event_loop()
        # a daemon: what still waits for a server does not keep the program from ending
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.own: dict[str, OwnServer] = {}
        addresses = config.servers
        if config.serve_on:
            if self.state.is_main_process:
                self.own = OwnServer.start_all(folder, model.config, config, dtype)
            addresses = parallel.of_main_process(list(self.own))
        self.servers = [Server(address, 60 * config.server_minutes) for address in addresses]
        self.name = parallel.of_main_process(name_of_run(uuid.uuid4().hex[:8]))
        self.sent, self.weights = 0, "none"
        for process in range(self.state.num_processes):  # the first one knows how long its own servers need to start
            if process == self.state.process_index:
                self.now(self._look_at_servers(config, longest_row(model.config, config), dtype))
            self.state.wait_for_everyone()
        self.watching = asyncio.run_coroutine_threadsafe(self._watch_own(), self.loop)
        self.home = folder_for_weights(self.name, model, self.servers, config)
        self.senders = [] if self.home else [self._nccl(server) for server in self.servers]
        self.sync()

    def now(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    # The start

    async def _look_at_servers(self, config: Config, longest: int, dtype: torch.dtype) -> None:
        """Raises UsageError for one that is not there, or that does not sample as this run needs it."""
        for server in self.servers:
            try:
                server.kind = await self._its_start(server)
                has = await server.weights()
            except ServerGone as error:
                raise UsageError(f"the server at {server.address} {error}. {serve_line(server.address)}") from error
            server.check(config, longest, dtype)
            warn_of_strangers(server.address)
            other = process_of(owner(has))
            if other not in (None, os.getpid()) and owner(has) != self.name:
                raise UsageError(
                    f"the server at {server.address} serves the run of process {other}: each run needs its own"
                )

    async def _its_start(self, server: Server) -> dict:
        """What it says of itself; one that this run has started gets the time that it needs."""
        while True:
            try:
                kind = await server.describe()
                if own := self.own.get(server.address):
                    own.answers()
                return kind
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
                    await server.pulse(name)  # an answer may take as long as it likes, from a server that is well
                errors = [error for error in writing.result() if error]
            except ServerGone as error:
                errors = [error]
            finally:
                writing.cancel()  # before the same is asked again
                with suppress(asyncio.CancelledError):
                    await writing
            if errors:
                error = next((error for error in errors if not isinstance(error, ServerGone)), errors[0])
                error.after_progress = any(answers[i] is not None for i in rest)
                raise error

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
                if error.after_progress:
                    gone, wait = 0.0, 1.0
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
        async with self._alone():
            if (found := await server.weights()) == name:
                await server.post("/resume")  # all that can be missing
                return
            if found != NAMELESS and owner(found) != self.name:
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

    @asynccontextmanager
    async def _alone(self):
        """One process of the run at a time: several may find out that a server is back."""
        if not self.home:
            yield
            return
        with open(self.home / ".lock", "w") as lock:
            await asyncio.to_thread(fcntl.lockf, lock, fcntl.LOCK_EX)
            yield

    # New weights

    def sleep(self) -> None:
        """Before each update. A server has memory of its own."""

    def sync(self) -> None:
        """Gives all servers the trainer's weights. What was begun before must have been fetched."""
        self.state.wait_for_everyone()  # by all processes: here a server's weights change under all of them
        before, self.sent = self.weights, self.sent + 1
        self.weights = f"{self.name}-{self.sent}"
        if self.home:
            weights = {name: weight.cpu() for name, weight in lora.merged_weights(self.model)}
            if self.state.is_main_process:
                write_weights(self.model, weights, self.home / self.weights)
                self.now(self._load_all(is_first=self.sent == 1))
                shutil.rmtree(self.home / before, ignore_errors=True)
        else:
            for server, sender in zip(self.servers, self.senders, strict=True):
                self._send(server, sender)
        self.state.wait_for_everyone()

    async def _load_all(self, is_first: bool) -> None:
        name, folder = self.weights, self.home / self.weights

        async def load(server: Server):
            if not is_first:
                await self._persist(server, lambda: server.load(folder, name), name)
                return
            try:
                await server.load(folder, name)
            except ServerGone as error:
                raise UsageError(
                    f"the server at {server.address} {error}. Does it see {folder}? Another place: --weights_folder"
                ) from error

        await asyncio.gather(*map(load, self.servers))

    def _nccl(self, server: Server):
        try:
            workers = self.now(server.get("/get_world_size"))["world_size"]
        except ServerGone as error:
            raise UsageError(f"the server at {server.address} {error}") from error
        return nccl_sender(server, workers, self.model, self.minutes)

    def _send(self, server: Server, sender) -> None:
        """By NCCL: all processes take part, since with FSDP all of them hold parts."""
        try:
            if self.state.is_main_process:
                self.now(server.begin_change(self.weights))
            sender.send_weights()
            if self.state.is_main_process:
                self.now(server.end_change(self.weights))
        except Exception as error:
            raise UsageError(
                f"the server at {server.address} did not take new weights: {reason_of(error)}. Go on from the last "
                "checkpoint with --resume"
            ) from error

    def close(self, folder: Path) -> None:
        """Ends the servers that this run has started; what they said is kept in its folder. Removes the weights."""
        for server in self.own.values():
            server.close()
            shutil.move(server.log, folder / Path(server.log).name)
        if self.home and self.state.is_main_process:
            shutil.rmtree(self.home, ignore_errors=True)
        self.watching.cancel()
        self.now(asyncio.sleep(0.1))  # until that is done
        self.loop.call_soon_threadsafe(self.loop.stop)


def owner(weights: str) -> str:
    """The run that gave weights this name."""
    return weights.removesuffix(on_their_way("")).rpartition("-")[0]
