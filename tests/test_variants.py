"""Every variant against an independent statement of it: plain loops, enumeration, finite differences, TRL's trainer."""

import copy
import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import expected_loss, is_close, largest_difference, row_logps, updated
from test_evaluation import FakeSampler, FakeTask

import grpo
from harness.batching import pad
from harness.metrics import rollout_metrics
from harness.settings import Sample
from variants import overlong_penalty

pytestmark = pytest.mark.floats

KINDS = ["grpo", "dr_grpo", "rloo", "batch", "maxrl"]

# Advantages


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_equal_a_numpy_loop(kind):
    rewards = np.random.default_rng(0).random((5, 6)).round(1)
    rewards[3], rewards[4] = 0.0, 0.7  # dead groups, of mean 0 and of another mean
    expected = np.zeros((5, 6))
    for p in range(5):
        for g in range(6):
            r, group = rewards[p, g], rewards[p]
            others = [group[i] for i in range(6) if i != g]
            expected[p, g] = {
                "grpo": lambda r=r, group=group: (r - np.mean(group)) / (np.std(group, ddof=1) + 1e-4),
                "dr_grpo": lambda r=r, group=group: r - np.mean(group),
                "rloo": lambda r=r, others=others: r - np.mean(others),
                "batch": lambda r=r, group=group: (r - np.mean(group)) / (np.std(rewards, ddof=1) + 1e-4),
                "maxrl": lambda r=r, group=group: (r - np.mean(group)) / np.mean(group) if np.mean(group) else 0.0,
            }[kind]() if len(set(group)) > 1 else 0.0
    got = grpo.group_advantages(torch.tensor(rewards), kind).numpy()
    assert np.allclose(got, expected, atol=1e-12)
    assert (got[3:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_dead_group_is_exactly_zero_in_spite_of_rounding(kind):
    rewards = torch.full((2, 7), 0.1)  # in float32 the mean of seven times 0.1 is not 0.1
    rewards[1, 0] = 1.0
    assert (rewards[0] - rewards[0].mean()).abs().max() > 0
    got = grpo.group_advantages(rewards, kind)
    assert (got[0] == 0).all() and got[1, 0] > 0


def test_maxrl_refuses_negative_rewards():
    with pytest.raises(grpo.UsageError, match="0 and more, but one is -0.5"):
        grpo.group_advantages(torch.tensor([[1.0, -0.5]]), "maxrl")


def weight_of_gradient(kind: str, p: float, group_size: int) -> float:
    """c in E[mean of A * grad log prob] = c * grad p, for a prompt that is right with probability p; by enumeration.

    The score function of a right answer is grad p / p on average, that of a wrong one -grad p / (1 - p).
    """
    total = 0.0
    for right in range(group_size + 1):
        rewards = torch.tensor([[1.0] * right + [0.0] * (group_size - right)], dtype=torch.float64)
        scores = torch.tensor([1 / p] * right + [-1 / (1 - p)] * (group_size - right), dtype=torch.float64)
        mean = (grpo.group_advantages(rewards, kind, eps=0.0)[0] * scores).mean().item()
        total += math.comb(group_size, right) * p**right * (1 - p) ** (group_size - right) * mean
    return total


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_what_each_advantage_follows(p):
    """The gradient of the share of right answers, exactly or with a factor that depends on the prompt."""
    assert weight_of_gradient("rloo", p, 8) == pytest.approx(1)  # unbiased
    assert weight_of_gradient("dr_grpo", p, 8) == pytest.approx(7 / 8)
    # over the std: hard and easy prompts weigh more, as 1 / sqrt(p (1 - p)) in large groups
    assert weight_of_gradient("grpo", p, 512) == pytest.approx(1 / math.sqrt(p * (1 - p)), rel=0.02)
    # MaxRL: the gradient of log p, cut after G - 1 terms of its series in 1 - p
    assert weight_of_gradient("maxrl", p, 8) == pytest.approx(sum((1 - p) ** k for k in range(7)))
    assert weight_of_gradient("maxrl", p, 512) == pytest.approx(1 / p, rel=0.01)


def test_batch_gives_no_prompt_more_weight_than_another():
    rewards = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]])
    batch, plain = (grpo.group_advantages(rewards, kind) for kind in ("batch", "dr_grpo"))
    assert torch.allclose(batch / batch[0, 0], plain / plain[0, 0])
    grouped = grpo.group_advantages(rewards, "grpo")
    assert not torch.allclose(grouped / grouped[0, 0], plain / plain[0, 0])


@pytest.mark.parametrize("kind, factor", [("rloo", 1.0), ("dr_grpo", 3 / 4)])
def test_sampled_gradients_converge_to_the_enumerated_one(kind, factor, make_config):
    """One-token answers over a vocabulary of 5, groups of 4, through assign_advantages, policy_loss and the weights."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, generator=generator, requires_grad=True)
    paid = torch.tensor([0.0, 1.0, 0.3, 0.0, 0.6], dtype=torch.float64)
    exact = torch.autograd.grad((logits.softmax(0) * paid).sum(), logits)[0]
    config, groups = make_config(advantage=kind, group_size=4), 20_000
    words = torch.multinomial(logits.detach().softmax(0), 4 * groups, replacement=True, generator=generator)
    rollouts = [grpo.Rollout([0], [w], [0.0], False, reward=paid[w].item()) for w in words.tolist()]
    grpo.assign_advantages(rollouts, config)
    logps = logits.log_softmax(0)[words][:, None]
    advantages = torch.tensor([[r.advantage] for r in rollouts], dtype=torch.float64)
    loss, _ = grpo.policy_loss(logps, logps.detach(), advantages)
    weights = grpo.token_weights(torch.ones(len(words), dtype=torch.long))
    got = -torch.autograd.grad((loss.sum(1) * weights).sum(), logits)[0]
    assert (got - factor * exact).abs().max() < 0.03 * exact.abs().max()  # 3 to 4 standard errors
    assert (got - 0.85 * exact).abs().max() > 0.05 * exact.abs().max()


# KL


def test_kl_in_the_reward_has_the_gradient_of_the_kl(make_config):
    """All pairs of words of a vocabulary of 50, each with its probability; rloo, so that there is no factor."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, dtype=torch.float64, generator=generator, requires_grad=True)
    ref = torch.randn(50, dtype=torch.float64, generator=generator).log_softmax(0)
    logps = logits.log_softmax(0)
    exact = torch.autograd.grad((logps.exp() * (logps - ref)).sum(), logits)[0]
    config = make_config(advantage="rloo", group_size=2, kl_in="reward", kl_coef=0.3)
    pairs, logps = list(itertools.product(range(50), repeat=2)), logits.log_softmax(0)
    rollouts = [
        grpo.Rollout([0], [w], [logps[w].item()], False, ref_logps=[ref[w].item()]) for pair in pairs for w in pair
    ]
    grpo.assign_advantages(rollouts, config)
    chosen = torch.tensor(pairs)  # [2500, 2]
    advantages = torch.tensor([r.advantage for r in rollouts], dtype=torch.float64).view(-1, 2)
    probability = logps.detach().exp()[chosen].prod(1)
    loss = -(probability[:, None] * advantages * logps[chosen]).sum() / 2
    assert torch.allclose(torch.autograd.grad(loss, logits)[0], 0.3 * exact, atol=1e-12)


def test_plain_estimators_would_have_other_gradients():
    """Why KL_FACTORS exists: k1 without a factor has the gradient 0, and k3 that of the KL the other way round."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, dtype=torch.float64, generator=generator, requires_grad=True)
    ref = torch.randn(50, dtype=torch.float64, generator=generator).log_softmax(0)

    def gradient(kind):
        logps = logits.log_softmax(0)
        return torch.autograd.grad((logps.detach().exp() * grpo.kl_estimate(logps, ref, kind)).sum(), logits)[0]

    reverse = torch.autograd.grad((ref.exp() * (ref - logits.log_softmax(0))).sum(), logits)[0]
    assert gradient("k1").abs().max() < 1e-12
    assert torch.allclose(gradient("k3"), reverse, atol=1e-12)


# The whole loss

VARIANTS = {
    "gspo": dict(ratio="sequence", loss_weight="sequence", clip_low=0.1, clip_high=0.2),
    "gspo by tokens": dict(ratio="sequence", loss_weight="token"),
    "cispo": dict(surrogate="cispo", clip_high=0.3),
    "cispo by rows": dict(surrogate="cispo", ratio="sequence", loss_weight="constant", clip_high=0.1),
    "entropy": dict(entropy_coef=0.05),
    "kl in reward": dict(kl_in="reward", kl_coef=0.2, advantage="rloo"),
    "importance": dict(old_logps="trainer", importance_cap=1.2),
    "importance, gspo": dict(old_logps="trainer", importance_cap=1.2, ratio="sequence", loss_weight="sequence"),
    "masked": dict(mask_truncated=True),
    "masked by rows": dict(mask_truncated=True, loss_weight="sequence"),
    "masked, constant": dict(mask_truncated=True, loss_weight="constant"),
    "all": dict(
        ratio="sequence", surrogate="cispo", entropy_coef=0.05, kl_coef=0.2, old_logps="trainer", importance_cap=1.1,
        mask_truncated=True, loss_weight="constant",
    ),
}  # fmt: skip


@pytest.fixture
def rollouts(make_rollouts):
    """With old log-probs of a trainer that is not quite the sampler, and every third completion cut off."""
    rollouts = make_rollouts()
    noise = torch.Generator().manual_seed(1)
    for i, r in enumerate(rollouts):
        r.old_logps = (torch.tensor(r.logps) + 0.3 * torch.randn(r.length, generator=noise)).tolist()
        r.truncated = i % 3 == 0
    return rollouts


@pytest.mark.parametrize("name", VARIANTS)
def test_update_equals_a_double_loop(name, model, rollouts, make_config, accelerator):
    config = make_config(**VARIANTS[name], tokens_per_microbatch=60)
    metrics, change = updated(model, rollouts, config, accelerator)
    reference = copy.deepcopy(model)
    loss = expected_loss(reference, rollouts, config)
    loss.backward()
    assert is_close(metrics["loss"], loss.item(), 1e-5)
    assert largest_difference(change, {name: -p.grad for name, p in reference.named_parameters()}) < 1e-5
    plain = expected_loss(copy.deepcopy(model), rollouts, make_config())
    assert abs(loss.item() - plain.item()) > 1e-4 or name == "kl in reward", "the variant has an effect here"


@pytest.mark.parametrize("name", ["entropy", "gspo", "gspo by tokens", "kl", "plain"])
def test_gradient_equals_finite_differences(name, model, make_rollouts, make_config, accelerator):
    """Of the whole loss, as the update computes it, along the gradient and along a random direction.

    (cispo and importance weights have parts that are held still: their loss is not the integral of their gradient.)
    """
    config = make_config(**VARIANTS.get(name, dict(kl_coef=0.3) if name == "kl" else {}))
    rollouts = make_rollouts()
    for r in rollouts:  # a finite difference is not to step over an edge of the clip: all ratios are near 1.05
        r.logps = [logp - 0.05 for logp in row_logps(model, r).tolist()]
    _, change = updated(model, rollouts, config, accelerator)
    norm = math.sqrt(sum(value.square().sum().item() for value in change.values()))
    generator = torch.Generator().manual_seed(0)
    noise = {key: torch.randn(value.shape, generator=generator) for key, value in change.items()}
    size = math.sqrt(sum(value.square().sum().item() for value in noise.values()))
    mixed = {key: 0.7 * change[key] / norm + 0.7 * noise[key] / size for key in change}
    for direction in ({key: value / norm for key, value in change.items()}, mixed):
        losses = []
        for epsilon in (1e-3, -1e-3):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                for key, p in moved.named_parameters():
                    p += epsilon * direction[key]
            losses.append(updated(moved, rollouts, config, accelerator)[0]["loss"])
        slope = sum((direction[key] * -change[key]).sum().item() for key in change)
        assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(slope, rel=0.02)


# What is done to the batch


@pytest.mark.parametrize("dead_groups", ["keep", "drop"])
def test_an_all_dead_step_moves_nothing_kept_or_dropped(dead_groups, model, make_rollouts, make_config, accelerator):
    """Also not by AdamW's momentum."""
    policy = grpo.Policy(copy.deepcopy(model))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    config = make_config(dead_groups=dead_groups)
    grpo.update(policy, optimizer, accelerator, make_rollouts(), config, step=1)
    before = [p.detach().clone() for p in policy.parameters()]
    dead = make_rollouts()
    for r in dead:
        r.advantage, r.dead = 0.0, True
    metrics = grpo.update(policy, optimizer, accelerator, dead, config, step=2)
    assert metrics["skipped_updates"] == 1 and metrics["grad_norm"] is None
    assert all(torch.equal(p, old) for p, old in zip(policy.parameters(), before, strict=True))


def test_the_gap_is_measured_though_the_first_minibatch_trains_nothing(model, make_rollouts, make_config, accelerator):
    rollouts = make_rollouts()
    for r in rollouts[1:]:
        r.dead, r.advantage = True, 0.0
    config = make_config(minibatches=8)
    for step in range(5):  # the one live row is in another minibatch each time
        policy = grpo.Policy(copy.deepcopy(model))
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
        metrics = grpo.update(policy, optimizer, accelerator, rollouts, config, step + 1)
        assert metrics["sampler_logp_gap"] > 0 and metrics["skipped_updates"] == 7


def test_dead_groups_are_counted_by_their_rewards(make_config):
    """A KL penalty makes all rewards differ by a little, which is no success of the task."""
    rows = [grpo.Rollout([1], [3], [-1.0 - i / 9], False, reward=1.0, ref_logps=[-1.0]) for i in range(4)]
    for r in rows:
        r.parts = dict(correct=1.0, format=1.0)
    config = make_config(group_size=4, kl_in="reward", kl_coef=0.1, advantage="rloo")
    grpo.assign_advantages(rows, config)
    assert not any(r.dead for r in rows) and rollout_metrics(rows, config)["zero_advantage_groups"] == 1


def test_masked_rows_do_not_exist_for_the_loss(model, rollouts, make_config, accelerator):
    kept = [r for r in rollouts if not r.truncated]
    for weight in ("token", "sequence", "constant"):
        masked = updated(model, rollouts, make_config(mask_truncated=True, loss_weight=weight), accelerator)
        without = updated(model, kept, make_config(loss_weight=weight), accelerator)
        assert largest_difference(masked[1], without[1]) < 1e-6
        assert is_close(masked[0]["loss"], without[0]["loss"])
    for r in rollouts:
        r.truncated = True
    metrics, change = updated(model, rollouts, make_config(mask_truncated=True), accelerator)
    assert metrics["skipped_updates"] == 1 and all((value == 0).all() for value in change.values())


def test_overlong_penalty_by_hand(make_config):
    assert [overlong_penalty(n, 20, 0.4) for n in (1, 12, 13, 16, 20)] == pytest.approx([0, 0, 1 / 8, 1 / 2, 1])
    assert overlong_penalty(20, 20, 0.0) == 0
    rollouts = [grpo.Rollout([1], [3] * n, [0.0] * n, n == 16, reward=1.0) for n in (8, 12, 14, 16)]
    grpo.assign_advantages(rollouts, make_config(group_size=4, overlong_share=0.25, advantage="dr_grpo"))
    assert [r.penalty for r in rollouts] == [0, 0, 0.5, 1]
    assert [r.advantage for r in rollouts] == [0.375, 0.375, -0.125, -0.625]
    assert not any(r.dead for r in rollouts), "equal rewards, but not equally long"


def test_kl_in_the_reward_by_hand(make_config):
    config = make_config(group_size=2, kl_in="reward", kl_coef=0.1, advantage="dr_grpo")
    a = grpo.Rollout([1], [3, 2], [-1.0, -2.0], False, reward=1.0, ref_logps=[-1.5, -4.0])
    b = grpo.Rollout([1], [4, 2], [-1.0, -2.0], False, reward=1.0, ref_logps=[-1.0, -1.0])
    grpo.assign_advantages([a, b], config)
    assert (a.penalty, b.penalty) == (pytest.approx(0.25), pytest.approx(-0.1))
    assert (a.advantage, b.advantage) == (pytest.approx(-0.175), pytest.approx(0.175))
    a.old_logps, b.old_logps = [-1.5, -4.0], [-1.0, -1.0]  # the trainer's, where those are the old policy's
    grpo.assign_advantages([a, b], config)
    assert (a.penalty, b.penalty) == (0, 0) and a.dead


class Puzzle(FakeTask):
    """Prompts whose number is under `easy` are always right, the others every other time."""

    def __init__(self, easy: int):
        self.easy = easy

    def reward(self, text, example):
        right = float(example["x"] < self.easy or len(text) % 2 == 0)
        return dict(reward=right, correct=right, format=1.0, prediction=text, ground_truth="")


class Alternating(FakeSampler):
    """In every group, one digit and two digits in turns."""

    def generate(self, prompts, group_size, sampling, seed):
        self.rows = getattr(self, "rows", 0) + len(prompts) * group_size
        ids = [[7, 7, 2], [7, 2]]
        return [Sample(p, ids[g % 2], [0.0] * len(ids[g % 2]), False) for p in prompts for g in range(group_size)]


def test_dead_groups_are_replaced_by_fresh_ones(tokenizer, make_config):
    settings = dict(prompts_per_step=20, group_size=4)
    plain, counts = grpo.collect(Alternating(), tokenizer, Puzzle(5), make_config(**settings), 1)
    dead = [i for i in range(20) if len({r.reward for r in plain[4 * i : 4 * i + 4]}) == 1]
    assert 4 <= len(dead) <= 16 and counts["resampled_groups"] == 0 and counts["step_tokens"] == 20 * 10
    config = make_config(**settings, dead_groups="resample", resample_rounds=12)
    sampler = Alternating()
    fresh, counts = grpo.collect(sampler, tokenizer, Puzzle(5), config, 1)
    assert all(len({r.reward for r in fresh[4 * i : 4 * i + 4]}) == 2 for i in range(20))
    assert all(len({r.prompt for r in fresh[4 * i : 4 * i + 4]}) == 1 for i in range(20)), "groups stay together"
    assert all(fresh[4 * i : 4 * i + 4] == plain[4 * i : 4 * i + 4] for i in range(20) if i not in dead)
    assert counts["resampled_groups"] >= len(dead) and sampler.rows == 80 + 4 * counts["resampled_groups"]
    assert counts["step_tokens"] == 200 + 10 * counts["resampled_groups"], "what was thrown away was sampled too"


def test_replacing_dead_groups_ends_at_its_bound(tokenizer, make_config):
    config = make_config(prompts_per_step=6, group_size=2, dead_groups="resample", resample_rounds=3)
    sampler = Alternating()
    rollouts, counts = grpo.collect(sampler, tokenizer, Puzzle(10), config, 1)
    assert len(rollouts) == 12 and counts["resampled_groups"] == 18 and sampler.rows == 12 + 36
    grpo.assign_advantages(rollouts, config)
    assert all(r.dead for r in rollouts) and config.drops_dead_groups


@pytest.mark.parametrize(
    "settings, drops",
    [
        (dict(), True),
        (dict(kl_coef=0.1), False),
        (dict(kl_coef=0.1, kl_in="reward", advantage="rloo"), True),
        (dict(entropy_coef=0.1), False),
        (dict(dead_groups="keep"), False),
        (dict(dead_groups="drop", kl_coef=0.1), True),
        (dict(dead_groups="resample", resample_rounds=1, kl_coef=0.1), True),
    ],
)
def test_dead_groups_are_dropped_where_that_is_exact(settings, drops, make_config):
    assert make_config(**settings).drops_dead_groups == drops


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(importance_cap=2.0), "needs --old_logps trainer"),
        (dict(kl_in="reward", advantage="rloo"), "kl_coef is 0, so there is no penalty"),
        (dict(advantage="maxrl", overlong_share=0.2), "can make negative"),
        (dict(advantage="maxrl", kl_in="reward", kl_coef=0.1), "can make negative"),
        (dict(dead_groups="resample"), "without a bound: set --resample_rounds"),
        (dict(resample_rounds=2), "is for --dead_groups resample"),
        (dict(kl_in="reward", kl_coef=0.1), "take rloo or dr_grpo"),
        (dict(kl_in="reward", kl_coef=0.1, advantage="batch"), "take rloo or dr_grpo"),
        (dict(entropy_coef=-0.5), "entropy_coef is -0.5, it must be 0 or more"),
        (dict(entropy_coef=float("nan")), "entropy_coef is nan"),
        (dict(overlong_share=1.0), "must be below 1"),
        (dict(minibatches=3, prompts_per_step=2, group_size=2), "must divide the 4 completions"),
        (dict(advantage="grop"), "grpo, dr_grpo, rloo, batch, maxrl"),
    ],
)
def test_contradictions_are_refused_with_the_reason(settings, said, make_config):
    with pytest.raises(grpo.UsageError, match=said):
        make_config(**settings)


# TRL's GRPOTrainer, as an independent implementation


class Given(torch.nn.Module):
    """In place of a Policy: log-probs and entropies that were given, whose gradients can be looked at."""

    def __init__(self, logps, entropies):
        super().__init__()
        self.logps, self.entropies = logps, entropies

    def forward(self, **inputs):
        return self.logps, self.entropies


def trl_loss(logps, entropies, mask, old, ref, sampled, advantages, config) -> torch.Tensor:
    """GRPOTrainer._compute_loss, with a trainer that has nothing but the settings, on log-probs that are given."""
    loss_type = {"token": "dapo", "sequence": "grpo", "constant": "dr_grpo"}[config.loss_weight]
    loss_type = "cispo" if config.surrogate == "cispo" else loss_type
    accelerator = SimpleNamespace(num_processes=1, sync_gradients=False)
    accelerator.gather, accelerator.reduce = lambda x: x, lambda x, reduction: x
    trainer = SimpleNamespace(
        accelerator=accelerator, aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level=config.ratio, beta=config.kl_coef, loss_type=loss_type, epsilon_low=config.clip_low,
        # TRL's bound of cispo is that of the ratio itself, not what it may be above 1
        epsilon_high=1 + config.clip_high if loss_type == "cispo" else config.clip_high,
        args=SimpleNamespace(use_bias_correction_kl=True, delta=None, steps_per_generation=1),
        use_vllm=bool(config.importance_cap), vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1, max_completion_length=config.max_completion_tokens,
        _entropy_bonus_enabled=config.entropy_coef > 0, use_adaptive_entropy=False, entropy_coef=config.entropy_coef,
        model=SimpleNamespace(training=True), _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, entropies, None),
    )  # fmt: skip
    rows, columns = logps.shape
    inputs = dict(
        prompt_ids=torch.zeros(rows, 1), prompt_mask=torch.ones(rows, 1), completion_ids=torch.zeros(rows, columns),
        completion_mask=mask, advantages=advantages[:, 0], old_per_token_logps=old, ref_per_token_logps=ref,
        num_items_in_batch=mask.sum(), importance_sampling_ratio=(old - sampled).exp().clamp(max=config.importance_cap),
    )  # fmt: skip
    trl = pytest.importorskip("trl", reason="TRL needs Python 3.11")
    return trl.GRPOTrainer._compute_loss(trainer, None, inputs)


LOSSES, RATIOS = ("token", "sequence", "constant", "cispo"), ("token", "sequence")
COMMON = [(loss, ratio, "") for loss in LOSSES for ratio in RATIOS]
# with a KL penalty or importance weights and the ratio of a sequence, TRL multiplies what all tokens share, ours what
# is each token's own
COMMON += [(loss, "token", more) for loss in LOSSES for more in ("kl", "importance")]
# TRL's bonus is a mean over tokens whatever the weights, ours has the weights of the loss
COMMON += [(loss, ratio, "entropy") for loss in ("token", "cispo") for ratio in RATIOS]


@pytest.mark.parametrize("loss, ratio, more", COMMON)
def test_loss_and_gradient_equal_trl(loss, ratio, more, rollouts, make_config):
    settings = dict(loss_weight="token", surrogate="cispo") if loss == "cispo" else dict(loss_weight=loss)
    extras = {"kl": dict(kl_coef=0.3), "importance": dict(importance_cap=1.2), "entropy": dict(entropy_coef=0.1)}
    settings |= extras.get(more, {})
    config = make_config(**settings, ratio=ratio, clip_high=0.28, old_logps="trainer", dead_groups="keep")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        batch = [r for r in rollouts if not r.dead]
        generator = torch.Generator().manual_seed(2)
        lengths = torch.tensor([r.length for r in batch])
        mask = grpo.completion_mask(lengths)
        old = pad([r.old_logps for r in batch], "cpu")
        ref, sampled = (pad([getattr(r, name) for r in batch], "cpu") for name in ("ref_logps", "logps"))
        near = old + 0.3 * torch.randn(old.shape, generator=generator)
        ours, theirs = ((near * mask).clone().requires_grad_() for _ in range(2))
        our_h, their_h = (torch.full(old.shape, 1.5).requires_grad_() for _ in range(2))
        # a policy's output is 0 behind the end of a row
        value = grpo.batch_loss(
            Given(ours * mask, our_h * mask), batch, config, torch.device("cpu"), int(lengths.sum()), len(batch)
        )
        advantages = torch.tensor([[r.advantage] for r in batch])
        expected = trl_loss(theirs, their_h, mask.double(), old, ref, sampled, advantages, config)
        value.backward(), expected.backward()
        assert value.item() == pytest.approx(expected.item(), abs=1e-6, rel=1e-6)
        assert (ours.grad - theirs.grad).abs().max() < 1e-6 * theirs.grad.abs().max() + 1e-12
        assert theirs.grad.abs().max() > 1e-3
        if more == "entropy":
            assert torch.allclose(our_h.grad, their_h.grad, atol=1e-9) and their_h.grad.abs().max() > 1e-4
    finally:
        torch.set_default_dtype(before)


def test_kl_in_the_reward_is_that_of_the_log_probs_that_the_ratio_is_taken_against(make_config):
    config = make_config(kl_coef=0.5, kl_in="reward", advantage="rloo", group_size=2)
    rows = [
        grpo.Rollout([1], [5, 2], [-1.0, -2.0], False, reward=reward, ref_logps=[-3.0, -3.0]) for reward in (1.0, 0.0)
    ]
    grpo.assign_advantages(rows, config)
    assert [r.penalty for r in rows] == [0.5 * 3.0] * 2
    for r in rows:
        r.old_logps = [-2.0, -2.5]  # the trainer's, where they are used
    grpo.assign_advantages(rows, config)
    assert [r.penalty for r in rows] == [0.5 * 1.5] * 2
