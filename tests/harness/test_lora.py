"""LoRA: adapters are trained as PEFT would, merge into what they computed, and are all that a checkpoint keeps."""

import copy
import gc
import math
from types import SimpleNamespace

import architectures
import peft
import pytest
import torch
import transformers
from conftest import PRETRAINED, expected_loss, largest_gap, other_model, random_rollouts, with_adapters
from safetensors.torch import load_file, save_file
from test_parallel import rows

import grpo
from harness import loading, lora, memory, optimizers, weight_transfer
from harness.proven_sampler import check_sampler
from harness.settings import Sample, Sampling
from mathformer.train import build_model

MODELS = ["qwen2", "llama", "gpt2", "mathformer"]
# PEFT moves adapters of layers beside fused experts into the experts, and refuses Mamba's out_proj
NOT_WITH_LORA = set("afmoe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe falcon_h1".split())
NOT_WITH_LORA |= set("glm4_moe glm4_moe_lite glm_moe_dsa hunyuan_v1_moe nemotron_h phimoe".split())
NOT_WITH_LORA |= {"qwen3_next", "solar_open"}
SMALL = dict(task_args=dict(eval_size=4), eval_samples=2, prompts_per_step=4, group_size=4, lora_rank=4, lr=1e-2)


@pytest.fixture
def plain(request, model):
    """A model without adapters; GPT-2 keeps its matrices transposed, Qwen2 and the small model tie their head."""
    return model if request.param == "mathformer" else other_model(request.param)


def written(model) -> list[Sample]:
    """What a model writes, with its log-probs."""
    return grpo.TorchSampler(model, [2]).generate([[1, 5, 6], [1, 7]], 4, Sampling(12), seed=0)


# What is computed


@pytest.mark.parametrize("plain", MODELS, indirect=True)
def test_loss_and_gradient_are_those_of_peft_in_a_plain_loop(plain, make_config, accelerator):
    config = make_config(lora_rank=4, lora_alpha=8, kl_coef=0.1, tokens_per_microbatch=40)
    ours, rollouts = with_adapters(copy.deepcopy(plain.double()), config).double(), random_rollouts(33)
    theirs = peft.get_peft_model(
        copy.deepcopy(plain),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", fan_in_fan_out="GPT2" in type(plain).__name__),
    ).double()
    state = {name.removeprefix("base_model.model."): weight for name, weight in theirs.named_parameters()}
    found = {name: weight for name, weight in ours.named_parameters() if weight.requires_grad}
    assert found.keys() == {name for name, weight in state.items() if weight.requires_grad}
    for name, weight in found.items():
        state[name].data.copy_(weight.data)
    loss = expected_loss(theirs, rollouts, config)
    loss.backward()
    optimizer = torch.optim.SGD(found.values(), lr=1.0)
    config.lr, before = 1.0, {name: weight.detach().clone() for name, weight in found.items()}
    metrics = grpo.update(grpo.Policy(ours), optimizer, accelerator, rollouts, config, step=1)
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-6)
    gradients = {name: before[name] - weight.detach() for name, weight in found.items()}
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-3
    for name, gradient in gradients.items():
        assert (gradient - state[name].grad).abs().max() < 1e-6, name


@pytest.mark.parametrize("plain", MODELS, indirect=True)
def test_merged_weights_compute_what_weights_and_adapters_do(plain, make_config):
    model = with_adapters(copy.deepcopy(plain), make_config(lora_rank=4))
    merged = dict(lora.merged_weights(model))
    assert list(merged) == [name for name, _ in plain.named_parameters()]
    assert {name: weight.shape for name, weight in merged.items()} == {n: p.shape for n, p in plain.named_parameters()}
    alone = copy.deepcopy(plain)
    alone.load_state_dict(merged, strict=False)
    samples = written(model)
    assert largest_gap(model, samples) < 1e-5 and largest_gap(alone.double(), samples) < 1e-5
    assert largest_gap(plain, samples) > 0.05, "the adapters change something"


def test_merging_rounds_once(make_config):
    plain = other_model("qwen2")
    model = with_adapters(copy.deepcopy(plain), make_config(lora_rank=4), "bf16")
    merged, exact = dict(lora.merged_weights(model)), dict(lora.merged_weights(model, torch.float32))
    name = "model.layers.1.mlp.up_proj.weight"
    layer = model.get_submodule(name.removesuffix(".weight"))
    whole = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
    assert merged[name].dtype == torch.bfloat16 and exact[name].dtype == torch.float32
    assert torch.equal(merged[name], whole.bfloat16()) and (exact[name] - whole).abs().max() < 1e-7
    assert {weight.dtype for weight in exact.values()} == {torch.float32}


def test_without_adapters_it_is_the_model_of_the_start(make_config):
    plain = other_model("qwen2")
    model, samples = with_adapters(copy.deepcopy(plain), make_config(lora_rank=4)), written(plain)
    reference = lora.WithoutAdapters(grpo.Policy(model))
    with torch.no_grad():
        logps, _ = reference(**grpo.policy_inputs(samples, "cpu"))
    for row, sample in zip(logps, samples, strict=True):
        assert row[: sample.length].tolist() == pytest.approx(sample.logps, abs=1e-5)
    assert largest_gap(model, samples) > 0.05, "the adapters are on again"
    assert all(weight.requires_grad for name, weight in model.named_parameters() if lora.is_adapter(name))


def test_adapters_start_without_effect_and_alike_for_a_seed(make_config):
    plain = other_model("qwen2")
    configs = [make_config(lora_rank=4, seed=seed) for seed in (0, 0, 1)]
    a, b, c = (with_adapters(copy.deepcopy(plain), config, filled=False) for config in configs)
    assert largest_gap(a, written(plain)) < 1e-5
    names = [name for name in lora.trained(a) if "lora_A" in name]
    assert all(torch.equal(lora.trained(a)[name], lora.trained(b)[name]) for name in names)
    assert not any(torch.equal(lora.trained(a)[name], lora.trained(c)[name]) for name in names)


def test_frozen_weights_have_the_precision_of_the_forward_pass_and_what_is_trained_float32(make_config):
    model = with_adapters(other_model("qwen2"), make_config(lora_rank=4), "bf16")
    assert {weight.dtype for weight in lora.trained(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32, "positions would be rounded"
    assert all(lora.is_adapter(name) for name in lora.trained(model))


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_gradient_checkpointing_changes_no_gradient(name, make_config, accelerator):
    gradients = []
    for on in (False, True):
        plain = other_model(name)
        if on:
            plain.gradient_checkpointing_enable()
        model = with_adapters(copy.deepcopy(plain), make_config(lora_rank=4))
        optimizer = torch.optim.SGD(lora.trained(model).values(), lr=1.0)
        before = {n: p.detach().clone() for n, p in lora.trained(model).items()}
        grpo.update(grpo.Policy(model), optimizer, accelerator, random_rollouts(33), make_config(lr=1.0), step=1)
        gradients.append({n: before[n] - p.detach() for n, p in lora.trained(model).items()})
    a, b = gradients
    assert all((a[n] - b[n]).abs().max() < 1e-6 and a[n].any() for n in a)


# Models of other kinds

SOME = ["deepseek_v3", "jamba", "mixtral", "qwen2_moe", "falcon_h1", "gemma3", "phimoe", "zamba2"]  # others: slow
KINDS = [kind for kind in architectures.KINDS if kind not in architectures.REFUSED]


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in SOME else pytest.mark.slow) for k in KINDS])
def test_an_adapted_model_of_any_kind_merges_into_what_it_computes_or_is_refused(kind, make_config):
    base = architectures.tiny_model(kind).eval()
    try:
        model = with_adapters(copy.deepcopy(base), make_config(lora_rank=1), filled=False)
    except grpo.UsageError as error:
        assert kind in NOT_WITH_LORA and "\n" not in str(error), error
        return
    assert kind not in NOT_WITH_LORA
    torch.manual_seed(1)
    for name, weight in lora.trained(model).items():
        if "lora_B" in name:
            weight.data.normal_(0, 0.02)
    rows = [Sample([5, 9, 20, 7], [30, 41, 8, 6], [0.0] * 4, False), Sample([4, 11], [12, 13, 14], [0.0] * 3, False)]
    inputs = grpo.policy_inputs(rows, "cpu")
    own, _ = grpo.Policy(model)(**inputs)
    merged = dict(lora.merged_weights(model))
    assert list(merged) == [name for name, _ in base.named_parameters()]
    alone = copy.deepcopy(base)
    alone.load_state_dict(merged, strict=False)
    with torch.no_grad():
        assert (own - grpo.Policy(alone)(**inputs)[0]).abs().max() < 1e-4
        assert (own - grpo.Policy(base)(**inputs)[0]).abs().max() > 1e-4
    own.sum().backward()
    without = {name for name, weight in lora.trained(model).items() if weight.grad is None}
    # experts that these few tokens did not go to, and what chooses tokens, which has no gradient
    assert all("expert" in name or "indexer" in name for name in without)


# Which layers


def test_alpha_over_rank_multiplies_what_an_adapter_computes(make_config):
    for rank, alpha in ((4, 8), (8, 32)):
        model = with_adapters(other_model("qwen2"), make_config(lora_rank=rank, lora_alpha=alpha))
        layer = model.model.layers[0].mlp.up_proj
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.shape == (rank, 32) and torch.allclose(lora.change(layer), alpha / rank * b @ a, atol=1e-6)


@pytest.mark.parametrize(
    "targets, layers",
    [
        ("all-linear", 7),
        ("q_proj", 1),
        ("q_proj, v_proj", 2),
        ("self_attn.o_proj", 1),
        (r".*\.mlp\..*", 3),
        ("model.layers.1.mlp.up_proj", 0.5),
    ],
)
def test_targets_are_names_or_a_pattern(targets, layers, make_config):
    model = with_adapters(other_model("qwen2"), make_config(lora_rank=2, lora_targets=targets))
    assert len(lora.adapted(model)) == 2 * layers  # of two layers of the model


WRONG = [
    (dict(lora_targets="q_prjo"), "lora_targets has 'q_prjo', and no layer .* there are .*q_proj"),
    (dict(lora_targets="q_proj,lm_head"), "lora_targets has 'lm_head', and no layer for an adapter has that name"),
    (dict(lora_targets="proj"), "lora_targets has 'proj', and no layer"),
    (dict(lora_targets=".*[.]qkv"), "the pattern lora_targets '.*' matches no whole name; there are .*q_proj"),
    (dict(lora_targets="[q"), "no regular expression"),
    (dict(lora_targets="k_proj", lora_rank=17), "lora_rank is 17, and .*k_proj, 16 x 32, has a smaller side"),
    (dict(lora_rank=100), "lora_rank is 100, and .* has a smaller side"),
]


@pytest.mark.parametrize("settings, message", WRONG)
def test_wrong_targets_are_told_before_the_model_is_loaded(settings, message, make_config, tmp_path, monkeypatch):
    other_model("qwen2").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(loading, "load_model", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(grpo.UsageError, match=message):
        grpo.train(make_config(model=str(tmp_path / "model"), **dict(lora_rank=4) | settings))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(lora_alpha=16), "LoRA, which is off: set --lora_rank"),
        (dict(lora_targets="q_proj"), "LoRA, which is off: set --lora_rank"),
        (dict(lora_rank=-1), "lora_rank is -1, it must be 0 or more"),
        (dict(lora_rank=4, lora_alpha=0), "lora_alpha is 0, it must be greater than 0"),
        (dict(lora_rank=4, optimizer="adamw_8bit"), "adamw_8bit keeps all weights in bf16: lora_rank and"),
        (dict(precision="fp16", optimizer="adamw_offload"), "precision fp16 go with adamw"),
    ],
)
def test_settings_that_contradict_each_other(settings, message, make_config):
    with pytest.raises(grpo.UsageError, match=message):
        make_config(**settings)


def test_an_adapter_is_no_model(make_config, tmp_path):
    result = grpo.train(make_config(steps=1, **SMALL))
    for folder in ("checkpoint-1", "final/adapter"):
        with pytest.raises(grpo.UsageError, match=f"is an adapter .LoRA. for {PRETRAINED}, .* give both merged"):
            grpo.train(make_config(model=str(result["run"] / folder)))


def test_peft_that_is_not_there_is_told_first(make_config, monkeypatch):
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(grpo.UsageError, match="lora_rank needs peft, which is not installed"):
        grpo.train(make_config(lora_rank=4))


# A run


def test_a_run_trains_adapters_alone_and_ends_with_a_model_and_an_adapter(make_config, capsys):
    folder = grpo.train(make_config(steps=3, kl_coef=0.01, **SMALL))["run"]
    told = "LoRA of rank 4 on 16 layers: 16,384 numbers are trained"
    assert told in capsys.readouterr().out
    saved = load_file(folder / "checkpoint-3" / "adapter_model.safetensors")
    assert sum(weight.numel() for weight in saved.values()) == 16_384
    assert not (folder / "checkpoint-3" / "model.safetensors").exists()
    moments = load_file(folder / "checkpoint-3" / "optimizer.state")
    assert sum(value.numel() for name, value in moments.items() if name.endswith("exp_avg")) == 16_384
    assert rows(folder)[0]["kl_ref"] == 0 and rows(folder)[-1]["kl_ref"] > 1e-4

    final, _ = loading.load_model(str(folder / "final"))
    base, _ = loading.load_model(PRETRAINED)
    beside = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "final" / "adapter").eval()
    samples = written(final)
    assert largest_gap(base, samples) > 0.01, "it has learned something"
    assert largest_gap(beside.base_model.model, samples) < 1e-5
    automatic = transformers.AutoModelForCausalLM.from_pretrained(folder / "final" / "adapter").eval()
    assert largest_gap(automatic, samples) < 1e-5, "transformers finds the base by itself"
    assert final.dtype == torch.float32
    assert "lora_rank" in (folder / "final" / "README.md").read_text()


def test_a_run_that_was_stopped_goes_on_bit_for_bit(make_config):
    settings = SMALL | dict(kl_coef=0.01, minibatches=2, save_steps=2)
    whole = grpo.train(make_config(steps=4, **settings))["run"]
    part = grpo.train(make_config(steps=2, **settings))["run"]
    assert grpo.train(make_config(steps=4, resume=str(part), **settings))["run"] == part
    assert rows(part) == rows(whole) and rows(part, "eval.jsonl")[-1] == rows(whole, "eval.jsonl")[-1]
    for file in ("checkpoint-4/adapter_model.safetensors", "checkpoint-4/optimizer.state", "final/model.safetensors"):
        a, b = load_file(part / file), load_file(whole / file)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_cannot_go_on(make_config, tmp_path):
    base = tmp_path / "base"
    model, tokenizer = loading.load_model(PRETRAINED)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    settings = SMALL | dict(model=str(base), save_steps=1)
    folder = grpo.train(make_config(steps=1, **settings))["run"]
    again = dict(steps=2, resume=str(folder))
    with pytest.raises(grpo.UsageError, match="lora_rank is 2, and .* was trained with 4"):
        grpo.train(make_config(**settings | again | dict(lora_rank=2)))
    changed = again | dict(allow_changed="lora_rank,lora_targets")
    with pytest.raises(grpo.UsageError, match="does not fit lora_rank and lora_targets: .* is .4, 256., not .2, 256."):
        grpo.train(make_config(**settings | changed | dict(lora_rank=2)))
    with pytest.raises(grpo.UsageError, match="does not fit lora_rank and lora_targets: .*, not None"):
        grpo.train(make_config(**settings | changed | dict(lora_targets="query_key_value")))
    with pytest.raises(grpo.UsageError, match="lora_rank is 0, and .* holds an adapter alone"):
        grpo.train(make_config(**settings | changed | dict(lora_rank=0)))
    weights = load_file(base / "model.safetensors")
    save_file({name: weight + 0.01 for name, weight in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(grpo.UsageError, match="is not the model that .* began with"):
        grpo.train(make_config(**settings | again))


def live_bytes() -> int:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_a_kl_penalty_needs_no_second_model(make_config, monkeypatch):
    loaded, load = [], loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda *args, **more: (loaded.append(args[0]), load(*args, **more))[1])
    held, runs = [], []
    for settings in (dict(), dict(kl_coef=0.1)):
        before = live_bytes()
        runs.append(grpo.setup(make_config(**SMALL | settings)))
        held.append(live_bytes() - before)
    size = sum(p.nbytes for p in runs[1].model.parameters())
    assert loaded == [PRETRAINED] * 2 and abs(held[1] - held[0]) < 0.02 * size
    assert {p.data_ptr() for p in runs[1].reference.parameters()} == {p.data_ptr() for p in runs[1].model.parameters()}


def test_moments_are_those_of_adapters(make_config, accelerator):
    model = with_adapters(other_model("qwen2"), make_config(lora_rank=4))
    optimizer = optimizers.make_optimizer(grpo.Policy(model), make_config(lora_rank=4), accelerator)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(
        map(id, lora.trained(model).values())
    )


def test_layers_that_are_too_narrow_have_no_adapter_unless_they_are_named(tokenizer, make_config, capsys):
    model = build_model("tiny", tokenizer, num_experts=4, active_experts=2).eval()
    adapted = with_adapters(copy.deepcopy(model), make_config(lora_rank=8))
    names = list(lora.adapted(adapted))
    assert not any("router" in name for name in names) and any("experts.3" in name for name in names)
    routers = sum("router" in name for name, _ in model.named_modules())
    assert f"({routers} others are too narrow for it, or not called)" in capsys.readouterr().out
    with pytest.raises(grpo.UsageError, match="lora_rank is 8, and .*router, 4 x .*, has a smaller side"):
        with_adapters(copy.deepcopy(model), make_config(lora_rank=8, lora_targets="router"))


def test_layers_that_no_text_goes_through_have_no_adapter(make_config):
    model = architectures.tiny_model("jamba").eval()  # multiplies with dt_proj's weight, and does not call it
    adapted = with_adapters(copy.deepcopy(model), make_config(lora_rank=1))
    assert not any("dt_proj" in name for name in lora.adapted(adapted))
    with pytest.raises(grpo.UsageError, match="dt_proj is not called when JambaForCausalLM reads a text"):
        with_adapters(model, make_config(lora_rank=1, lora_targets="dt_proj"))


# A sampler with weights of its own


class OwnWeights(grpo.TorchSampler):
    """Samples with a copy of the model, which `sync` renews in its own way."""

    def __init__(self, model, base, renew):
        super().__init__(copy.deepcopy(base), [2])
        self.trained, self.renew = model, renew
        self.sync()

    def sync(self):
        self.model.load_state_dict(self.renew(self.trained), strict=False)


def without_adapters(model):
    return {name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if not lora.is_adapter(name)}


def without_the_last(model):
    weights = dict(lora.merged_weights(model))
    name = "model.layers.1.mlp.down_proj.weight"
    return weights | {name: model.get_submodule(name.removesuffix(".weight")).base_layer.weight}


def only_at_first(model):
    if not hasattr(model, "seen"):
        model.seen = {name: weight.clone() for name, weight in lora.merged_weights(model)}
    return model.seen


@pytest.mark.parametrize(
    "renew, follows",
    [(lambda model: dict(lora.merged_weights(model)), True), (without_adapters, False), (only_at_first, False),
     (without_the_last, False)],
)  # fmt: skip
@pytest.mark.parametrize("filled", [True, False])
def test_a_sampler_with_old_adapters_is_seen_at_the_start(filled, renew, follows, make_config, accelerator):
    base, config = other_model("qwen2"), make_config(lora_rank=4, max_completion_tokens=8, max_prompt_tokens=20)
    model = with_adapters(copy.deepcopy(base), config, filled=filled)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    sampler = OwnWeights(model, base, renew)

    def check():
        check_sampler(sampler, grpo.Policy(model), accelerator, [[1, 5, 6], [1, 9]], config)

    if follows:
        check()
        assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())
    else:
        with pytest.raises(grpo.UsageError, match="vLLM's log-probs differ from the trainer's"):
            check()


def test_a_sampler_whose_log_probs_are_no_numbers_does_not_pass(make_config, accelerator):
    base, config = other_model("qwen2"), make_config(lora_rank=4, max_completion_tokens=8, max_prompt_tokens=20)
    model = with_adapters(copy.deepcopy(base), config)
    sampler = OwnWeights(model, base, lambda model: dict(lora.merged_weights(model)))
    generate = sampler.generate
    sampler.generate = lambda *args: [s._replace(logps=[math.nan] * s.length) for s in generate(*args)]
    with pytest.raises(grpo.UsageError, match="vLLM's log-probs differ from the trainer's by nan"):
        check_sampler(sampler, grpo.Policy(model), accelerator, [[1, 5, 6], [1, 9]], config)


@pytest.mark.parametrize("plain", MODELS, indirect=True)
def test_the_noise_of_the_self_test_changes_each_matrix_as_much_as_it_would_without_lora(plain, make_config):
    model = with_adapters(copy.deepcopy(plain), make_config(lora_rank=4, lora_alpha=64), filled=False)
    sizes = lora.noise_sizes(grpo.Policy(model))
    assert {id(weight) for weight in sizes} == set(map(id, lora.trained(model).values()))
    torch.manual_seed(0)
    for layer in lora.adapted(model).values():
        b = layer.lora_B["default"].weight
        b.data.normal_(0, sizes[b])
        size = layer.base_layer.weight.abs().mean()
        assert lora.change(layer).std() == pytest.approx(size.item(), rel=0.35)


def test_nccl_gets_the_merged_weights_by_the_names_of_the_model(make_config):
    base = SimpleNamespace(WeightSource=object, ParamMeta=lambda *described: described)
    plain = other_model("qwen2")
    model = with_adapters(copy.deepcopy(plain), make_config(lora_rank=4), "bf16")
    source = weight_transfer.merged_source(base, model)
    expected = dict(lora.merged_weights(model))
    assert source.metadata() == [(name, torch.bfloat16, tuple(p.shape)) for name, p in plain.named_parameters()]
    sent = list(source)
    assert [name for name, _ in sent] == list(expected)
    assert all(torch.equal(weight, expected[name]) for name, weight in sent)


# Memory


def test_the_arithmetic_of_adapters():
    config = transformers.Qwen2Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    shape = memory.Shape.of(config)
    # q and o, k and v, gate and up, down: in + out
    assert shape.adaptable == 36 * (2 * (2048 + 2048) + 2 * (2048 + 256) + 2 * (2048 + 11008) + (11008 + 2048))
    run = grpo.Config(model="m", task="t", lora_rank=16, kl_coef=0.1)
    parts = memory.needs(shape, run, True, True, True, 80e9)
    n, t = shape.parameters, 16 * shape.adaptable
    assert parts["weights"][2] == 2 * n + 4 * t and parts["AdamW"][2] == 8 * t and parts["gradients"][2] == 4 * t
    assert parts["16-bit copies of the weights"][2] == 2 * t and "reference" not in parts
    assert memory.needs(shape, run, False, True, True, 80e9)["weights"][0] == 4 * n + 4 * t
    some = memory.Shape.of(config, grpo.Config(model="m", task="t", lora_rank=8, lora_targets="q_proj,v_proj"))
    assert some.adaptable == 36 * (2048 + 2048 + 2048 + 256)
