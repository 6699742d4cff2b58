"""Requests to one `vllm serve` over HTTP, by vLLM's own routes."""

import asyncio
import ipaddress
import socket
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import torch

from harness.messages import reason_of
from harness.serve import serve_line
from harness.settings import Config, Sample, UsageError

NAMELESS = "default"  # what a server calls the weights that it started with
ROUTES = {"/weight_info": "VLLM_SERVER_DEV_MODE=1 in its environment", "/inference/v1/generate": "--enable-scale-out"}


class ServerGone(Exception):
    """There was no answer, or not the right one. Asking again later may work."""

    after_progress = False  # whether other answers had come by then


class Server:
    """One `vllm serve`."""

    AT_ONCE = 128  # requests: more only wait in its queue, and each is a connection

    def __init__(self, address: str, seconds: float):
        self.address, self.kind = address, {}  # what it said of itself at the start
        # a connection that is dead shows that it is; one that was idle for long may just be closed at the other end
        transport = httpx.AsyncHTTPTransport(
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2),
            socket_options=[(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)],
        )
        # without trust_env: proxies named in the environment are for the world outside
        self.client = httpx.AsyncClient(
            base_url=address, timeout=httpx.Timeout(seconds, connect=10), transport=transport, trust_env=False
        )
        self.patience = min(60.0, seconds)  # for what takes no time
        self.room = asyncio.Semaphore(self.AT_ONCE)

    async def ask(self, method: str, path: str, body: dict | None = None, timeout=httpx.USE_CLIENT_DEFAULT) -> dict:
        """What it answers.

        Raises:
            ServerGone: nothing, or an error of its own. UsageError: it refuses.
        """
        try:
            answer = await self.client.request(method, path, json=body, timeout=timeout)
            if answer.status_code >= 500:
                raise ServerGone(f"answers {answer.status_code} to {path}: {one_line(answer.text)}")
            if answer.is_success:
                return answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise ServerGone(f"does not answer {path} ({reason_of(error)})") from error
        route = path.partition("?")[0]
        if answer.status_code == 404 and route in ROUTES:
            raise UsageError(
                f"the server at {self.address} has no {route}: it needs {ROUTES[route]}. {serve_line(self.address)}"
            )
        raise UsageError(f"the server at {self.address} refuses {route}, {answer.status_code}: {one_line(answer.text)}")

    async def get(self, path: str) -> dict:
        return await self.ask("GET", path, timeout=self.patience)

    async def post(self, path: str, **body) -> dict:
        return await self.ask("POST", path, body)

    async def weights(self) -> str:
        """The name of the weights that it has."""
        return (await self.get("/weight_info"))["weight_version"]

    async def describe(self) -> dict:
        """vLLM's version, and those of its settings that a run depends on."""
        try:
            await self.weights()  # here, a server without these routes says so
            version, found = await self.get("/version"), await self.get("/server_info?config_format=json")
            found = found["vllm_config"]
            model, transfer = found["model_config"], found.get("weight_transfer_config") or {}
            overrides = model.get("hf_overrides") or {}
            names = ("model", "dtype", "max_model_len", "logprobs_mode", "generation_config", "skip_tokenizer_init")
            kind = {name: model.get(name) for name in names} | {"head_dtype": overrides.get("head_dtype")}
            return kind | {"version": version["version"], "transfer": transfer.get("backend")}
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{self.address} answers, but not as vLLM 0.32 does. {serve_line(self.address)}"
            ) from error

    def check(self, config: Config, longest: int, dtype: torch.dtype) -> None:
        """Raises UsageError if its kind is not what the run needs; names the flag."""
        wanted = {
            "logprobs_mode": ("processed_logprobs", "--logprobs-mode processed_logprobs"),
            "generation_config": ("vllm", "--generation-config vllm"),
            "head_dtype": ("float32", """--hf-overrides '{"head_dtype": "float32"}'"""),
            "dtype": (str(dtype), f"--dtype {str(dtype).removeprefix('torch.')}"),
        }
        if config.stop:
            wanted["skip_tokenizer_init"] = (False, "no --skip-tokenizer-init, since there are stop strings")
        for setting, (value, flag) in wanted.items():
            if self.kind[setting] != value:
                raise UsageError(
                    f"the server at {self.address} has {setting} {self.kind[setting]}, and this run needs {value}: "
                    f"start it with {flag}. {serve_line(self.address)}"
                )
        if self.kind["max_model_len"] < longest:
            raise UsageError(
                f"the server at {self.address} takes rows of {self.kind['max_model_len']} tokens, and this run may "
                f"have {longest}: start it with --max-model-len {longest}"
            )

    async def begin_change(self, name: str) -> None:
        """Waits for the answers in progress, so that each is written by the same weights from beginning to end.

        Until `end_change`, no answer can be mistaken for one from known weights.
        """
        await self.post("/pause?mode=wait")
        await self.post("/update_weight_version", new_version=on_their_way(name))

    async def end_change(self, name: str) -> None:
        if (found := await self.weights()) != on_their_way(name):
            raise ServerGone(f"has got weights from somebody else ({found})")
        if not (await self.post("/reset_prefix_cache")).get("success"):
            raise ServerGone("did not reset its prefix cache: it would answer with keys of the old weights")
        await self.post("/update_weight_version", new_version=name)
        await self.post("/resume")

    async def pulse(self, name: str) -> None:
        """Raises ServerGone unless it is writing with these weights."""
        if (found := await self.weights()) != name:
            raise ServerGone(f"has the weights {found}, not {name}")
        if (await self.get("/is_paused"))["is_paused"]:
            raise ServerGone("is paused")

    async def load(self, folder: Path, name: str) -> None:
        """New weights, from the file in `folder`."""
        await self.begin_change(name)
        # it was started with load_format dummy, that is with random weights; files have to be read
        formats = {"load_config": {"load_format": "safetensors"}}
        await self.post("/collective_rpc", method="update_config", kwargs={"overrides": formats})
        await self.post("/collective_rpc", method="reload_weights", kwargs={"weights_path": str(folder)})
        await self.end_change(name)

    async def answer(self, ids: list[int], settings: dict, name: str) -> list[Sample]:
        """The completions of one prompt, if the weights of this name have written them, however long that takes."""
        asked = dict(token_ids=ids, sampling_params=settings)
        async with self.room:
            found = await self.ask("POST", "/inference/v1/generate", asked, timeout=httpx.Timeout(None, connect=10))
        samples = []
        for choice in sorted(found["choices"], key=lambda choice: choice["index"]):
            spoke = {span["version"] for span in choice["weight_versions"] or ()}
            if choice["finish_reason"] == "abort":
                raise ServerGone("has broken off an answer")
            if spoke != {name}:
                raise ServerGone(f"answers with the weights {', '.join(map(str, spoke))}, not {name}")
            logps = [token["logprob"] for token in choice["logprobs"]["content"]]
            samples.append(Sample(ids, choice["token_ids"], logps, choice["finish_reason"] == "length"))
        return samples


def on_their_way(name: str) -> str:
    return f"{name}~"


def one_line(text: str) -> str:
    return " ".join(text.split())[:200]


def is_here(address: str) -> bool:
    """Whether it is an address of this machine's own, which no other one reaches."""
    host = urlsplit(address).hostname
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def warn_of_strangers(address: str) -> None:
    if not is_here(address):
        print(
            f"{address}: anyone who can reach this server can replace its weights and run code on it. It belongs in a "
            "network that is yours alone (docs/server.md)"
        )
