"""The default run learns: its first steps on two seeds here, all of it behind `-m slow`."""

import json

import pytest
from conftest import PRETRAINED

import grpo


def first_steps(seed: int, tmp_path, steps: int = 20) -> list[dict]:
    """Metrics of the first steps of the plain command, with a small evaluation."""
    settings = ["--steps", str(steps), "--seed", str(seed), "--runs", str(tmp_path), "--task_args.eval_size", "100"]
    summary = grpo.train(grpo.parse_config([*settings, "--eval_steps", "0", "--print_steps", "0"]))
    return [json.loads(line) for line in (summary["run"] / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_steps_of_the_default_run_learn(seed, tmp_path):
    metrics = first_steps(seed, tmp_path)
    for key, margin in {"reward": 0.04, "worked": 0.15, "length": 3.0}.items():
        early, late = (sum(row[key] for row in rows) / 5 for rows in (metrics[:5], metrics[-5:]))
        assert late > early + margin, (key, early, late)
    assert max(row["sampler_logp_gap"] for row in metrics) < 1e-4
    assert max(row["peak_memory"] for row in metrics) < 3, "of the whole test process; the default run stays under 1.5"


def test_the_base_can_work_but_mostly_does_not(tmp_path):
    """What the README says of the shipped model: able with steps, poor without, in the habit of going without."""
    config = grpo.parse_config(["--steps", "0", "--runs", str(tmp_path)])
    first = grpo.train(config)["first"]
    assert first["accuracy"] < 0.5 and first["worked"] < 0.15
    assert first["accuracy_worked"] > 0.95
    assert "yes" in grpo.verdict(first)


def test_the_shipped_checkpoint_is_small():
    size = sum(path.stat().st_size for path in grpo.Path(PRETRAINED).iterdir())
    assert size < 2_000_000


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_default_run_ends_above_90_percent(seed, tmp_path):
    summary = grpo.train(grpo.parse_config(["--seed", str(seed), "--runs", str(tmp_path)]))
    assert summary["first"]["accuracy"] <= 0.5 and summary["first"]["worked"] < 0.15
    assert summary["last"]["accuracy"] >= 0.9 and summary["last"]["worked"] > 0.9
