"""The workshop: notebooks as built, run untouched and solved; each classic mistake and each bad function named."""

import re
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent.parent / "notebooks"
sys.path.insert(0, str(HERE))

import build  # noqa: E402
import nbformat  # noqa: E402
import workshop  # noqa: E402

SOURCES = build.sources()
MISTAKES = [(name, text) for name, (_, mistakes) in workshop.EXERCISES.items() for text in mistakes]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_rebuild_changes_nothing(source):
    assert nbformat.writes(build.build(source)).strip() == (HERE / f"{source.stem}.ipynb").read_text().strip()
    assert len(build.build(source).cells) <= 25


def printed(notebook) -> str:
    return "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))


LONG = ("01_rollouts", "04_train_it")


@pytest.mark.parametrize(
    "source",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in LONG)) for path in SOURCES],
)
def test_untouched_and_solved_run_to_the_end(source):
    notebook = build.build(source)
    exercises = sum(bool(build.EXERCISE.search(c.source)) for c in notebook.cells if c.cell_type == "code")
    assert printed(build.execute(notebook)).count("not written yet") == exercises
    text = printed(build.execute(build.solve(build.build(source))))
    assert len(re.findall(r": right, values and gradients", text)) == exercises and "not yet" not in text
    assert "False" not in text


@pytest.mark.parametrize("name, mistake", MISTAKES)
def test_a_classic_mistake_is_named(name, mistake):
    assert workshop.complaint(workshop.EXERCISES[name][1][mistake], name) == mistake


@pytest.mark.parametrize("name", list(workshop.EXERCISES))
def test_the_answers_are_right(name):
    assert workshop.complaint(workshop.answer(name), name) == ""


def raises(logps, ref, kind="k3"):
    raise RuntimeError("sizes differ")


@pytest.mark.parametrize(
    "function, message",
    [
        (raises, "raised RuntimeError: sizes differ"),
        (lambda p, r, kind="k3": (p - r).sum(), r"shape \[\], wanted is \[3, 4\]"),
        (lambda p, r, kind="k3": (p - r).long(), "dtype torch.int64"),
        (lambda p, r, kind="k3": torch.zeros_like(p), "a constant"),
        (lambda p, r, kind="k3": torch.rand(p.shape), "detached"),
        (lambda p, r, kind="k3": None, "raised"),
    ],
)
def test_bad_functions_are_described(function, message):
    found = workshop.complaint(function, "kl_estimate")
    assert re.search(message, found) and "(on k1, random log-probs)" in found


def test_check_goes_on_with_the_library(capsys):
    def kl_estimate(logps, ref_logps, kind="k3"):
        raise NotImplementedError

    assert workshop.check(kl_estimate) is workshop.answer("kl_estimate")
    assert "not written yet" in capsys.readouterr().out
