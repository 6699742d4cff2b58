"""The sizes of grpo.py and of the rooms, counted the way that tests/test_house.py limits them.

    python tests/house.py                  a table; other files or commits: python tests/house.py FILE [COMMIT:FILE ...]
"""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONG = 100  # characters; a longer line counts as two


def lines_of(text: str) -> int:
    return sum(2 if len(line) > LONG else 1 for line in text.splitlines())


def words_of(text: str) -> int:
    return len(text.split())


def code_lines(text: str) -> int:
    """Lines with anything but comments, docstrings and white space."""
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in layout]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, documented) and ast.get_docstring(node)]
    docs = {line for node in nodes for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    return len({line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - docs)


def branches(text: str) -> int:
    return sum(isinstance(node, ast.If | ast.IfExp) for node in ast.walk(ast.parse(text)))


def settings_read(text: str) -> set[str]:
    """Names behind `config.`."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "config"}


def row(name: str, text: str) -> str:
    lines = text.splitlines()
    width = sum(map(len, lines)) / len(lines)
    figures = (lines_of(text), code_lines(text), words_of(text), branches(text), len(settings_read(text)))
    return f"| {name} | {' | '.join(f'{figure:,}' for figure in figures)} | {width:.0f} |"


def read(name: str) -> str:
    if ":" in name:
        return subprocess.run(["git", "show", name], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return (ROOT / name).read_text()


def main() -> None:
    paths = [path for room in ("harness", "tasks", "view") for path in (ROOT / room).glob("*.py")]
    rooms = sorted(str(path.relative_to(ROOT)) for path in paths)
    print("| file | lines | of code | words | ifs | settings | characters a line |\n" + "| --- " * 7 + "|")
    for name in sys.argv[1:] or ["grpo.py", "variants.py", *rooms]:
        print(row(name, read(name)))


if __name__ == "__main__":
    main()
