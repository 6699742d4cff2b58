"""fp16 on a CPU: autocast and a loss scaler of torch, where accelerate has them for GPUs only."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import other_model
from safetensors.torch import load_file
from test_parallel import rows
from torch.nn.modules.module import register_module_forward_hook

import grpo
from harness import devices
from harness.fast_head import FastHead
from harness.metrics import Alarms

SMALL = dict(task_args=dict(eval_size=4), eval_samples=2, prompts_per_step=4, group_size=4)


@pytest.fixture
def fp16(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from fp16_on_cpu import Fp16OnCpu

    AcceleratorState._reset_state(reset_partial_state=True)  # a process has one precision
    monkeypatch.setattr(devices, "Accelerator", Fp16OnCpu)
    monkeypatch.setattr(devices, "choose_precision", lambda config: "fp16")
    yield Fp16OnCpu
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("rank", [0, 4])
def test_what_is_fp16_and_what_is_not(rank, fp16, make_config):
    seen = set()

    def watch(module, args, output):
        if isinstance(module, torch.nn.Linear) and torch.is_autocast_enabled("cpu"):
            seen.add(output.dtype)

    hook = register_module_forward_hook(watch)
    try:
        folder = grpo.train(make_config(steps=2, lora_rank=rank, lr=1e-3, kl_coef=0.01, **SMALL))["run"]
    finally:
        hook.remove()
    assert seen == {torch.float16}
    first, second = rows(folder)
    assert 1e-6 < first["sampler_logp_gap"] < 0.02 and first["ratio_max"] < 1.1
    assert first["nonfinite_updates"] == second["nonfinite_updates"] == 0 and first["grad_norm"] > 0.01
    (file,) = (folder / "checkpoint-2").glob("*model.safetensors")
    assert {weight.dtype for weight in load_file(file).values()} == {torch.float32}


def test_its_gradient_is_that_of_float32_to_three_digits(fp16, make_config):
    """Also where a part of it is smaller than what fp16 can represent: the loss is scaled up."""
    settings = dict(steps=1, optimizer="adamw", loss_weight="constant", max_completion_tokens=24, **SMALL)
    norms = {}
    for scale in (2.0**16, 2.0**-14):
        AcceleratorState._reset_state(reset_partial_state=True)
        fp16.first_scale = scale
        norms[scale] = rows(grpo.train(make_config(**settings))["run"])[0]["grad_norm"]
    fp16.first_scale = 2.0**16
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "Accelerator", Accelerator)
        patch.setattr(devices, "choose_precision", lambda config: "no")
        exact = rows(grpo.train(make_config(**settings))["run"])[0]["grad_norm"]
    assert norms[2.0**16] == pytest.approx(exact, rel=0.02)
    assert norms[2.0**-14] != pytest.approx(exact, rel=0.02), "the scaler matters here"


def test_steps_that_overflow_at_the_start_are_skipped_and_are_no_alarm(fp16, make_config, monkeypatch):
    monkeypatch.setattr(fp16, "first_scale", 2.0**27)
    folder = grpo.train(make_config(steps=16, lr=1e-3, save_steps=1, keep_last=99, eval_steps=0, **SMALL))["run"]
    found = rows(folder)
    skipped = [row["nonfinite_updates"] for row in found if not row["skipped_updates"]]
    assert skipped[:4] == [1] * 4, "more than three in a row"
    assert 0 in skipped[4:]
    last = sum(row["nonfinite_updates"] for row in found)
    weights = [load_file(folder / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2, 16)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    state = load_file(folder / "checkpoint-16" / "optimizer.state")
    assert state["scaler.scale"] == 2.0 ** (27 - last)


def test_a_run_that_was_stopped_goes_on_with_its_scale(fp16, make_config, monkeypatch):
    monkeypatch.setattr(fp16, "first_scale", 2.0**30)
    settings = SMALL | dict(lr=1e-3, save_steps=6, eval_steps=0, lora_rank=4)
    whole = grpo.train(make_config(steps=12, **settings))["run"]
    part = grpo.train(make_config(steps=6, **settings))["run"]
    assert load_file(part / "checkpoint-6" / "optimizer.state")["scaler.scale"] < 2.0**30
    assert grpo.train(make_config(steps=12, resume=str(part), **settings))["run"] == part
    assert rows(part) == rows(whole)
    for file in ("checkpoint-12/adapter_model.safetensors", "checkpoint-12/optimizer.state"):
        a, b = load_file(part / file), load_file(whole / file)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_gradient_that_stays_not_finite_ends_the_run_all_the_same():
    row = dict(zero_advantage_groups=0.0, truncated=0.0, kl_ref=None, sampler_logp_gap=None, age=0, step=1)
    row |= dict(nonfinite_updates=1, skipped_updates=0)
    alarms = Alarms(1, scaled=True)
    for _ in range(19):
        assert alarms(row) == []
    with pytest.raises(grpo.UsageError, match="not finite in 20 steps in a row"):
        alarms(row)


def test_the_head_keeps_gradients_of_fp16_that_are_too_small_for_it():
    """They are made in the forward pass, before the loss is scaled."""
    torch.manual_seed(0)
    model = other_model("qwen2")
    hidden, targets = torch.randn(40, 32), torch.randint(0, 33, (40,))
    found = []
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 2.0**16)):
        h = hidden.detach().to(dtype).requires_grad_()
        slope = lambda at, logps: torch.full_like(logps, 1e-7)  # noqa: E731
        logps, _ = FastHead.apply(h, model.lm_head.weight.detach(), None, targets, 1.0, 4, slope, False)
        (logps * 1e-7 * scale).sum().backward()
        found.append(h.grad.float() / scale)
    assert (found[0] - found[1]).norm() < 0.01 * found[0].norm()


# What it is allowed for


@pytest.fixture
def card(monkeypatch):
    """A GPU, with bf16 or without."""

    def make(bf16: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)

    return make


def test_auto_is_what_the_card_has(card, make_config, monkeypatch):
    assert devices.choose_precision(make_config()) == "no"
    card(True)
    assert devices.choose_precision(make_config()) == "bf16"
    assert devices.choose_precision(make_config(device="cpu")) == "no"
    card(False)
    assert devices.choose_precision(make_config()) == "fp16"
    assert devices.choose_precision(make_config(precision="fp32")) == "no"
    assert devices.choose_precision(make_config(optimizer="adamw_8bit")) == "no", "its weights are in bf16"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert devices.choose_precision(make_config()) == "no"
    with pytest.raises(grpo.UsageError, match="precision fp16 is for whole models: with FSDP or DeepSpeed"):
        devices.choose_precision(make_config(precision="fp16"))


def test_fp16_on_a_cpu_is_refused(make_config):
    with pytest.raises(grpo.UsageError, match="precision fp16 is for CUDA GPUs: elsewhere, use --precision fp32"):
        grpo.train(make_config(precision="fp16"))
