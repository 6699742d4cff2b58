"""The memory table: its arithmetic against what autograd really keeps, and what it advises."""

import random
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from accelerate.utils import DistributedType
from conftest import with_adapters

import grpo
from harness import loading, memory, optimizers
from harness.memory import Shape, Spread

SHAPE = dict(vocab_size=101, hidden_size=96, intermediate_size=288, num_attention_heads=6, num_key_value_heads=2)
CONFIGS = {
    "qwen2": lambda layers: transformers.Qwen2Config(**SHAPE, num_hidden_layers=layers),
    "qwen3": lambda layers: transformers.Qwen3Config(**SHAPE, num_hidden_layers=layers, head_dim=32),
    "llama": lambda layers: transformers.LlamaConfig(**SHAPE, num_hidden_layers=layers, tie_word_embeddings=True),
}
# Qwen2.5-3B and Qwen2.5-0.5B, from their config.json
QWEN_3B = dict(vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36)
QWEN_3B |= dict(num_attention_heads=16, num_key_value_heads=2, tie_word_embeddings=True)
QWEN_HALF_B = dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24)
QWEN_HALF_B |= dict(num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True)
QWEN_1_5B = QWEN_3B | dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12)
QWEN3_1_7B = QWEN_3B | dict(intermediate_size=6144, num_hidden_layers=28, num_key_value_heads=8, head_dim=128)
GPU = SimpleNamespace(device=torch.device("cuda"), mixed_precision="bf16", num_processes=1, distributed_type="NO")


def kept_bytes(config, tokens: int, half: bool, checkpointing: bool, rank: int = 0) -> int:
    """Bytes that the forward pass of the base model keeps for its backward pass, besides weights and their copies."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    with_adapters(model, grpo.Config(model="m", task="t", lora_rank=rank), "bf16" if half else "no", filled=False)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(sorted(p.shape)) for p in model.parameters() if p.dim() == 2}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(sorted(tensor.shape)) not in shapes:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor: or its address may be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", enabled=half):
        hidden = model.base_model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_activations_are_what_autograd_keeps(name, rank, half, checkpointing):
    tokens = 71  # is no width of a weight
    more, fewer = (kept_bytes(CONFIGS[name](n), tokens, half, checkpointing, rank) for n in (4, 2))
    a, b = (Shape.of(CONFIGS[name](n)).activation_bytes(half, checkpointing, rank) for n in (4, 2))
    assert a - b == pytest.approx((more - fewer) / tokens, rel=0.02)


def test_a_shape_counts_parameters_without_making_them():
    big = Shape.of(transformers.Qwen2Config(**QWEN_3B))
    assert big.parameters == 3_085_938_688 and big.embeddings == 151936 * 2048  # as the model card says: 3.09 B
    assert big.cache_bytes(half=True) == 36 * 1024 and not big.normalises_queries
    assert Shape.of(transformers.Qwen2Config(**QWEN_HALF_B)).cache_bytes(half=True) == 12 * 1024
    untied = Shape.of(transformers.Qwen2Config(**SHAPE, num_hidden_layers=2, tie_word_embeddings=False))
    assert untied.embeddings == 2 * 101 * 96
    assert Shape.of(transformers.Qwen3Config(**SHAPE, num_hidden_layers=2)).normalises_queries
    gpt2 = Shape.of(transformers.GPT2Config(vocab_size=33, n_embd=32, n_layer=2, n_head=4))
    assert (gpt2.layers, gpt2.mlp, gpt2.keys_values) == (2, 128, 64)


def recipe(name: str) -> grpo.Config:
    return grpo.parse_config(["--config", f"configs/{name}.yaml"])


def table(shape: dict, config: grpo.Config, vllm: bool = True, free: float = 80e9) -> dict:
    return memory.needs(Shape.of(transformers.Qwen2Config(**shape)), config, True, vllm, True, free, Spread())


def test_the_parts_of_a_3b_run():
    parts, n = table(QWEN_3B, recipe("countdown-3b")), 3_085_938_688
    assert parts["weights"] == [4 * 3_085_938_688] * 3 and parts["AdamW"] == [8 * n] * 3
    assert parts["gradients"] == [0, 0, 4 * n]
    assert parts["reference"] == [0, 4 * n, 0]  # offloaded but for its own pass
    assert parts["16-bit copies of the weights"][2] == 2 * (n - 151936 * 2048)
    assert parts["vLLM: weights"] == [2 * n] * 3
    assert parts["key-value cache"] == [int(1.2 * 16 * 4 * 1280 * 36 * 1024)] * 3
    # with gradient checkpointing, the residual stream of each layer and all of one layer, or the logits
    layer = 26 * 2048 + 4 * 2048 + 2 * 512 + 8 * 11008
    logits = 8 * 2048 * 151936 + 4 * 151936 * 2048
    assert parts["logits"] == [0, logits, logits - 8192 * layer]
    assert parts["activations"][2] == 8192 * (36 * 4 * 2048 + layer)
    kept = table(QWEN_3B, replace(recipe("countdown-3b"), gradient_checkpointing=False))
    assert kept["activations"][2] == 8192 * 36 * layer
    assert memory.peak(parts) == max(sum(column) for column in zip(*parts.values(), strict=True))


def test_settings_move_the_parts_that_they_should():
    config = recipe("countdown-3b")
    asleep = table(QWEN_3B, replace(config, vllm_sleep=True))
    assert asleep["vLLM: weights"][0] > 0 and asleep["vLLM: weights"][1:] == [0, 0]
    assert asleep["key-value cache"][0] > 0 and asleep["key-value cache"][1:] == [0, 0]
    assert table(QWEN_3B, replace(config, offload_reference=False))["reference"] == [4 * 3_085_938_688] * 3
    on_cpu = memory.needs(Shape.of(transformers.Qwen2Config(**QWEN_3B)), config, False, False, False, 80e9, Spread())
    assert on_cpu["reference"] == [4 * 3_085_938_688] * 3, "offloaded to where it is"
    assert "reference" not in table(QWEN_3B, replace(config, kl_coef=0.0))
    assert not {"vLLM: weights", "vLLM: the rest"} & table(QWEN_3B, config, vllm=False).keys()
    # torch sampling holds the cache of 256 rows while it samples, with room to grow
    sampled = table(QWEN_3B, replace(config, prompts_per_step=128), vllm=False)["key-value cache"]
    assert sampled == [1.25 * 256 * 1280 * 36 * 1024, 0, 0]
    # few rows a step do not help: the evaluation fills its batches
    assert table(QWEN_3B, replace(config, prompts_per_step=1), vllm=False)["key-value cache"] == sampled
    assert table(QWEN_3B, config, vllm=False)["logits"][0] == 12 * 256 * 151936
    older = table(QWEN_3B, replace(config, staleness=2), vllm=False)
    assert older["older weights"] == [4 * 3_085_938_688] * 3
    assert "older weights" not in table(QWEN_3B, replace(config, staleness=2))
    served = table(QWEN_3B, replace(config, staleness=2, serve_on="1"), vllm=False)
    nothing_here = {"older weights", "key-value cache", "vLLM: weights", "vLLM: the rest"}
    assert not nothing_here & served.keys() and [served[name][0] for name in ("logits", "activations")] == [0, 0]
    assert table(QWEN_3B, replace(config, kv_cache_gb=3))["key-value cache"] == [3e9] * 3
    assert table(QWEN_3B, replace(config, prompts_per_step=4096), free=20e9)["key-value cache"] == [10e9] * 3
    # a row that is longer than the budget is a microbatch by itself
    few = table(QWEN_3B, replace(config, tokens_per_microbatch=64))["activations"][2]
    assert few == 1280 / 8192 * table(QWEN_3B, config)["activations"][2]


@pytest.fixture
def card(monkeypatch):
    """What `fitted` says of a model of this shape on a card with so many free bytes."""

    def check(shape: dict, config: grpo.Config, free: float, vllm: bool = True):
        monkeypatch.setattr(memory, "free_memory", lambda device: free)
        memory.fitted(transformers.Qwen2Config(**shape), config, GPU, vllm)

    return check


def test_what_fits_is_shown_and_what_does_not_is_refused_with_advice(card, capsys):
    config = recipe("countdown-3b")
    card(QWEN_3B, config, 100e9)
    out = capsys.readouterr().out
    assert "together" in out and "free on this card" in out and "may not fit" not in out
    needed = memory.peak(table(QWEN_3B, config, free=80e9))
    card(QWEN_3B, config, needed / 1.02)
    out = capsys.readouterr().out
    assert "may not fit. With --lora_rank 16 --lr 1e-05 (LoRA: it wants a larger learning rate) it needs about" in out
    assert "; with all weights trained and --tokens_per_microbatch 2048 --vllm_sleep true, about" in out
    card(QWEN_3B, replace(config, lora_rank=16), needed / 1.02)
    assert "may not fit" not in capsys.readouterr().out
    asleep = replace(config, vllm_sleep=True, gradient_checkpointing=False)
    card(QWEN_HALF_B, asleep, memory.peak(table(QWEN_HALF_B, asleep, free=80e9)) / 1.02)
    out = capsys.readouterr().out
    assert "may not fit. With --tokens_per_microbatch 2048 it needs" in out, "costs less than LoRA"
    with pytest.raises(grpo.UsageError, match="of memory, 12.0 are free. Even with .*take a smaller model"):
        card(QWEN_3B, config, 12e9)
    with pytest.raises(grpo.UsageError, match="are free. With --lora_rank 16 .*all weights .*adamw_8bit, about"):
        card(QWEN_3B, config, 32e9)
    with pytest.raises(grpo.UsageError, match="are free. With --lora_rank .*weights .*--gradient_checkpointing true"):
        card(QWEN_HALF_B, replace(config, kl_coef=0.0, gradient_checkpointing=False), 19e9)


def chosen(free: float, monkeypatch, **settings) -> grpo.Config:
    """The 3B recipe with `auto` on a card with so many free bytes."""
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    config = replace(recipe("countdown-3b"), tokens_per_microbatch="auto", **settings)
    return memory.fitted(transformers.Qwen2Config(**QWEN_3B), config, GPU, True)


@pytest.mark.parametrize("free", [81e9, 85e9, 100e9])
def test_auto_takes_the_largest_microbatch_that_fits(free, monkeypatch, capsys):
    config = chosen(free, monkeypatch)
    tokens = config.tokens_per_microbatch
    assert f"tokens_per_microbatch auto is {tokens:,}; all completions of a step have at most 81,920" in (
        capsys.readouterr().out
    )
    training = [
        sum(part[2] for part in table(QWEN_3B, replace(config, tokens_per_microbatch=n), free=free).values())
        for n in (tokens, tokens + 1024)
    ]
    assert training[0] < 0.9 * free <= training[1] and 1280 <= tokens < 81920


def test_auto_takes_a_whole_step_where_there_is_room(monkeypatch):
    assert chosen(400e9, monkeypatch).tokens_per_microbatch == 64 * 1280
    assert chosen(400e9, monkeypatch, prompts_per_step=1).tokens_per_microbatch == 4 * 1280


def test_auto_with_no_room_for_one_row_is_one_line(monkeypatch, capsys):
    with pytest.raises(grpo.UsageError, match=r"needs about \d+ GB of memory, 30.0 are free. With "):
        chosen(30e9, monkeypatch)
    assert "tokens_per_microbatch auto is 1,280;" in capsys.readouterr().out


def test_with_auto_all_processes_cut_alike(monkeypatch):
    alone = chosen(85e9, monkeypatch).tokens_per_microbatch
    monkeypatch.setattr(memory.parallel, "join", lambda own: [*own, 2048])
    assert chosen(85e9, monkeypatch).tokens_per_microbatch == 2048 < alone


def test_the_advice_comes_true(card, capsys):
    config = replace(recipe("countdown-3b"), offload_reference=False)
    with pytest.raises(grpo.UsageError, match="free. With ") as refused:
        card(QWEN_3B, config, 75e9)
    ways = [re.findall(r"--(\w+) (\S+)", way.replace(",", "")) for way in str(refused.value).split("; with all")]
    assert ("lora_rank", "16") in ways[0] and ("offload_reference", "true") in ways[1] and len(ways) == 2
    needed = [memory.peak(table(QWEN_3B, config, free=75e9)) / 1e9]
    for way in ways:
        typed = {name: yaml.safe_load(value) for name, value in way} | {"lr": 1e-5}
        capsys.readouterr()
        card(QWEN_3B, replace(config, **typed), 75e9)
        out = capsys.readouterr().out
        assert "may not fit" not in out
        needed.append(memory.peak(table(QWEN_3B, replace(config, **typed), free=75e9)) / 1e9)
        together = next(line for line in out.splitlines() if line.startswith("  together"))
        assert max(map(float, together.split()[1:])) == pytest.approx(needed[-1], abs=0.06)
    # in the words of the refusal: what it needs, beside what is free, and what it needs with the flags
    numbers = re.findall(r"about (\d+) GB|, ([\d.]+) are free", str(refused.value))
    assert [float(a or b) for a, b in numbers] == [round(needed[0]), 75.0, *map(round, needed[1:])]


@pytest.mark.parametrize(
    "name, model_config, gigabytes",
    [
        ("countdown-3b", transformers.Qwen2Config(**QWEN_3B), 80),
        ("countdown-24gb", transformers.Qwen2Config(**QWEN_3B), 24),
        ("countdown-24gb --optimizer adamw_8bit", transformers.Qwen2Config(**QWEN_3B), 32),
        ("countdown-workshop", transformers.Qwen3Config(**QWEN3_1_7B), 80),
        ("countdown-workshop --vllm_sleep true --kv_cache_gb 10", transformers.Qwen3Config(**QWEN3_1_7B), 48),
        ("math-1.5b", transformers.Qwen2Config(**QWEN_1_5B), 80),
        ("math-1.5b --gradient_checkpointing true --vllm_sleep true", transformers.Qwen2Config(**QWEN_1_5B), 48),
        ("math-1.5b-served", transformers.Qwen2Config(**QWEN_1_5B), 48),
        ("countdown-3b-lora", transformers.Qwen2Config(**QWEN_3B), 24),
        ("countdown-3b-lora --vllm_sleep false --tokens_per_microbatch 2560", transformers.Qwen2Config(**QWEN_3B), 24),
        ("gsm8k-1.5b-lora", transformers.Qwen2Config(**QWEN_1_5B), 16),
        ("gsm8k-1.5b-lora --vllm_sleep false --tokens_per_microbatch 2048", transformers.Qwen2Config(**QWEN_1_5B), 16),
        ("gsm8k-0.5b-lora", transformers.Qwen2Config(**QWEN_HALF_B), 8),
        ("gsm8k-0.5b", transformers.Qwen2Config(**QWEN_HALF_B), 24),
    ],
)
def test_a_recipe_fits_the_card_that_it_names(name, model_config, gigabytes):
    name, *flags = name.split()
    config, free = grpo.parse_config(["--config", f"configs/{name}.yaml", *flags]), gigabytes * 2**30 * 0.98
    parts = memory.needs(Shape.of(model_config), config, True, not config.serve_on, True, free, Spread())
    assert memory.peak(parts) < 0.95 * free
    said = open(f"configs/{name}.yaml").read()
    assert f"{gigabytes} GB" in said and re.search(rf"\b{round(memory.peak(parts) / 1e9)}\b", said)


def test_a_setting_that_helps_only_after_another_is_found(card):
    """With torch sampling of many rows the sampling is the peak, and only when that is lowered the training is."""
    config = replace(recipe("countdown-3b"), sample_rows=1024, gradient_checkpointing=False)
    with pytest.raises(grpo.UsageError, match="With .*--sample_rows 4.*--gradient_checkpointing true"):
        card(QWEN_3B, config, 66e9, vllm=False)


def test_where_nothing_sleeps_no_sleep_is_advised(card):
    config = recipe("countdown-3b")
    for vllm in (True, False):
        with pytest.raises(grpo.UsageError) as refused:
            card(QWEN_3B, config, 20e9, vllm)
        assert ("--vllm_sleep" in str(refused.value)) == vllm


def test_small_models_are_passed_over_in_silence(card, capsys):
    card(SHAPE | dict(num_hidden_layers=2), recipe("arithmetic"), 1e9, vllm=False)
    assert capsys.readouterr().out == ""


def test_too_large_a_model_is_refused_before_it_is_loaded(tmp_path, monkeypatch, tokenizer):
    transformers.Qwen2Config(**QWEN_3B).save_pretrained(tmp_path)  # a config.json, and no weights
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(memory, "free_memory", lambda device: 8e9)
    monkeypatch.setattr(loading, "load_model", lambda name: pytest.fail("the model was loaded"))
    with pytest.raises(grpo.UsageError, match="GB of memory, 8.0 are free"):
        grpo.train(grpo.Config(model=str(tmp_path), task="arithmetic", runs=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


def test_optimizers_and_processes_move_the_parts_that_they_should():
    config, n = recipe("countdown-3b"), 3_085_938_688

    def parts(optimizer: str, spread=Spread(), on_gpu=True, bf16=True):  # noqa: B008
        shape = Shape.of(transformers.Qwen2Config(**QWEN_3B))
        return memory.needs(shape, replace(config, optimizer=optimizer), bf16, True, on_gpu, 80e9, spread)

    eight = parts("adamw_8bit")
    assert (eight["weights"][0], eight["gradients"][2], eight["AdamW"][0]) == (2 * n, 2 * n, 2 * n)
    assert eight["reference"][1] == 2 * n and "16-bit copies of the weights" not in eight
    away = parts("adamw_offload")
    assert (away["weights"][0], away["gradients"][2]) == (2 * n, 2 * n) and "AdamW" not in away
    assert parts("adamw_offload", on_gpu=False)["AdamW"][0] == 12 * n, "the CPU's memory is the CPU's memory"
    assert parts("adamw_8bit", bf16=False)["activations"] == eight["activations"]
    fsdp = parts("adamw", Spread(4, 4, 4, 4))
    assert (fsdp["weights"][0], fsdp["gradients"][2], fsdp["AdamW"][0]) == (n, n, 2 * n)
    assert fsdp["vLLM: weights"] == eight["vLLM: weights"], "each process has a sampler of its own"
    assert fsdp["key-value cache"][0] == pytest.approx(eight["key-value cache"][0] / 4)
    zero = parts("adamw", Spread(4, 1, 4, 4))
    assert (zero["weights"][0], zero["gradients"][2], zero["AdamW"][0]) == (4 * n, n, 2 * n)


def live_bytes(work) -> int:
    """The most bytes of tensors that `work` has at a time, besides those from before it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.usefixtures("no_compile")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adamw_offload", "lora"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("chunk", [256, 1024])
def test_the_training_column_is_what_an_update_holds(chunk, bf16, optimizer, checkpointing, accelerator, monkeypatch):
    """With a quarter of the tokens of a small run, and logits of a part of them, or of all, at a time."""
    monkeypatch.setattr(memory, "logits_chunk", lambda config: chunk)
    torch.manual_seed(0)
    shape = SHAPE | dict(vocab_size=8000, hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    model_config = transformers.Qwen2Config(**shape | dict(num_attention_heads=4), tie_word_embeddings=True)
    settings = dict(prompts_per_step=2, group_size=2, max_prompt_tokens=64, max_completion_tokens=192, lr=1e-4)
    settings |= dict(gradient_checkpointing=checkpointing, tokens_per_microbatch=1024)
    settings |= dict(lora_rank=8) if optimizer == "lora" else dict(optimizer=optimizer)
    config = grpo.Config(model="m", task="t", device="cpu", precision="bf16" if bf16 else "fp32", **settings)
    model = transformers.Qwen2ForCausalLM(model_config)
    if checkpointing:
        model.gradient_checkpointing_enable()
    with_adapters(model, config, "bf16" if bf16 else "no", filled=False)
    policy = grpo.Policy(model)
    policy.forward = torch.autocast("cpu", torch.bfloat16, enabled=bf16)(policy.forward)  # as accelerate does
    adamw = optimizers.make_optimizer(policy, config, accelerator)
    rng = random.Random(0)
    rollouts = []
    for i in range(4):
        prompt, ids = ([rng.randrange(8000) for _ in range(n)] for n in (64, 192))
        rollouts.append(grpo.Rollout(prompt, ids, [-9.0] * 192, True, advantage=(-1.0) ** i))

    def step():
        grpo.update(policy, adamw, accelerator, rollouts, config, step=1)

    step()  # makes the moments
    if optimizer == "adamw_8bit":  # not compiled, as here, its step has float32 copies of moments
        monkeypatch.setattr(adamw, "step", lambda: None)
    held = [*policy.parameters(), *optimizers.packed_moments(adamw).values(), *getattr(adamw, "float32_weights", [])]
    measured = sum(tensor.numel() * tensor.element_size() for tensor in held) + live_bytes(step)
    parts = memory.needs(Shape.of(model_config), config, bf16, False, False, 1e12, Spread())
    assert sum(column[2] for column in parts.values()) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    "kind, spread",
    [("MULTI_GPU", Spread(4)), ("FSDP", Spread(4, 4, 4, 4)), ("DEEPSPEED", Spread(4, 1, 4, 4)), ("NO", Spread(4))],
)
def test_what_is_spread_over_processes(kind, spread):
    kind = DistributedType(kind)
    assert Spread.of(SimpleNamespace(num_processes=4, distributed_type=kind)) == spread


def test_processes_share_the_memory_of_a_machine(monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_memory", lambda device: 100e9)
    for device, free in (("cpu", "25.0"), ("cuda", "100.0")):  # each has a card of its own
        accelerator = SimpleNamespace(device=torch.device(device), mixed_precision="no", num_processes=4)
        accelerator.distributed_type = DistributedType.MULTI_CPU
        memory.fitted(transformers.Qwen2Config(**QWEN_HALF_B), recipe("gsm8k-0.5b"), accelerator, False)
        assert capsys.readouterr().out.splitlines()[-1].split()[-1] == free


def test_the_evaluation_counts_in_the_rows_that_are_sampled_at_once():
    few = replace(recipe("countdown-3b"), sample_rows=4, group_size=4)
    cache = [table(QWEN_3B, replace(few, eval_samples=k), vllm=False)["key-value cache"][0] for k in (4, 64)]
    assert cache[1] == 16 * cache[0]
