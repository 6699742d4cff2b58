"""What is printed before the first step, and where a library's many messages go instead: to a file of the run."""

import logging
import os
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from tqdm import tqdm

SLOW = 1.0  # seconds: what takes less is not worth a line


def reason_of(error: Exception) -> str:
    """The first line of what an error says, or its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def stage(what: str, is_slow: bool = False):
    """A part of the start: a line once it has taken a second, or at once if it `is_slow`; and a line at its end."""
    started = time.monotonic()
    alarm = threading.Timer(0 if is_slow else SLOW, lambda: print(f"{what} ...", flush=True))
    alarm.daemon = True
    alarm.start()
    if is_slow:
        alarm.join()  # the body may redirect what is printed
    try:
        yield
    finally:
        alarm.cancel()
    if (seconds := time.monotonic() - started) >= SLOW or is_slow:
        print(f"{what}: {seconds:.1f} s", flush=True)


class ToTerminal(logging.Handler):
    """What went wrong is seen at once, above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"{record.name}: {record.getMessage()}", file=sys.stderr)


class LibraryLog:
    """The messages of a library: a temporary file until the run has its folder, then a file there."""

    def __init__(self, name: str):
        self.name, self.handler, self.loggers = name, None, []
        file, self.path = tempfile.mkstemp(suffix=".log", prefix=f"{name}-")
        os.close(file)

    @contextmanager
    def everything(self):
        """In the body, all output of this process goes to the file: bars, warnings, what C++ writes.

        If the body fails, the file stays where it is, for whoever reads the error.
        """
        saved = [os.dup(number) for number in (1, 2)]
        try:
            with open(self.path, "ab") as file:
                self.point(file.fileno(), file.fileno())
            yield
        finally:
            self.point(*saved)
            for copy in saved:
                os.close(copy)

    @staticmethod
    def point(*targets: int) -> None:
        """Standard output and errors go there from now on, not what was printed before."""
        sys.stdout.flush()
        sys.stderr.flush()
        for number, target in zip((1, 2), targets, strict=True):
            os.dup2(target, number)

    def take(self, *loggers: str) -> None:
        """From now on the file gets what is logged under these names; the terminal only what went wrong."""
        self.loggers = [logging.getLogger(logger) for logger in loggers]
        self.open()

    def open(self) -> None:
        self.handler = logging.FileHandler(self.path, encoding="utf-8")
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        loud = ToTerminal(logging.ERROR)
        for logger in self.loggers:
            logger.handlers, logger.propagate = [self.handler, loud], False

    def move_to(self, folder: Path) -> None:
        """The file becomes `<name>.log` in the run's folder: behind what is there, if the run goes on."""
        rank, before = PartialState().process_index, Path(self.path)
        target = folder / (f"{self.name}-{rank}.log" if rank else f"{self.name}.log")
        if before == target:
            return
        if self.handler:
            self.handler.close()
        with open(target, "ab") as file:
            file.write(before.read_bytes())
        before.unlink()
        self.path = str(target)
        if self.loggers:
            self.open()
