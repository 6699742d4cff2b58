"""Finds assertions that cannot fail, or that are never asked, by watching the tests run.

    python tests/vacuous.py                     the whole suite (15 minutes)
    python tests/vacuous.py tests/test_loss.py

In a copy of the tests, each assertion notes what it sees. What is printed is to be looked at, one by one:

    never reached      in a loop over nothing, or in a branch that no test takes
    all of nothing     `all(...)` over what was empty each time
    true each time     a part of an `or` that was true whenever it was asked, so that the other parts do not count
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTES = '''
import atexit, builtins, json, os

seen = {}


def note(place, what, value):
    key = f"{place} {what}"
    seen[key] = seen.get(key, True) and bool(value)


def noted_all(values, place):
    values = list(values)
    note(place, "all of nothing", not values)
    return all(values)


def noted_or(place, *parts):
    """`or` of the parts, of which each is asked, also where one before it was true."""
    for i, part in enumerate(parts, 1):
        try:
            note(place, f"true each time: part {i}", part())
        except Exception:
            note(place, f"true each time: part {i}", False)
    for part in parts:
        if value := part():
            return value
    return value


@atexit.register
def write():
    with open(f"{os.environ['VACUOUS']}/{os.getpid()}.json", "w") as file:
        json.dump(seen, file)


builtins.__dict__.update(note=note, noted_all=noted_all, noted_or=noted_or)
'''


class Noting(ast.NodeTransformer):
    """Makes each assertion of a file note what it sees."""

    def __init__(self, file: str):
        self.file, self.places, self.inside = file, [], None

    def visit_Assert(self, node: ast.Assert):
        self.inside = place = f"{self.file}:{node.lineno}"
        self.places.append(place)
        self.generic_visit(node)
        self.inside = None
        return [ast.parse(f"note({place!r}, 'reached', True)").body[0], node]

    def visit_Call(self, node: ast.Call):
        self.generic_visit(node)
        if self.inside and isinstance(node.func, ast.Name) and node.func.id == "all":
            node.func.id = "noted_all"
            node.args.append(ast.Constant(self.inside))
        return node

    def visit_BoolOp(self, node: ast.BoolOp):
        self.generic_visit(node)
        if not self.inside or isinstance(node.op, ast.And):
            return node
        nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        parts = [ast.Lambda(nothing, value) for value in node.values]
        return ast.Call(ast.Name("noted_or", ast.Load()), [ast.Constant(self.inside), *parts], [])


def main(tests: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy, notes = Path(folder) / "copy", Path(folder) / "notes"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__"))
        notes.mkdir()
        places: list[str] = []
        for path in sorted((copy / "tests").glob("test_*.py")):
            noting = Noting(path.name)
            path.write_text(ast.unparse(ast.fix_missing_locations(noting.visit(ast.parse(path.read_text())))))
            places += noting.places
        conftest = copy / "tests" / "conftest.py"
        conftest.write_text(NOTES + conftest.read_text())
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        subprocess.run(command, cwd=copy, env=os.environ | {"VACUOUS": str(notes)})
        seen: dict[str, bool] = defaultdict(lambda: True)
        for file in notes.glob("*.json"):
            for key, value in json.loads(file.read_text()).items():
                seen[key] &= value
    chosen = {Path(test.partition("::")[0]).name for test in tests if test.endswith(".py") or "::" in test}
    for place in places:
        found = [key.removeprefix(f"{place} ") for key, value in seen.items() if value and key.startswith(f"{place} ")]
        if chosen and place.partition(":")[0] not in chosen:
            continue
        if "reached" not in found:
            print(f"tests/{place}: never reached")
        for what in sorted(set(found) - {"reached"}):
            print(f"tests/{place}: {what}")


if __name__ == "__main__":
    main(sys.argv[1:])
