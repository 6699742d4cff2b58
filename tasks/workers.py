"""Rewards with a limit in time: worker processes that judge in parallel and can be killed.

Nothing inside a process limits code that catches every exception, runs in a thread, or waits for a program of its own.
So each worker is a process in a session of its own, which is killed with all that it started. They are forks of one
process that has built the task: it is built there once, and a new worker is there at once. A reward must not depend on
what `train()` did in the process that trains.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tasks import UsageError, load_task
from tasks.foreign import in_a_line, plain

START = "import sys; sys.path[:] = {path!r}; from tasks.workers import build_and_fork; build_and_fork({fd})"


class Worker:
    """One process. `job` is the number of the answer that it judges."""

    def __init__(self, builder: socket.socket):
        self.connection, theirs = Pipe()
        socket.send_fds(builder, [b"fork"], [theirs.fileno()])
        theirs.close()
        answer = builder.recv(16)
        if not answer:
            raise OSError("the process that starts workers has died")
        self.pid, self.job, self.deadline = int(answer), None, float("inf")

    def receive(self) -> dict | None:
        """Its answer; None if it has died. As JSON: what ran code of a model's is not to be unpickled."""
        try:
            return json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            return None

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.connection.close()


class Workers:
    """As many workers as there are cores for this process, forked by one that has built the task.

    Args:
        name, task_args: of `load_task`.
        seconds: for each answer.

    Raises:
        UsageError: the task cannot be built.
    """

    def __init__(self, name: str, task_args: dict[str, Any], seconds: float):
        self.made_by, self.seconds, self.said, self.workers = (name, task_args), seconds, set(), []
        self.start_builder()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        for _ in range(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))):
            self.workers.append(self.new_worker())
        weakref.finalize(self, kill_all, self.workers)

    def start_builder(self) -> None:
        self.builder, theirs = socket.socketpair()
        command = [sys.executable, "-c", START.format(path=sys.path, fd=theirs.fileno())]
        subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        theirs.close()
        with self.builder.makefile("rwb") as stream:
            stream.write(json.dumps(self.made_by).encode() + b"\n")
            stream.flush()
            built = json.loads(stream.readline() or b'"it died"')
        if built != "built":
            raise UsageError(f"task {self.made_by[0]!r} cannot be built in a process of its own: {built}")

    def new_worker(self) -> Worker:
        try:
            return Worker(self.builder)
        except OSError:  # as when someone killed it
            self.start_builder()
            return Worker(self.builder)

    def rewards(self, answers: list[tuple[str, dict]]) -> list[dict]:
        """For each text and example {"parts": what reward() gave}, or {"error": what it raised}; in their order.

        An answer that takes too long, or whose worker dies, is wrong, with `timed_out` or `worker_died` as 1.
        """
        found, ahead = [None] * len(answers), iter(range(len(answers)))
        while any(result is None for result in found):
            for worker in self.workers:
                if worker.job is None and (job := next(ahead, None)) is not None:
                    worker.job, worker.deadline = job, time.monotonic() + self.seconds
                    with suppress(OSError):  # it has died, as is seen below
                        worker.connection.send(answers[job])
            self.look(found)
        return found

    def look(self, found: list) -> None:
        """Waits for an answer, a deadline or a death, and takes note of it."""
        first = min(worker.deadline for worker in self.workers)
        ready = wait([worker.connection for worker in self.workers], max(0.0, first - time.monotonic()))
        for at, worker in enumerate(self.workers):
            if worker.connection in ready:
                if (result := worker.receive()) is None:
                    self.replace(at, found, "worker_died", "a worker for rewards died")
                else:
                    late = result.pop("seconds") > self.seconds  # though it came before anyone looked
                    found[worker.job] = self.wrong("timed_out", self.too_late) if late else result
                    worker.job, worker.deadline = None, float("inf")
            elif time.monotonic() > worker.deadline:
                self.replace(at, found, "timed_out", self.too_late)

    def replace(self, at: int, found: list, part: str, reason: str) -> None:
        """A new worker in its place; its answer is wrong."""
        self.workers[at].kill()
        if (job := self.workers[at].job) is not None:
            found[job] = self.wrong(part, reason)
        self.workers[at] = self.new_worker()

    @property
    def too_late(self) -> str:
        return f"reward() took longer than {self.seconds:g} s"

    def wrong(self, part: str, reason: str) -> dict:
        """Says so once for each reason."""
        if reason not in self.said:
            self.said.add(reason)
            tqdm.write(f"{reason}: the answer counts as wrong, and {part} counts such answers")
        return {"parts": dict(reward=0.0, correct=0.0, format=0.0, prediction=reason, ground_truth="") | {part: 1.0}}


def kill_all(workers: list[Worker]) -> None:
    for worker in workers:
        worker.kill()


# ==== In the other processes ======================================================================


def build_and_fork(descriptor: int) -> None:
    """Builds the task once, and forks a worker for each connection that comes, until the other end is closed."""
    control = socket.socket(fileno=descriptor)
    stream, stderr = control.makefile("rwb"), os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what building says has been said in the process that trains
    try:
        task, answer = load_task(*json.loads(stream.readline())), "built"
    except UsageError as error:
        task, answer = None, str(error)
    os.dup2(stderr, 2)
    stream.write(json.dumps(answer).encode() + b"\n")
    stream.flush()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    while task is not None:
        message, descriptors, *_ = socket.recv_fds(control, 16, 1)
        if not message:
            return
        if pid := os.fork():
            os.close(descriptors[0])
            control.send(str(pid).encode())
        else:
            control.close()
            work(task, Connection(descriptors[0]))
            os._exit(0)


def work(task, connection: Connection) -> None:
    os.setsid()  # what a reward starts is in this session, and is killed with it
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, args=[os.getppid()], daemon=True).start()
    with suppress(OSError):  # where memory runs out, this process is to die, and not the run
        Path("/proc/self/oom_score_adj").write_text("1000")
    with suppress(EOFError, OSError):
        while True:
            connection.send_bytes(judged_here(task, *connection.recv()))


def judged_here(task, text: str, example: dict) -> bytes:
    started = time.monotonic()
    try:
        parts = task.reward(text, example)
        if isinstance(parts, dict):
            parts = {str(key): plain(value) for key, value in parts.items()}
        return json.dumps({"parts": parts, "seconds": time.monotonic() - started}, default=str).encode()
    except MemoryError:
        os._exit(1)
    except BaseException as error:
        return json.dumps({"error": in_a_line(error), "seconds": 0.0}).encode()


def end_with_parent(parent: int) -> None:
    """A worker that is busy does not see that the other end is closed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)
