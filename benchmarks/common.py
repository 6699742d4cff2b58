"""What the scripts of this folder share: options, runs of a program, arms times seeds, and the text of a table.

Every script prints its table and writes it to results/, with the machine, the versions and the commit.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))  # where a script finds grpo, harness and mathformer


def arguments(about: str, out: str = "", tiny: str = "", one: int = 0, **defaults) -> argparse.ArgumentParser:
    """An option for each default: a value, a list of numbers, or a dict of arms, of which some can be chosen.

    `out` is a file in results/, `tiny` the help of --tiny, `one` how many words a script gives to itself behind --one.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    for name, value in defaults.items():
        how = dict(nargs="+", choices=list(value)) if isinstance(value, dict) else dict(type=type(value))
        if isinstance(value, list):
            how = dict(nargs="+", type=int)
        parser.add_argument(f"--{name}", default=list(value) if "nargs" in how else value, **how)
    if out:
        parser.add_argument("--out", type=Path, default=RESULTS / out)
    if tiny:
        parser.add_argument("--tiny", action="store_true", help=tiny)
    if one:
        parser.add_argument("--one", nargs=one, help=argparse.SUPPRESS)
    return parser


# ==== Runs ============================================================================================================


def within(limit: float | None, command: list[str], **environment: str) -> int | None:
    """The exit code of the command, or None if it was ended at the limit, with all that it had started."""
    group = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, start_new_session=True)
    try:
        return group.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(group.pid, signal.SIGKILL)
        group.wait()
        return None


def flags(**settings) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def python(*words: str, tree: Path = ROOT, quiet: bool = True, check: bool = True, **environment: str):
    """Runs `python *words`; what a quiet one prints is kept, and its errors are shown if it fails."""
    command, environment = [sys.executable, *words], os.environ | environment
    done = subprocess.run(command, cwd=tree, capture_output=quiet, text=True, env=environment)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}\n{(done.stderr or '')[-3000:]}")
    return done


def in_a_process(script: str, *words: str) -> dict:
    """What the script, in a process of its own, prints in its last line."""
    return json.loads(python(script, *words, HF_HUB_OFFLINE="1").stdout.splitlines()[-1])


def rows_of(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()]


class Run(NamedTuple):
    folder: Path
    seconds: float  # of the whole process
    process: subprocess.CompletedProcess

    def read(self, log: str) -> list[dict]:
        return rows_of(self.folder / log)


@contextmanager
def finished(*words: str, **how) -> Iterator[Run]:
    """`python *words --runs FOLDER` when it has ended; the folder lasts as long as the `with`."""
    with tempfile.TemporaryDirectory() as runs:
        started = time.time()
        done = python(*words, "--runs", runs, **how)
        seconds = time.time() - started
        (folder,) = Path(runs).iterdir()
        yield Run(folder, seconds, done)


def train(**settings) -> tuple[list[dict], list[dict]]:
    """A run in this process: the rows of metrics.jsonl and of rollouts.jsonl."""
    import grpo

    with tempfile.TemporaryDirectory() as runs:
        folder = grpo.train(grpo.Config(**settings, print_groups=0, runs=runs))["run"]
        return rows_of(folder / "metrics.jsonl"), rows_of(folder / "rollouts.jsonl")


def arms_times_seeds(run: Callable, arms: dict[str, list[str]], options, seeds: list[int]) -> dict[str, list]:
    """Of each arm `run(its flags, steps, seed)` for each seed; `options.jobs` at a time."""
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {name: [pool.submit(run, arm, options.steps, seed) for seed in seeds] for name, arm in arms.items()}
        return {name: [future.result() for future in found] for name, found in futures.items()}


def in_turns(names: list, turns: int) -> Iterator:
    """Each name once a turn, in every second turn the other way around: a drift of the machine's speed hits all."""
    for turn in range(turns):
        yield from names if turn % 2 == 0 else names[::-1]


def check_out(commit: str, folder: Path) -> Path:
    """The files of a commit of this repository, in a new folder."""
    folder.mkdir()
    files = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True)
    subprocess.run(["tar", "-x", "-C", folder], check=True, input=files.stdout)
    return folder


# ==== The text of a table =============================================================================================


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions(*names: str) -> str:
    return ", ".join(f"{name} {platform.python_version() if name == 'Python' else version(name)}" for name in names)


def origin(begin: str, *names: str) -> str:
    """Where a table comes from: what was run, on which machine, with which versions, at which commit."""
    found = versions(*(names or ("Python", "torch", "transformers")))
    return f"{begin} {os.cpu_count()} cores of {cpu_name()}, {found}, commit {commit()}."


def spread(values: list[float], digits: int) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def of_seeds(rows: list[dict], columns: dict[str, tuple[str, float, int]]) -> list[str]:
    """A cell for each column, which is a key, a scale and a number of digits: the values of all seeds."""
    return [" ".join(f"{scale * row[key]:.{digits}f}" for row in rows) for key, scale, digits in columns.values()]


def table(heads: str, rows: Iterable[Iterable]) -> str:
    """Markdown; `heads` are separated by ` | `."""
    lines = [f"| {heads} |", "| --- " * len(heads.split(" | ")) + "|"]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def write(out: Path, *parts: str) -> None:
    """Writes the paragraphs and tables, and prints them."""
    out.write_text("\n\n".join(parts) + "\n")
    print(out.read_text(), flush=True)
