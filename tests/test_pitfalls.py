"""The mistakes that stand in public implementations that people learn from; each test fails when its mistake is made.

`python tests/mutation.py pitfall` makes those that are a line of code, one by one, and shows which tests notice.
"""

import ast
import copy
import json
import math
import random
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import is_close, largest_difference, row_entropies, row_logps, updated
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

import grpo
from harness import loading
from harness.batching import policy_inputs, row_tokens
from harness.metrics import rollout_metrics
from harness.proven_sampler import check_sampler
from harness.settings import Sample
from tasks.competition_math import math_reward
from tasks.countdown import countdown_reward
from tasks.gsm8k import gsm8k_example, gsm8k_reward
from tasks.tags import is_think_then_answer


def on_policy(model, rollouts: list[grpo.Rollout]) -> list[grpo.Rollout]:
    """As if the model had just sampled them."""
    for r in rollouts:
        r.logps = row_logps(model, r).tolist()
    return rollouts


def rollout(prompt_length: int, length: int, advantage: float = 1.0, seed: int = 0) -> grpo.Rollout:
    rng = random.Random(seed)
    ids = [rng.randrange(3, 20) for _ in range(prompt_length + length - 1)] + [2]
    return grpo.Rollout(ids[:prompt_length], ids[prompt_length:], [0.0] * length, False, advantage=advantage)


class Repeats:
    """A task whose right answer is the prompt's digit, first."""

    def train(self, rng, step):
        return {"digit": rng.choice("0123456789")}

    def eval(self):
        return [{"digit": digit} for digit in "0123456789"]

    def prompt(self, example):
        return f"<sos>{example['digit']}"

    def reward(self, text, example):
        right = float(text.startswith(example["digit"]))
        return dict(reward=right, correct=right, format=1.0, prediction=text, ground_truth=example["digit"])


@pytest.fixture
def run(make_config, monkeypatch, model, tokenizer, tmp_path):
    """A run of the random tiny model on `Repeats`; keyword arguments are settings."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(loading, "load_task", lambda *args: Repeats())

    def start(**settings):
        defaults = dict(model=str(tmp_path / "model"), prompts_per_step=4, group_size=8, max_completion_tokens=6)
        return grpo.train(make_config(**defaults | dict(lr=1e-3, steps=4, eval_samples=4, grad_clip=1.0) | settings))

    return start


def lines(folder, name: str) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def test_01_the_normaliser_counts_completion_tokens_only(model, make_config, accelerator):
    """On-policy with every advantage 1, a mean over tokens is -1, however long prompts and padding are."""
    rows = on_policy(model, [rollout(2, 3), rollout(30, 9, seed=1), rollout(5, 1, seed=2)])
    for weight in ("token", "sequence"):
        assert is_close(updated(model, rows, make_config(loss_weight=weight), accelerator)[0]["loss"], -1.0)


def test_02_the_loss_does_not_depend_on_the_microbatch_size(model, make_rollouts, make_config, accelerator):
    rows = make_rollouts()
    for weight in ("token", "sequence", "constant"):
        settings = dict(loss_weight=weight, kl_coef=0.1)
        one, other = (
            updated(model, rows, make_config(tokens_per_microbatch=budget, **settings), accelerator)
            for budget in (10_000, 25)
        )
        assert largest_difference(one[1], other[1]) < 1e-6 and is_close(one[0]["loss"], other[0]["loss"])


def test_03_length_bias_is_what_the_setting_says(model, make_config, accelerator):
    """A right answer of 9 tokens and a wrong one of 3: which of them weighs more, and how much."""
    rows = on_policy(model, [rollout(2, 9, 1.0), rollout(2, 3, -1.0, seed=1)])
    losses = {
        weight: updated(model, rows, make_config(loss_weight=weight), accelerator)[0]["loss"]
        for weight in ("token", "sequence", "constant")
    }
    assert is_close(losses["token"], -(9 - 3) / 12) and is_close(losses["constant"], -(9 - 3) / (2 * 16))
    assert abs(losses["sequence"]) < 1e-6


def test_04_the_kl_penalty_pulls_toward_the_reference(model, make_rollouts, make_config, accelerator):
    policy, reference = (torch.tensor(p, dtype=torch.float64).log() for p in ([0.7, 0.2, 0.1], [0.2, 0.3, 0.5]))
    exact = (policy.exp() * (policy - reference)).sum()
    assert is_close((policy.exp() * grpo.kl_estimate(policy, reference)).sum().item(), exact.item())
    rows = on_policy(model, make_rollouts())
    for r in rows:  # the reference finds every sampled token likelier: an update must raise their log-probs
        r.advantage, r.ref_logps = 0.0, [logp + 1 for logp in r.logps]
    for kind in ("k2", "k3"):
        _, change = updated(model, rows, make_config(kl_coef=0.1, kl_kind=kind), accelerator)
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in moved.named_parameters():
                p += 0.1 * change[name]
        assert sum(row_logps(moved, r).sum() - sum(r.logps) for r in rows) > 0


def test_05_kl_in_the_loss_has_the_gradient_of_the_kl():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, dtype=torch.float64, generator=generator, requires_grad=True)
    reference = torch.randn(50, dtype=torch.float64, generator=generator).log_softmax(0)
    exact = torch.autograd.grad((logits.softmax(0) * (logits.log_softmax(0) - reference)).sum(), logits)[0]
    for kind in ("k1", "k2", "k3"):
        logps = logits.log_softmax(0)
        in_loss = grpo.KL_FACTORS[kind]((logps - logps.detach()).exp()) * grpo.kl_estimate(logps, reference, kind)
        got = torch.autograd.grad((logps.detach().exp() * in_loss).sum(), logits)[0]
        assert torch.allclose(got, exact, atol=1e-12), kind
    near = torch.linspace(-1e-3, 1e-3, 1001)
    assert (grpo.kl_estimate(near, torch.zeros(1001)) >= 0).all(), "in float32, exp(x) - 1 - x would round below 0"


def test_06_the_clip_is_a_min_for_negative_advantages_too():
    """(ratio, advantage): loss and slope in the ratio; a slope of 0 where the policy has moved far enough."""
    cases = {(0.5, -1): (0.8, 0), (1.5, -1): (1.5, 1), (0.5, 1): (-0.5, -1), (1.5, 1): (-1.2, 0)}
    for (ratio, advantage), (value, slope) in cases.items():
        logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
        loss, _ = grpo.policy_loss(logp, torch.zeros(1, 1), torch.tensor([[float(advantage)]], dtype=torch.float64))
        loss.sum().backward()
        assert loss.item() == pytest.approx(value) and logp.grad.item() == pytest.approx(slope * ratio)


def test_07_the_std_has_a_safe_epsilon_and_g_minus_one():
    noise = torch.tensor([[0.5, 0.5 + 1e-7, 0.5, 0.5]])
    assert grpo.group_advantages(noise).abs().max() < 0.01
    by_hand = grpo.group_advantages(torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64), eps=0.0)
    assert by_hand[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5])  # std 1/2; with G it would be 0.433


def test_08_dead_groups_count_and_are_kept_under_a_penalty(model, make_rollouts, make_config, accelerator):
    rewards = torch.full((1, 7), 0.1)
    assert (rewards != rewards.mean()).any(), "rounding: a dead group is not found by comparing advantages with 0"
    assert (grpo.group_advantages(rewards) == 0).all() and grpo.dead_groups(rewards).all()
    rows = on_policy(model, make_rollouts())  # the last group is dead
    dropped, kept = (
        updated(model, rows, make_config(dead_groups=how), accelerator) for how in ("drop", "keep")
    )  # if they did not count in the denominator, the other rows would weigh more
    assert largest_difference(dropped[1], kept[1]) < 1e-6 and is_close(dropped[0]["loss"], kept[0]["loss"])
    by_hand = sum(-r.advantage * r.length for r in rows) / sum(r.length for r in rows)
    assert is_close(dropped[0]["loss"], by_hand, 1e-5)
    auto, kept, dropped = (
        updated(model, rows, make_config(kl_coef=0.3, dead_groups=how), accelerator)[1]
        for how in ("auto", "keep", "drop")
    )
    assert largest_difference(auto, kept) == 0 and largest_difference(auto, dropped) > 1e-4


def test_09_the_end_of_sequence_token_is_trained(model, tokenizer):
    """It is part of the completion, its log-prob has a gradient, and padding of the same value has none."""
    short, long = rollout(3, 2), rollout(3, 6, seed=1)
    inputs = policy_inputs([short, long], "cpu")
    inputs["ids"][0, row_tokens(short) :] = 2  # padded with the end-of-sequence token
    logps, _ = grpo.Policy(model)(**inputs)
    assert torch.allclose(logps[0, :2].double(), row_logps(model, short), atol=1e-5) and (logps[0, 2:] == 0).all()
    sampled = grpo.TorchSampler(model, [2]).generate([[1, 5]], 64, grpo.Sampling(30), seed=0)
    ended = [r for r in sampled if not r.truncated]
    assert ended and all(r.completion_ids[-1] == 2 and len(r.logps) == r.length for r in ended)


def test_10_the_prompt_is_not_in_the_loss(model, make_config, accelerator, monkeypatch):
    """Only positions that predict a completion token have a gradient, and each of those has one."""
    row, seen = rollout(5, 3), []
    (row,) = on_policy(model, [row])
    policy = grpo.Policy(copy.deepcopy(model))
    best_head = grpo.best_head

    def watched(*args, **hints):
        head = best_head(*args, **hints)
        return lambda hidden, targets: (seen.append(targets.tolist()), head(hidden, targets))[1]

    monkeypatch.setattr(grpo, "best_head", watched)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    grpo.update(policy, optimizer, accelerator, [row], make_config(), step=1)
    assert all(targets == row.completion_ids for targets in seen) and seen


def test_11_dropout_is_off_in_sampling_and_in_training(tmp_path, tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64)
    config.initializer_range = 0.3
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.5
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = loading.load_model(str(tmp_path))
    rollouts = grpo.TorchSampler(model, [2]).generate([[1, 5, 6]], 4, grpo.Sampling(8), seed=0)
    logps, _ = grpo.Policy(model).train()(**policy_inputs(rollouts, "cpu"))
    for i, r in enumerate(rollouts):
        assert torch.allclose(logps[i, : r.length], torch.tensor(r.logps), atol=1e-4)


def test_12_sampling_is_not_greedy_by_default(model, make_config):
    settings = make_config().sampling
    assert (settings.temperature, settings.top_p, settings.top_k) == (1.0, 1.0, 0)
    rollouts = grpo.TorchSampler(model, [2]).generate([[1, 5]], 400, settings._replace(max_tokens=1), seed=0)
    with torch.no_grad():
        probs = model(torch.tensor([[1, 5]])).logits[0, -1].softmax(0)
    counts = torch.bincount(torch.tensor([r.completion_ids[0] for r in rollouts]), minlength=len(probs)) / 400
    assert (counts - probs).abs().max() < 4 * math.sqrt(0.25 / 400) and (counts > 0).sum() > 3


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_13_log_probs_are_of_the_distribution_that_was_sampled(temperature, model, make_config):
    rollouts = grpo.TorchSampler(model, [2]).generate([[1, 5, 6]], 8, grpo.Sampling(8, temperature), seed=0)
    for plain in (False, True):  # which head computes them
        logps, _ = grpo.Policy(model, temperature, entropy_gradient=plain)(**policy_inputs(rollouts, "cpu"))
        for i, r in enumerate(rollouts):
            assert torch.allclose(logps[i, : r.length], torch.tensor(r.logps), atol=1e-4)
    # with top_k or top_p the sampler's distribution is not the policy's: the trainer's log-probs are taken
    assert make_config(top_k=5).uses_trainer_logps and make_config(top_p=0.9).uses_trainer_logps
    assert not make_config().uses_trainer_logps


def test_14_nothing_is_tokenised_twice(tokenizer, make_config):
    class Odd:  # rows that decoding and encoding again would change
        def generate(self, prompts, group_size, sampling, seed):
            return [Sample(p, [7, 0, 7, 2], [0.0] * 4, False) for p in prompts for _ in range(group_size)]

    rollouts, _ = grpo.collect(Odd(), tokenizer, Repeats(), make_config(prompts_per_step=2, group_size=2), 1)
    assert all(r.completion_ids == [7, 0, 7, 2] for r in rollouts)
    assert all(policy_inputs([r], "cpu")["ids"].tolist() == [r.prompt_ids + [7, 0, 7, 2]] for r in rollouts)


@pytest.mark.parametrize("fault", ["none", "does nothing", "forgets the head", "forgets a layer"])
def test_15_a_weight_sync_cannot_fail_silently(fault, model, make_config, accelerator):
    """A sampler with weights of its own, which the self-test at the start must see follow the trainer's."""
    own, forgotten = copy.deepcopy(model), {"forgets the head": "word_embeddings"}
    sampler = grpo.TorchSampler(own, [2])

    def sync():
        part = forgotten.get(fault, "h.1.mlp" if fault == "forgets a layer" else "nothing of this name")
        with torch.no_grad():
            for (name, mine), theirs in zip(own.named_parameters(), model.parameters(), strict=True):
                if fault != "does nothing" and part not in name:
                    mine.copy_(theirs)

    sampler.sync = sync
    before = copy.deepcopy(model.state_dict())

    def check(**settings):
        policy = grpo.Policy(model, settings.get("temperature", 1.0))
        check_sampler(sampler, policy, accelerator, [[1, 5, 6]], make_config(**settings))

    if fault == "none":
        with pytest.MonkeyPatch.context() as patch:  # at the temperature of the run, as long as answers may be
            asked, generate = [], sampler.generate
            patch.setattr(sampler, "generate", lambda *args: (asked.append(args[2]), generate(*args))[1])
            check(temperature=0.7, max_completion_tokens=5)
            assert asked == [grpo.Sampling(5, 0.7)] * 3
        check()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    else:
        with pytest.raises(grpo.UsageError, match="it does not sample from the policy that is trained"):
            check()


def test_16_small_updates_are_not_lost_in_bf16(tmp_path, model, tokenizer):
    """A bf16 checkpoint is trained in float32: at lr 1e-6 nearly every weight moves."""
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = loading.load_model(str(tmp_path))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    before = [p.detach().clone() for p in loaded.parameters()]
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=1e-6, weight_decay=0.0)
    loaded(torch.tensor([[1, 5, 6, 7]])).logits.square().mean().backward()
    optimizer.step()
    trained = [(p, b) for p, b in zip(loaded.parameters(), before, strict=True) if p.grad.abs().min() > 0]
    assert trained and all((p != b).float().mean() > 0.9 for p, b in trained)


def test_17_the_verifier_is_no_eval():
    example = {"nums": [2, 3, 5], "target": 11}
    right = "<think>a</think><answer>2 * 3 + 5</answer>"
    assert countdown_reward(right, example)["correct"] == 1
    attacks = ["99**98**97", "2**3 + 5 - 2", "7//2", "2.5*4 + 1", "__import__('os')", "(" * 1000 + "2" + ")" * 1000]
    attacks += ["2*3+5 # 1", "0x2*3+5", "2_0", "٢*3+5", "2*3+5;1", "5+6", "2*3+5+0", "-" * 5000 + "2", "1" * 100_000]
    for attack in attacks:
        started = time.process_time()
        assert countdown_reward(f"<think>a</think><answer>{attack}</answer>", example)["correct"] == 0, attack
        assert time.process_time() - started < 0.1, attack
    inside = "<think><answer>2 * 3 + 5</answer></think><answer>1</answer>"
    assert countdown_reward(inside, example)["correct"] == 0, "the first answer, inside the thinking, does not count"
    assert countdown_reward("<think>" + right.replace("<think>a</think>", ""), example)["correct"] == 0


def test_18_numbers_are_read_as_people_write_them():
    gold = gsm8k_example({"question": "How many?", "answer": "1400 + 50 = 1450\n#### 1,450"})
    assert gsm8k_reward("so it is\nFinal: $1,450", gold)["reward"] == 1
    assert gsm8k_reward("Final: 1450.00", gold)["reward"] == 1
    assert gsm8k_reward("Final: 14", gold)["reward"] == 0.1, "a part of the number is not the number"
    assert gsm8k_reward("no number", gold)["reward"] == 0

    def answer(text):
        return f"<think>a</think><answer>{text}</answer>"

    third = {"answer": r"-\frac{1}{3}"}
    assert all(math_reward(answer(a), third)["correct"] == 1 for a in (r"$-\frac13$", "-1/3"))
    unreadable = {"answer": ""}
    assert math_reward(answer(""), third)["correct"] == math_reward(answer(""), unreadable)["correct"] == 0


def test_19_a_thought_may_have_many_lines():
    text = "<think>first\nsecond\n\nthird</think>\n<answer>2 * 3 + 5</answer>"
    assert is_think_then_answer(text)
    assert countdown_reward(text, {"nums": [2, 3, 5], "target": 11})["format"] == 1


def test_20_a_resumed_run_is_the_run_that_was_not_stopped(run):
    whole = run(save_steps=2, keep_last=3, eval_steps=0)["run"]
    stopped = Path(str(whole) + "-stopped")
    subprocess.run(["cp", "-r", str(whole), str(stopped)], check=True)
    for name in ("checkpoint-4", "final"):
        subprocess.run(["rm", "-r", str(stopped / name)], check=True)
    grpo.train(grpo.parse_config(["--resume", str(stopped)]))
    for name in ("model.safetensors", "optimizer.state"):
        a, b = (load_file(folder / "checkpoint-4" / name) for folder in (whole, stopped))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
    assert lines(whole, "rollouts.jsonl") == lines(stopped, "rollouts.jsonl")
    assert [row["step"] for row in lines(stopped, "metrics.jsonl")] == [1, 2, 3, 4]
    with pytest.raises(grpo.UsageError, match="lr was 0.001 .* cannot become 0.1"):
        grpo.parse_config(["--resume", str(stopped), "--lr", "0.1"])


def test_21_metrics_are_what_they_are_called(model, make_rollouts, make_config, accelerator):
    rows = on_policy(model, make_rollouts())
    config = make_config(tokens_per_microbatch=40, dead_groups="keep", grad_clip=1e-3)
    metrics, _ = updated(model, rows, config, accelerator)
    entropies = [h for r in rows for h in row_entropies(model, r).tolist()]
    assert is_close(metrics["entropy"], sum(entropies) / len(entropies), 1e-4)
    total = sum(r.length for r in rows)
    loss = sum(-r.advantage * r.length / total for r in rows)
    assert is_close(metrics["loss"], loss, 1e-5), "the loss of the step, not of its last microbatch"
    plain, unclipped = updated(model, rows, make_config(), accelerator)
    norm = math.sqrt(sum(value.square().sum().item() for value in unclipped.values()))
    assert is_close(metrics["grad_norm"], norm, 1e-4), "before the clip, after the backward pass"
    for r in rows:
        r.reward, r.parts = 0.0, dict(correct=0.0, format=1.0)
    assert rollout_metrics(rows, config)["zero_advantage_groups"] == 1


def test_22_the_evaluation_comes_first_and_repeats(run):
    same = dict(lr=1e-12, steps=1, eval_steps=0)
    rows = [lines(run(**same, seed=seed)["run"], "eval.jsonl") for seed in (0, 0)]
    assert [row["step"] for row in rows[0]] == [0, 1] and rows[0] == rows[1]
    before, after = ({k: v for k, v in row.items() if k != "step"} for row in rows[0])
    assert before == after, "the same model, evaluated again, is exactly as good"
    assert {"accuracy_low", "accuracy_high", "accuracy_sampled_low", "n"} <= before.keys()


def test_23_truncated_answers_are_shown_and_can_be_masked(run, model, make_rollouts, make_config, accelerator):
    assert lines(run(steps=1)["run"], "metrics.jsonl")[0]["truncated"] > 0
    rows = make_rollouts()
    for i, r in enumerate(rows):
        r.truncated = i % 2 == 0
    for weight in ("token", "sequence", "constant"):  # as if they had never been sampled
        configs = [make_config(mask_truncated=mask, loss_weight=weight) for mask in (True, False)]
        masked, whole = (updated(model, rows, config, accelerator)[1] for config in configs)
        kept = updated(model, [r for r in rows if not r.truncated], configs[1], accelerator)[1]
        assert largest_difference(masked, kept) < 1e-6 < largest_difference(masked, whole)


def test_24_the_algorithm_is_written_once():
    """Scripts and notebooks import it: two copies would drift until one no longer runs."""
    functions = {"group_advantages", "policy_loss", "kl_estimate", "token_weights", "update", "batch_loss"}
    found = []
    for path in [*Path(".").glob("*.py"), *Path("mathformer").glob("*.py"), *Path("benchmarks").glob("*.py")]:
        names = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        found += [(name, path.name) for name in names & functions]
    assert sorted(found) == sorted((name, "grpo.py") for name in functions)


def test_25_groups_are_not_mixed_up(run, tokenizer, make_config, model):
    rewards = torch.tensor([[1.0, 0.0], [100.0, 7.0]])
    assert torch.equal(grpo.group_advantages(rewards)[0], grpo.group_advantages(rewards[:1])[0])
    rows = lines(run(steps=2)["run"], "rollouts.jsonl")
    for start in range(0, len(rows), 8):
        group = rows[start : start + 8]
        assert len({row["prompt"] for row in group}) == 1
        right = torch.tensor([[row["reward"] for row in group]], dtype=torch.float64)
        assert [row["advantage"] for row in group] == pytest.approx(grpo.group_advantages(right)[0].tolist())
