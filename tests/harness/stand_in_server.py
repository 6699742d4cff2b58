"""A stand-in for `vllm serve`: the routes that a run asks, answered by a model of torch in this process.

It has weights and a name for them, forgets both when it is killed, and fails as it is told to. So any machine can see
what the trainer makes of its answers; what the real one does is tested in test_vllm_server.py.
"""

import json
import random
import socket
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import transformers
from safetensors.torch import load_file

import grpo

KIND = dict(model="somewhere", dtype="torch.float32", max_model_len=512, logprobs_mode="processed_logprobs")
KIND |= dict(generation_config="vllm", skip_tokenizer_init=False, hf_overrides={"head_dtype": "float32"})


class StandIn:
    """`asked` lists the routes in the order in which they were asked.

    `faults` holds (route, what) that befall the next requests: `500`, `drop`, `die`, `abort`, `old`, or a
    function that is called before the answer.
    """

    def __init__(self, folder, eos_ids=(2,)):
        self.folder, self.eos_ids, self.kind, self.version = folder, list(eos_ids), dict(KIND), "0.32.0"
        self.faults: deque = deque()
        self.missing: set[str] = set()  # routes that it does not have
        self.asked: list[str] = []
        self.spoken: list[tuple[str, list[int]]] = []  # the name of the weights, and the prompt, of each answer
        self.deaths, self.lock = 0, threading.Lock()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        config = transformers.AutoConfig.from_pretrained(self.folder)
        self.model = transformers.AutoModelForCausalLM.from_config(config).eval()  # random, as with load_format dummy
        self.sampler = grpo.TorchSampler(self.model, self.eos_ids)
        self.name, self.paused = "default", False
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                stand_in.handle(self)

            def do_POST(self):
                stand_in.handle(self)

            def log_message(self, *args): ...

        class Server(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

            def handle_error(self, *args): ...  # of connections that were broken off

        self.server = Server(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()

    def kill(self) -> None:
        """As a kill of the process does: connections break, weights and their name are gone."""
        self.deaths += 1
        server, self.server = self.server, None
        if server:
            server.shutdown()
            server.server_close()

    def restart(self) -> None:
        self.kill()
        self.start()

    def handle(self, handler) -> None:
        route = handler.path.partition("?")[0]
        body = json.loads(handler.rfile.read(int(handler.headers.get("content-length", 0))) or "{}")
        self.asked.append(route)
        fault = None
        with self.lock:
            if self.faults and self.faults[0][0] == route:
                fault = self.faults.popleft()[1]
        if callable(fault):
            fault()
        if fault == "die":
            threading.Thread(target=self.restart).start()
        if fault in ("die", "drop") or handler.server is not self.server:  # that one was killed
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
            return
        if fault == "500" or route in self.missing:
            answer, code = {"error": "told to fail"}, 500 if fault == "500" else 404
        else:
            answer, code = self.answer(route, body, fault), 200
        text = json.dumps(answer).encode()
        handler.send_response(code)
        handler.send_header("content-length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)

    def answer(self, route: str, body: dict, fault) -> dict:
        if route == "/version":
            return {"version": self.version}
        if route == "/server_info":
            return {"vllm_config": {"model_config": self.kind, "weight_transfer_config": None}}
        if route == "/weight_info":
            return {"weight_version": self.name}
        if route == "/is_paused":
            return {"is_paused": self.paused}
        if route in ("/pause", "/resume"):
            self.paused = route == "/pause"
        elif route == "/update_weight_version":
            self.name = body["new_version"]
        elif route == "/collective_rpc" and body["method"] == "reload_weights":
            assert self.paused, "vLLM may die of this"
            weights = load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
            with self.lock:
                self.model.load_state_dict(weights, strict=False)
        elif route == "/inference/v1/generate":
            return {"choices": self.completions(body["token_ids"], body["sampling_params"], fault)}
        return {"success": True}

    def completions(self, ids: list[int], asked: dict, fault) -> list[dict]:
        while self.paused:
            time.sleep(0.01)
        sampling = grpo.Sampling(asked["max_tokens"], asked["temperature"], asked["top_p"], asked["top_k"])
        with self.lock:
            name = "an old one" if fault == "old" else self.name
            samples = self.sampler.generate([ids], asked["n"], sampling, asked["seed"] % 2**31)
        self.spoken.append((name, ids))
        choices = [
            {
                "index": i, "token_ids": s.completion_ids, "weight_versions": [{"version": name}],
                "finish_reason": "abort" if fault == "abort" else "length" if s.truncated else "stop",
                "logprobs": {"content": [{"logprob": logp} for logp in s.logps]},
            }
            for i, s in enumerate(samples)
        ]  # fmt: skip
        random.shuffle(choices)  # they have numbers
        return choices
