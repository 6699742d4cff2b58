"""The mistakes of mutants.py can still be made: their places are there, once, and so are the tests that they name."""

import re
from pathlib import Path

import mutation
import pytest
import quick
import test_settings
from mutants import MUTANTS, Mutant

HERE = Path(__file__).parent


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.mistake)
def test_a_mistake_can_be_made_and_names_a_test(mutant):
    mutation.mutated(mutant)
    path, _, name = mutant.tests[0].partition("::")
    source = (mutation.ROOT / path).read_text()
    assert not name or re.search(rf"^def {name}\(", source, re.MULTILINE), name
    if "-k" in mutant.tests:  # of the cases of test_settings.py
        for word in mutant.tests[-1].split(" or "):
            assert any(word in case.name for case in test_settings.CASES), word


SOURCE = '''
"""Of a project."""
import os


class Sampler:
    def draw(self, rows, é="é"):
        found = [self.one(row,  # a comment
                          1) for row in rows]
        if found:
            found.sort()
            return found


def other(rows):
    return [self.one(row, 1) for row in rows]
'''


@pytest.mark.parametrize(
    "where, old, new, changed",
    [
        ("Sampler.draw", "self.one(row, 1)", "None", "found = [None for row in rows]"),
        ("Sampler.draw", "found.sort()\nreturn found", "return", "        if found:\n            return\n"),
        ("Sampler.draw", "found.sort()", "a = 1\nb = 2", "            a = 1\n            b = 2\n            return"),
        ("other", "self.one(row, 1)", "self.one(row, 2)", "return [self.one(row, 2) for row in rows]"),
    ],
)
def test_a_place_is_found_by_function_and_code_however_it_is_laid_out(where, old, new, changed, tmp_path):
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "sampling.py").write_text(SOURCE)
    file, text = mutation.mutated(Mutant("a mistake", where, old, new, ()), tmp_path)
    assert file == "room/sampling.py" and changed in text and '"""Of a project."""' in text
    assert len(text.splitlines()) <= len(SOURCE.splitlines()) + 1


@pytest.mark.parametrize(
    "where, old, new, said",
    [
        ("Sampler", "self.many(row)", "None", "is nowhere"),
        ("Nobody.draw", "self.one(row, 1)", "None", "is nowhere"),
        ("Sampler.draw", "found", "rows", "sampling.py:10, sampling.py:11, sampling.py:12"),
        ("Sampler.draw", "self.one(row, 1)", "self.one( row , 1 )", "it changes nothing"),
    ],
)
def test_a_place_that_is_not_there_once_is_an_error(where, old, new, said, tmp_path):
    (tmp_path / "sampling.py").write_text(SOURCE)
    with pytest.raises(LookupError, match=f"^a mistake: .*{re.escape(said)}"):
        mutation.mutated(Mutant("a mistake", where, old, new, ()), tmp_path)


def test_every_file_of_the_project_can_have_mistakes():
    found = {str(path.relative_to(mutation.ROOT)) for path in mutation.sources()}
    assert {"grpo.py", "variants.py", "harness/metrics.py", "tasks/countdown.py", "view/report.py"} <= found
    assert not any(name.startswith(("tests", "benchmarks", "notebooks", ".")) for name in found)


def test_the_quick_tests_catch_at_least_half_of_the_mistakes():
    slow = quick.slow_functions()
    named = [mutant.tests[0].removeprefix("tests/") for mutant in MUTANTS]
    caught = [test for test in named if test not in slow and "-k" not in test]
    assert len(caught) >= len(MUTANTS) / 2
    rooms = {path.parent.name for path in HERE.rglob("test_*.py")} - {HERE.name}
    tests = {quick.function_of(p.relative_to(HERE).as_posix(), name) for p in HERE.rglob("test_*.py")
             for name in re.findall(r"^def (test_\w+)", p.read_text(), re.MULTILINE)}  # fmt: skip
    assert rooms <= {test.partition("/")[0] for test in tests - slow if "/" in test}, "each room is looked at"
    assert slow <= tests, "a test of not_quick.txt is gone: python tests/quick.py"
