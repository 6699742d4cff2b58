"""Turns notebooks/src/NN_name.py (percent format) into notebooks.

A paragraph that begins with `Hint 1, ...:` or `Answer:` is folded away; each hint is inside the one before it.

python notebooks/build.py             notebooks/NN_name.ipynb, without outputs
python notebooks/build.py --solved    notebooks/solved/NN_name.ipynb: answers put in, executed, outputs kept
"""

import ast
import html
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

REPOSITORY = ""  # https://github.com/OWNER/NAME: then notebooks find the files, and a badge opens one
HERE = Path(__file__).resolve().parent
HOSTED = HERE / "src" / "colab_gpu.py"  # for a GPU that a hosted notebook lends
sys.path[:0] = [str(HERE), str(HERE.parent)]
EXERCISE = re.compile(r"^def (\w+)\(.*raise NotImplementedError", re.S | re.M)


def sources() -> list[Path]:
    return sorted((HERE / "src").glob("[0-9][0-9]_*.py"))


def badge(source: Path) -> str:
    if not REPOSITORY:
        return "(A badge that opens this in Colab stands here once `REPOSITORY` in notebooks/build.py is set.)"
    place = REPOSITORY.removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{place}/blob/main/notebooks/{source.stem}.ipynb"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})"


def fold(text: str) -> str:
    """Hints and answers as HTML that opens on a click. It is no Markdown inside, so `code` becomes HTML here too."""
    out, depth = "", 0
    for paragraph in text.split("\n\n"):
        found = re.fullmatch(r"(Hint \d, [^:]*|Answer): (.*)", paragraph, re.S)
        if found:
            content = re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(found[2], quote=False))
            separator = "\n" if depth else "\n\n"
            out += f'{separator}<details style="margin-bottom:0.7em"><summary>{found[1]}</summary>{content}'
            depth += 1
        else:
            out += f"{'</details>' * depth}\n\n{paragraph}"
            depth = 0
    return (out + "</details>" * depth).strip("\n")


def build(source: Path) -> nbformat.NotebookNode:
    """The notebook of a source; a cell's id is the notebook's number and its place, so that a rebuild changes none."""
    cells, written = [], source.read_text(encoding="utf-8").replace("# BADGE", f"# {badge(source)}")
    written = written.replace('REPOSITORY = ""', f'REPOSITORY = "{REPOSITORY}"')
    for i, part in enumerate(re.split(r"^# %%", written, flags=re.M)[1:]):
        head, _, body = part.partition("\n")
        is_text = "[markdown]" in head
        text = fold(re.sub(r"^# ?", "", body, flags=re.M).strip("\n")) if is_text else body.strip("\n")
        cell = (new_markdown_cell if is_text else new_code_cell)(text)
        cell["id"] = f"{source.name[:2]}-{i:03d}"
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def solve(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Puts the library's source into each exercise cell, with an import of what that source uses."""
    import workshop

    for cell in notebook.cells:
        found = EXERCISE.search(cell.source)
        if cell.cell_type == "code" and found:
            answer = workshop.answer(found[1])
            home, source = inspect.getmodule(answer), inspect.getsource(answer).strip()
            names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
            imports: dict[str, list[str]] = {}
            for name, value in sorted((name, vars(home)[name]) for name in names if name in vars(home)):
                if not isinstance(value, ModuleType):
                    has_home = inspect.isclass(value) or inspect.isfunction(value)
                    imports.setdefault(value.__module__ if has_home else home.__name__, []).append(name)
            lines = [f"from {module} import {', '.join(used)}\n" for module, used in sorted(imports.items())]
            cell.source = "".join(lines) + "\n\n" * bool(lines) + source
    return notebook


def execute(notebook: nbformat.NotebookNode, timeout: int = 300, folder: Path = HERE) -> nbformat.NotebookNode:
    from nbclient import NotebookClient

    NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the times of the day
        if "outputs" in cell:  # without warnings of libraries, which name folders of this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main() -> None:
    for source in [*sources(), *([] if "--solved" in sys.argv else [HOSTED])]:
        notebook, folder = build(source), HERE
        if "--solved" in sys.argv:
            notebook, folder = execute(solve(notebook)), HERE / "solved"
        folder.mkdir(exist_ok=True)
        nbformat.write(notebook, folder / f"{source.stem}.ipynb")
        print(folder / f"{source.stem}.ipynb")


if __name__ == "__main__":
    main()
