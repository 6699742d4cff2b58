"""What one `vllm serve` is asked over HTTP, by vLLM's own routes."""

import asyncio
import ipaddress
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from harness.serve import serve_line
from harness.settings import Sample, UsageError

CHANGING = "changing"  # the name of weights that are on their way
NAMELESS = ("default", CHANGING)  # what a server calls weights that nobody has named, as after its start
ROUTES = {"/weight_info": "VLLM_SERVER_DEV_MODE=1 in its environment", "/inference/v1/generate": "--enable-scale-out"}


class ServerGone(Exception):
    """It does not answer, or not as it should: that may change, and then the same question can be asked again."""


class Server:
    """One `vllm serve`."""

    def __init__(self, address: str, seconds: float):
        self.address, self.kind = address, {}  # what it said of itself at the start
        no_limit = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        # trust_env: a proxy of the environment is for the world outside
        self.client = httpx.AsyncClient(
            base_url=address, timeout=httpx.Timeout(seconds, connect=10), limits=no_limit, trust_env=False
        )
        self.is_brought_back = asyncio.Lock()

    async def ask(self, method: str, path: str, body: dict | None = None, timeout=httpx.USE_CLIENT_DEFAULT) -> dict:
        """What it answers.

        Raises:
            ServerGone: nothing, or an error of its own. UsageError: it refuses.
        """
        try:
            answer = await self.client.request(method, path, json=body, timeout=timeout)
            if answer.status_code >= 500:
                raise ServerGone(f"answers {answer.status_code} to {path}: {answer.text[:200]}")
            if answer.is_success:
                return answer.json()
        except (httpx.HTTPError, ValueError) as error:
            reason = str(error).strip() or type(error).__name__
            raise ServerGone(f"does not answer {path} ({reason})") from error
        route = path.partition("?")[0]
        if answer.status_code == 404 and route in ROUTES:
            raise UsageError(
                f"the server at {self.address} has no {route}: it needs {ROUTES[route]}. {serve_line(self.address)}"
            )
        raise UsageError(f"the server at {self.address} refuses {route}, {answer.status_code}: {answer.text[:300]}")

    async def get(self, path: str) -> dict:
        return await self.ask("GET", path, timeout=30)

    async def post(self, path: str, **body) -> dict:
        return await self.ask("POST", path, body)

    async def weights(self) -> str:
        """The name of the weights that it has."""
        return (await self.get("/weight_info"))["weight_version"]

    async def describe(self) -> dict:
        """vLLM's version, and those of its settings that a run depends on."""
        await self.weights()  # here, a server without these routes says so
        version, found = await self.get("/version"), await self.get("/server_info?config_format=json")
        found = found["vllm_config"]
        model, transfer = found["model_config"], found.get("weight_transfer_config") or {}
        overrides = model.get("hf_overrides") or {}
        names = ("model", "dtype", "max_model_len", "logprobs_mode", "generation_config", "skip_tokenizer_init")
        kind = {name: model.get(name) for name in names} | {"head_dtype": overrides.get("head_dtype")}
        return kind | {"version": version["version"], "transfer": transfer.get("backend")}

    async def begin_change(self) -> None:
        """No answer may have begun under other weights than it ends with: those that are being written are waited for.

        Whatever happens before `end_change`, no answer will pass for one of a known policy.
        """
        await self.post("/pause?mode=wait")
        await self.post("/update_weight_version", new_version=CHANGING)

    async def end_change(self, name: str) -> None:
        await self.post("/update_weight_version", new_version=name)
        if not (await self.post("/reset_prefix_cache")).get("success"):
            raise ServerGone("did not reset its prefix cache: it would answer with keys of the old weights")
        await self.post("/resume")

    async def load(self, folder: Path, name: str) -> None:
        """New weights, from the file in `folder`."""
        await self.begin_change()
        # it began with empty ones, load_format dummy, which is not how to read a file
        formats = {"load_config": {"load_format": "safetensors"}}
        await self.post("/collective_rpc", method="update_config", kwargs={"overrides": formats})
        await self.post("/collective_rpc", method="reload_weights", kwargs={"weights_path": str(folder)})
        await self.end_change(name)

    async def answer(self, ids: list[int], settings: dict, name: str) -> list[Sample]:
        """The completions of one prompt, which weights of this name have written, and no others."""
        found = await self.post("/inference/v1/generate", token_ids=ids, sampling_params=settings)
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
            f"{address}: whoever reaches this server can give it other weights and run code on it. It should be open "
            "to this machine alone, by a firewall or an ssh tunnel (docs/server.md)"
        )
