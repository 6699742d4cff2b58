"""What tasks read: the rows of data sets and which of them can be used, and the text of prompt templates."""

import json
from collections.abc import Callable, Hashable
from pathlib import Path

from tasks.foreign import shortened
from tasks.names import ask_the_hub_only_if_it_is_there, check_local


def load_rows(dataset: str, split: str, columns: list[str], subset: str | None = None):
    """The rows of a data set, as a `datasets.Dataset`.

    Args:
        dataset: a JSON, JSON Lines, CSV or Parquet file, a folder of such files (of one split, or with the split's
            name in the file names), or a name on the Hugging Face Hub.
        split: train, test, ...; a single file has no splits and is taken whole.
        columns: those that the task reads.
        subset: the data set's configuration on the Hub.

    Raises:
        ValueError: it cannot be loaded, or lacks a column.
    """
    check_local(dataset, "data set")
    import datasets

    path = Path(dataset)
    try:
        if path.is_file():
            kind = {".parquet": "parquet", ".csv": "csv"}.get(path.suffix, "json")
            rows = datasets.load_dataset(kind, data_files=str(path), split="train")
        else:
            if not path.exists():
                ask_the_hub_only_if_it_is_there()
            rows = datasets.load_dataset(dataset, subset, split=split)
    except Exception as error:  # of many kinds: network, file system, format
        what = broken_line(path) or (str(error) or repr(error)).splitlines()[0]
        raise ValueError(
            f"the data set {dataset!r} (split {split}) cannot be loaded: {what.rstrip('.')}. "
            "Give a name on the Hugging Face Hub, or a local folder or JSON, CSV or Parquet file (`hf download NAME "
            "--repo-type dataset --local-dir FOLDER` makes a folder where there is a network)"
        ) from error
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        found = ", ".join(rows.column_names)
        raise ValueError(f"the data set {dataset!r} has no column {', '.join(missing)}; it has {found}")
    return rows


def usable(rows, dataset: str, is_usable: Callable[[dict], bool], lack: str) -> list[int]:
    """The numbers of the rows that a task can use; says how many it cannot, and shows the first of them.

    Raises:
        ValueError: it can use none.
    """
    columns = rows[:]
    each = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    can_be = [is_usable(row) for row in each]
    kept = [i for i, row in enumerate(each) if can_be[i]]
    if len(kept) == len(each):
        return kept
    first = shortened(each[can_be.index(False)])
    if not kept:
        raise ValueError(f"{dataset!r}: no row can be used, {lack}; the first is {first}")
    print(f"{dataset}: {len(each) - len(kept):,} of {len(each):,} rows are left out, {lack}; the first is {first}")
    return kept


def without(rows: list[dict], taken: list[dict], key: Callable[[dict], Hashable]) -> list[dict]:
    """The rows whose key none of the `taken` has, each once."""
    seen = {key(row) for row in taken}
    return [row for row in rows if (own := key(row)) not in seen and not seen.add(own)]


def broken_line(path: Path) -> str:
    """What is wrong with the first line of a JSON Lines file that is not JSON, which the library does not say."""
    if path.suffix != ".jsonl" or not path.is_file():
        return ""
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            if line.strip() and not isinstance(json.loads(line), dict):
                return f"line {number} is no row in braces"
        except ValueError as error:
            return f"line {number} is not JSON: {error}"
    return ""


def read_template(name: str, known: dict[str, str], fields: tuple[str, ...]) -> str:
    """A prompt's text: a known one by its name, a file's, or `name` itself; it must have all the fields."""
    text = known.get(name)
    if text is None:
        is_file = len(name) < 1000 and Path(name).is_file()
        text = Path(name).read_text(encoding="utf-8") if is_file else name
        missing = [field for field in fields if field not in text]
        if missing:
            raise ValueError(
                f"prompt_template {name[:80]!r} has no {' and no '.join(missing)}; "
                f"give {', '.join(known)}, or text or a file with {' and '.join(fields)}"
            )
    return text
