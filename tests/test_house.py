"""The house stays in order: the sizes of its files, which room may import which, the commands that are shown."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import house
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from packaging.requirements import Requirement

import grpo
from harness import serve, sft, smollm2
from harness.command_line import parse_settings
from mathformer import evaluate, train, train_rl
from view.report import parse_arguments

ROOMS = [path for room in ("harness", "tasks", "view") for path in sorted((house.ROOT / room).glob("*.py"))]
# what may be imported by the files of which room; mathformer's own files, but for its commands, know only themselves
MAY_IMPORT = {
    "tasks": {"tasks"},
    "harness": {"harness", "tasks"},
    "harness commands": {"grpo", "harness", "tasks"},
    "variants": {"tasks"},
    "grpo": {"variants", "harness", "tasks"},
    "view": {"view", "grpo", "variants", "harness", "tasks", "mathformer"},
    "mathformer": {"mathformer"},
    "mathformer commands": {"mathformer", "grpo", "variants", "harness", "tasks"},
}
COMMANDS = {"mathformer": {"train.py", "train_rl.py", "evaluate.py"}, "harness": {"sft.py"}}
OURS = {"tasks", "harness", "variants", "grpo", "view", "mathformer", "notebooks", "benchmarks", "tests", "conftest"}


# ==== Sizes ===========================================================================================================


def test_grpo_can_be_read_in_one_sitting():
    text = (house.ROOT / "grpo.py").read_text()
    assert house.lines_of(text) <= 650 and house.words_of(text) <= 3800


def test_what_is_counted():
    text = f'"""A file."""\nx = 1 if True else 2  # {"long " * 20}\n\n\ndef f(config):\n    return config.lr\n'
    assert house.lines_of(text) == 7 and house.words_of(text) == 34
    assert house.code_lines(text) == 3 and house.branches(text) == 1 and house.settings_read(text) == {"lr"}


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: str(path.relative_to(house.ROOT)))
def test_a_file_of_a_room_is_short_and_begins_with_what_belongs_there(path):
    text = path.read_text()
    assert len(text.splitlines()) < 350
    assert re.match(r'"""[A-Z][^\n]{20,}', text), "a docstring whose first line says what belongs here"


def test_few_files_stand_at_the_root():
    assert len(list(house.ROOT.glob("*.py"))) <= 3


# ==== Imports =========================================================================================================


def room_of(path: Path) -> str:
    first = path.relative_to(house.ROOT).parts[0].removesuffix(".py")
    if path.name in COMMANDS.get(first, ()):
        return f"{first} commands"
    return first


def imported(source: str) -> set[str]:
    """The project's top-level names that the source imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found & OURS


SOURCES = [house.ROOT / "grpo.py", house.ROOT / "variants.py", *ROOMS]
SOURCES += sorted((house.ROOT / "mathformer").glob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(house.ROOT)))
def test_imports_run_one_way(path):
    assert imported(path.read_text()) <= MAY_IMPORT[room_of(path)]


def test_an_import_the_wrong_way_is_seen():
    assert imported("def f():\n    import grpo\n") - MAY_IMPORT["harness"] == {"grpo"}
    assert imported("from view.play import play\nimport harness.loading") - MAY_IMPORT["grpo"] == {"view"}


@pytest.mark.parametrize("module", ["harness.settings", "tasks", "view.report"])
def test_what_needs_no_torch_loads_none(module):
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ==== The commands of the README ======================================================================================


def commands(path: Path) -> list[str]:
    """The commands of a file's bash blocks, one by one."""
    blocks = re.findall(r"^```bash\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [part.strip() for line in lines for part in re.sub(r"\s+#.*", "", line).split("&&") if part.strip()]


def check_grpo(argv: list[str]) -> None:
    grpo.parse_config(argv)


PROGRAMS = {
    "grpo.py": check_grpo,
    "mathformer.train": lambda argv: parse_settings(train.PretrainConfig, "x", argv),
    "mathformer.train_rl": lambda argv: parse_settings(train_rl.RLConfig, "x", argv),
    "mathformer.evaluate": lambda argv: parse_settings(evaluate.EvaluationConfig, "x", argv),
    "view report": parse_arguments,
    "harness.smollm2": smollm2.parse_arguments,
    "harness.sft": sft.parse_arguments,
    "harness.serve": serve.parse_arguments,
}


def check(command: str) -> str:
    """Parses the command as the program would; says which program that is."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if words[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(words[2:])
        assert Path(launch.config_file).is_file()
        words = ["python", launch.training_script, *launch.training_script_args]
    if words[0] == "pip":
        assert all(Path(file).is_file() for file in words[words.index("-r") + 1 :])
        return "pip"
    if words[0] == ".":
        return "activate"
    assert words[0] in ("python", "python3"), command
    name, argv = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    if name == "view":
        name, argv = f"view {argv[0]}", argv[1:]
    if name in PROGRAMS:
        PROGRAMS[name](argv)
    else:
        assert name in ("venv", "pytest") or Path(name).is_file(), command
    return name


PAGES = [house.ROOT / "README.md", house.ROOT / "CONTRIBUTING.md", house.ROOT / "CHANGELOG.md"]
PAGES += [*sorted((house.ROOT / "docs").glob("*.md")), house.ROOT / "benchmarks" / "README.md"]
PAGES += [house.ROOT / "benchmarks" / "results" / "h100" / "README.md", house.ROOT / "notebooks" / "INSTRUCTOR.md"]
by_name = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(house.ROOT)))


@by_name
def test_a_command_that_is_shown_is_one_that_the_program_takes(path):
    for command in commands(path):
        check(command)


@pytest.mark.parametrize(
    "file, programs",
    [
        ("README.md", {"grpo.py", "pytest"}),
        ("CONTRIBUTING.md", {"pytest", "tests/house.py", "tests/mutation.py"}),
        ("docs/gpu.md", {"grpo.py", "pip"}),
        ("docs/several_gpus.md", {"grpo.py"}),
        ("docs/your_own_task.md", {"grpo.py"}),
        ("docs/small_model.md", {"mathformer.train", "mathformer.train_rl", "mathformer.evaluate", "grpo.py"}),
    ],
)
def test_the_commands_are_found(file, programs):
    assert programs <= {check(command) for command in commands(house.ROOT / file)}


@pytest.mark.parametrize(
    "command", ["python grpo.py --sleps 3", "python nothing.py", "python -m mathformer.train --oat x"]
)
def test_a_command_with_a_mistake_is_refused(command):
    with pytest.raises((AssertionError, grpo.UsageError, SystemExit)):
        check(command)


@pytest.mark.parametrize(
    "path", [*PAGES, house.ROOT / "grpo.py", house.ROOT / "one_page.py"], ids=lambda path: path.name
)
def test_a_command_in_a_line_of_text_is_of_a_program_that_is_there(path):
    text = re.sub(r"\s+", " ", path.read_text())
    for name in re.findall(r"python (?:-m )?([\w/]+\.py|mathformer\.\w+|view \w+)", text):
        assert name in PROGRAMS or name == "view play" or Path(name).is_file(), name


# ==== The pages =======================================================================================================


def anchors(path: Path) -> set[str]:
    """What GitHub calls the headings of a page: lower case, without punctuation, blanks as hyphens."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(path: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", path.read_text())


@by_name
def test_a_link_leads_somewhere(path):
    for link in links(path):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_a_heading_has_the_anchor_that_github_gives_it():
    assert "the-flags-of-train_rl-and-what-each-did-here" in anchors(house.ROOT / "docs" / "small_model.md")


def test_the_tests_that_a_page_names_are_there():
    tests = "".join(path.read_text() for path in (house.ROOT / "tests").rglob("test_*.py"))
    named = {name for path in PAGES for name in re.findall(r"`(test_\w+)`", path.read_text())}
    assert len(named) > 20 and all(f"def {name}(" in tests for name in named), named


def test_the_front_page_is_a_front_page():
    text = (house.ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200 and len(text.encode()) <= 14_000


def test_every_page_is_reached_from_the_front_page():
    reached = {(house.ROOT / link.partition("#")[0]).resolve() for link in links(house.ROOT / "README.md")}
    assert set(PAGES) - {house.ROOT / "README.md"} <= reached


# ==== Requirements ====================================================================================================


def requirements(file: str) -> list[Requirement]:
    lines = [line.partition(" #")[0].strip() for line in (house.ROOT / file).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))]


REQUIRED = (
    requirements("requirements.txt") + requirements("requirements-test.txt") + requirements("requirements-gpu.txt")
)


@pytest.mark.parametrize("required", REQUIRED, ids=str)
def test_a_requirement_has_an_upper_bound_and_a_known_good_version_within(required):
    assert any(specifier.operator in ("<", "<=", "==", "~=") for specifier in required.specifier)
    good = {r.name.lower().replace("_", "-"): r for r in requirements("constraints.txt")}
    if required.name != "vllm":  # it is not installed where the tests run
        (version,) = good[required.name.lower()].specifier
        assert version.operator == "==" and required.specifier.contains(version.version) and "+" not in version.version


def test_the_project_names_its_requirements_in_one_place():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((house.ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["dependencies"]
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
    assert project["project"]["version"] == yaml.safe_load((house.ROOT / "CITATION.cff").read_text())["version"]
    assert f"## {project['project']['version'].replace('.', '-')}" in (house.ROOT / "CHANGELOG.md").read_text()


def test_what_others_start_names_files_that_are_there():
    """The workflow, the container: each file of ours that they name."""
    workflow = yaml.safe_load((house.ROOT / ".github/workflows/tests.yml").read_text())
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    for command in (part.strip() for line in commands for part in line.split("&&")):
        assert (house.ROOT / command).is_file() if command == ".ci/run" else check(command)
    container = json.loads((house.ROOT / ".devcontainer/devcontainer.json").read_text())
    dockerfile = house.ROOT / ".devcontainer" / container["build"]["dockerfile"]
    (copied,) = re.findall(r"^COPY (req.*) \./$", dockerfile.read_text(), re.MULTILINE)
    named = re.findall(r"-[rc] (\S+)", dockerfile.read_text() + container["postCreateCommand"])
    assert set(copied.split()) <= set(named) and all((house.ROOT / file).is_file() for file in named)
