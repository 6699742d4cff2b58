"""Devices, samplers and tasks by name: what is there, what is refused, and with which words."""

from pathlib import Path

import pytest
import torch
import transformers

import grpo
from harness import files, loading
from harness.loading import choose_sampler

QWEN = transformers.Qwen2Config()


class Small:
    model_type = "mathformer"


@pytest.mark.parametrize(
    "installed, device, model, chosen",
    [
        (True, "cuda", QWEN, "vllm"),
        (False, "cuda", QWEN, "torch"),
        (True, "cuda", Small, "torch"),
        (True, "cpu", QWEN, "torch"),
        (True, "mps", QWEN, "torch"),
    ],
)
def test_auto_takes_vllm_for_language_models_on_a_gpu(installed, device, model, chosen, monkeypatch, make_config):
    monkeypatch.setattr(loading, "find_spec", lambda name: installed)
    assert choose_sampler(make_config(), model, torch.device(device)) == chosen


@pytest.mark.parametrize("cudnn_attention", [True, False])
def test_which_attention_torch_may_take(cudnn_attention, monkeypatch, make_config):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(loading, "load_model", lambda *args: (_ for _ in ()).throw(grpo.UsageError("far enough")))
    try:
        with pytest.raises(grpo.UsageError, match="far enough"):
            grpo.train(make_config(cudnn_attention=cudnn_attention))
        assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn_attention
        assert torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_a_missing_vllm_is_one_line(monkeypatch, make_config):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    monkeypatch.setattr(loading, "load_model", lambda name: pytest.fail("the model was loaded"))
    with pytest.raises(grpo.UsageError, match="not installed: pip install -r requirements-gpu.txt, or"):
        grpo.train(make_config(sampler="vllm"))


def test_vllm_on_a_device_that_it_would_not_use_is_refused(monkeypatch, make_config):
    monkeypatch.setattr(loading, "find_spec", lambda name: True)
    with pytest.raises(grpo.UsageError, match="does not run on mps here"):
        choose_sampler(make_config(sampler="vllm"), QWEN, torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # it would take the GPU beside a trainer on the CPU
    with pytest.raises(grpo.UsageError, match="does not run on cpu here"):
        choose_sampler(make_config(sampler="vllm"), QWEN, torch.device("cpu"))


def test_bf16_on_a_card_without_it_is_refused(monkeypatch, make_config):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(grpo.UsageError, match="this GPU has no bf16: use --precision fp16"):
        grpo.train(make_config(precision="bf16"))


def test_a_model_that_comes_with_the_project_is_found_from_anywhere(tmp_path, monkeypatch):
    here = Path(loading.__file__).resolve().parents[1]
    monkeypatch.chdir(tmp_path)
    assert files.local_name("mathformer/pretrained") == str(here / "mathformer" / "pretrained")
    assert loading.load_model("mathformer/pretrained")[0].config.model_type == "mathformer"
    assert files.local_name("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    (tmp_path / "mathformer" / "pretrained").mkdir(parents=True)  # what is here comes first
    assert files.local_name("mathformer/pretrained") == "mathformer/pretrained"


def test_the_hub_is_asked_aloud_and_only_for_what_is_not_here(capsys):
    loading.load_model_config("mathformer/pretrained")
    assert capsys.readouterr().out == ""
    with pytest.raises(loading.UsageError, match="cannot be loaded"):
        loading.load_model_config("nobody/nothing")
    assert "there is no folder nobody/nothing here: looking for it on the Hugging Face Hub" in capsys.readouterr().out


def test_remote_code_is_trusted_by_those_who_say_so_everywhere(monkeypatch):
    """Configuration, tokenizer and weights: each is asked with the setting."""
    asked = []

    def watch(owner):
        load = owner.from_pretrained.__func__

        def watched(cls, *args, **kwargs):
            asked.append((owner.__name__, kwargs.get("trust_remote_code")))
            return load(cls, *args, **kwargs)

        monkeypatch.setattr(owner, "from_pretrained", classmethod(watched))

    for owner in (transformers.AutoConfig, transformers.AutoTokenizer, transformers.AutoModelForCausalLM):
        watch(owner)
    loading.load_model("mathformer/pretrained")
    assert {value for _, value in asked} == {False}, "where nothing is said"
    for trusted in (True, False):
        asked.clear()
        loading.load_model("mathformer/pretrained", trust_remote_code=trusted)
        assert {name for name, _ in asked} == {"AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"}
        assert {value for _, value in asked} == {trusted}
