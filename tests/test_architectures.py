"""Each architecture is computed right, or refused in one line: none is trained as another model than it is."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import transformers
from architectures import HEAD, KINDS, NOT_TRIED, REFUSED, VOCABULARY, tiny_config, tiny_model
from conftest import byte_tokenizer
from test_models import run

import grpo
from harness.batching import policy_inputs
from harness.memory import Shape
from harness.model_checks import check_model, check_positions, logps_of, switch_off_noise
from harness.settings import Sampling

PROMPT = [3 + i * 37 % 260 for i in range(40)]
ENDS = [5, 6, 7, 8, *range(100, 130)]
# what people take today; each must be right
TODAY = (
    "qwen2 qwen3 qwen3_moe qwen3_5 qwen3_5_text qwen3_next llama gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4 "
    "gemma4_text smollm3 phi3 olmo2 olmo3 granite granitemoehybrid mistral mixtral gpt2 bloom falcon falcon_h1 opt "
    "deepseek_v2 deepseek_v3 glm4 gpt_oss exaone4 ernie4_5 hunyuan_v1_dense seed_oss cohere cohere2 nanochat lfm2 "
    "starcoder2 stablelm olmoe jamba bamba zamba2 minicpm3"
).split()


def checked(model, sampler: str = "torch"):
    switch_off_noise(model)
    where = SimpleNamespace(device=torch.device("cpu"), num_processes=1, mixed_precision="no")
    parts = dict(model=model, problems=[SimpleNamespace(ids=PROMPT)], sampler_name=sampler, accelerator=where)
    parts = SimpleNamespace(**parts)
    check_model(parts, grpo.Policy, grpo.TorchSampler)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_each_architecture_is_right_or_refused(kind):
    """Right: the sampler's log-probs, and the trainer's in training mode, are the model's own, row by row."""
    assert min(Shape.of(tiny_config(kind))[:8]) > 0  # its memory is estimated, before anything is loaded
    model = tiny_model(kind)
    if kind in REFUSED:
        with pytest.raises(grpo.UsageError) as error:
            checked(model)
        assert REFUSED[kind] in str(error.value) and "\n" not in str(error.value)
        return
    checked(model)
    prompts = [PROMPT[:37], PROMPT[5:16], PROMPT[3:9]]
    rows = grpo.TorchSampler(model, ENDS).generate(prompts, 4, Sampling(14), seed=1)
    assert len({len(row.completion_ids) for row in rows}) > 2  # some end, and leave the others
    with torch.no_grad():
        trained = grpo.Policy(model).train()(**policy_inputs(rows, "cpu"))[0]
        model.eval()
        for row, logps in zip(rows, trained, strict=True):
            own = logps_of(model(torch.tensor([row.prompt_ids + row.completion_ids])).logits, row)
            torch.testing.assert_close(torch.tensor(row.logps), own, rtol=0, atol=1e-4)
            torch.testing.assert_close(logps[: len(own)], own, rtol=0, atol=1e-4)


def test_what_people_take_is_not_refused():
    assert set(TODAY) <= set(KINDS) - set(REFUSED) and len(KINDS) - len(REFUSED) >= 100
    assert not set(REFUSED) & set(NOT_TRIED)


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("mixtral", dict(router_jitter_noise=0.1)),
        ("gpt2", dict(resid_pdrop=0.1, attn_pdrop=0.1)),
        ("granite", dict(logits_scaling=4.0)),
        ("cohere", dict(logit_scale=0.25)),
        ("gemma2", dict(final_logit_softcapping=1.0)),
        ("falcon_h1", dict(lm_head_multiplier=0.3)),
    ],
)
def test_noise_is_off_and_heads_are_scaled_as_the_config_says(kind, settings):
    config = tiny_config(kind)
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = checked(transformers.AutoModelForCausalLM.from_config(config))
    ids = torch.tensor([PROMPT])
    ours = grpo.output_logits(model, model.base_model(ids).last_hidden_state)
    torch.testing.assert_close(ours, model.eval()(ids).logits.float(), rtol=0, atol=1e-4)


def test_noise_that_cannot_be_switched_off_is_refused():
    model = tiny_model("llama")
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, _, out: out + 0.1 * torch.randn_like(out) if module.training else out
    )
    with pytest.raises(grpo.UsageError, match="computes otherwise in training"):
        checked(model)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda model: model.lm_head.weight.data.fill_(torch.nan), "numbers that are not finite"),
        (lambda model: model.resize_token_embeddings(100), "the prompt has the token"),
        (lambda model: model.lm_head.register_forward_hook(lambda module, _, out: out * 2), HEAD),
        (lambda model: model.model.layers[1].self_attn.register_forward_hook(
            lambda module, _, out: (out[0] + out[0].mean(1, keepdim=True), *out[1:])), "is it causal?"),
    ],
)  # fmt: skip
def test_a_model_that_is_not_as_it_must_be_is_refused(spoil, said):
    model = tiny_model("llama")
    spoil(model)
    with pytest.raises(grpo.UsageError, match=said.replace("?", r"\?")):
        checked(model)


def test_what_torch_cannot_sample_may_be_left_to_vllm():
    checked(tiny_model("mamba2"), sampler="vllm")


@pytest.mark.parametrize("kind", ["qwen3_5_text", "gemma4_text", "granitemoehybrid", "mamba"])
def test_a_run_from_a_folder_of_this_architecture(kind, tmp_path):
    """Through `train`, as a user would: it trains, or is refused before there is a folder."""
    config, tokenizer = tiny_config(kind), byte_tokenizer()
    config.get_text_config().vocab_size = max(VOCABULARY, len(tokenizer))
    config.get_text_config().max_position_embeddings = 1024
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    if kind in REFUSED:
        with pytest.raises(grpo.UsageError, match=REFUSED[kind]):
            run(str(tmp_path / "model"), tmp_path / "runs")
        assert not (tmp_path / "runs").exists()
    else:
        assert (run(str(tmp_path / "model"), tmp_path / "runs", steps=1) / "final" / "config.json").is_file()


@pytest.mark.parametrize(
    "rope, longest, refused",
    [
        (dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4), 256, False),
        (dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4), 257, True),
        (dict(rope_type="dynamic", factor=2.0), 257, True),
        (dict(rope_type="yarn", factor=4.0), 1000, False),
        (dict(rope_type="default"), 1000, False),
    ],
)
def test_positions_that_depend_on_the_batch_are_refused(rope, longest, refused):
    rope |= dict(rope_theta=10000.0, original_max_position_embeddings=256)
    config = tiny_config("phi3")
    config.max_position_embeddings, config.original_max_position_embeddings, config.rope_parameters = 1024, 256, rope
    settings = SimpleNamespace(max_prompt_tokens=100, max_completion_tokens=longest - 100)
    with pytest.raises(grpo.UsageError, match="depend on the batch") if refused else nullcontext():
        check_positions(config, settings)
    if rope["rope_type"] != "longrope":
        return
    # and it is so: beside a longer row, a short one has other log-probs, in exactly the cases that are refused
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    short = torch.tensor([PROMPT])
    with torch.no_grad():
        alone = model(short).logits
        beside = model(torch.nn.functional.pad(short, (0, longest - len(PROMPT)))).logits[:, : len(PROMPT)]
    assert torch.allclose(alone, beside, atol=1e-4) is not refused
