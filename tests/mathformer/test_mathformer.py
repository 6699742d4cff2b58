"""The small model: against BLOOM, its mixture of experts, its tokenizer."""

import math

import pytest
import torch
import transformers
from conftest import row_logps

import grpo
from harness import loading
from mathformer import MathformerConfig, MathformerForCausalLM
from mathformer.model import MixtureOfExperts, alibi_slopes, load_balancing_loss
from mathformer.tokenizer import VOCABULARY
from mathformer.train import build_model

pytestmark = pytest.mark.floats

# The model


@pytest.fixture
def bloom(model):
    """transformers' BLOOM, also with ALiBi, of the same shape and with the same weights."""
    c = model.config
    config = transformers.BloomConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, n_layer=c.num_hidden_layers, n_head=c.num_attention_heads
    )
    other = transformers.BloomForCausalLM(config).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_logits_equal_those_of_bloom(model, bloom):
    ids = torch.randint(3, 33, (4, 20), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model(ids).logits, bloom(ids).logits, atol=1e-5)


def test_logits_equal_those_of_bloom_left_padded(model, bloom):
    ids = torch.randint(3, 33, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, :2] = 0, 0
    ours, theirs = model(ids, attention_mask=mask).logits, bloom(ids, attention_mask=mask).logits
    assert torch.allclose(ours[mask.bool()], theirs[mask.bool()], atol=1e-5)
    alone = model(ids[:1, 7:]).logits
    assert torch.allclose(ours[:1, 7:], alone, atol=1e-5)


def test_left_padding_in_bf16_gives_no_nan(model):
    ids = torch.randint(3, 33, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(ids, attention_mask=mask).logits.isfinite().all()
        assert (model.transformer.attention_bias(0, 12, mask, torch.zeros(1)).bfloat16() > -math.inf).all()


def test_cache_changes_nothing(model, bloom):
    ids = torch.randint(3, 33, (2, 10), generator=torch.Generator().manual_seed(0))
    out = model(ids[:, :6], use_cache=True)
    rest = model(ids[:, 6:9], past_key_values=out.past_key_values, use_cache=True)
    last = model(ids[:, 9:], past_key_values=rest.past_key_values, use_cache=True)
    expected = bloom(ids).logits
    assert torch.allclose(torch.cat([out.logits, rest.logits, last.logits], 1), expected, atol=1e-5)


def test_attention_is_causal(model):
    ids = torch.randint(3, 33, (1, 10), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 6:] = 5
    assert torch.equal(model(ids).logits[:, :6], model(changed).logits[:, :6])
    assert not torch.equal(model(ids).logits[:, 6:], model(changed).logits[:, 6:])


def test_gradients_equal_those_of_bloom(model, bloom):
    ids = torch.randint(3, 33, (4, 12), generator=torch.Generator().manual_seed(0))
    model(ids, labels=ids).loss.backward()
    bloom(ids, labels=ids).loss.backward()
    theirs = dict(bloom.named_parameters())
    assert all(torch.allclose(p.grad, theirs[name].grad, atol=1e-5) for name, p in model.named_parameters())


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 7, 8, 12, 15])
def test_slopes_equal_those_of_bloom_for_any_number_of_heads(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    alibi = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)
    assert torch.allclose(alibi_slopes(heads), alibi[:, 0, 1])


def test_saved_and_loaded_by_the_auto_classes(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer("<sos><big>3+4", return_tensors="pt")["input_ids"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, MathformerForCausalLM)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.lm_head.weight is loaded.transformer.word_embeddings.weight
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("3+4")["input_ids"] == tokenizer("3+4")["input_ids"]


def test_generate_of_transformers_works_left_padded(model, tokenizer):
    batch = tokenizer(["<sos><big>3+4*(5-6)", "<sos><big>3+4"], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    together = model.generate(**batch, max_new_tokens=8, do_sample=False)[1, -8:]
    alone = model.generate(batch["input_ids"][1:, -5:], max_new_tokens=8, do_sample=False)[0, -8:]
    assert torch.equal(together, alone)


def test_width_must_be_a_multiple_of_the_heads():
    with pytest.raises(ValueError, match="hidden_size 30 is not a multiple of num_attention_heads 4"):
        MathformerConfig(hidden_size=30, num_attention_heads=4)


# Dropout


def test_dropout_acts_in_training_only(tokenizer):
    torch.manual_seed(0)
    model = build_model("tiny", tokenizer, dropout=0.5)
    ids = torch.randint(3, 33, (2, 10), generator=torch.Generator().manual_seed(0))
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    a, b = (grpo.TorchSampler(model, [2]).generate(ids.tolist(), 4, grpo.Sampling(8), seed=0) for _ in range(2))
    assert [r.logps for r in a] == [r.logps for r in b]  # the sampler turns it off
    assert build_model("tiny", tokenizer).config.hidden_dropout == 0
    with pytest.raises(ValueError, match="hidden_dropout is 1.0"):
        build_model("tiny", tokenizer, dropout=1.0)


def test_reinforcement_learning_takes_dropout_out(tokenizer, tmp_path):
    build_model("tiny", tokenizer, dropout=0.5).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = loading.load_model(str(tmp_path))
    model.train()
    ids = torch.randint(3, 33, (2, 10))
    assert torch.equal(model(ids).logits, model(ids).logits)


# The mixture of experts


@pytest.fixture
def mixture():
    torch.manual_seed(0)
    config = MathformerConfig(hidden_size=16, num_attention_heads=4, num_experts=4, active_experts=2)
    layer = MixtureOfExperts(config)
    with torch.no_grad():
        layer.router.weight.mul_(5)
    return layer


def test_mixture_equals_a_loop_over_tokens(mixture):
    x = torch.randn(3, 7, 16)
    out, router_logits = mixture(x)
    for token, got, logits in zip(x.flatten(0, 1), out.flatten(0, 1), router_logits, strict=True):
        probs = torch.softmax(mixture.router.weight @ token, 0)
        assert torch.allclose(logits.softmax(0), probs, atol=1e-6)
        best = sorted(range(4), key=lambda e: -probs[e])[:2]
        expected = sum(probs[e] * mixture.experts[e](token) for e in best)
        assert torch.allclose(got, expected, atol=1e-5)


def test_no_token_is_dropped_however_uneven_the_load(mixture):
    with torch.no_grad():
        mixture.router.weight[1] = mixture.router.weight[0] = 3.0  # every token with a positive sum goes to 0 and 1
    crowd = torch.rand(1, 500, 16)
    alone = mixture(crowd[:, 250:251])[0]
    together, router_logits = mixture(crowd)
    assert set(router_logits.topk(2).indices.flatten().tolist()) == {0, 1}
    assert alone.abs().min() > 0
    assert torch.allclose(together[:, 250:251], alone, atol=1e-6)


def test_the_router_and_the_chosen_experts_get_gradients_also_with_one_active():
    torch.manual_seed(0)
    layer = MixtureOfExperts(MathformerConfig(hidden_size=16, num_attention_heads=4, num_experts=3, active_experts=1))
    out, router_logits = layer(torch.randn(1, 40, 16))
    out.square().sum().backward()
    chosen = set(router_logits.argmax(1).tolist())
    assert layer.router.weight.grad.abs().max() > 0
    for e, expert in enumerate(layer.experts):
        assert (expert.dense_h_to_4h.weight.grad.abs().max() > 0) == (e in chosen)


def test_load_balancing_loss_by_hand():
    even = torch.eye(4).repeat(3, 1) * 50  # each expert gets three tokens of twelve, each for certain
    crowded = torch.tensor([[50.0, 0, 0, 0]]).repeat(12, 1)
    real = torch.ones(12, dtype=torch.bool)
    assert load_balancing_loss((even,), real, 1).item() == pytest.approx(1)
    assert load_balancing_loss((crowded,), real, 1).item() == pytest.approx(4)
    assert load_balancing_loss((even, crowded), real, 1).item() == pytest.approx(2.5)
    # two tokens, two of three experts each: shares (1/2, 1/4, 1/4), mean probabilities (.5, .3, .2)
    logits = torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.3, 0.3 + 1e-6]]).log()
    expected = 3 * (0.5 * 0.5 + 0.25 * 0.3 + 0.25 * 0.2)
    assert load_balancing_loss((logits,), torch.tensor([True, True]), 2).item() == pytest.approx(expected, abs=1e-4)


def test_load_balancing_loss_does_not_see_padding():
    logits = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    real = torch.arange(10) < 6
    assert load_balancing_loss((logits,), real, 2) == load_balancing_loss((logits[:6],), real[:6], 2)


def test_a_mixture_is_saved_loaded_and_sampled_like_any_model(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = build_model("tiny", tokenizer, num_experts=4, active_experts=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = loading.load_model(str(tmp_path))
    ids = torch.randint(3, 33, (2, 10), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded(ids).router_logits is None
    assert [tuple(logits.shape) for logits in loaded(ids, output_router_logits=True).router_logits] == [(20, 4)] * 3
    for r in grpo.TorchSampler(loaded, [2]).generate([[5, 6, 7], [8]], 8, grpo.Sampling(20), seed=0):
        assert torch.allclose(torch.tensor(r.logps).double(), row_logps(model, r), atol=1e-4)


def test_more_active_experts_than_experts_are_refused():
    with pytest.raises(ValueError, match="active_experts is 5, it must be from 1 to num_experts, 4"):
        MathformerConfig(num_experts=4, active_experts=5)
    with pytest.raises(ValueError, match="active_experts is 0"):
        MathformerConfig(num_experts=4, active_experts=0)


# The tokenizer


def test_every_symbol_is_one_token_and_comes_back(tokenizer):
    text = "<sos><big>max(3,-12) %abs 4/next prev 5min<scratchpad>1*2=2;<little><answer>+<eos><pad>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([i]) for i in ids[:6]] == ["<sos>", "<big>", "max", "(", "3", ","]
    assert len(tokenizer) == len(VOCABULARY) == len(set(VOCABULARY))
    assert set(range(len(VOCABULARY))) == set(tokenizer("".join(VOCABULARY))["input_ids"])


def test_decoding_a_completion_keeps_tags_and_drops_the_end(tokenizer):
    ids = tokenizer("<scratchpad>1+2=3<answer>3<eos>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<scratchpad>1+2=3<answer>3"


def test_a_character_outside_the_vocabulary_is_refused(tokenizer):
    with pytest.raises(Exception, match="(?i)unk"):
        tokenizer("3 x 4")
