"""Standard output and errors that may go away: a closed terminal, a pipe into `head`, a full disk."""

import os
import sys
import threading
from contextlib import contextmanager, suppress

LOST = threading.Event()  # then a run saves, and ends


class Steady:
    """A stream that swallows what cannot be written any more, and says so in `LOST`."""

    def __init__(self, stream):
        self.stream, self.lost = stream, False

    def write(self, text: str) -> int:
        self.do("write", text)
        return len(text)

    def flush(self) -> None:
        self.do("flush")

    def do(self, method: str, *args) -> None:
        if self.lost:
            return
        try:
            getattr(self.stream, method)(*args)
        except UnicodeEncodeError:  # a terminal that knows few characters
            known = self.stream.encoding
            self.stream.write(args[0].encode(known, "backslashreplace").decode(known))
        except (OSError, ValueError):
            self.lost = True
            LOST.set()
            with suppress(OSError, ValueError):  # what is still buffered goes nowhere, without a word at the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextmanager
def steady():
    """Both streams, in the body."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Steady, before)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before
