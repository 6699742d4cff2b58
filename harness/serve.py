"""Starts `vllm serve` so that a run can sample from it, and give it new weights.

    CUDA_VISIBLE_DEVICES=1 python -m harness.serve --config configs/math-1.5b.yaml
    python grpo.py --config configs/math-1.5b.yaml --server http://127.0.0.1:8000          in another terminal

It takes the settings of the run, and --host and --port, and prints the line that it runs. The server begins with random
weights: the run brings the real ones. Anyone who can reach it can run code on it, so it accepts connections from this
machine only, unless --host says otherwise.
"""

import argparse
import atexit
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import PartialState

from harness import memory
from harness.command_line import ArgumentParser, errors_as_lines, parse_config
from harness.devices import DTYPES, choose_precision
from harness.files import local_name
from harness.loading import check_served, load_model_config
from harness.settings import Config, UsageError
from harness.vllm_sampler import engine_settings


def serve_line(address: str) -> str:
    return f"A server for this run at {address}: python -m harness.serve, with the settings of the run (docs/server.md)"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def command(folder: str, model_config, config: Config, dtype: torch.dtype, host: str, port: int) -> list[str]:
    """The line that starts a server for this run."""
    settings, on_gpu = engine_settings(model_config, config, dtype, processes=1), torch.cuda.is_available()
    settings |= {"model": folder, "host": host, "port": port, "enable_scale_out": True}
    if on_gpu:
        settings["weight_transfer_config"] = {"backend": "nccl"}
        if config.kv_cache_gb:  # else vLLM takes what is left of its card
            settings["kv_cache_memory_bytes"] = int(1e9 * config.kv_cache_gb)
    else:
        free, shape, half = memory.free_memory(torch.device("cpu")), memory.Shape.of(model_config), dtype.itemsize == 2
        settings["kv_cache_memory_bytes"] = memory.vllm_cache_bytes(shape, config, half, free, processes=1)
        # vLLM's CPU build packs a tied head by itself, and would keep the old one when new weights come
        settings["hf_overrides"] = settings["hf_overrides"] | {"tie_word_embeddings": False}
    given = {f"--{name.replace('_', '-')}": value for name, value in settings.items() if value not in (False, None)}
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for flag, value in given.items():
        words += [flag] if value is True else [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def environment(gpu: str = "") -> dict[str, str]:
    """With the routes for new weights; on one GPU, if it is named; and so that two servers on a CPU share its cores."""
    chosen = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if gpu:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        chosen["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(gpu)] if visible else gpu
    return os.environ | chosen


def chosen_gpus(config: Config) -> list[str]:
    """The GPUs of `serve_on`, or one empty name for the CPU.

    Raises:
        UsageError: there is no such GPU, or it is one of those that train.
    """
    here, trained_on = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if trained_on < PartialState().num_processes:
        raise UsageError(
            "serve_on is for one machine. For a run on several, start the servers by themselves (python -m "
            "harness.serve) and name them: --server"
        )
    if not here:
        if config.serve_on != "cpu":
            raise UsageError(f"serve_on is {config.serve_on}, and there is no GPU here: cpu is what there is")
        return [""]
    gpus = [gpu.strip() for gpu in config.serve_on.split(",")]
    if len(set(gpus)) < len(gpus):
        raise UsageError(f"serve_on names a GPU twice: {config.serve_on}")
    for gpu in gpus:
        if not gpu.isdecimal() or not trained_on <= int(gpu) < here:
            free = ", ".join(map(str, range(trained_on, here))) or "none"
            raise UsageError(f"serve_on has {gpu!r}; the GPUs that do not train are {free}, of {here}")
    return gpus


def lasting(folder: str) -> str:
    """A folder from which a server can start again at any time: a checkpoint may be deleted, and its copy here is not.

    Without weights, which the run brings.
    """
    if not Path(folder).name.startswith("checkpoint-"):
        return folder
    copy = tempfile.mkdtemp(prefix="grpo-served-")
    weights = shutil.ignore_patterns("*.safetensors", "*.bin", "*.pt", "*.state", "*.jsonl", "deepspeed")
    shutil.copytree(folder, copy, ignore=weights, dirs_exist_ok=True)
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    return copy


class OwnServer:
    """A server that the run has started, and starts again where it has died. It ends with the run."""

    PATIENCE = 120  # seconds without an answer, after which one that is running is started again; or twice its start
    START = 900  # seconds that a start may take

    def __init__(self, words: list[str], gpu: str, port: int):
        self.words, self.environment = words, environment(gpu)
        file, self.log = tempfile.mkstemp(prefix=f"grpo-server-{port}-", suffix=".log")
        os.close(file)
        if shutil.which("setpriv"):  # the system then ends it, however the run ends
            self.words = ["setpriv", "--pdeathsig", "TERM", *words]
        self.is_over, self.patience = False, self.PATIENCE
        self.start()
        atexit.register(self.close)

    @classmethod
    def start_all(cls, folder: str, model_config, config: Config, dtype: torch.dtype) -> dict[str, "OwnServer"]:
        """One on each GPU of `serve_on`, by address. Nothing is waited for."""
        if not find_spec("vllm"):
            raise UsageError("serve_on needs vLLM, which is not installed: pip install -r requirements-gpu.txt")
        started, folder = {}, lasting(folder)
        for gpu in chosen_gpus(config):
            port = free_port()
            server = cls(command(folder, model_config, config, dtype, "127.0.0.1", port), gpu, port)
            started[f"http://127.0.0.1:{port}"] = server
            print(f"a server starts on {f'GPU {gpu}' if gpu else 'the CPU'}; what it says is in {server.log}")
        return started

    def start(self) -> None:
        with open(self.log, "ab") as log:
            # a group of its own: Ctrl-C is for the run, and all of its processes can be ended together
            self.process = subprocess.Popen(
                self.words, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        self.started = time.monotonic()

    def answers(self) -> None:
        """Called at its first answer."""
        self.patience = max(self.PATIENCE, 2 * (time.monotonic() - self.started))

    def check(self) -> None:
        """Raises UsageError if it has ended, or does not come to an end of its start."""
        if self.process.poll() is not None:
            said = [line for line in Path(self.log).read_text(errors="replace").splitlines() if "Error" in line]
            raise UsageError(f"the server ended while it started: {said[-1] if said else 'see its log'} ({self.log})")
        if time.monotonic() - self.started > self.START:
            raise UsageError(f"the server has not answered for {self.START} s since it was started: see {self.log}")

    def revive(self, gone: float) -> None:
        """Starts it again if it has ended, or has not answered for long, since the time `gone`."""
        is_stuck = time.monotonic() - max(gone, self.started) > self.patience
        if (self.process.poll() is not None or is_stuck) and not self.is_over:
            self.end()
            self.start()

    def close(self) -> None:
        self.is_over = True
        self.end()

    def end(self) -> None:
        """With all of its processes: an engine outlives a server that was killed."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, how)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(10)


def parse_arguments(argv: list[str]) -> tuple[str, int, Config]:
    """Host, port, and the settings of the run."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address that it listens on")
    parser.add_argument("--port", type=int, default=8000)
    options, of_the_run = parser.parse_known_args(argv)
    return options.host, options.port, parse_config(of_the_run)


def main(argv: list[str]) -> None:
    with errors_as_lines():
        host, port, config = parse_arguments(argv)
        model_config = load_model_config(config.model, config.trust_remote_code)
        check_served(model_config)
        if not find_spec("vllm"):
            raise UsageError("vLLM is not installed: pip install -r requirements-gpu.txt")
        dtype = DTYPES[choose_precision(config)]
        words = command(local_name(config.model), model_config, config, dtype, host, port)
        print("VLLM_SERVER_DEV_MODE=1", shlex.join(words), flush=True)
    os.execvpe(words[0], words, environment())


if __name__ == "__main__":
    main(sys.argv[1:])
