"""Files: written whole or not at all, on the disk, by one process; read as UTF-8, also while they grow."""

import fcntl
import json
import os
import shlex
import shutil
import socket
import zlib
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from harness.settings import HERE, UsageError

FORMAT = 1  # of a run's folder; folders without a number are older, and are read


def sync_to_disk(path: Path) -> None:
    """Waits until the file, or the folder's list of names, is on the disk and not only in the system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """The file is either the old one or the new one, whenever the program is killed."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    sync_to_disk(partial)
    partial.replace(path)


def as_line(row: dict) -> str:
    """A row of a JSON Lines file. Half of a surrogate pair, which UTF-8 does not have, is escaped."""
    text = json.dumps(row, ensure_ascii=False, default=str) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSON Lines file, without what is not a whole line yet; none if there is no file.

    Raises:
        UsageError: a line is no row; says which.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], 1):
        if line.strip():  # a damaged line was blanked
            rows.append(row_of(line))
            if rows[-1] is None:
                raise UsageError(f"{path}, line {number} is damaged: --resume leaves it out")
    return rows


def row_of(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def blank_damaged_lines(path: Path) -> list[int]:
    """Overwrites each line that is no row with blanks, since checkpoints know a log by its bytes; the lines' numbers.

    The file as it was is kept beside it, as `<name>.damaged`. Of a large file only the ends of lines are looked at.
    """
    damaged, at, is_small = [], 0, path.stat().st_size < 50_000_000
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            is_row = line[:1] == b"{" and line[-2:] == b"}\n" and not (is_small and row_of(line) is None)
            if line.strip() and not is_row:
                damaged.append((number, at, len(line) - line.endswith(b"\n")))
            at += len(line)
    if damaged:
        shutil.copy(path, path.with_name(f"{path.name}.damaged"))
        with open(path, "r+b") as file:
            for _, begin, length in damaged:
                file.seek(begin)
                file.write(b" " * length)
    return [number for number, _, _ in damaged]


def quoted(path: Path) -> str:
    """As it has to be written in a command that is printed."""
    return shlex.quote(str(path))


def checksum(path: Path) -> int:
    """CRC-32 of a file: against damage, not against malice."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def checksums(folder: Path) -> dict[str, int]:
    """Of all files in the folder and below, by their path from there."""
    return {str(file.relative_to(folder)): checksum(file) for file in sorted(folder.rglob("*")) if file.is_file()}


class Lock:
    """One process writes into a folder. The system lets go of it when the process ends, however it ends.

    Raises:
        UsageError: another process has it; names that process.
    """

    def __init__(self, folder: Path):
        self.file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (it stays open)
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            self.file.close()
            raise UsageError(f"{holder} writes into {folder}: wait for its end, or stop it") from error
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.file.flush()

    def release(self) -> None:
        self.file.close()


@contextmanager
def may_fail(what: str):
    """A picture, a card or a tracker never costs a model: where it fails, one line says so."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        tqdm.write(f"{what} could not be made: {type(error).__name__}: {reason}; all else goes on")


def check_format(number, where: Path) -> None:
    """Raises UsageError for a folder that a later version wrote."""
    if not isinstance(number, int) or number > FORMAT:
        raise UsageError(f"{where} has the format {number!r}, and this version reads up to {FORMAT}: take a newer one")


def check_format_of(run: Path) -> None:
    """The same, of a run's folder."""
    if (run / "run.json").exists():
        check_format(read_json(run / "run.json").get("format"), run)


def read_json(path: Path) -> dict:
    """Raises UsageError for a file that holds no names and values."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} is damaged: it holds no names and values")
    return found


# ==== Of models ===================================================================================


def local_name(name: str) -> str:
    """A model's folder that comes with this project is found from anywhere."""
    return str(HERE / name) if not Path(name).exists() and (HERE / name).exists() else name


def checksums_of_model(name: str) -> dict[str, int]:
    """Of the weights and settings of a model that was loaded: from its folder, or from the cache of the Hub."""
    from transformers.utils import cached_file

    folder = Path(local_name(name))
    if not folder.exists():
        folder = Path(cached_file(name, "config.json")).parent
    wanted = (".safetensors", ".bin", ".json")
    return {file.name: checksum(file) for file in sorted(folder.iterdir()) if file.suffix in wanted and file.is_file()}
