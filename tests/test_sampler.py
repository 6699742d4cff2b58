"""TorchSampler: it samples from the distribution that is trained, and says so with its log-probs."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import SHAPE, other_model, row_logps
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer
from transformers.integrations import sdpa_attention

import grpo
from harness import kv_cache, loading
from harness.batching import policy_inputs
from variants import draw, keep_top

pytestmark = pytest.mark.floats

EOS = 2
PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]


def sample(model, group_size=8, max_tokens=20, seed=0, sample_rows=256, **settings) -> list[grpo.Rollout]:
    sampling = grpo.Sampling(max_tokens, **settings)
    return grpo.TorchSampler(model, [EOS], sample_rows).generate(PROMPTS, group_size, sampling, seed)


@pytest.mark.parametrize("name", ["mathformer", "qwen2", "llama", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_and_trainer_agree_on_ragged_rows(model, name, temperature):
    model = model if name == "mathformer" else other_model(name)
    rollouts = sample(model, temperature=temperature, group_size=16)
    assert len({r.length for r in rollouts}) > 3, "the rows must be ragged for this test to mean anything"
    logps, _ = grpo.Policy(model, temperature)(**policy_inputs(rollouts, torch.device("cpu")))
    for i, r in enumerate(rollouts):
        assert torch.allclose(torch.tensor(r.logps), logps[i, : r.length], atol=1e-4)
        assert torch.allclose(torch.tensor(r.logps).double(), row_logps(model, r, temperature), atol=1e-4)


@pytest.mark.parametrize("name", ["mathformer", "qwen2"])
def test_a_long_completion_outgrows_the_cache_more_than_once(model, name, monkeypatch):
    model = model if name == "mathformer" else other_model(name)
    rooms, update = set(), kv_cache.GrowingLayer.update

    def watched(self, *args, **kwargs):
        result = update(self, *args, **kwargs)
        rooms.add(self.room["keys"].shape[2])
        return result

    monkeypatch.setattr(kv_cache.GrowingLayer, "update", watched)
    rollouts = sample(model, max_tokens=90, group_size=16)
    assert len(rooms) >= 2 and len({r.length for r in rollouts}) > 6
    for r in rollouts:
        assert torch.allclose(torch.tensor(r.logps).double(), row_logps(model, r), atol=1e-4)


def test_growing_layer_equals_the_layer_it_replaces():
    generator = torch.Generator().manual_seed(0)
    plain = DynamicLayer()
    plain.update(*torch.randn(2, 6, 2, 5, 4, generator=generator))
    growing = kv_cache.GrowingLayer(plain)
    for indices in ([0, 1, 2, 3, 4, 5], [0, 5, 2, 3], [3, 1], [0]):
        for layer in (plain, growing):
            layer.batch_select_indices(torch.tensor(indices))
        for _ in range(30):
            states = torch.randn(2, len(indices), 2, 1, 4, generator=generator)
            for ours, theirs in zip(growing.update(*states), plain.update(*states), strict=True):
                assert torch.equal(ours, theirs)
        assert growing.get_seq_length() == plain.get_seq_length()


@pytest.mark.parametrize("mask", [None, "seen", "added", "for each head"])
@pytest.mark.parametrize("tokens, heads, scaling", [(1, 6, None), (1, 6, 0.7), (1, 2, None), (5, 6, 0.7)])
def test_attention_to_shared_keys_is_the_librarys(tokens, heads, scaling, mask):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, heads, tokens, 8), torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8)
    masks = {"seen": torch.rand(3, 1, tokens, 9) < 0.7, "added": torch.randn(3, 1, tokens, 9)}
    masks |= {"for each head": torch.randn(3, heads, tokens, 9)}
    module = SimpleNamespace(num_key_value_groups=heads // 2, is_causal=True)
    inputs = module, query, key, value, masks.get(mask)
    ours, theirs = (f(*inputs, scaling=scaling)[0] for f in (kv_cache.attention, sdpa_attention.sdpa_attention_forward))
    assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-6)


def test_shared_keys_are_repeated_for_the_prompts_only(tmp_path, monkeypatch):
    repeated, repeat = [], sdpa_attention.repeat_kv
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda *args: repeated.append(1) or repeat(*args))
    model = other_model("qwen2")
    sample(model)
    assert len(repeated) == 2 * SHAPE["num_hidden_layers"], "keys and values of each layer, once"
    model.save_pretrained(tmp_path)
    assert "sdpa" not in (tmp_path / "config.json").read_text(), "others do not know it"


def test_groups_are_contiguous_and_end_where_they_should(model):
    rollouts = sample(model)
    assert [r.prompt_ids for r in rollouts] == [p for p in PROMPTS for _ in range(8)]
    for r in rollouts:
        assert EOS not in r.completion_ids[:-1]
        assert r.truncated == (r.completion_ids[-1] != EOS)
        assert len(r.logps) == r.length <= 20 and (r.length == 20 or not r.truncated)
    assert {r.truncated for r in rollouts} == {True, False}


def test_several_eos_tokens_all_end_a_row(model):
    rollouts = grpo.TorchSampler(model, [EOS, 7]).generate(PROMPTS, 8, grpo.Sampling(20), seed=0)
    assert {r.completion_ids[-1] for r in rollouts if not r.truncated} == {EOS, 7}
    assert not any({EOS, 7} & set(r.completion_ids[:-1]) for r in rollouts)


def test_sampled_frequencies_are_the_models_probabilities(model):
    rollouts = sample(model, group_size=4000, max_tokens=1, sample_rows=5000, temperature=0.8)[:4000]
    counts = torch.bincount(torch.tensor([r.completion_ids[0] for r in rollouts]), minlength=33) / 4000
    probs = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.8).softmax(-1)
    assert (counts - probs).abs().max() < 0.03
    assert len(counts.nonzero()) > 5


def test_seed_decides_and_other_randomness_does_not(model):
    first = sample(model, seed=1)
    torch.manual_seed(123)
    assert [r.completion_ids for r in sample(model, seed=1)] == [r.completion_ids for r in first]
    assert [r.completion_ids for r in sample(model, seed=2)] != [r.completion_ids for r in first]
    state = torch.get_rng_state()
    sample(model)
    assert torch.equal(state, torch.get_rng_state())


def test_members_of_a_group_differ(model):
    rollouts = sample(model)
    assert len({tuple(r.completion_ids) for r in rollouts[:8]}) > 4


def test_greedy_is_the_argmax_of_the_whole_sequence(model):
    for r in sample(model, group_size=1, temperature=0.0):
        ids = torch.tensor([r.prompt_ids + r.completion_ids])
        best = model(ids).logits[0, len(r.prompt_ids) - 1 : -1].argmax(-1)
        assert best.tolist() == r.completion_ids
        assert torch.allclose(torch.tensor(r.logps).double(), row_logps(model, r), atol=1e-4)


def test_greedy_equals_generate_of_transformers(model):
    expected = model.generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=20, do_sample=False, eos_token_id=EOS, pad_token_id=0
    )[0, len(PROMPTS[0]) :].tolist()
    assert sample(model, group_size=1, temperature=0.0)[0].completion_ids == expected


def test_number_of_rows_at_once_does_not_change_greedy_answers(model):
    together = sample(model, group_size=1, temperature=0.0)
    alone = sample(model, group_size=1, temperature=0.0, sample_rows=1)
    assert [r.completion_ids for r in together] == [r.completion_ids for r in alone]


def test_finished_rows_leave_the_batch(model, monkeypatch):
    sizes = []
    original = grpo.TorchSampler._forward
    monkeypatch.setattr(
        grpo.TorchSampler, "_forward", lambda self, ids, *rest: (sizes.append(ids.shape), original(self, ids, *rest))[1]
    )
    rollouts = sample(model)
    assert sizes[0] == (3, 6), "one prefill for each prompt, not for each completion"
    alive = [sum(r.length > t for r in rollouts) for t in range(1, 20)]
    assert [size[0] for size in sizes[1:]] == [n for n in alive if n]


def test_top_k_and_top_p_by_hand():
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()
    kept = lambda *settings: keep_top(logits, *settings).isfinite()[0].tolist()  # noqa: E731
    assert kept(0, 1.0) == [True] * 5
    assert kept(2, 1.0) == [True, True, False, False, False]
    assert kept(99, 1.0) == [True] * 5
    assert kept(0, 0.6) == [True, True, False, False, False]
    assert kept(0, 0.8) == [True, True, True, False, False]
    assert kept(0, 0.01) == [True, False, False, False, False]
    assert kept(1, 0.99) == [True, False, False, False, False]


def test_temperature_comes_first_then_top_k_then_top_p(model, monkeypatch):
    """As in vLLM. Of probabilities .4 .3 .2 .1, temperature 0.5 makes .53 .3 .13 .03, then top_k 3 makes .55 .31 .14,
    of which top_p .54 keeps the first. In any other order two would be left."""
    sampler = grpo.TorchSampler(model, [EOS])
    logits = torch.full((1, 33), -torch.inf)
    logits[0, 5:9] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    forward = grpo.TorchSampler._forward
    monkeypatch.setattr(
        grpo.TorchSampler, "_forward", lambda *args: (logits.expand(len(args[1]), -1), forward(*args)[1])
    )
    settings = dict(temperature=0.5, top_k=3, top_p=0.54)
    rollouts = sampler.generate([[1, 3]], 64, grpo.Sampling(2, **settings), seed=0)
    assert {(*r.completion_ids, *r.logps) for r in rollouts} == {(5, 5, 0.0, 0.0)}
    loose = sampler.generate([[1, 3]], 64, grpo.Sampling(1, **settings | dict(top_p=0.56)), seed=0)
    assert {r.completion_ids[0] for r in loose} == {5, 6}
    expected = {5: math.log(0.16 / 0.25), 6: math.log(0.09 / 0.25)}  # what is left, made a distribution again
    assert all(r.logps[0] == pytest.approx(expected[r.completion_ids[0]], abs=1e-5) for r in loose)


def test_top_k_is_applied_in_sampling_and_in_its_logps(model):
    for r in sample(model, top_k=1, temperature=1.0):
        assert r.logps == [0.0] * r.length  # one token of probability 1
    assert [r.completion_ids for r in sample(model, top_k=1)][::8] == [
        r.completion_ids for r in sample(model, group_size=1, temperature=0.0)
    ]


def test_dropout_is_off_while_sampling_and_training():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_dropout=0.5))
    model.train()
    rollouts = sample(model)  # sampling switches the model to evaluation mode
    logps, _ = grpo.Policy(model)(**policy_inputs(rollouts, torch.device("cpu")))
    for i, r in enumerate(rollouts):
        assert torch.allclose(torch.tensor(r.logps), logps[i, : r.length], atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_loaded_models_have_no_dropout_and_float32_weights(tmp_path, tokenizer, kind):
    dropout = dict(hidden_dropout=0.5, attention_dropout=0.5)
    if kind == "llama":
        saved = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_dropout=0.5))
    else:
        saved = BloomForCausalLM(BloomConfig(vocab_size=33, hidden_size=32, n_layer=2, n_head=4, **dropout))
    saved.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = loading.load_model(str(tmp_path))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.train()
    ids = torch.tensor([PROMPTS[0]])
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("below_1, token", [(0.0, 3), (0.49, 3), (0.51, 1), (0.8, 1), (1 - 2**-53, 1)])
@pytest.mark.parametrize("times", [1.0, 1 + 1e-6, 1 - 1e-6])
def test_a_draw_is_the_first_token_whose_sum_reaches_the_level(times, below_1, token, monkeypatch):
    """Rounding may leave probabilities that do not sum to 1; tokens of probability 0 are never drawn."""
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, **where: torch.full(shape, below_1, dtype=dtype))
    probs = times * torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0], [0.5, 0.0, 0.0, 0.0, 0.5]])
    assert draw(probs, None).tolist() == [[token], [0 if token == 1 else 4]]


def test_draws_have_the_probabilities_that_they_should():
    generator, n = torch.Generator().manual_seed(0), 200_000
    probs = torch.tensor([1e-4, 0.3, 0.0, 0.6, 0.0999])
    counts = draw(probs.expand(n, -1), generator)[:, 0].bincount(minlength=5)
    expected = n * probs
    assert counts[2] == 0
    assert ((counts - expected).abs() <= 4 * (expected * (1 - probs)).sqrt()).all()


def test_what_has_diverged_is_not_drawn_from():
    with pytest.raises(grpo.UsageError, match="logits are not numbers"):
        draw(torch.tensor([[0.5, 0.5], [math.nan, 0.5]]), torch.Generator())
