"""Processes as workers, started by spawn: one that hangs is killed, one that dies is replaced."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from multiprocessing import connection
from types import FrameType
from typing import Any

from rewriter.runtime.errors import BoxError

from .dispatch import Lost
from .task import Block, Failure, Outcome, Progress, Task

_SPAWN = multiprocessing.get_context("spawn")
_LONGEST_START = 300.0  # seconds; the imports of a large program on a busy machine
_SECONDS_TO_TIDY_UP = 0.3  # between asking a process to end and killing it
_NUMERIC_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
_ENVIRONMENT = threading.Lock()
_REMEDY = (
    'put what a script does under if __name__ == "__main__", as each worker imports the script anew; keep the function '
    "in a module that a new process can import; look at what the worker printed"
)


class _Stopped(BaseException):
    """The parent asked this process to end. No Exception: what tidies up may see it, what handles errors may not."""


class _Process:
    """One process and the pipe to it; `ready` once it has loaded the function."""

    def __init__(self, payload: bytes) -> None:
        self.ready = False
        self.started = time.monotonic()
        memory: Any = _SPAWN.RawArray("d", 4)
        self.progress = Progress(memory)
        self.connection, other_end = _SPAWN.Pipe()
        self.process = _SPAWN.Process(
            target=_serve, args=(other_end, payload, self.progress), name="rewriter-box", daemon=True
        )
        with _single_threaded_numeric_libraries():
            self.process.start()
        other_end.close()

    def send(self, task: Task, block: Block) -> None:
        """The task is the one this process has loaded."""
        self.connection.send(block)

    def under_way(self) -> tuple[int, int, float]:
        return self.progress.read()

    def receive(self) -> Outcome | Lost | None:
        """None: it has just become ready. Raises `BoxError` if it cannot do its work at all."""
        try:
            message: Any = self.connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            self.process.join(_SECONDS_TO_TIDY_UP)  # for its own exit code
            stop([self])
            return Lost(f"killed its worker process {_in_words(self.process.exitcode)}")
        if isinstance(message, str):
            raise BoxError("the function of a box cannot be loaded in a worker process", why=message, remedy=_REMEDY)
        self.ready = True
        return message if isinstance(message, Outcome) else None


class ProcessCrew:
    """At most `size` processes that load one task, which is given as a pickle."""

    alone = False

    def __init__(self, size: int, payload: bytes) -> None:
        self.size = size
        self.workers: list[_Process] = []
        self._payload = payload

    def grow(self, count: int) -> None:
        while len(self.workers) < min(count, self.size):
            try:
                self.workers.append(_Process(self._payload))
            except AssertionError as error:
                raise BoxError(
                    "worker processes cannot be started here",
                    why=f"this is itself a worker process of somebody, where Python says: {error}",
                    remedy='a box that is used inside a worker takes threads, executor="threads:2", or none',
                ) from error
            except (RuntimeError, OSError) as error:
                raise BoxError("worker processes cannot be started here", why=str(error), remedy=_REMEDY) from error

    def wait(self, seconds: float | None) -> list[tuple[_Process, Outcome | Lost]]:
        starting = [worker.started + _LONGEST_START - time.monotonic() for worker in self.workers if not worker.ready]
        if starting:
            seconds = max(min([*starting, *([] if seconds is None else [seconds])]), 0.0)
        answers: list[tuple[_Process, Outcome | Lost]] = []
        by_connection = {worker.connection: worker for worker in self.workers}
        for found in connection.wait(list(by_connection), seconds):
            worker = by_connection[found]  # type: ignore[index]
            answer = worker.receive()
            if isinstance(answer, Lost):
                self.workers.remove(worker)
                if not worker.ready:
                    why = f"it ended {_in_words(worker.process.exitcode)}"
                    raise BoxError("a worker process ended before it was ready", why=why, remedy=_REMEDY)
            if answer is not None:
                answers.append((worker, answer))
        if starting and min(starting) <= 0:
            raise BoxError(f"a worker process was not ready after {_LONGEST_START:g} s", remedy=_REMEDY)
        return answers

    def employs(self, thread: threading.Thread) -> bool:
        return False

    def replace(self, worker: _Process) -> None:
        self.workers.remove(worker)
        stop([worker])

    def close(self) -> None:
        stop(self.workers)
        self.workers = []


def stop(workers: list[_Process]) -> None:
    """End processes: first by a signal upon which Python tidies up, then by one that nothing survives."""
    for worker in workers:
        worker.connection.close()
        worker.process.terminate()
    limit = time.monotonic() + _SECONDS_TO_TIDY_UP
    for worker in workers:
        worker.process.join(max(limit - time.monotonic(), 0.0))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def light(answer: Outcome) -> Outcome:
    """The answer as it crosses to another process: of exceptions only the first."""
    for position, (row, failure) in enumerate(answer.failures):
        if failure.error is not None:
            answer.failures[position] = row, Failure(failure.reason, failure.remedy)
    return answer


def _serve(to_parent: Any, payload: bytes, progress: Progress) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    status = 1
    try:
        signal.signal(signal.SIGTERM, _stop_here)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        try:
            task: Task = pickle.loads(payload)
        except Exception as error:
            to_parent.send(f"{type(error).__name__}: {error}")
            return
        to_parent.send(None)
        while True:
            to_parent.send(light(task(to_parent.recv(), progress)))
    except (EOFError, BrokenPipeError, _Stopped):
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(status)  # neither waits for threads of the function nor tears down what is the parent's


def _stop_here(number: int, frame: FrameType | None) -> None:
    raise _Stopped


def _end_with_parent() -> None:
    """A worker that hangs does not outlive a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)  # as `stop` does
        time.sleep(_SECONDS_TO_TIDY_UP)
        os._exit(1)


@contextlib.contextmanager
def _single_threaded_numeric_libraries() -> Iterator[None]:
    """They read the environment when they are loaded, before any of our code runs in the new process."""
    with _ENVIRONMENT:
        unset = [name for name in _NUMERIC_THREADS if name not in os.environ]
        os.environ.update(dict.fromkeys(unset, "1"))
        try:
            yield
        finally:
            for name in unset:
                del os.environ[name]


def _in_words(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"({signal.Signals(-exit_code).name})"
    return f"(exit code {exit_code})"
