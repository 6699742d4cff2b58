"""The small-model track: model against BLOOM, tokenizer, expressions, task, pretraining."""

import math
import random

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from mathformer import ArithmeticTask, MathformerConfig, MathformerForCausalLM
from mathformer import expressions as ex
from mathformer.model import alibi_slopes
from mathformer.task import prompt_text, solution_text
from mathformer.tokenizer import VOCABULARY
from mathformer.train import PretrainConfig, build_model, pretrain

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


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12])
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


# Expressions

numbers = st.integers(-99, 99)
trees = st.recursive(
    numbers, lambda t: st.builds(ex.Operation, st.sampled_from(list(ex.OPERATORS)), t, t), max_leaves=12
)


@given(trees)
@settings(deadline=None)
def test_parse_inverts_render(tree):
    assert ex.parse(ex.render(tree)) == tree


@given(trees)
@settings(deadline=None)
def test_value_equals_pythons(tree):
    assert ex.evaluate(tree) == eval(ex.render(tree))  # noqa: S307 - our own text, in a test


@given(trees)
@settings(deadline=None)
def test_steps_are_true_and_reach_the_result(tree):
    steps = ex.steps(tree)
    for step in steps:
        left, right = step.split("=")
        assert ex.evaluate(ex.parse(left)) == int(right)
    if steps:
        assert int(steps[-1].split("=")[1]) == ex.evaluate(tree)


def test_steps_by_hand():
    assert ex.steps(ex.parse("7-(4+8)*3")) == ["4+8=12", "12*3=36", "7-36=-29"]
    assert ex.steps(ex.parse("1-2-3")) == ["1-2=-1", "-1-3=-4"]
    assert ex.render(ex.parse("((1)-((2-3)))*(4)")) == "(1-(2-3))*4"


@pytest.mark.parametrize(
    "text, said",
    [
        ("", r"a number or \( was expected at symbol 1"),
        ("3+", "expected at symbol 3"),
        ("(3", r"a \) was expected"),
        ("3)", r"unexpected '\)' at symbol 2"),
        ("3 4", "unexpected '4'"),
        ("-(3)", "a number"),
        ("3^4", r"unexpected '\^'"),
        ("٣+1", "a number"),
        ("(" * 400 + "1", "nested"),
        ("1" * 2000, "2000 characters"),
    ],
)
def test_what_does_not_parse_is_named(text, said):
    with pytest.raises(ValueError, match=said):
        ex.parse(text)


def test_generated_problems_keep_to_their_limits():
    rng = random.Random(0)
    found = [ex.generate(rng, 2, 3, "+-", 150) for _ in range(2000)]
    assert {ex.depth(tree) for tree in found} == {1, 2, 3}
    assert max(map(ex.largest_value, found)) <= 150
    text = "".join(map(ex.render, found))
    assert "*" not in text and {"+", "-"} <= set(text)
    assert [ex.generate(random.Random(5), 1, 3) for _ in range(3)] == [ex.generate(random.Random(5), 1, 3)] * 3


# The task


def test_evaluation_problems_are_in_no_training():
    task = ArithmeticTask()
    evaluation = {example["expression"] for example in task.eval()}
    assert len(evaluation) == len(task.eval()) == 500
    rng = random.Random(0)
    training = {task.train(rng, 0)["expression"] for _ in range(20_000)}
    assert not evaluation & training
    assert task.eval() == ArithmeticTask().eval()


def test_small_settings_give_fewer_evaluation_problems():
    assert 1 < len(ArithmeticTask(max_depth=1).eval()) < 40


def test_the_verifier_accepts_what_pretraining_teaches():
    task = ArithmeticTask()
    rng = random.Random(0)
    for _ in range(200):
        tree = task.draw(rng, for_eval=False)
        for worked in (True, False):
            parts = task.reward(solution_text(tree, worked), task.example(tree))
            assert parts["reward"] == parts["correct"] == parts["format"] == 1 and parts["worked"] == worked
            assert parts["prediction"] == parts["ground_truth"]


@pytest.mark.parametrize(
    "text, correct, format, worked",
    [
        ("<answer>35", 1, 1, 0),
        ("<answer>-35", 0, 1, 0),
        ("<answer>36", 0, 1, 0),
        ("<answer>035", 1, 1, 0),
        ("<answer>35<answer>35", 0, 0, 0),
        ("<answer>35+0", 0, 0, 0),
        ("<answer>", 0, 0, 0),
        ("35", 0, 0, 0),
        ("", 0, 0, 0),
        ("<scratchpad>3+4=7;7*5=35<answer>35", 1, 1, 1),
        ("<scratchpad>3+4=8;8*5=41<answer>35", 1, 1, 0),  # steps that are all false are no work
        ("<scratchpad><answer>35", 1, 1, 0),
        ("<scratchpad>3+4=7;7*5=35", 0, 0, 0),
        ("<scratchpad>3+4=7=<answer>36", 0, 1, 0),
        ("<scratchpad>35=35<answer>35", 1, 1, 0),
        ("<answer>" + "9" * 5000, 0, 0, 0),
        ("<scratchpad>" + "(" * 5000 + "<answer>1", 0, 1, 0),
    ],
)
def test_rewards_by_hand(text, correct, format, worked):
    task = ArithmeticTask()
    parts = task.reward(text, task.example(ex.parse("(3+4)*5")))
    assert (parts["reward"], parts["correct"], parts["format"], parts["worked"]) == (correct, correct, format, worked)


def test_prompt_of_a_problem():
    assert prompt_text(ex.parse("(3+4)*5")) == "<sos><big>(3+4)*5"


# Pretraining and the shipped checkpoint


def test_pretraining_learns_repeats_and_leaves_a_model(tmp_path):
    common = dict(modelsize="tiny", max_depth=1, steps=100, batch_size=32, final_share=0.25)
    for name in ("a", "b"):
        pretrain(PretrainConfig(output=str(tmp_path / name), log_csv=str(tmp_path / f"{name}.csv"), **common))
    a, b = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "ab")
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    losses = [line.split(",")[1] for line in (tmp_path / "a.csv").read_text().splitlines()[1:]]
    assert float(losses[-1]) < 2.7  # it starts at log(33) = 3.5
    with pytest.raises(ValueError, match="exists already"):
        PretrainConfig(output=str(tmp_path / "a"))


def test_sizes(tokenizer):
    counts = {size: sum(p.numel() for p in build_model(size, tokenizer).parameters()) for size in ("tiny", "small")}
    assert counts["tiny"] < 100_000 < counts["small"] < 250_000
    with pytest.raises(ValueError, match="'huge': choose one of tiny, small"):
        PretrainConfig(output="x", modelsize="huge")
