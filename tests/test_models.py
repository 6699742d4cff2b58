"""Whole runs on folders that look like models of the Hub: other architectures, other tokenizers."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import byte_tokenizer, row_logps
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

import grpo
from harness import loading
from harness.batching import policy_inputs
from harness.prompts import Problem, encode_prompt

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(max_position_embeddings=1024, initializer_range=0.1)
FAMILIES = {
    "qwen2.5": lambda **s: transformers.Qwen2Config(**s, tie_word_embeddings=True),
    "qwen3": lambda **s: transformers.Qwen3Config(**s, head_dim=16, tie_word_embeddings=False),
    "llama": lambda **s: transformers.LlamaConfig(**s, tie_word_embeddings=False),
    "smollm2": lambda **s: transformers.LlamaConfig(**s, tie_word_embeddings=True, rope_theta=100000.0),
}


def save_model(folder: Path, family: str, tokenizer) -> str:
    """Random weights; the table of embeddings is larger than the vocabulary, as that of Qwen2.5 is."""
    torch.manual_seed(0)
    config = FAMILIES[family](**SIZES, vocab_size=len(tokenizer) + 6, eos_token_id=tokenizer.eos_token_id)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(model: str, runs, template: str = "plain", **settings) -> Path:
    args = dict(dataset="synthetic", eval_size=2, prompt_template=template)
    defaults = dict(prompts_per_step=2, group_size=4, max_completion_tokens=24, steps=2, eval_samples=2, lr=1e-2)
    config = grpo.Config(model=model, task="countdown", task_args=args, runs=str(runs), **defaults | settings)
    return grpo.train(config)["run"]


@pytest.fixture
def pays_odd_lengths(monkeypatch):
    """A random model solves no puzzle: pay for something that it does now and then."""
    judge_all = grpo.judge_all

    def pay(task, rollouts, problems):
        judgements = judge_all(task, rollouts, problems)
        return [parts | {"reward": float(len(r.text) % 2)} for parts, r in zip(judgements, rollouts, strict=True)]

    monkeypatch.setattr(grpo, "judge_all", pay)


@pytest.mark.parametrize("template", ["plain", "r1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_on_each_family(family, template, tmp_path, pays_odd_lengths):
    folder = save_model(tmp_path / "model", family, byte_tokenizer())
    done = run(folder, tmp_path / "runs", template)
    metrics = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2 and max(row["sampler_logp_gap"] for row in metrics) < 1e-5
    before, after = load_file(f"{folder}/model.safetensors"), load_file(done / "final" / "model.safetensors")
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(done / "final")
    assert transformers.AutoTokenizer.from_pretrained(done / "final").decode([5]) == byte_tokenizer().decode([5])
    assert loaded.config.tie_word_embeddings == (family in ("qwen2.5", "smollm2"))


@pytest.mark.floats
@pytest.mark.parametrize("pad", [None, "<eos>", "<pad>"])
def test_the_end_of_sequence_token_is_trained_whatever_the_padding_token_is(pad, tmp_path, pays_odd_lengths):
    """With no padding token, or with one that is the end-of-sequence token, the run is the same, to the last bit."""
    tokenizer = byte_tokenizer()
    folder = save_model(tmp_path / "reference", "qwen2.5", tokenizer)
    tokenizer.pad_token = pad
    other = save_model(tmp_path / "other", "qwen2.5", tokenizer)
    assert transformers.AutoTokenizer.from_pretrained(other).pad_token == pad
    settings = dict(prompts_per_step=8, group_size=8)
    runs = [run(name, tmp_path / "runs", **settings) for name in (folder, other)]
    finals = [load_file(r / "final" / "model.safetensors") for r in runs]
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])
    rollouts = [json.loads(line) for line in (runs[1] / "rollouts.jsonl").read_text().splitlines()]
    ended = [r for r in rollouts if not r["truncated"]]
    assert ended and all(r["length"] <= 24 for r in ended)


def test_a_model_without_a_chat_template_takes_plain_prompts_only(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    folder = save_model(tmp_path / "base", "qwen2.5", tokenizer)
    assert (run(folder, tmp_path / "runs", "plain", steps=1) / "final").is_dir()
    with pytest.raises(grpo.UsageError, match="no chat template: take a chat .instruct. model, or let prompt"):
        run(folder, tmp_path / "runs", "r1")


def test_an_unknown_end_of_sequence_token_is_refused(tmp_path):
    tokenizer = byte_tokenizer()
    folder = Path(save_model(tmp_path / "model", "qwen2.5", tokenizer))
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({k: v for k, v in settings.items() if not k.startswith("eos_token")}))
    # transformers makes one up, behind the tokens that the model was given
    assert transformers.AutoTokenizer.from_pretrained(folder).eos_token_id == len(tokenizer)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][: len(tokenizer)].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | {"vocab_size": len(tokenizer)}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(grpo.UsageError, match="names an end-of-sequence token that the model has"):
        run(str(folder), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("prompt", ["plain text", [{"role": "user", "content": "hello"}]])
def test_special_tokens_are_added_once(prompt):
    """A chat template writes its own; plain text gets those that the tokenizer adds to any text."""

    class Asks:
        def prompt(self, example):
            return prompt

    tokenizer = byte_tokenizer()
    start = tokenizer.convert_tokens_to_ids("<pad>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<pad> $A", special_tokens=[("<pad>", start)])
    tokenizer.chat_template = "<pad>" + tokenizer.chat_template
    text, ids, _ = encode_prompt(tokenizer, Asks(), {})
    assert ids[0] == start and ids.count(start) == 1
    assert tokenizer.decode(ids[1:]) == text.removeprefix("<pad>") == (prompt if isinstance(prompt, str) else text[5:])
    # nor does a prefix of the answer get any
    given = []

    class Sampler:
        def generate(self, prompts, *args):
            given.extend(prompts)
            return []

    grpo.complete(Sampler(), tokenizer, Asks(), [Problem({}, text, ids)], 1, grpo.Sampling(1), 0, "so")
    assert given == [ids + tokenizer("so", add_special_tokens=False)["input_ids"]] and given[0].count(start) == 1


def test_an_output_head_with_a_bias_is_used_whole():
    torch.manual_seed(0)
    config = transformers.PhiConfig(**SIZES | dict(num_key_value_heads=4), vocab_size=40, eos_token_id=2)
    model = transformers.PhiForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.bias.normal_()
    rollouts = grpo.TorchSampler(model, [2]).generate([[5, 6, 7], [8]], 4, grpo.Sampling(6), seed=0)
    logps, _ = grpo.Policy(model)(**policy_inputs(rollouts, "cpu"))
    for i, r in enumerate(rollouts):
        assert torch.allclose(torch.tensor(r.logps).double(), row_logps(model, r), atol=1e-4)
        assert torch.allclose(logps[i, : r.length].double(), row_logps(model, r), atol=1e-4)


def test_end_tokens_that_the_model_does_not_have_are_left_out(tmp_path):
    model, tokenizer = loading.load_model(save_model(tmp_path, "qwen2.5", byte_tokenizer()))
    n = model.get_input_embeddings().num_embeddings
    assert n > len(tokenizer)  # the rest is padding, which no token of the tokenizer has
    model.generation_config.eos_token_id, model.config.eos_token_id = [7, len(tokenizer), n - 1, n], 3
    assert loading.find_eos(model, tokenizer) == [tokenizer.eos_token_id, 3, 7]
