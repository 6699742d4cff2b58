"""The default run learns: a short one on two seeds here, all of it behind `-m slow`."""

import json
from pathlib import Path

import pytest
from conftest import PRETRAINED

import grpo
from harness.evaluation import verdict


@pytest.mark.parametrize("seed", [0, 1])
def test_twelve_steps_of_the_default_run_learn(seed, tmp_path):
    settings = ["--steps", "12", "--seed", str(seed), "--runs", str(tmp_path), "--eval_steps", "0"]
    summary = grpo.train(grpo.parse_config([*settings, "--task_args.eval_size", "300", "--print_groups", "0"]))
    first, last = summary["first"], summary["last"]
    # over seeds 0 to 3 on the machine of docs/results.md: worked .07 -> .21, length 5.4 -> 8.8, sampled .35 -> .40
    assert last["worked"] > first["worked"] + 0.05
    assert last["length"] > first["length"] + 1.5
    assert last["accuracy_sampled"] > first["accuracy_sampled"]
    metrics = [json.loads(line) for line in (summary["run"] / "metrics.jsonl").read_text().splitlines()]
    assert max(row["sampler_logp_gap"] for row in metrics) < 1e-4
    assert sum(row["skipped_updates"] for row in metrics) == 0


def test_the_base_can_work_but_mostly_does_not(tmp_path):
    """What docs/small_model.md says of the base: able with steps, poor without, in the habit of going without."""
    config = grpo.parse_config(["--steps", "0", "--runs", str(tmp_path)])
    first = grpo.train(config)["first"]
    assert first["accuracy"] < 0.5 and first["worked"] < 0.15
    assert first["accuracy_worked"] > 0.95
    assert "yes" in verdict(first)


def test_the_shipped_checkpoint_is_small():
    size = sum(path.stat().st_size for path in Path(PRETRAINED).iterdir())
    assert size < 2_000_000


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_default_run_ends_above_90_percent(seed, tmp_path):
    summary = grpo.train(grpo.parse_config(["--seed", str(seed), "--runs", str(tmp_path)]))
    assert summary["first"]["accuracy"] <= 0.5 and summary["first"]["worked"] < 0.15
    assert summary["last"]["accuracy"] >= 0.9 and summary["last"]["worked"] > 0.9
