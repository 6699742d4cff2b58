"""Puts mistakes into a copy of the source, one at a time, and reports which tests notice.

    python tests/mutation.py                        the mistakes of mutants.py, each against the tests that it names
    python tests/mutation.py schedule NaN           those whose description or tests contain one of the words
    python tests/mutation.py --sample 300 --seed 0  random mistakes made by cosmic-ray, against the tests of their lines

The second kind needs to know which tests run a line, and how long they take. This run finds out (15 minutes):

    python -m pytest --cov --cov-context=test --cov-report= --junitxml=.durations.xml

A random mistake that survives is a question, not a fault: is a test missing, or is the changed code as right as before?
Ends with 1 if a mistake survives.
"""

import argparse
import ast
import difflib
import functools
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent
NOT_MUTATED = ("tests", "benchmarks", "notebooks", "examples", "docs", "runs", "build")
NOT_COPIED = (".*", "runs", "__pycache__")
NO_TESTS = "(there are no such tests)"
# what the tests import, most of which takes seconds
PRELOADED = """
torch torch._dynamo torch.distributed.fsdp torch.distributed.tensor accelerate accelerate.tracking datasets
transformers transformers.modeling_utils transformers.generation.utils transformers.distributed.fsdp
transformers.models.auto.auto_factory transformers.models.gpt2.modeling_gpt2
transformers.models.llama.modeling_llama transformers.models.qwen2.modeling_qwen2
transformers.models.qwen3.modeling_qwen3 transformers.models.bloom.modeling_bloom trl hypothesis jsonargparse
matplotlib.figure nbformat pytest yaml
""".split()


class Place(NamedTuple):
    """A stretch of a source file, in characters."""

    file: str  # from the project's folder
    start: int
    end: int
    line: int


def sources(root: Path = ROOT) -> list[Path]:
    """The project's Python files outside tests, benchmarks and notebooks."""
    found = [path for path in sorted(root.rglob("*.py")) if not path.relative_to(root).parts[0].startswith(".")]
    return [path for path in found if path.relative_to(root).parts[0] not in NOT_MUTATED]


# ==== Mistakes made by hand ===========================================================================================


def definitions(tree: ast.AST, prefix: str = ""):
    """(name, node) of every function, class and assigned name: `train`, `Policy.forward`, `ADVANTAGES`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + node.name, node
            yield from definitions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    yield prefix + target.id, node
        elif isinstance(node, ast.If | ast.With | ast.Try):
            yield from definitions(node, prefix)


def stretches(node: ast.AST, wanted: list[ast.stmt]):
    """The (first, last) nodes inside `node` that are the same code as `wanted`, however they are laid out."""
    if len(wanted) == 1 and isinstance(wanted[0], ast.Expr):
        kind, code = type(wanted[0].value), ast.dump(wanted[0].value)
        yield from ((inner, inner) for inner in ast.walk(node) if type(inner) is kind and ast.dump(inner) == code)
        return
    code = [ast.dump(statement) for statement in wanted]
    for inner in ast.walk(node):
        for block in (getattr(inner, name, None) for name in ("body", "orelse", "finalbody")):
            if isinstance(block, list):
                for i in range(len(block) - len(code) + 1):
                    if [ast.dump(statement) for statement in block[i : i + len(code)]] == code:
                        yield block[i], block[i + len(code) - 1]


parsed = functools.cache(ast.parse)


def code(text: str) -> ast.Module:
    return ast.parse(textwrap.dedent(text).strip())


def offset(lines: list[str], line: int, column: int) -> int:
    """A position of a tree, a line and a column in bytes of UTF-8, as one in the characters of the text."""
    return sum(map(len, lines[: line - 1])) + len(lines[line - 1].encode()[:column].decode())


def find(mutant: Mutant, root: Path = ROOT) -> Place:
    """Where the code is that the mistake replaces: by function and expression, in whatever file and layout.

    Raises:
        LookupError: it is nowhere, or in several places.
    """
    wanted, found = code(mutant.old).body, set()
    for path in sources(root):
        text = path.read_text()
        if mutant.where.split(".")[-1] not in text:
            continue
        lines = text.splitlines(keepends=True)
        for name, node in definitions(parsed(text)):
            for first, last in stretches(node, wanted) if name == mutant.where else ():
                start = offset(lines, first.lineno, first.col_offset)
                end = offset(lines, last.end_lineno, last.end_col_offset)
                found.add(Place(str(path.relative_to(root)), start, end, first.lineno))
    if len(found) != 1:
        where = ", ".join(f"{place.file}:{place.line}" for place in sorted(found)) or "nowhere"
        raise LookupError(f"{mutant.mistake}: `{mutant.old}` in {mutant.where} is to be in one place, but is {where}")
    return found.pop()


def mutated(mutant: Mutant, root: Path = ROOT) -> tuple[str, str]:
    """The file that the mistake is in, and its text with the mistake."""
    place = find(mutant, root)
    text = (root / place.file).read_text()
    indent = " " * (place.start - text.rfind("\n", 0, place.start) - 1)
    new = textwrap.indent(textwrap.dedent(mutant.new).strip(), indent).strip()
    changed = text[: place.start] + new + text[place.end :]
    if ast.dump(code(mutant.old)) == ast.dump(code(mutant.new)):
        raise LookupError(f"{mutant.mistake}: it changes nothing")
    return place.file, changed


# ==== Mistakes made by cosmic-ray =====================================================================================


class Random(NamedTuple):
    """A mutation of cosmic-ray: `operator`, applied for the `occurrence`th time in `file`."""

    file: str
    line: int
    operator: str
    occurrence: int


def annotations(text: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Begin and end of each type annotation, as (line, column): to change one does nothing, or is a crash at import."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
            found.append(node.annotation)
        if isinstance(node, ast.FunctionDef) and node.returns:
            found.append(node.returns)
    return [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in found]


def sample(count: int, seed: int, words: list[str]) -> list[Random]:
    """So many random mistakes, each in another place of the source, with a seed. `words` choose the files."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    operators = {name: get_operator(name)() for name in sorted(operator_names()) if "Variable" not in name}
    places: dict[tuple, list[Random]] = {}
    for path in sources():
        file, text = str(path.relative_to(ROOT)), path.read_text()
        if words and not any(word in file for word in words):
            continue
        skipped, nodes = annotations(text), list(ast_nodes(get_ast(text)))
        for name, operator in operators.items():
            occurrence = 0
            for node in nodes:
                for start, _ in operator.mutation_positions(node):
                    if not any(first <= start < last for first, last in skipped):
                        places.setdefault((file, start), []).append(Random(file, start[0], name, occurrence))
                    occurrence += 1
    rng = random.Random(seed)
    chosen = rng.sample(sorted(places), min(count, len(places)))
    print(f"{len(chosen)} of {len(places)} places, one mistake in each, seed {seed}")
    return [rng.choice(places[place]) for place in chosen]


def random_mutation(mutation: Random) -> str:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    return mutate_code((ROOT / mutation.file).read_text(), get_operator(mutation.operator)(), mutation.occurrence)


class Covering:
    """Which tests run a line, the quickest first."""

    def __init__(self):
        from coverage import CoverageData

        self.data = CoverageData(ROOT / ".coverage")
        self.data.read()
        if not self.data.measured_files() or not (ROOT / ".durations.xml").exists():
            sys.exit(
                f"error: there is no record of which tests run what; make one first:\n{__doc__.splitlines()[8].strip()}"
            )
        self.seconds = {}
        for case in ElementTree.parse(ROOT / ".durations.xml").iter("testcase"):
            test = f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}"
            self.seconds[test] = self.seconds.get(test, 0.0) + float(case.get("time"))

    def tests(self, file: str, line: int, budget: float) -> list[str]:
        """Of the line; of its function, where it is a part of its head; of the file, where it is in none.

        The quickest first, as many as take `budget` seconds together.
        """
        contexts = self.data.contexts_by_lineno(str(ROOT / file))
        function = self.enclosing(file, line)
        for lines in ([line], range(*function) if function else (), contexts):
            found = {c.split("|")[0] for number in lines for c in contexts.get(number, ()) if c}
            if found:
                break
        chosen, spent = [], 0.0
        for test in sorted(found, key=lambda test: (self.seconds.get(test, 1.0), test)):
            if chosen and (spent := spent + self.seconds.get(test, 1.0)) > budget:
                break
            chosen.append(test)
        return chosen

    @staticmethod
    def enclosing(file: str, line: int) -> tuple[int, int] | None:
        """First line and last, exclusive, of the innermost function around a line."""
        nodes = [n for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, ast.FunctionDef)]
        around = [(n.lineno, n.end_lineno + 1) for n in nodes if n.lineno <= line <= n.end_lineno]
        return min(around, key=lambda pair: pair[1] - pair[0], default=None)


# ==== Running the tests ===============================================================================================


def run_pytest(folder: str, tests: list[str], log: str) -> None:
    """In a process of its own, which has torch loaded already."""
    os.setpgid(0, 0)  # so that all that a test starts can be ended with it
    os.chdir(folder)
    sys.path[:] = [folder, f"{folder}/tests", *(path for path in sys.path if not path.startswith(str(ROOT)))]
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1), os.dup2(out, 2)
    import pytest

    code = pytest.main(["-n", "0", "-x", "-q", "--no-header", "-p", "no:cacheprovider", "-m", "", *tests])
    os._exit(int(code))


def failing(file: str, text: str, tests: list[str], timeout: float) -> str:
    """The first of the tests that fails with `text` as the content of `file`; "" if none does."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy, log = Path(folder) / "copy", Path(folder) / "log"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
        (copy / file).write_text(text)
        process = multiprocessing.get_context("forkserver").Process(
            target=run_pytest, args=(str(copy), tests, str(log))
        )
        process.start()
        process.join(timeout)
        if process.is_alive():  # an endless loop, or `eval` of 99**98**97, which does not come back
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            return "(the tests hang)"
        said = log.read_text(errors="replace") if log.exists() else ""
        if process.exitcode == 0:
            return ""
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
        if process.exitcode == 1 and failed:
            return failed[0]
        if "not found:" in said or process.exitcode == 5:  # of a random mistake: their names depend on the source
            return NO_TESTS
        return "(an error at import)" if process.exitcode in (2, 4) else f"(pytest ends with {process.exitcode})"


def prepare() -> None:
    """What conftest sets, before the libraries are loaded."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)


def by_hand(mutant: Mutant) -> tuple[str, str]:
    file, text = mutated(mutant)
    ast.parse(text)  # an error in it would be caught by any test
    if (caught := failing(file, text, list(mutant.tests), timeout=300)) == NO_TESTS:
        raise LookupError(f"{mutant.mistake}: there are no tests {' '.join(mutant.tests)}")
    return caught, f"{mutant.mistake:66}"


def at_random(mutation: Random, covering: Covering, seconds: float) -> tuple[str, str]:
    text, tests = random_mutation(mutation), covering.tests(mutation.file, mutation.line, seconds)
    before = (ROOT / mutation.file).read_text()
    changed = [line for line in difflib.ndiff(before.splitlines(), text.splitlines()) if line[0] in "-+"]
    what = f"{mutation.file}:{mutation.line} {mutation.operator.removeprefix('core/')} ({len(tests)} tests)"
    what = "\n      ".join([what, *changed, ""])
    if not tests:
        return "", f"{what} NO TEST RUNS THIS LINE;"
    return failing(mutation.file, text, tests, timeout=60 + 5 * seconds), what


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="of descriptions and tests; with --sample, of files; all if none")
    parser.add_argument("--sample", type=int, metavar="N", help="so many random mistakes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60, help="of tests that are spent on a random mistake")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    prepare()
    if options.sample:
        covering = Covering()
        chosen = sample(options.sample, options.seed, options.words)
        check = functools.partial(at_random, covering=covering, seconds=options.seconds)
    else:
        chosen = [m for m in MUTANTS if not options.words or any(w in f"{m.mistake} {m.tests}" for w in options.words)]
        check = by_hand
    survivors, started = 0, time.time()
    with ThreadPoolExecutor(options.jobs) as pool:
        for i, (caught, what) in enumerate(pool.map(check, chosen), 1):
            survivors += not caught
            print(f"{i:3} {what} {caught or 'SURVIVED'}", flush=True)
    print(f"{len(chosen)} mistakes, {survivors} not caught, {time.time() - started:.0f} s")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
