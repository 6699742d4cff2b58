"""Names that a person types: which other one is close, which is meant to be local, and the Hub for all others."""

import difflib
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlparse

from tasks import UsageError

LOCAL = (".json", ".jsonl", ".parquet", ".csv", ".md", ".yaml", ".txt", ".py", ".gguf", ".safetensors")


def near(name: str, names: Iterable[str], before: str = "") -> str:
    """`; did you mean X?`, with `before` in front of X, if one of the names is close or begins like this one."""
    names = list(names)
    found = difflib.get_close_matches(name, names, 1, 0.8) or [n for n in names if len(name) > 1 and n.startswith(name)]
    found = found or difflib.get_close_matches(name, names, 1, 0.6)
    return f"; did you mean {before}{found[0]}?" if found else ""


def check_local(name: str, what: str) -> None:
    """Raises UsageError if a name that is meant to be local is not there: the Hub is not asked for it.

    It is local if it is a path, if it ends like a file, or if a folder that is here has something of nearly this name.
    """
    path = Path(name).expanduser()
    if path.exists():
        return
    hint = near(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if is_path or path.suffix in LOCAL or ("/" in name and hint):
        raise UsageError(f"{what} {name!r}: there is no such file or folder{hint}")


def ask_the_hub_only_if_it_is_there() -> None:
    """Without a network, the Hub's library reads its cache alone: left to itself, it would try for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or any(name.upper() in ("HTTPS_PROXY", "ALL_PROXY") for name in os.environ):
        return
    host = urlparse(constants.ENDPOINT)
    try:
        socket.create_connection((host.hostname, host.port or 443), timeout=3).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True
