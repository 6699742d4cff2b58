"""AdamW in three sizes: the small ones learn what the large one does, and a stopped run goes on from their state."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
from conftest import other_model
from safetensors.torch import load_file
from torch import nn

import grpo
from harness import optimizers
from harness.optimizers import OffloadedAdamW, load_moments, make_optimizer, packed_moments
from harness.run_folder import RunFolder
from harness.settings import UsageError

pytestmark = pytest.mark.usefixtures("no_compile")
SMALL = ["adamw_8bit", "adamw_offload"]


def made(name: str, weights: torch.Tensor, make_config, accelerator, lr: float = 1e-6):
    """A module with these weights, and its optimizer."""
    module = nn.Linear(weights.shape[1], weights.shape[0], bias=False)
    module.weight.data = weights.clone()
    return module, make_optimizer(module, make_config(optimizer=name, lr=lr), accelerator)


def take_steps(module, optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        module.weight.grad = (torch.randn(module.weight.shape, generator=generator) - 1).to(module.weight.dtype)
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return 0.02 * torch.randn(128, 64)


@pytest.mark.parametrize("name", SMALL)
def test_weights_go_to_bf16_and_the_frequencies_of_positions_do_not(name, make_config, accelerator):
    policy = grpo.Policy(other_model("qwen2"))
    exact = policy.model.model.rotary_emb.inv_freq.clone()
    make_optimizer(policy, make_config(optimizer=name), accelerator)
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    assert torch.equal(policy.model.model.rotary_emb.inv_freq, exact) and (exact != exact.bfloat16()).any()


@pytest.mark.parametrize("name", SMALL)
def test_steps_smaller_than_bf16_can_show_add_up(name, weights, make_config, accelerator):
    """A step of 1e-6 moves a weight of 0.02 by 1/120 of bf16's gap there: rounded to nearest, most would never move."""
    large, adamw = made("adamw", weights, make_config, accelerator)
    take_steps(large, adamw, 60)
    wanted = (large.weight.detach() - weights).mean().item()
    start = weights.bfloat16().float()  # what the small ones compute with
    small, optimizer = made(name, weights, make_config, accelerator)
    take_steps(small, optimizer, 60)
    moved = small.weight.detach().float() - start
    assert moved.mean().item() == pytest.approx(wanted, rel=0.1)
    plain = nn.Linear(64, 128, bias=False).bfloat16()
    plain.weight.data = weights.bfloat16()
    take_steps(plain, torch.optim.AdamW(plain.parameters(), lr=1e-6, weight_decay=0.0), 60)
    assert (plain.weight.detach().float() - start).mean().abs() < 0.5 * abs(wanted), "this test would see nothing"


def test_offloaded_adamw_is_adamw(weights, make_config, accelerator):
    large, adamw = made("adamw", weights, make_config, accelerator, lr=1e-3)
    small, offloaded = made("adamw_offload", weights, make_config, accelerator, lr=1e-3)
    for step in range(5):
        torch.manual_seed(step)
        gradient = torch.randn(weights.shape).bfloat16()
        large.weight.grad, small.weight.grad = gradient.float(), gradient
        adamw.step(), offloaded.step()
        offloaded.zero_grad()
        assert small.weight.grad is None
    assert torch.allclose(offloaded.float32_weights[0], large.weight, atol=1e-7)
    assert torch.equal(small.weight, offloaded.float32_weights[0].bfloat16()) and small.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["adamw", *SMALL])
def test_the_gradient_is_clipped_and_the_learning_rate_followed(
    name, make_rollouts, make_config, accelerator, monkeypatch
):
    moved = {}
    for lr in (1e-3, 4e-3):
        for clip in (1e9, 1e-9):
            model = other_model("qwen2")
            policy = grpo.Policy(model)
            config = make_config(optimizer=name, lr=lr, grad_clip=clip)
            optimizer = make_optimizer(policy, config, accelerator)
            before = [p.detach().float().clone() for p in policy.parameters()]
            metrics = grpo.update(policy, optimizer, accelerator, make_rollouts(), config, 1)
            assert metrics["lr"] == lr and metrics["grad_norm"] > 0.01
            pairs = zip(policy.parameters(), before, strict=True)
            moved[lr, clip] = sum((p.detach().float() - b).abs().mean().item() for p, b in pairs)
    assert moved[4e-3, 1e9] > 2 * moved[1e-3, 1e9]
    assert moved[1e-3, 1e-9] < 0.2 * moved[1e-3, 1e9]  # so small a gradient is lost in AdamW's epsilon


@pytest.mark.parametrize("name", ["adamw", *SMALL])
def test_steps_go_on_from_saved_moments(name, weights, make_config, accelerator, tmp_path):
    whole, optimizer = made(name, weights, make_config, accelerator, lr=1e-3)
    take_steps(whole, optimizer, 3)
    saved = {key: value.clone() for key, value in packed_moments(optimizer).items()}
    assert all(type(value) is torch.Tensor for value in saved.values())
    half = copy.deepcopy(getattr(optimizer, "float32_weights", [whole.weight])[0].detach().float())
    take_steps(whole, optimizer, 3, start=3)

    resumed, again = made(name, half, make_config, accelerator, lr=1e-3)
    load_moments(again, saved)
    take_steps(resumed, again, 3, start=3)
    assert torch.equal(resumed.weight, whole.weight)
    assert {k: v.tolist() for k, v in packed_moments(again).items()} == {
        k: v.tolist() for k, v in packed_moments(optimizer).items()
    }
    forgetful, empty = made(name, half, make_config, accelerator, lr=1e-3)
    take_steps(forgetful, empty, 3, start=3)
    assert not torch.equal(forgetful.weight, whole.weight)


@pytest.mark.parametrize("name", SMALL)
def test_a_resumed_run_is_the_run_that_was_not_stopped(name, make_config):
    settings = dict(optimizer=name, prompts_per_step=8, eval_samples=2, eval_steps=0, save_steps=2, keep_last=3)
    config = make_config(**settings, steps=4, task_args={"eval_size": 10}, lr=1e-3, grad_clip=1.0)
    whole = grpo.train(config)["run"]
    parts = grpo.train(replace(config, steps=2))["run"]
    grpo.train(replace(config, resume=str(parts)))
    keys = ("reward", "loss", "grad_norm", "entropy", "sampler_logp_gap")
    first, second = (
        [[row[key] for key in keys] for row in RunFolder(path).read("metrics.jsonl")] for path in (whole, parts)
    )
    assert len(first) == 4 and first == second
    a, b = (load_file(path / "final" / "model.safetensors") for path in (whole, parts))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert {tensor.dtype for tensor in a.values()} == {torch.bfloat16 if name == "adamw_8bit" else torch.float32}


def test_bytes_are_what_the_table_says(weights, make_config, accelerator):
    """Of weights and moments, for each parameter; scales of the 8 bits are another 4 bytes for each 256."""
    for name, wanted in {"adamw": 12, "adamw_8bit": 4}.items():
        module, optimizer = made(name, weights, make_config, accelerator)
        take_steps(module, optimizer, 1)
        moments = [v for k, v in packed_moments(optimizer).items() if "step" not in k and "qmap" not in k]
        held = sum(t.numel() * t.element_size() for t in [module.weight, *moments]) / weights.numel()
        assert held == pytest.approx(wanted, abs=0.04)
    module, optimizer = made("adamw_offload", weights, make_config, accelerator)
    assert isinstance(optimizer, OffloadedAdamW)
    assert module.weight.element_size() == 2 and optimizer.float32_weights[0].device.type == "cpu"


def test_torchao_that_is_not_there_is_named(weights, make_config, accelerator, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="adamw_8bit needs torchao.*pip install torchao==0.18.0"):
        made("adamw_8bit", weights, make_config, accelerator)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
@pytest.mark.parametrize("name", SMALL)
def test_sharded_models_take_plain_adamw(name, kind, make_config):
    accelerator = type(
        "Sharded", (), dict(distributed_type=optimizers.DistributedType(kind), device=torch.device("cpu"))
    )
    with pytest.raises(UsageError, match=f"optimizer {name} is for whole models"):
        make_optimizer(nn.Linear(2, 2), make_config(optimizer=name), accelerator)


@pytest.mark.parametrize("name", ["adamw", *SMALL])
def test_weight_decay_reaches_the_optimizer(name, weights, make_config, accelerator):
    module = nn.Linear(weights.shape[1], weights.shape[0], bias=False)
    module.weight.data = weights.clone()
    optimizer = make_optimizer(module, make_config(optimizer=name, lr=1e-2, weight_decay=10.0), accelerator)
    module.weight.grad = torch.zeros_like(module.weight)
    optimizer.step()
    assert module.weight.detach().float().norm().item() == pytest.approx(0.9 * weights.norm().item(), rel=5e-3)
