"""python -m mathformer.train, .train_rl and .evaluate."""

import csv
import json
import os
import random
import shutil
import signal
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import transformers
from conftest import PRETRAINED
from safetensors.torch import load_file

import grpo
from harness.evaluation import wilson_interval
from mathformer import evaluate, train, train_rl
from mathformer.evaluate import EvaluationConfig, accuracy_by, load_checkpoint, trained_on
from mathformer.train import PretrainConfig, build_model, pretrain
from mathformer.train_rl import RLConfig

TINY = dict(modelsize="tiny", max_depth=1, steps=100, batch_size=32, final_share=0.25)


def weights(folder) -> dict:
    return load_file(Path(folder) / "model.safetensors")


def said_at_exit(main, argv: list[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code not in (0, None)
    return str(exit_.value.code)


# Pretraining


def test_pretraining_learns_repeats_and_leaves_a_model(tmp_path):
    for name in ("a", "b"):
        assert pretrain(PretrainConfig(output=str(tmp_path / name), log_csv=str(tmp_path / f"{name}.csv"), **TINY))
    a, b = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "ab")
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    losses = [float(row["loss"]) for row in csv.DictReader((tmp_path / "a.csv").open())]
    assert losses[-1] < 2.7  # it starts at log(33) = 3.5
    assert not list((tmp_path / "a").glob("checkpoint-*"))
    with pytest.raises(ValueError, match="exists already"):
        pretrain(PretrainConfig(output=str(tmp_path / "a")))


@pytest.mark.floats
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(dropout=0.2, endian="both", spaces=0.1, parentheses=0.1, negatives=0.1, operators="all", columns=True),
        dict(num_experts=3, active_experts=2),
    ],
)
def test_stopped_and_resumed_pretraining_equals_uninterrupted(tmp_path, monkeypatch, capsys, settings):
    whole = PretrainConfig(output=str(tmp_path / "whole"), **TINY | settings)
    pretrain(whole)
    rate = train.learning_rate

    def interrupt(config, step):
        if step == 40:  # in the second pool of 32 batches; the second phase starts at 75
            os.kill(os.getpid(), signal.SIGINT)
        return rate(config, step)

    monkeypatch.setattr(train, "learning_rate", interrupt)
    stopped = tmp_path / "stopped"
    assert not pretrain(PretrainConfig(output=str(stopped), **TINY | settings))
    monkeypatch.setattr(train, "learning_rate", rate)
    assert f"--resume {stopped}" in capsys.readouterr().out
    assert (stopped / "checkpoint-64").is_dir() and not (stopped / "model.safetensors").exists()
    state = json.loads((stopped / "checkpoint-64" / "state.json").read_text())
    assert state["answers"] == 64 * 32 and 0 <= state["right"] <= state["answers"] and state["seconds"] > 0
    assert pretrain(PretrainConfig(resume=str(stopped)))
    a, b = weights(whole.output), weights(stopped)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    def without_seconds(folder):
        return [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (Path(folder) / "metrics.jsonl").open()
        ]

    assert without_seconds(whole.output) == without_seconds(stopped)


def test_pretraining_writes_checkpoints_that_load(tmp_path, monkeypatch):
    seen, save = [], grpo.RunFolder.save_checkpoint

    def watched(self, step, *args, **kwargs):
        save(self, step, *args, **kwargs)
        seen.append(step)
        model, tokenizer = load_checkpoint(str(self.path / f"checkpoint-{step}"), modelsize="tiny")
        assert tokenizer("3+4")["input_ids"]

    monkeypatch.setattr(grpo.RunFolder, "save_checkpoint", watched)
    pretrain(PretrainConfig(output=str(tmp_path / "a"), **TINY | dict(save_steps=30)))
    assert seen == [32, 64]  # between two pools; the second phase, from 75 on, starts one of its own


def test_each_expert_receives_tokens_after_pretraining(tmp_path, tokenizer):
    folder = tmp_path / "mixture"
    pretrain(PretrainConfig(output=str(folder), **TINY | dict(num_experts=4, active_experts=1, balance_coef=0.05)))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert 1 <= rows[-1]["balance"] < 1.5
    model, _ = load_checkpoint(str(folder), "tiny", 4, 1)
    ids = [tokenizer(text)["input_ids"] for text in ("<sos><big>3+4", "<sos><big>7-2", "<sos><big>5*8")]
    rollouts = [grpo.Rollout(prompt, [6, 7, 8, 2], [0.0] * 4, False) for prompt in ids]
    load = evaluate.expert_load(model, rollouts)
    assert len(load) == 3 and all(sum(layer) == pytest.approx(1) for layer in load)
    wide = [grpo.Rollout([i], [j, 2], [0.0] * 2, False) for i in range(3, 33) for j in range(3, 33)]
    assert min(share for layer in evaluate.expert_load(model, wide) for share in layer) > 0


def test_sizes(tokenizer):
    counts = {size: sum(p.numel() for p in build_model(size, tokenizer).parameters()) for size in ("tiny", "small")}
    assert counts["tiny"] < 100_000 < counts["small"] < 250_000


@pytest.mark.parametrize(
    "argv, said",
    [
        ([], "give --output"),
        (["--output", "x", "--resume", "y"], "give --output"),
        (["--resume", "/nowhere/base"], "/nowhere/base holds no checkpoint of a pretraining"),
        (["--resume", "y", "--steps", "10"], "leave the others out"),
        (["--output", "x", "--modelsize", "huge"], "modelsize 'huge': choose one of tiny, small, medium, large"),
        (["--output", "x", "--num_experts", "4", "--active_experts", "5"], "active_experts is 5, it must be from 1 to"),
        (["--output", "x", "--max_depth", "0"], "max_depth is 0, it must be 1 or more"),
        (["--output", "x", "--operators", "+^"], "there is no operator '^'; choose from + - * / %"),
        (["--output", "x", "--prob_scratchpad", "1.5"], "prob_scratchpad is 1.5"),
        (["--output", "x", "--steps", "0"], "steps is 0"),
        (
            ["--output", "x", "--log_csv", "nowhere/a.csv"],
            "nowhere/a.csv cannot be written: there is no folder nowhere",
        ),
        (["--output", "x", "--lr", "0"], "lr is 0.0"),
        (["--output", "x", "--dropout", "1"], "hidden_dropout is 1.0"),
    ],
)
def test_bad_input_of_pretraining(argv, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in said_at_exit(train.main, argv)
    assert not list(tmp_path.iterdir())


# Reinforcement learning

SHORT = ["--steps", "2", "--batch_size", "4", "--max_gen_len", "40"]


def test_train_rl_trains_evaluates_and_leaves_a_csv_and_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grpo.Config, "eval_samples", 2)
    runs, log = tmp_path / "runs", tmp_path / "log.csv"
    argv = [
        "--checkpoint",
        PRETRAINED,
        "--runs",
        str(runs),
        "--log_csv",
        str(log),
        "--eval_interval",
        "1",
        "--max_depth",
        "1",
        *SHORT,
    ]
    with pytest.raises(SystemExit) as exit_:
        train_rl.main(argv)
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert "Improvement: " in printed and " points, the 95 % intervals overlap" in printed
    assert [row["step"] for row in csv.DictReader(log.open())] == ["1", "2"]
    (run,) = runs.iterdir()
    assert [json.loads(line)["step"] for line in (run / "eval.jsonl").open()] == [0, 1, 2]
    load_checkpoint(str(run / "final"), "small", 1, 1)
    # what the run was trained on is known from its folder
    expected = dict(max_digits=1, max_depth=1, operators="+-*", max_value=99)
    assert expected.items() <= trained_on(str(run / "final")).items()


def test_flags_become_settings_of_grpo():
    flags = dict(steps=7, batch_size=5, group_size=6, lr=1e-3, max_gen_len=30, kl_coef=0.2, kl_target=0.3, epochs=2)
    flags |= dict(clip_ratio=0.1, temperature=0.9, top_k=9, grad_clip=2.0, save_interval=11, eval_interval=13, seed=3)
    flags |= dict(max_depth=2, operators="+-", partial_credit=0.25, curriculum_steps=50, runs="r")
    config = RLConfig(checkpoint=PRETRAINED, **flags).grpo_config()
    problems = dict(max_digits=1, max_depth=2, operators="+-", max_value=99, partial_credit=0.25, curriculum_steps=50)
    assert config == grpo.Config(
        model=PRETRAINED, task="arithmetic", task_args=problems, prompts_per_step=5, group_size=6, lr=1e-3, steps=7,
        max_completion_tokens=30, kl_coef=0.2, kl_target=0.3, epochs=2, clip_low=0.1, clip_high=0.1, temperature=0.9,
        top_k=9, grad_clip=2.0, save_steps=11, eval_steps=13, seed=3, runs="r", tokens_per_microbatch=2048,
    )  # fmt: skip


def changed(path, **settings) -> str:
    """A copy of the shipped checkpoint whose config.json says otherwise."""
    shutil.copytree(PRETRAINED, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | settings))
    return str(path)


def bad_checkpoints(tmp_path, kind: str) -> str:
    folder = tmp_path / "checkpoint"
    if kind == "truncated file":
        changed(folder)
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif kind == "no JSON":
        changed(folder)
        (folder / "config.json").write_text("{")
    elif kind == "another width":
        changed(folder, hidden_size=48)
    elif kind == "more layers":
        changed(folder, num_hidden_layers=5)
    elif kind == "experts":
        changed(folder, num_experts=4, active_experts=5)
    elif kind == "another vocabulary":
        changed(folder)
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["+"], vocabulary["-"] = vocabulary["-"], vocabulary["+"]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    elif kind == "another architecture":
        changed(folder)
        config = transformers.LlamaConfig(
            vocab_size=33, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("main", [train_rl.main, evaluate.main])
@pytest.mark.parametrize(
    "kind, said",
    [
        ("truncated file", "cannot be loaded: Error while deserializing"),
        ("no JSON", "cannot be loaded: Expecting property name"),
        ("another width", "do not fit its config.json"),
        ("more layers", "transformer.h.4.input_layernorm.bias is missing, and 11 more"),
        ("experts", "active_experts is 5, it must be from 1 to num_experts, 4"),
        ("another vocabulary", "has another vocabulary"),
        ("another architecture", "is a llama model"),
        ("missing", "cannot be loaded"),
    ],
)
def test_bad_checkpoints(main, kind, said, tmp_path, monkeypatch):
    folder = bad_checkpoints(tmp_path, kind)
    monkeypatch.chdir(tmp_path)
    quick = ["--steps", "0"] if main is train_rl.main else ["--problems", "1"]  # should it go on after all
    message = said_at_exit(main, ["--checkpoint", folder, *quick])
    assert said in message and folder in message and message.startswith("error: ") and "\n" not in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--modelsize", "medium"], f"modelsize is 'medium', but {PRETRAINED} has 'small'"),
        (["--num_experts", "4"], f"num_experts is 4, but {PRETRAINED} has 1"),
        (["--active_experts", "2"], f"active_experts is 2, but {PRETRAINED} has 1"),
        (["--max_depth", "0"], "max_depth is 0, it must be 1 or more"),
        (["--log_csv", "nowhere/a.csv"], "there is no folder nowhere"),
        (["--max_digits", "3"], "max_digits 3 needs a max_value of 100 or more"),
        (["--operators", "^"], "there is no operator '^'"),
        (["--group_size", "1"], "group_size is 1, it must be 2 or more"),
        (["--partial_credit", "1"], "partial_credit is 1.0"),
        (["--kl_target", "0.1", "--kl_coef", "0"], "kl_coef must start above 0"),
    ],
)
def test_bad_input_of_train_rl(argv, said, tmp_path):
    assert said in said_at_exit(
        train_rl.main, ["--checkpoint", PRETRAINED, "--steps", "0", "--runs", str(tmp_path), *argv]
    )
    assert not list(tmp_path.iterdir())


# Evaluation


def test_evaluation_of_the_shipped_model(tmp_path, capsys, monkeypatch):
    out, prefixes, complete = tmp_path / "accuracy.json", [], grpo.complete

    def watched(*args):
        prefixes.append(args[7:])
        return complete(*args)

    monkeypatch.setattr(grpo, "complete", watched)
    evaluate.main(["--checkpoint", PRETRAINED, "--problems", "60", "--samples", "4", "--out", str(out)])
    assert prefixes[-2:] == [("<scratchpad>",), ("<answer>",)]  # made to work, and made to answer at once
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    rows = {row["problems"]: row for row in result["accuracy"]}
    everything, row = rows["all"], result["evaluation"]
    assert everything["n"] == row["n"] == 60
    assert everything["greedy"] == row["accuracy"] and everything["greedy_low"] == row["accuracy_low"]
    assert everything["sampled"] == pytest.approx(row["accuracy_sampled"])
    assert everything["worked"] == row["accuracy_worked"] > 0.9
    assert everything["direct"] < 0.6
    assert sum(rows[f"depth {d}"]["n"] for d in (1, 2, 3) if f"depth {d}" in rows) == 60
    assert set(row["pass_at_k"]) == {"1", "2", "4"}
    for text in ("will it learn?", "pass@k", "operator *", "depth 3", "digits 1", "result an integer"):
        assert text in printed


def test_accuracy_by_counts_each_problem_where_it_belongs():
    problems = [dict(expression=text, value=value) for text, value in [("3+4*2", 11), ("12/5", Fraction(12, 5))]]
    rows = {row["problems"]: row for row in accuracy_by(problems, [dict(greedy=1.0), dict(greedy=0.0)])}
    assert {name: (row["n"], row["greedy"]) for name, row in rows.items()} == {
        "all": (2, 0.5), "depth 1": (1, 0.0), "depth 2": (1, 1.0), "operator *": (1, 1.0), "operator +": (1, 1.0),
        "operator /": (1, 0.0), "digits 1": (1, 1.0), "digits 2": (1, 0.0), "result a fraction": (1, 0.0),
        "result an integer": (1, 1.0),
    }  # fmt: skip
    assert (rows["all"]["greedy_low"], rows["all"]["greedy_high"]) == wilson_interval(0.5, 2)


def test_one_expression_is_shown(capsys):
    evaluate.main(["--checkpoint", PRETRAINED, "--expression", "(3 + 4)*5"])
    printed = capsys.readouterr().out
    assert "<scratchpad>3+4=7;7*5=35<answer>35" in printed and "of 100 samples" in printed
    assert printed.splitlines()[-1].split() == ["value", "35"]


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--expression", "3+4*"], "a number, a function or ( was expected at symbol 5 of '3+4*'"),
        (["--expression", "7"], "'7' is a number: there is nothing to work out"),
        (["--expression", "1/0"], "'1/0' divides by zero"),
        (["--max_depth", "0"], "max_depth is 0"),
        (["--problems", "0"], "eval_size is 0"),
        (["--samples", "0"], "eval_samples is 0"),
    ],
)
def test_bad_input_of_evaluate(argv, said):
    assert said in said_at_exit(evaluate.main, ["--checkpoint", PRETRAINED, *argv])


def test_a_checkpoint_of_unknown_origin_gets_the_default_problems(tmp_path):
    folder = changed(tmp_path / "checkpoint")
    assert trained_on(folder)["operators"] == "+-*"
    (Path(folder) / "pretraining.json").unlink()
    assert trained_on(folder) == {}
    config = EvaluationConfig(checkpoint=folder, operators="+", max_digits=2)
    assert evaluate.problem_settings(config) == dict(operators="+", max_digits=2)


# Pretraining, by hand


def test_the_learning_rate_of_pretraining():
    """Up along a line over 2 % of the steps, then down along a cosine to 1 % of the peak."""
    config = PretrainConfig(output="x", steps=1000, lr=2e-3)
    rate = [train.learning_rate(config, step) for step in range(1000)]
    assert rate[0] == pytest.approx(2e-3 / 20) and rate[9] == pytest.approx(2e-3 / 2)
    assert max(rate) == rate[19] == pytest.approx(2e-3, rel=0.01)
    assert rate[500] == pytest.approx(2e-3 * (0.01 + 0.99 / 2)) and rate[999] == pytest.approx(2e-5, rel=0.01)


def test_the_loss_of_pretraining_is_the_token_mean_over_a_pool(tokenizer):
    config = PretrainConfig(output="x", batch_size=4)
    drawn = list(train.batches(random.Random(0), config, config.task(), tokenizer, 0.5))
    tokens = [int((labels != -100).sum()) for _, labels, _, _ in drawn]
    assert len(drawn) == train.POOL and len({weight for *_, weight in drawn}) == 1
    assert sum(n * weight for n, (*_, weight) in zip(tokens, drawn, strict=True)) == pytest.approx(train.POOL)
    for ids, labels, lengths, _ in drawn:
        assert ids.shape == labels.shape and ids.shape[1] == lengths.max()
        assert all((row[length:] == tokenizer.pad_token_id).all() for row, length in zip(ids, lengths, strict=True))


def test_what_reaches_the_optimizer_of_pretraining(tmp_path, monkeypatch):
    """The rate of each step, a gradient of norm 1 at most, and AdamW as it was chosen."""
    made, rates, norms, step = [], [], [], torch.optim.AdamW.step

    def watched(self, *args):
        if not made:
            made.append(self.defaults)
        rates.append(self.param_groups[0]["lr"])
        norms.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]).norm().item())
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    config = PretrainConfig(output=str(tmp_path / "a"), **TINY | dict(steps=10, lr=2e-3, weight_decay=0.2))
    pretrain(config)
    assert rates == [train.learning_rate(config, i) for i in range(10)] and max(norms) == pytest.approx(1, rel=1e-3)
    assert made[0]["betas"] == (0.9, 0.98) and made[0]["weight_decay"] == 0.2


def test_a_fresh_model_has_small_random_weights(tokenizer):
    torch.manual_seed(0)
    weights = dict(build_model("small", tokenizer).named_parameters())
    assert {name for name, value in weights.items() if value.std() > 0} == {
        n for n, v in weights.items() if v.dim() == 2
    }
    for name, value in weights.items():
        if value.dim() == 2:
            assert value.std().item() == pytest.approx(0.02, rel=0.1) and abs(value.mean().item()) < 2e-3, name
        else:
            assert (value == (1 if "layernorm.weight" in name or name.endswith("ln_f.weight") else 0)).all(), name


def test_the_first_row_of_pretraining_by_hand(tmp_path, monkeypatch, tokenizer):
    """Loss and accuracy of a model that has learned nothing yet; an answer is right if all of it is."""
    seen, draw = [], train.batches
    monkeypatch.setattr(train, "batches", lambda *args: seen.extend(found := list(draw(*args))) or iter(found))
    config = PretrainConfig(output=str(tmp_path / "a"), **TINY | dict(steps=1, final_share=0, seed=5))
    pretrain(config)
    torch.manual_seed(5)
    model, (ids, labels, _, _) = build_model("tiny", tokenizer), seen[0]
    logits, labels = model(ids[:, :-1]).logits, labels[:, 1:]
    (row,) = (json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").open())
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-4)
    right = (logits.argmax(-1) == labels)[labels != -100]
    assert row["accuracy"] == 0 < right.float().mean(), "tokens are right by chance, no whole answer is"
    assert row["step"] == 1 and row["tokens"] == (labels != -100).sum() and row["lr"] == train.learning_rate(config, 0)


def test_the_experts_are_balanced_over_real_tokens(tmp_path, monkeypatch, tokenizer):
    seen, real, draw, loss = [], [], train.batches, train.load_balancing_loss
    monkeypatch.setattr(train, "batches", lambda *args: seen.extend(found := list(draw(*args))) or iter(found))
    monkeypatch.setattr(train, "load_balancing_loss", lambda *args: (real.append(args[1]), loss(*args))[1])
    pretrain(PretrainConfig(output=str(tmp_path / "a"), **TINY | dict(steps=32, final_share=0, num_experts=2)))
    for (ids, *_), mask in zip(seen, real, strict=False):
        assert torch.equal(mask, ids[:, :-1].flatten() != tokenizer.pad_token_id)
    assert len(real) == 32 and not all(mask.all() for mask in real)


def test_the_load_of_experts_is_that_of_real_tokens(tokenizer):
    torch.manual_seed(0)
    model = build_model("tiny", tokenizer, num_experts=4, active_experts=2).eval()
    rows = [grpo.Rollout([1, 3, 8, 9], [6, 7, 2], [0.0] * 3, False), grpo.Rollout([1, 3], [6, 2], [0.0] * 2, False)]
    together, alone = evaluate.expert_load(model, rows), [evaluate.expert_load(model, [row]) for row in rows]
    for layer, shares in enumerate(together):
        expected = [(7 * a + 4 * b) / 11 for a, b in zip(alone[0][layer], alone[1][layer], strict=True)]
        assert shares == pytest.approx(expected)


def test_a_mixture_is_evaluated_with_the_load_of_its_experts(tmp_path, tokenizer, capsys):
    torch.manual_seed(0)
    build_model("tiny", tokenizer, num_experts=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    flags = ["--problems", "4", "--samples", "1", "--max_gen_len", "4"]
    evaluate.main(["--checkpoint", str(tmp_path), *flags, "--out", str(tmp_path / "out.json")])
    load = json.loads((tmp_path / "out.json").read_text())["expert_load"]
    assert len(load) == 3 and all(sum(shares) == pytest.approx(1) for shares in load)
    printed = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  layer")]
    assert printed == [f"layer {i}: {a:.1%}, {b:.1%}" for i, (a, b) in enumerate(load, 1)]
