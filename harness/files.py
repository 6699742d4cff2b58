"""Files: whether they are on the disk, what is in them, and those of a model."""

import os
import zlib
from pathlib import Path

from transformers.utils import cached_file

from harness.settings import HERE


def sync_to_disk(path: Path) -> None:
    """Waits until the file, or the folder's list of names, is on the disk and not only in the system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def local_name(name: str) -> str:
    """A model's folder that comes with this project is found from anywhere."""
    return str(HERE / name) if not Path(name).exists() and (HERE / name).exists() else name


def checksums_of_model(name: str) -> dict[str, int]:
    """Of the weights and settings of a model that was loaded: from its folder, or from the cache of the Hub."""
    folder = Path(local_name(name))
    if not folder.exists():
        folder = Path(cached_file(name, "config.json")).parent
    wanted = (".safetensors", ".bin", ".json")
    return {file.name: checksum(file) for file in sorted(folder.iterdir()) if file.suffix in wanted and file.is_file()}
