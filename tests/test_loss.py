"""Advantages, log-probs, loss and update, against cases worked by hand and plain double loops."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from conftest import expected_loss, is_close, largest_difference, other_model, row_logps, updated

import grpo
from harness import fast_head, memory
from harness.batching import microbatches, policy_inputs, row_tokens
from harness.optimizers import learning_rate
from variants import adapted_kl_coef

pytestmark = pytest.mark.floats

# Advantages


def test_grpo_advantages_by_hand():
    # rewards 1, 0, 0, 0: mean 1/4, std with G - 1 is sqrt((9/16 + 3/16) / 3) = 1/2
    got = grpo.group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64), eps=0.0)
    assert torch.allclose(got, torch.tensor([[1.5, -0.5, -0.5, -0.5]], dtype=torch.float64))


def test_nearly_equal_rewards_do_not_become_advantages():
    rewards = torch.tensor([[0.5, 0.5 + 1e-7, 0.5, 0.5]])
    assert grpo.group_advantages(rewards).abs().max() < 0.01


def test_groups_do_not_mix():
    alone = grpo.group_advantages(torch.tensor([[1.0, 0.0]]))
    beside = grpo.group_advantages(torch.tensor([[1.0, 0.0], [100.0, 7.0]]))
    assert torch.equal(alone[0], beside[0])


def test_advantages_refuse_what_makes_no_group():
    with pytest.raises(ValueError, match=r"\[3, 1\]"):
        grpo.group_advantages(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="'gpro'"):
        grpo.group_advantages(torch.zeros(3, 2), "gpro")


# Token weights


def test_token_weights_by_hand():
    lengths = torch.tensor([1, 3, 0])
    assert torch.allclose(grpo.token_weights(lengths, "token"), torch.tensor([1 / 4, 1 / 4, 0]))
    assert torch.allclose(grpo.token_weights(lengths, "sequence"), torch.tensor([1 / 3, 1 / 9, 0]))
    assert torch.allclose(grpo.token_weights(lengths, "constant", max_tokens=5), torch.tensor([1 / 15, 1 / 15, 0]))


def test_token_weights_take_the_totals_of_the_whole_step():
    part = grpo.token_weights(torch.tensor([2, 2]), "token", total_tokens=40)
    assert torch.allclose(part, torch.tensor([1 / 40, 1 / 40]))
    part = grpo.token_weights(torch.tensor([2, 4]), "sequence", total_rows=10)
    assert torch.allclose(part, torch.tensor([1 / 20, 1 / 40]))
    part = grpo.token_weights(torch.tensor([2, 4]), "constant", max_tokens=8, total_rows=10)
    assert torch.allclose(part, torch.tensor([1 / 80, 1 / 80]))


def test_token_weights_refuse_an_unknown_kind():
    with pytest.raises(ValueError, match="'mean'"):
        grpo.token_weights(torch.tensor([1]), "mean")


# The surrogate


@pytest.mark.parametrize(
    "advantage, ratio, loss, slope, clipped",
    [  # slope: d loss / d logp, which is -A*r where the token still has a gradient
        (1.0, 1.0, -1.0, -1.0, 0),
        (1.0, 1.5, -1.2, 0.0, 1),  # already likelier than the clip allows: no further push
        (1.0, 0.5, -0.5, -0.5, 0),  # too unlikely, and should be likelier: not clipped
        (-1.0, 1.0, 1.0, 1.0, 0),
        (-1.0, 0.5, 0.8, 0.0, -1),
        (-1.0, 1.5, 1.5, 1.5, 0),
    ],
)
def test_clip_value_and_gradient(advantage, ratio, loss, slope, clipped):
    logp = torch.tensor([[math.log(ratio) - 3.0]], dtype=torch.float64, requires_grad=True)
    got, what = grpo.policy_loss(logp, torch.tensor([[-3.0]]), torch.tensor([[advantage]]), 0.2, 0.2)
    got.sum().backward()
    assert is_close(got.item(), loss) and is_close(logp.grad.item(), slope) and what.item() == clipped


def test_a_completion_of_one_token_has_that_tokens_ratio():
    logps, old = torch.tensor([[-1.0, -2.0], [-1.0, 0.0]]), torch.tensor([[-1.1, -2.3], [-1.1, 0.0]])
    mask = torch.tensor([[True, True], [True, False]])
    loss, _ = grpo.policy_loss(logps, old, torch.ones(2, 1), 9.0, 9.0, mask, ratio="sequence")
    assert loss[0].tolist() == pytest.approx([-math.exp(0.2)] * 2) and loss[1].tolist() == pytest.approx(
        [-math.exp(0.1), 0]
    )


def test_clip_sides_are_separate():
    logp = torch.tensor([[math.log(1.25)]])
    assert grpo.policy_loss(logp, torch.zeros(1, 1), torch.ones(1, 1), 0.2, 0.28)[0].item() == pytest.approx(-1.25)
    assert grpo.policy_loss(logp, torch.zeros(1, 1), torch.ones(1, 1), 0.28, 0.2)[0].item() == pytest.approx(-1.2)


def test_policy_loss_is_zero_outside_the_mask():
    mask = torch.tensor([[True, False]])
    loss, clipped = grpo.policy_loss(torch.ones(1, 2), torch.zeros(1, 2), torch.ones(1, 1), mask=mask)
    assert loss[0, 1] == 0 and clipped.tolist() == [[1, 0]]


# KL


def test_kl_estimates_by_hand():
    logps, ref = torch.tensor([-1.0, -2.0], dtype=torch.float64), torch.tensor([-2.0, -1.0], dtype=torch.float64)
    assert grpo.kl_estimate(logps, ref, "k1").tolist() == [1.0, -1.0]
    assert grpo.kl_estimate(logps, ref, "k2").tolist() == [0.5, 0.5]
    expected = [math.exp(-1) - 1 + 1, math.exp(1) - 1 - 1]
    assert np.allclose(grpo.kl_estimate(logps, ref, "k3").numpy(), expected)
    with pytest.raises(ValueError, match="'k4'"):
        grpo.kl_estimate(logps, ref, "k4")


def test_k3_is_never_negative_in_float32():
    logps = torch.linspace(-20, 0, 10_001)
    noise = 1e-4 * torch.randn(10_001, generator=torch.Generator().manual_seed(0))
    assert grpo.kl_estimate(logps, logps + noise, "k3").min() >= 0


def enumerated():
    """Two distributions over 50 words: (logits that need a gradient, log-probs of the reference)."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(50, dtype=torch.float64, generator=generator, requires_grad=True)
    return logits, torch.randn(50, dtype=torch.float64, generator=generator).log_softmax(-1)


@pytest.mark.parametrize("kind, is_unbiased", [("k1", True), ("k2", False), ("k3", True)])
def test_kl_expectation(kind, is_unbiased):
    logits, ref = enumerated()
    logps = logits.log_softmax(-1)
    exact = (logps.exp() * (logps - ref)).sum().item()
    expectation = (logps.exp() * grpo.kl_estimate(logps, ref, kind)).sum().item()
    assert is_close(expectation, exact, 1e-9) == is_unbiased


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_gradient_in_the_loss_is_that_of_kl_policy_to_reference(kind):
    """The expectation over samples, by enumeration, of the gradient of what the loss holds for each sample."""
    logits, ref = enumerated()
    logps = logits.log_softmax(-1)
    exact = torch.autograd.grad((logps.exp() * (logps - ref)).sum(), logits)[0]
    logps = logits.log_softmax(-1)
    old = logps.detach()
    per_word = grpo.KL_FACTORS[kind]((logps - old).exp()) * grpo.kl_estimate(logps, ref, kind)
    got = torch.autograd.grad((old.exp() * per_word).sum(), logits)[0]
    assert torch.allclose(got, exact, atol=1e-12)


# Log-probs


def test_policy_equals_the_model_row_by_row(model, make_rollouts):
    rollouts = make_rollouts()
    inputs = policy_inputs(rollouts, torch.device("cpu"))
    logps, entropy = grpo.Policy(model, temperature=0.7)(**inputs)
    assert logps.dtype == torch.float32
    for i, r in enumerate(rollouts):
        assert torch.allclose(logps[i, : r.length].double(), row_logps(model, r, 0.7), atol=1e-5)
        assert (logps[i, r.length :] == 0).all() and (entropy[i, r.length :] == 0).all()


def test_entropy_by_hand(model, make_rollouts):
    r = make_rollouts()[0]
    _, entropy = grpo.Policy(model)(**policy_inputs([r], torch.device("cpu")))
    logits = model(torch.tensor([r.prompt_ids + r.completion_ids])).logits[0, len(r.prompt_ids) - 1 : -1].double()
    p = logits.softmax(-1)
    assert torch.allclose(entropy[0].double(), -(p * p.log()).sum(-1), atol=1e-5)


def test_padding_is_never_seen(model, make_rollouts):
    rollouts = make_rollouts()
    inputs = policy_inputs(rollouts, torch.device("cpu"))
    before = grpo.Policy(model)(**inputs)[0]
    for i, r in enumerate(rollouts):
        inputs["ids"][i, row_tokens(r) :] = 2  # end-of-sequence tokens, as where padding and EOS are the same
    assert torch.equal(before, grpo.Policy(model)(**inputs)[0])


def test_chunks_change_nothing(model, make_rollouts, monkeypatch):
    def gradients():
        model.zero_grad()
        logps, _ = grpo.Policy(model)(**policy_inputs(make_rollouts(), torch.device("cpu")))
        logps.sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    whole = gradients()
    monkeypatch.setattr(memory, "logits_chunk", lambda config: 7)
    assert largest_difference(gradients(), whole) < 1e-4


def test_logits_are_float32_inside_autocast(model):
    hidden = torch.randn(3, model.config.hidden_size)
    with torch.autocast("cpu", torch.bfloat16):
        logits = grpo.output_logits(model, hidden.bfloat16())
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, hidden.bfloat16().float() @ model.lm_head.weight.T, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(make_rollouts, make_config, accelerator):
    model = other_model("qwen2")
    plain = updated(model, make_rollouts(), make_config(), accelerator)
    model.gradient_checkpointing_enable()
    metrics, change = updated(model, make_rollouts(), make_config(), accelerator)
    assert largest_difference(change, plain[1]) < 1e-5 and is_close(metrics["loss"], plain[0]["loss"])


def test_completion_logps_is_the_plain_face(model, make_rollouts):
    inputs = policy_inputs(make_rollouts(), torch.device("cpu"))
    assert torch.equal(grpo.completion_logps(model, **inputs), grpo.Policy(model)(**inputs)[0])


# The update


@pytest.mark.parametrize("loss_weight", ["token", "sequence", "constant"])
@pytest.mark.parametrize("kl", [(0.0, "k3"), (0.3, "k1"), (0.3, "k2"), (0.3, "k3")])
def test_update_equals_a_double_loop(model, make_rollouts, make_config, accelerator, loss_weight, kl):
    config = make_config(loss_weight=loss_weight, kl_coef=kl[0], kl_kind=kl[1], temperature=0.8)
    rollouts = make_rollouts()
    metrics, change = updated(model, rollouts, config, accelerator)
    reference = copy.deepcopy(model)
    loss = expected_loss(reference, rollouts, config)
    loss.backward()
    assert is_close(metrics["loss"], loss.item(), 1e-5)
    assert largest_difference(change, {name: -p.grad for name, p in reference.named_parameters()}) < 1e-5
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in reference.parameters()))
    assert is_close(metrics["grad_norm"], norm, 1e-4)


@pytest.mark.parametrize("loss_weight", ["token", "sequence", "constant"])
def test_nothing_depends_on_budget_order_or_dead_groups(model, make_rollouts, make_config, accelerator, loss_weight):
    rollouts = make_rollouts()
    metrics, change = updated(model, rollouts, make_config(loss_weight=loss_weight), accelerator)
    shuffled = random.Random(0).sample(rollouts, len(rollouts))
    others = {
        "budget": (rollouts, make_config(loss_weight=loss_weight, tokens_per_microbatch=1)),
        "order": (shuffled, make_config(loss_weight=loss_weight, tokens_per_microbatch=50)),
        "dead": (rollouts, make_config(loss_weight=loss_weight, dead_groups="keep")),
    }
    for name, (rows, config) in others.items():
        other_metrics, other_change = updated(model, rows, config, accelerator)
        assert largest_difference(change, other_change) < 1e-6, name
        assert is_close(metrics["loss"], other_metrics["loss"]), name
        if name != "dead":  # the means below are over trained tokens, so they do change with the dead groups
            for key in ("entropy", "clipped_low", "clipped_high", "ratio_max", "sampler_kl", "sampler_logp_gap"):
                assert is_close(metrics[key], other_metrics[key], 1e-5), (name, key)


@pytest.mark.parametrize("plain", [False, True])
def test_prompt_and_padding_are_not_trained_and_eos_is(plain, model, make_config, accelerator, monkeypatch):
    """The output head gets the completion's tokens only, the last of them EOS."""
    eos = 2
    rollouts = [
        grpo.Rollout([5, 6, 7], [8, eos], [-3.0, -3.0], False, advantage=1.0),
        grpo.Rollout([5, 6], [9, 10, 11, 12], [-3.0] * 4, True, advantage=-1.0),
    ]
    seen = []
    policy = grpo.Policy(model, entropy_gradient=plain)
    inputs = policy_inputs(rollouts, torch.device("cpu"))
    for place, name in ((grpo, "output_logits"), (fast_head, "logits_of")):
        watched = getattr(place, name)
        watch = lambda a, b, *more, f=watched: seen.append(b if plain else a) or f(a, b, *more)  # noqa: E731
        monkeypatch.setattr(place, name, watch)
    logps, _ = policy(**inputs)
    assert [len(hidden) for hidden in seen] == [6]
    _, change = updated(model, rollouts, make_config(), accelerator)
    assert change["lm_head.weight" if "lm_head.weight" in change else "transformer.word_embeddings.weight"].any()
    # pushing up the advantage of the first row alone makes its EOS likelier
    _, change = updated(model, rollouts[:1], make_config(), accelerator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.01 * change[name])
    after = grpo.completion_logps(model, **inputs)
    assert after[0, 1] > logps[0, 1]


def test_loss_is_zero_on_policy_with_sequence_weights(model, make_rollouts, make_config, accelerator):
    rollouts = make_rollouts()
    for r in rollouts:
        r.logps = row_logps(model, r).tolist()
    metrics, change = updated(model, rollouts, make_config(loss_weight="sequence"), accelerator)
    assert abs(metrics["loss"]) < 1e-6
    assert metrics["grad_norm"] > 0.01 and metrics["sampler_logp_gap"] < 1e-5


def test_loss_of_token_weights_is_minus_the_covariance_of_advantage_and_length(
    model, make_config, accelerator, make_rollouts
):
    """Half right at 29 tokens, half wrong at 5: A = +-sqrt(7/8), so -sqrt(7/8) * (29 - 5) / (29 + 5) = -0.66."""
    rewards = torch.tensor([[1.0] * 4 + [0.0] * 4])
    advantages = grpo.group_advantages(rewards)[0].tolist()
    rollouts = []
    for advantage, reward in zip(advantages, rewards[0].tolist(), strict=True):
        ids = [4] * (29 if reward else 5)
        rollouts.append(grpo.Rollout([5, 6], ids, [0.0] * len(ids), False, advantage=advantage))
    for r in rollouts:
        r.logps = row_logps(model, r).tolist()
    metrics, _ = updated(model, rollouts, make_config(), accelerator)
    assert metrics["loss"] == pytest.approx(-math.sqrt(7 / 8) * 24 / 34, abs=1e-3)


def test_all_groups_dead_skips_the_update(model, make_rollouts, make_config, accelerator):
    rollouts = make_rollouts()[-4:]
    metrics, change = updated(model, rollouts, make_config(), accelerator)
    assert metrics["skipped_updates"] == 1 and metrics["grad_norm"] is None
    assert all((value == 0).all() for value in change.values())


def test_a_gradient_that_is_not_finite_is_skipped(model, make_rollouts, make_config, accelerator):
    rollouts = make_rollouts()
    rollouts[0].logps[0] = -1e30  # a ratio of infinity
    rollouts[0].advantage = -1.0
    metrics, change = updated(model, rollouts, make_config(), accelerator)
    assert (metrics["nonfinite_updates"], metrics["skipped_updates"]) == (1, 0)
    assert all((value == 0).all() for value in change.values())


def test_metrics_of_the_update_by_hand(model, make_config, accelerator):
    r = grpo.Rollout([5, 6, 7], [8, 9, 10, 2], [], False, advantage=1.0)
    true = row_logps(model, r)
    r.logps = (true - torch.tensor([0.0, 0.5, -0.5, 0.1])).tolist()  # ratios 1, e^0.5, e^-0.5, e^0.1
    metrics, _ = updated(model, [r], make_config(), accelerator)
    assert metrics["clipped_high"] == 0.25 and metrics["clipped_low"] == 0
    assert is_close(metrics["ratio_max"], math.exp(0.5), 1e-4)
    assert is_close(metrics["sampler_kl"], -0.1 / 4, 1e-4)
    assert is_close(metrics["sampler_logp_gap"], 1.1 / 4, 1e-4)
    r.advantage = -1.0
    metrics, _ = updated(model, [r], make_config(), accelerator)
    assert metrics["clipped_high"] == 0 and metrics["clipped_low"] == 0.25


def test_epochs_and_minibatches_take_that_many_steps(model, make_rollouts, make_config, accelerator):
    rollouts = make_rollouts(groups=5)[:16]  # no dead group among them
    policy = grpo.Policy(model)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    of_all_steps = []
    optimizer.register_step_post_hook(lambda *args: of_all_steps.append(next(policy.parameters()).grad.clone()))
    grpo.update(policy, optimizer, accelerator, rollouts, make_config(epochs=2, minibatches=4), step=1)
    assert len(of_all_steps) == 8 and next(policy.parameters()).grad is None
    sizes = [grad.norm() for grad in of_all_steps]
    assert max(sizes[4:]) < 2 * max(sizes[:4]), "each step has a gradient of its own"


def test_sampler_gap_is_measured_before_the_first_update(model, make_rollouts, make_config, accelerator):
    once, _ = updated(model, make_rollouts(), make_config(), accelerator)
    thrice, _ = updated(model, make_rollouts(), make_config(epochs=3), accelerator)
    for key in ("sampler_kl", "sampler_logp_gap"):
        assert is_close(once[key], thrice[key], 1e-5)
    assert not is_close(once["entropy"], thrice["entropy"], 1e-3), "the policy moved in between"


def test_minibatches_at_rate_zero_add_up_to_the_whole(model, make_rollouts, make_config, accelerator):
    """With sequence weights the mean of the minibatch losses is the loss of the batch, while nothing moves."""
    rollouts = make_rollouts()
    policy, config = grpo.Policy(model), make_config(loss_weight="sequence", minibatches=4)
    config.lr = 0.0
    split = grpo.update(policy, torch.optim.SGD(policy.parameters(), lr=0.0), accelerator, rollouts, config, 1)
    config.minibatches = 1
    whole = grpo.update(policy, torch.optim.SGD(policy.parameters(), lr=0.0), accelerator, rollouts, config, 1)
    assert is_close(split["loss"], whole["loss"])


def test_old_logps_of_the_trainer_are_used(model, make_rollouts, make_config, accelerator):
    rollouts = make_rollouts()
    config = make_config(old_logps="trainer")
    grpo.add_logps("old_logps", grpo.Policy(model), rollouts, accelerator, config)
    for r in rollouts:
        assert torch.allclose(torch.tensor(r.old_logps), row_logps(model, r).float(), atol=1e-5)
    metrics, _ = updated(model, rollouts, config, accelerator)
    assert is_close(metrics["ratio_max"], 1.0, 1e-5) and metrics["sampler_logp_gap"] > 0.1


def test_microbatches_fill_the_budget_and_lose_nothing(make_rollouts):
    rollouts = make_rollouts(groups=20)
    batches = microbatches(rollouts, 60)
    assert sorted(map(id, sum(batches, []))) == sorted(map(id, rollouts))
    assert all(len(b) * max(row_tokens(r) for r in b) <= 60 for b in batches)
    assert len(batches) <= 1.3 * sum(row_tokens(r) for r in rollouts) / 60 + 1
    assert [len(b) for b in microbatches(rollouts[:3], 1)] == [1, 1, 1]


def row_of(tokens: int) -> grpo.Rollout:
    return grpo.Rollout([1], [3] * (tokens - 1), [0.0] * (tokens - 1), False)


def test_microbatches_are_the_cheapest_cuts():
    """Against all cuts of a few rows, where a batch costs its tokens, padding included, and 256 more."""

    def cost(batches):
        return sum(256 + len(batch) * max(batch) for batch in batches)

    rng, sizes = random.Random(0), set()
    for _ in range(60):
        lengths = sorted((rng.choice((20, 100, 400)) + rng.randrange(100) for _ in range(8)), reverse=True)
        budget = rng.choice((300, 900, 2000))
        found = [[row_tokens(r) for r in batch] for batch in microbatches(list(map(row_of, lengths)), budget)]
        assert sum(found, []) == lengths
        allowed = []
        for cuts in range(1 << 7):
            batches = [[lengths[0]]]
            for i, length in enumerate(lengths[1:]):
                if cuts >> i & 1:
                    batches.append([])
                batches[-1].append(length)
            if all(len(batch) == 1 or len(batch) * batch[0] <= budget for batch in batches):
                allowed.append(batches)
        assert cost(found) == min(map(cost, allowed))
        sizes |= set(map(len, found))
    assert len(sizes) > 4


def test_many_rows_are_cut_with_little_padding():
    rows = [row_of(7 + i) for i in range(100) for _ in range(4)]
    padded = [len(batch) * row_tokens(batch[0]) for batch in microbatches(rows, 16384)]
    assert sum(padded) < 1.15 * sum(row_tokens(r) for r in rows), "two batches of 16,384 would be 1.6 times the tokens"
    assert len(padded) < 20


def test_learning_rate_schedules(make_config):
    constant = make_config(lr=1.0, steps=10, warmup_steps=4)
    assert [learning_rate(constant, s) for s in (1, 2, 4, 5, 10)] == [0.25, 0.5, 1, 1, 1]
    linear = make_config(lr=1.0, steps=10, lr_schedule="linear")
    assert learning_rate(linear, 1) == 1 and is_close(learning_rate(linear, 6), 0.5)
    cosine = make_config(lr=1.0, steps=10, lr_schedule="cosine", warmup_steps=2)
    assert learning_rate(cosine, 3) == 1 and is_close(learning_rate(cosine, 7), 0.5)


@pytest.mark.parametrize(
    "kl, expected", [(0.1, 0.05), (0.11, 0.0505), (0.09, 0.0495), (5.0, 0.051), (0.0, 0.049), (None, 0.05)]
)
def test_adapted_kl_coef_by_hand(kl, expected):
    assert adapted_kl_coef(0.05, kl, target=0.1) == pytest.approx(expected)
