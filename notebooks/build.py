"""Turns notebooks/src/NN_name.py (percent format) into notebooks.

python notebooks/build.py             notebooks/NN_name.ipynb, without outputs
python notebooks/build.py --solved    notebooks/solved/NN_name.ipynb: answers put in, executed, outputs kept
"""

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
EXERCISE = re.compile(r"^def (\w+)\(.*raise NotImplementedError", re.S | re.M)


def sources() -> list[Path]:
    return sorted((HERE / "src").glob("[0-9][0-9]_*.py"))


def build(source: Path) -> nbformat.NotebookNode:
    """The notebook of a source; a cell's id is the notebook's number and its place, so that a rebuild changes none."""
    cells = []
    for i, part in enumerate(re.split(r"^# %%", source.read_text(), flags=re.M)[1:]):
        head, _, body = part.partition("\n")
        is_text = "[markdown]" in head
        text = re.sub(r"^# ?", "", body, flags=re.M) if is_text else body
        cell = (new_markdown_cell if is_text else new_code_cell)(text.strip("\n"))
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
            home = inspect.getmodule(answer)
            used = [name for name in answer.__code__.co_names if hasattr(home, name)]
            used = sorted(name for name in set(used) if not isinstance(getattr(home, name), ModuleType))
            imports = f"from {home.__name__} import {', '.join(used)}\n\n\n" if used else ""
            cell.source = imports + inspect.getsource(answer).strip()
    return notebook


def execute(notebook: nbformat.NotebookNode, timeout: int = 300) -> nbformat.NotebookNode:
    from nbclient import NotebookClient

    NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the times of the day
    return notebook


def main() -> None:
    for source in sources():
        notebook, folder = build(source), HERE
        if "--solved" in sys.argv:
            notebook, folder = execute(solve(notebook)), HERE / "solved"
        folder.mkdir(exist_ok=True)
        nbformat.write(notebook, folder / f"{source.stem}.ipynb")
        print(folder / f"{source.stem}.ipynb")


if __name__ == "__main__":
    main()
