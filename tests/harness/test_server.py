"""A run whose answers come from servers, and answers that were written ahead.

Most of it with a stand-in for `vllm serve`; the real one is in test_vllm_server.py.
"""

import copy
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import test_parallel
import torch
import transformers
from conftest import SHAPE, check_that_new_adapters_sample, largest_gap, with_adapters
from stand_in_server import StandIn

import grpo
from harness import ahead, loading, serve, server_sampler, vllm_client, weight_transfer
from harness.prompts import draw_prompts
from harness.server_sampler import ServerSampler
from harness.settings import UsageError

PARITY = "benchmarks/against_trl.py:Parity"
PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [13] * 40, [4, 5, 6], [9, 9]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("model")
    config = transformers.Qwen2Config(**SHAPE | dict(max_position_embeddings=512), tie_word_embeddings=True)
    config.eos_token_id, config.pad_token_id = 2, 0
    transformers.Qwen2ForCausalLM(config).save_pretrained(made)
    tokenizer.save_pretrained(made)
    return str(made)


@pytest.fixture
def server(folder):
    stand_in = StandIn(folder)
    yield stand_in
    stand_in.kill()


@pytest.fixture
def config(folder, server, tmp_path):
    settings = dict(prompts_per_step=4, group_size=4, max_prompt_tokens=60, max_completion_tokens=8, lr=1e-2, steps=4)
    settings |= dict(eval_samples=2, eval_steps=0, save_steps=2, print_groups=0, server_minutes=0.5, keep_last=9)
    return grpo.Config(
        model=folder, task=PARITY, runs=str(tmp_path / "runs"), server=server.address, device="cpu", **settings
    )


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Trying again is not waited for."""
    sleep = server_sampler.asyncio.sleep
    monkeypatch.setattr(server_sampler.asyncio, "sleep", lambda seconds: sleep(min(seconds, 0.05)))


def rows(run: Path, name: str = "rollouts.jsonl") -> list[dict]:
    return test_parallel.rows(run, name)


def sampler_of(folder, config) -> tuple:
    model, _ = loading.load_model(folder)
    return model, ServerSampler(folder, model, [2], config, dtype=torch.float32)


def change(model) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


# ==== Servers =========================================================================================================


def test_a_server_writes_what_the_trainer_would_and_follows_its_weights(folder, config, server):
    model, sampler = sampler_of(folder, config)
    for _ in range(3):
        found = sampler.generate(PROMPTS, 3, grpo.Sampling(8), seed=1)
        assert [s.prompt_ids for s in found] == [ids for ids in PROMPTS for _ in range(3)]
        assert largest_gap(model, found) < 1e-4 and {s.truncated for s in found} == {True, False}
        assert all(s.truncated == (s.completion_ids[-1] != 2) for s in found)
        likely = sampler.generate(PROMPTS, 1, grpo.Sampling(8, temperature=0.0), seed=1)
        own = grpo.TorchSampler(model, [2]).generate(PROMPTS, 1, grpo.Sampling(8, temperature=0.0), seed=1)
        assert [s.completion_ids for s in likely] == [s.completion_ids for s in own]
        assert found == sampler.generate(PROMPTS, 3, grpo.Sampling(8), seed=1)
        assert found != sampler.generate(PROMPTS, 3, grpo.Sampling(8), seed=2)
        change(model)
        assert largest_gap(model, found) > 0.1
        sampler.sync()
    names = list(dict.fromkeys(name for name, _ in server.spoken))
    assert [name.rpartition("-")[2] for name in names] == ["1", "2", "3"]
    assert not server.paused and [path.name for path in sampler.home.iterdir()] == [sampler.weights]


def test_adapters_reach_a_server_merged(folder, config, server):
    base, _ = loading.load_model(folder)
    model = with_adapters(copy.deepcopy(base), replace(config, lora_rank=4))
    sampler = ServerSampler(folder, model, [2], config, dtype=torch.float32)
    written = partial(sampler.generate, PROMPTS, 3, grpo.Sampling(8), seed=1)
    check_that_new_adapters_sample(sampler, model, base, written, 1e-4)


ROUTES_OF_A_CHANGE = [
    "/pause", "/update_weight_version", "/collective_rpc", "/collective_rpc", "/weight_info", "/reset_prefix_cache",
    "/update_weight_version", "/resume",
]  # fmt: skip


def test_new_weights_come_between_answers_and_not_into_them(folder, config, server):
    model, sampler = sampler_of(folder, config)
    server.asked.clear()
    sampler.sync()
    assert server.asked == ROUTES_OF_A_CHANGE


def test_servers_share_the_prompts_and_answer_as_one(folder, config, server):
    other = StandIn(folder)
    try:
        _, alone = sampler_of(folder, config)
        expected = alone.generate(PROMPTS, 3, grpo.Sampling(8), seed=1)
        server.spoken.clear()
        _, both = sampler_of(folder, replace(config, server=f"{server.address}, {other.address}/"))
        assert both.generate(PROMPTS, 3, grpo.Sampling(8), seed=1) == expected
        assert [ids for _, ids in sorted(server.spoken)] == sorted(PROMPTS[::2])
        assert [ids for _, ids in sorted(other.spoken)] == sorted(PROMPTS[1::2])
        assert both.generate(PROMPTS[:1], 3, grpo.Sampling(8), seed=1) == expected[:3]  # none for the other one
    finally:
        other.kill()


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """What a run leaves behind whose server never fails; of a number of steps and a staleness."""
    known = {}

    def of(config) -> Path:
        key = config.steps, config.staleness
        if key not in known:
            server = StandIn(folder)
            runs = str(tmp_path_factory.mktemp("runs"))
            known[key] = grpo.train(replace(config, server=server.address, runs=runs))["run"]
            server.kill()
        return known[key]

    return of


FAULTS = [
    ("/inference/v1/generate", "500", 1),
    ("/inference/v1/generate", "drop", 0),
    ("/inference/v1/generate", "die", 1),
    ("/inference/v1/generate", "abort", 0),
    ("/inference/v1/generate", "old", 1),
    ("/collective_rpc", "500", 0),
    ("/collective_rpc", "die", 1),
    ("/pause", "drop", 0),
    ("/reset_prefix_cache", "500", 0),
    ("/resume", "die", 1),
]


@pytest.mark.parametrize("route, what, staleness", FAULTS)
def test_a_server_that_fails_and_comes_back_changes_nothing(
    route, what, staleness, config, server, undisturbed, capsys
):
    config = replace(config, staleness=staleness)
    expected = undisturbed(config)
    learn = grpo.update

    def learn_then_fail(*args):
        if args[-1] == 2:  # from here on: in the sync after this step, or in the answers of the next one
            server.faults.append((route, what))
        return learn(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "update", learn_then_fail)
        run = grpo.train(config)["run"]
    assert not server.faults, "it did not come to that"
    assert rows(run) == rows(expected) and rows(run, "metrics.jsonl") == rows(expected, "metrics.jsonl")
    said = capsys.readouterr()
    assert "trying for 0.5 minutes" in said.out + said.err and "is back, after" in said.out + said.err


def test_ten_kills_lose_nothing(config, server, undisturbed):
    config = replace(config, steps=8, staleness=1)
    expected = undisturbed(config)
    server.faults.extend(("/inference/v1/generate", "die" if i % 4 == 3 else None) for i in range(40))
    run = grpo.train(config)["run"]
    assert server.deaths == 10
    assert rows(run) == rows(expected) and rows(run, "eval.jsonl") == rows(expected, "eval.jsonl")


def test_a_server_that_stays_away_ends_the_run_and_its_checkpoint_stands(config, server, undisturbed, monkeypatch):
    learn = grpo.update

    def learn_then_leave(*args):
        if args[-1] == 3:
            server.kill()
        return learn(*args)

    monkeypatch.setattr(grpo, "update", learn_then_leave)
    with pytest.raises(UsageError, match=r"does not answer /\w+ \(All conn.*for 0.01 minutes.*--resume"):
        grpo.train(replace(config, server_minutes=0.01))
    (run,) = Path(config.runs).iterdir()
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.setattr(grpo, "update", learn)
    server.start()
    grpo.train(grpo.parse_config(["--resume", str(run), "--server_minutes", "0.5"]))
    assert rows(run) == rows(undisturbed(config))


def test_a_server_that_hangs_is_given_up(folder, config, server, monkeypatch):
    """As an engine that is stuck does: the server takes requests, and answers none."""
    monkeypatch.setattr(ServerSampler, "PULSE", 0.1)
    _, sampler = sampler_of(folder, replace(config, server_minutes=0.02))
    monkeypatch.setattr(server, "answer", lambda *args: time.sleep(60))
    started = time.monotonic()
    with pytest.raises(UsageError, match=r"does not answer /weight_info \(ReadTimeout\), for 0.02 minutes"):
        sampler.generate(PROMPTS, 2, grpo.Sampling(8), seed=0)
    assert time.monotonic() - started < 10


def test_an_answer_may_take_longer_than_a_server_may_be_gone(folder, config, server, monkeypatch):
    monkeypatch.setattr(ServerSampler, "PULSE", 0.1)
    _, sampler = sampler_of(folder, replace(config, server_minutes=0.01))
    expected = sampler.generate(PROMPTS, 2, grpo.Sampling(8), seed=0)
    server.faults.extend([("/inference/v1/generate", lambda: time.sleep(2))] * 5)
    server.asked.clear()
    assert sampler.generate(PROMPTS, 2, grpo.Sampling(8), seed=0) == expected
    assert server.asked.count("/inference/v1/generate") == 5 and server.asked.count("/weight_info") > 3


def test_a_server_that_was_left_paused_goes_on(folder, config, server):
    """A change of weights that was broken off behind the new name, and one that was broken off before it."""
    model, sampler = sampler_of(folder, config)
    for route in ("/resume", "/update_weight_version"):
        change(model)
        server.faults.append((route, "drop"))
        sampler.sync()
        assert not server.paused and server.name == sampler.weights and not server.faults
        assert largest_gap(model, sampler.generate(PROMPTS, 2, grpo.Sampling(8), seed=0)) < 1e-4


def test_a_server_whose_return_was_broken_off_goes_on(folder, config, server):
    """It has the weights again and their name, and is still paused."""
    _, sampler = sampler_of(folder, config)
    server.restart()
    server.faults.append(("/resume", "drop"))
    assert len(sampler.begin(PROMPTS, 2, grpo.Sampling(8), seed=0).result(timeout=20)) == 10
    assert not server.paused and not server.faults


@pytest.mark.parametrize("what", ["version", "max_model_len", "model"])
def test_a_server_that_comes_back_as_another_one_ends_the_run(what, folder, config, server):
    _, sampler = sampler_of(folder, config)
    if what == "version":
        server.version = "0.31.0"
    else:
        server.kind[what] = 600
    server.restart()
    with pytest.raises(UsageError, match=rf"came back as another one: {what} is (0.31.0|600), and was .*--resume"):
        sampler.generate(PROMPTS, 2, grpo.Sampling(8), seed=0)


def test_another_run_that_takes_the_server_is_noticed(folder, config, server):
    _, sampler = sampler_of(folder, config)
    _, thief = sampler_of(folder, config)
    with pytest.raises(UsageError, match="has the weights grpo-weights-.*-1 of another run: give each run a server"):
        sampler.generate(PROMPTS, 2, grpo.Sampling(8), seed=0)
    assert len(thief.generate(PROMPTS, 2, grpo.Sampling(8), seed=0)) == 10


def test_a_server_that_serves_another_run_is_not_taken_from_it(folder, config, server, tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        theirs = weight_transfer.name_of_run("a1").replace(str(os.getpid()), str(other.pid))
        server.name = f"{theirs}-3~"
        assert f"serves the run of process {other.pid}: each run needs its own" in refused(config)
    finally:
        other.kill()
        other.wait()
    sampler_of(folder, config)  # and once that one is over, it may


def test_weights_that_somebody_else_sends_in_between_do_not_get_our_name(folder, config, server):
    """Whoever was here last may have changed them, whatever they are called."""
    _, sampler = sampler_of(folder, config)

    def intrude():
        server.name = "theirs-1~"

    server.faults.append(("/collective_rpc", intrude))
    with pytest.raises(UsageError, match="has the weights theirs-1~ of another run"):
        sampler.sync()


def test_each_server_is_seen_to_follow(config, server, folder):
    """Also if there are fewer problems than servers to see it with."""
    other = StandIn(folder)
    known = other.answer
    other.answer = lambda route, *args: {"success": True} if route == "/collective_rpc" else known(route, *args)
    try:
        said = refused(config, server=f"{server.address},{other.address}")
        assert "vLLM's log-probs differ from the trainer's by" in said
    finally:
        other.kill()


def test_a_second_failure_has_its_own_time(folder, config, server):
    """Where answers came in between, a server is not the same time gone."""
    _, sampler = sampler_of(folder, replace(config, server_minutes=0.015))
    expected = sampler.generate(PROMPTS, 2, grpo.Sampling(8), seed=0)
    sampler.servers[0].room = server_sampler.asyncio.Semaphore(1)
    slowly = lambda: time.sleep(1.2)  # noqa: E731
    faults = [None, "500", None, "500", None, "500", slowly, "500"]  # two of five prompts are asked again, then one
    server.faults.extend(("/inference/v1/generate", fault) for fault in faults)
    assert sampler.generate(PROMPTS, 2, grpo.Sampling(8), seed=0) == expected and not server.faults


@pytest.mark.parametrize("how", ["paused", "another name"])
def test_a_server_that_is_well_but_does_not_write_is_not_waited_for(how, folder, config, server, monkeypatch):
    """As if somebody had paused it, or a change of weights had been broken off."""
    monkeypatch.setattr(ServerSampler, "PULSE", 0.1)
    _, sampler = sampler_of(folder, config)
    expected = sampler.generate(PROMPTS, 2, grpo.Sampling(8), seed=0)
    server.paused = True
    if how == "another name":
        server.name = f"{sampler.weights}~"
    answers = sampler.begin(PROMPTS, 2, grpo.Sampling(8), seed=0)
    assert answers.result(timeout=20) == expected


def test_errors_of_a_server_are_one_line(folder, config, server):
    _, sampler = sampler_of(folder, replace(config, server_minutes=0.01))
    server.faults.extend([("/inference/v1/generate", "500")] * 100)
    with pytest.raises(
        UsageError, match="answers 500 to /inference/v1/generate: .*told to fail.*for 0.01 minutes"
    ) as error:
        sampler.generate(PROMPTS, 2, grpo.Sampling(8), seed=0)
    assert "\n" not in str(error.value) and vllm_client.one_line(" a\n\n b") == "a b"


def test_a_server_that_is_another_program(config, server, monkeypatch):
    monkeypatch.setattr(server, "answer", lambda *args: {})
    assert "answers, but not as vLLM 0.32 does" in refused(config)


def test_a_server_does_not_take_the_weights_at_the_start(config, server):
    server.faults.append(("/collective_rpc", "500"))
    assert "Another place: --weights_folder" in refused(config)


def test_a_server_that_does_not_take_the_weights_fails_the_self_test(config, server, monkeypatch):
    monkeypatch.setattr(server, "answer", lambda *args, known=server.answer: (
        {"success": True} if args[0] == "/collective_rpc" else known(*args)
    ))  # fmt: skip
    with pytest.raises(UsageError, match="vLLM's log-probs differ from the trainer's by"):
        grpo.train(config)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_have_one_server(kind, folder, config, server, tmp_path):
    """Each asks for a part of the answers; one gives the weights, while no answer is being written."""
    settings = dict(model=folder, task=PARITY, server=server.address, steps=4, prompts_per_step=5, lr=1e-2, staleness=1)
    settings |= dict(max_prompt_tokens=60, max_completion_tokens=8, eval_samples=1, task_args="{}", device="cpu")
    done = test_parallel.grpo_run(kind, tmp_path / "runs", **settings, save_steps=3)
    assert not done.returncode, done.stderr[-3000:]
    (run,) = (tmp_path / "runs").iterdir()
    steps = rows(run, "metrics.jsonl")
    assert [row["age"] for row in steps] == [0, 1, 1, 1] and steps[0]["sampler_logp_gap"] < 1e-4
    assert all(0.01 < row["sampler_logp_gap"] for row in steps[1:]), "these are older"
    shutil.rmtree(run / "checkpoint-4")
    done = test_parallel.launch(kind, "grpo.py", "--resume", str(run))
    assert not done.returncode, done.stderr[-3000:]
    assert rows(run, "metrics.jsonl") == steps


def test_weights_are_removed_at_the_end_and_what_a_dead_run_left(folder, server, tmp_path):
    here = tmp_path / "weights"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    alive = here / weight_transfer.name_of_run("a1")
    dead = here / alive.name.replace(str(os.getpid()), str(gone.pid))
    elsewhere = here / f"grpo-weights-elsewhere-{gone.pid}-a3"
    for left in (dead, alive, elsewhere):
        left.mkdir(parents=True)
    words = f"grpo.py --model {folder} --task {PARITY} --server {server.address} --weights_folder {here} --steps 2 "
    words += f"--prompts_per_step 2 --group_size 2 --max_prompt_tokens 60 --max_completion_tokens 8 --runs {tmp_path}/r"
    seen = []
    server.faults.append(("/collective_rpc", lambda: seen.extend(here.glob("*/*/model.safetensors"))))
    done = subprocess.run([sys.executable, *words.split()], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert len(seen) == 1 and sorted(here.iterdir()) == sorted([alive, elsewhere])


# ==== Bad input =======================================================================================================


def refused(config, **settings) -> str:
    with pytest.raises(UsageError) as error:
        grpo.train(replace(config, **settings))
    assert "\n" not in str(error.value)
    assert not list(Path(config.runs).glob("*")), "before a folder is made"
    return str(error.value)


def test_an_address_where_nobody_listens(config):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    said = refused(config, server=address)
    assert re.search(r"does not answer /weight_info .*python -m harness.serve, with the settings of the run", said)


@pytest.mark.parametrize(
    "route, flag", [("/weight_info", "VLLM_SERVER_DEV_MODE=1"), ("/inference/v1/generate", "--enable-scale-out")]
)
def test_a_server_without_the_routes(route, flag, config, server):
    server.missing.add(route)
    assert re.search(rf"has no {route}: it needs {flag}", refused(config))


@pytest.mark.parametrize(
    "setting, value, said",
    [
        ("logprobs_mode", "raw_logprobs", "--logprobs-mode processed_logprobs"),
        ("generation_config", "auto", "--generation-config vllm"),
        ("dtype", "torch.bfloat16", "--dtype float32"),
        ("hf_overrides", None, "--hf-overrides"),
        ("max_model_len", 80, "takes rows of 80 tokens, and this run may have 100: start it with --max-model-len 100"),
    ],
)
def test_a_server_that_samples_otherwise(setting, value, said, config, server):
    server.kind[setting] = value
    assert said in refused(config)


def test_stop_strings_need_a_tokenizer_there(config, server):
    server.kind["skip_tokenizer_init"] = True
    assert "no --skip-tokenizer-init, since there are stop strings" in refused(config, stop=["="])


def test_other_refusals(config, monkeypatch, tmp_path):
    for settings, said in [
        (dict(server="localhost:8000"), "which is no address like http://127.0.0.1:8000"),
        (dict(server="http://127.0.0.1"), "which is no address like"),
        (dict(server="http://127.0.0.1:abc"), "which is no address like"),
        (dict(server="http://127.0.0.1:99999"), "which is no address like"),
        (dict(server="http://[::1"), "which is no address like"),
        (dict(server=" , "), "which is no address like"),
        (dict(server="http://a:1,http://a:1/"), "has an address twice"),
        (dict(server=",".join(f"http://a:{i}" for i in range(5))), "5 servers are to share 4 prompts_per_step"),
        (dict(serve_on="cpu"), "server names servers that there are, serve_on starts new ones"),
        (dict(sampler="torch"), "sampler is torch, which is no server"),
        (dict(server="", sampler="server"), "sampler is server: which one?"),
        (dict(vllm_sleep=True, staleness=1), "vLLM must keep the older weights"),
        (dict(top_k=5, staleness=1), "which top_k and top_p change: leave them off"),
        (dict(staleness=-1), "staleness is -1, it must be 0 or more"),
        (dict(server_minutes=0), "server_minutes is 0, it must be greater than 0"),
    ]:
        with pytest.raises(UsageError, match=re.escape(said)):
            replace(config, **settings)
    assert "the small model (mathformer) is not served" in refused(config, model="mathformer/pretrained")
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in refused(config, weights_folder=str(tmp_path / "file"))
    monkeypatch.setattr(weight_transfer, "is_here", lambda address: False)
    assert "or in files: --weights_folder, a folder that both machines see" in refused(config)


@pytest.mark.parametrize(
    "address, here",
    [
        ("http://127.0.0.1:8000", True),
        ("http://localhost:8000", True),
        ("http://[::1]:8000", True),
        ("http://10.0.0.7:8000", False),
        ("http://gpu-box:8000", False),
    ],
)
def test_a_server_that_others_reach_is_warned_of(address, here, capsys):
    vllm_client.warn_of_strangers(address)
    assert ("can replace its weights and run code on it" in capsys.readouterr().out) != here


# ==== Starting them ===================================================================================================


def test_the_line_that_starts_a_server(folder, config):
    model_config = loading.load_model_config(folder)
    words = serve.command(folder, model_config, replace(config, seed=3), torch.float32, "127.0.0.1", 8001)
    flags = dict(zip(words, words[1:], strict=False))
    expected = {"--model": folder, "--host": "127.0.0.1", "--port": "8001", "--dtype": "float32", "--seed": "3"}
    expected |= {"--max-model-len": "100", "--max-num-seqs": "256", "--logprobs-mode": "processed_logprobs"}
    expected |= {"--load-format": "dummy", "--generation-config": "vllm"}
    assert {name: flags[name] for name in expected} == expected
    assert json.loads(flags["--hf-overrides"]) == {"head_dtype": "float32", "tie_word_embeddings": False}
    assert {"--enforce-eager", "--enable-scale-out"} <= set(words) and "--trust-remote-code" not in words
    assert serve.environment()["VLLM_SERVER_DEV_MODE"] == "1"


def test_on_a_gpu_weights_come_by_nccl(folder, config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    words = serve.command(folder, loading.load_model_config(folder), config, torch.bfloat16, "127.0.0.1", 8001)
    flags = dict(zip(words, words[1:], strict=False))
    assert json.loads(flags["--weight-transfer-config"]) == {"backend": "nccl"} and flags["--dtype"] == "bfloat16"
    assert json.loads(flags["--hf-overrides"]) == {"head_dtype": "float32"}
    assert "--kv-cache-memory-bytes" not in flags and "--enforce-eager" not in words


@pytest.mark.parametrize(
    "serve_on, visible, trainers, chosen",
    [("1", "", 1, ["1"]), ("2,3", "", 2, ["2", "3"]), ("1", "4,5", 1, ["5"]), ("0", "", 1, None), ("4", "", 1, None),
     ("cpu", "", 1, None), ("1", "", 2, None)],
)  # fmt: skip
def test_servers_get_gpus_that_do_not_train(serve_on, visible, trainers, chosen, config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(trainers))
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    config = replace(config, server="", serve_on=serve_on)
    if chosen is None:
        with pytest.raises(UsageError, match="the GPUs that do not train are"):
            serve.chosen_gpus(config)
    else:
        found = [serve.environment(gpu)["CUDA_VISIBLE_DEVICES"] for gpu in serve.chosen_gpus(config)]
        assert found == chosen


def test_what_names_a_gpu_twice_or_no_gpu_is_refused(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for serve_on, said in (("1,1", "names a GPU twice"), ("\u00b2", "the GPUs that do not train are 1, 2, 3, of 4")):
        with pytest.raises(UsageError, match=said):
            serve.chosen_gpus(replace(config, server="", serve_on=serve_on))


def test_a_server_can_start_again_after_its_checkpoint_is_gone(folder, tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(folder, checkpoint)
    kept = serve.lasting(str(checkpoint))
    shutil.rmtree(checkpoint)
    assert loading.load_model_config(kept).model_type == "qwen2" and not list(Path(kept).glob("*.safetensors"))
    assert serve.lasting(folder) == folder


def test_servers_are_not_started_where_they_cannot_run(config, monkeypatch):
    config = replace(config, server="", serve_on="1")
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert "serve_on needs vLLM, which is not installed" in refused(config)
    monkeypatch.setattr(serve, "find_spec", lambda name: True)
    assert "serve_on is 1, and there is no GPU here: cpu is what there is" in refused(config)
    monkeypatch.setattr(serve, "PartialState", lambda: type("State", (), dict(num_processes=2)))
    with pytest.raises(UsageError, match="serve_on is for one machine"):
        serve.chosen_gpus(config)


def test_a_server_of_the_run_is_started_again_and_ends_with_it(tmp_path):
    """With a program that only waits, in the place of vLLM."""
    words = [sys.executable, "-c", "import os, time; os.fork(); time.sleep(100)"]
    own = serve.OwnServer(words, "", 8001)
    own.check()
    first = own.process.pid
    own.revive(time.monotonic())
    assert own.process.pid == first, "it was well"
    own.process.kill()
    own.process.wait()
    with pytest.raises(UsageError, match="the server ended while it started: see its log"):
        own.check()
    own.revive(time.monotonic())
    second = own.process.pid
    assert second != first and own.process.poll() is None
    own.started = time.monotonic() - 1000
    own.revive(time.monotonic() - 1000)
    assert own.process.pid not in (first, second), "it had hung"
    time.sleep(0.3)
    group = own.process.pid
    own.close()
    own.revive(0.0)
    time.sleep(0.2)
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            assert process.status() == psutil.STATUS_ZOMBIE or os.getpgid(process.pid) not in (first, second, group)


def test_nccl_takes_the_weights_in_the_right_order(folder, config, server, monkeypatch):
    """vLLM's sender needs a GPU: what is seen here is when it is called, and with what."""
    calls = []

    class Sender:
        @classmethod
        def trainer_init(cls, info, *, client, source):
            calls.append((info, client, source))
            return cls()

        def send_weights(self):
            server.asked.append("send_weights")

    part = type("Part", (), dict(
        NCCLTrainerWeightTransferEngine=Sender, NCCLTrainerInitInfo=lambda *args, rank: (*args, rank),
        HTTPVLLMWeightSyncClient=lambda address, timeout: address, ModuleSource=lambda model: model,
    ))  # fmt: skip
    monkeypatch.setattr(weight_transfer, "import_module", lambda name: part)
    monkeypatch.setattr(server_sampler, "folder_for_weights", lambda *args: None)
    known = server.answer
    monkeypatch.setattr(server, "answer", lambda route, *args: (
        {"world_size": 2} if route == "/get_world_size" else known(route, *args)
    ))  # fmt: skip
    model, sampler = sampler_of(folder, config)
    ((host, port, world, rank), client, source), *_ = calls
    assert (host, world, rank, client, source) == ("127.0.0.1", 3, 0, server.address, model) and port > 1023
    expected = [*ROUTES_OF_A_CHANGE[:2], "send_weights", *ROUTES_OF_A_CHANGE[4:]]
    assert server.asked[-7:] == expected
    assert server.name == sampler.weights
    server.restart()
    with pytest.raises(UsageError, match="has lost its weights, and NCCL's connection with them"):
        sampler.generate(PROMPTS, 2, grpo.Sampling(8), seed=0)


# ==== Written ahead ===================================================================================================


def stale(make_config, **settings) -> grpo.Config:
    settings = dict(task_args=dict(eval_size=4), prompts_per_step=4, group_size=4, steps=7, lr=1e-3) | settings
    return make_config(**settings, eval_samples=2, max_completion_tokens=12, print_groups=0, keep_last=9)


def scheduled(k: int, steps: int) -> list[int]:
    """The updates in the weights that write each step: none at first; after each k-th step the newest begin k more."""
    return [0 if step <= k + 1 else (step - 2) // k * k for step in range(1, steps + 1)] if k else list(range(steps))


@pytest.mark.parametrize(
    "k, expected",
    [
        (0, [0, 1, 2, 3, 4, 5, 6]),
        (1, [0, 0, 1, 2, 3, 4, 5]),
        (2, [0, 0, 0, 2, 2, 4, 4]),
        (3, [0, 0, 0, 0, 3, 3, 3]),
        (9, [0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_which_weights_write_a_step(k, expected, make_config):
    """The log-probs of each step's answers are those of the weights that there were after so many updates."""
    assert scheduled(k, 7) == expected
    steps, policies = [], []
    learn = grpo.update

    def watched(policy, optimizer, accelerator, rollouts, config, step):
        policies.append({name: value.clone() for name, value in policy.state_dict().items()})
        steps.append(rollouts)
        return learn(policy, optimizer, accelerator, rollouts, config, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "update", watched)
        run = grpo.train(stale(make_config, staleness=k, eval_steps=3))["run"]
    model, _ = loading.load_model("mathformer/pretrained")
    policy = grpo.Policy(model)
    for step, (rollouts, updates) in enumerate(zip(steps, expected, strict=True), 1):
        for i, weights in enumerate(policies[:step]):
            policy.load_state_dict(weights)
            is_same = all(torch.equal(value, policies[updates][name]) for name, value in weights.items())
            assert (largest_gap(model, rollouts) < 1e-4) == is_same and (is_same or i != updates), (step, i)
        assert {r.age for r in rollouts} == {step - 1 - updates}
    assert [row["age"] for row in rows(run, "metrics.jsonl")] == [i - updates for i, updates in enumerate(expected)]


@pytest.mark.parametrize("k", [0, 1, 2, 4])
def test_an_evaluation_has_the_newest_weights_and_changes_no_answer(k, make_config):
    settings = dict(staleness=k, lr=3e-3, task_args=dict(eval_size=20))
    often = grpo.train(stale(make_config, **settings, eval_steps=2))["run"]
    seldom = grpo.train(stale(make_config, **settings, eval_steps=0))["run"]
    assert rows(often) == rows(seldom) and rows(often, "metrics.jsonl") == rows(seldom, "metrics.jsonl")
    assert rows(often, "eval-7.jsonl") == rows(seldom, "eval-7.jsonl")
    again = grpo.train(stale(make_config, **settings | dict(steps=0), model=str(often / "final")))["run"]
    assert rows(again, "eval-0.jsonl") == rows(often, "eval-7.jsonl")
    assert k != 2 or rows(often, "eval-6.jsonl") != rows(often, "eval-7.jsonl"), "those of the last change"


@pytest.mark.parametrize("stopped", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_run_that_was_stopped_has_the_answers_that_it_would_have_had(k, stopped, make_config):
    config = stale(make_config, staleness=k, save_steps=1)
    run = grpo.train(config)["run"]
    expected = rows(run), rows(run, "metrics.jsonl")
    for path in run.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > stopped:
            shutil.rmtree(path)
    grpo.train(grpo.parse_config(["--resume", str(run)]))
    assert (rows(run), rows(run, "metrics.jsonl")) == expected


def test_answers_that_were_kept_are_not_used_with_other_settings(make_config):
    run = grpo.train(stale(make_config, staleness=2, save_steps=1, steps=3))["run"]
    words = [str(run / "checkpoint-2"), "--allow_changed", "group_size", "--group_size", "3"]
    other = grpo.train(grpo.parse_config(["--resume", *words]))["run"]
    assert len(rows(other)) == 2 * 16 + 12 and rows(other, "metrics.jsonl")[-1]["age"] == 0


@pytest.mark.parametrize(
    "k, steps, resumed, ages", [(1, 3, 3, [0, 1, 1, 0, 1, 1, 1, 1]), (4, 6, 4, [0, 1, 2, 3, 4, 1, 2, 3])]
)
def test_a_run_that_gets_more_steps_goes_on_writing_ahead(k, steps, resumed, ages, make_config):
    run = grpo.train(stale(make_config, staleness=k, steps=steps, save_steps=1))["run"]
    for step in range(resumed + 1, steps + 1):
        shutil.rmtree(run / f"checkpoint-{step}")
    grpo.train(grpo.parse_config(["--resume", str(run), "--steps", "8"]))
    assert [row["age"] for row in rows(run, "metrics.jsonl")] == ages


def test_answers_of_old_weights_set_off_no_alarm_but_the_same_gap_without_age_does(make_config, capsys):
    grpo.train(stale(make_config, staleness=1, lr=1e-2))
    assert "are its weights stale?" not in capsys.readouterr().out
    alarms = grpo.metrics.Alarms(1)
    row = dict(zero_advantage_groups=0, truncated=0, kl_ref=0, nonfinite_updates=0, skipped_updates=0)
    assert not alarms(row | dict(sampler_logp_gap=0.3, age=1.0))
    assert any("are its weights stale?" in text for text in alarms(row | dict(sampler_logp_gap=0.3, age=0.0)))


def test_replaced_groups_come_from_the_newest_weights(make_config):
    settings = dict(staleness=2, dead_groups="resample", resample_rounds=1, lr=1e-2)
    run = grpo.train(stale(make_config, **settings))["run"]
    steps = rows(run, "metrics.jsonl")
    assert any(row["resampled_groups"] for row in steps[1:])
    for row, updates in zip(steps, scheduled(2, 7), strict=True):
        old = (4 - row["resampled_groups"]) / 4  # four groups a step, of which those were replaced once
        assert row["age"] == pytest.approx(old * (row["step"] - 1 - updates))


class Moody:
    """A task whose problems depend on how often it was asked."""

    def __init__(self):
        self.asked = 0

    def train(self, rng, step):
        self.asked += 1
        return {"prompt": f"{self.asked}+1="}

    def eval(self):
        return [{"prompt": "1+1="}]

    def prompt(self, example):
        return example["prompt"]

    def reward(self, text, example):
        return dict(reward=1.0, correct=1.0, format=1.0, prediction=text, ground_truth=None)


def test_a_task_with_a_memory_is_refused(make_config, monkeypatch):
    monkeypatch.setattr(loading, "load_task", lambda *args: Moody())
    with pytest.raises(UsageError, match="gave other problems for step 1 when it was asked again: with staleness"):
        grpo.train(stale(make_config, staleness=1, task_args={}))


def test_another_number_of_processes_cannot_go_on(make_config, tmp_path):
    run = grpo.train(stale(make_config, staleness=2, steps=4, save_steps=2))["run"]
    file = run / "checkpoint-2" / ahead.FILE
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["step"] for row in kept] == [3, 4]
    (tmp_path / ahead.FILE).write_text(
        "".join(json.dumps(row | dict(process=i)) + "\n" for row in kept for i in (0, 1))
    )
    with pytest.raises(UsageError, match="has answers for 2 processes, and these are 1"):
        ahead.read_batches(tmp_path)


@pytest.mark.parametrize("staleness", [0, 1])
def test_servers_write_while_the_trainer_trains(staleness, config, server, monkeypatch):
    """With staleness, the answers of the next step are written before this one is over; without, they are not begun."""
    learn, seen = grpo.update, []

    def watched(policy, optimizer, accelerator, rollouts, config, step):
        following = [problem.ids for problem in draw_prompts(task, tokenizer, config, step + 1)[0]]
        deadline = time.monotonic() + (10 if staleness and step < config.steps else 0.2)
        while not (there := all(ids in [known for _, known in server.spoken] for ids in following)):
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        seen.append(there)
        return learn(policy, optimizer, accelerator, rollouts, config, step)

    task, (_, tokenizer) = loading.load_task(PARITY, {}), loading.load_model(config.model)
    monkeypatch.setattr(grpo, "update", watched)
    grpo.train(replace(config, staleness=staleness, steps=3))
    assert seen == ([True, True, False] if staleness else [False] * 3)
