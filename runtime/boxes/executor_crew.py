"""Executors of the user (`concurrent.futures`) as workers: all that is known of a block is whether it is done."""

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ThreadPoolExecutor, wait

from rewriter.runtime.errors import BoxError

from .dispatch import Lost
from .process_crew import light
from .task import Block, Outcome, Progress, Task
from .thread_crew import processors

_SETTLING = 1.0  # seconds


class _Slot:
    """The place of one block in flight."""

    ready = True

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.future: Future[Outcome] | None = None
        self._rows = (0, 0)
        self._since = math.inf

    def send(self, task: Task, block: Block) -> None:
        self._rows, self._since = (block.start, block.stop), math.inf
        try:
            self.future = self.executor.submit(_perform, task, block)
        except BrokenExecutor as error:
            raise OSError from error

    def under_way(self) -> tuple[int, int, float]:
        if self._since == math.inf and self.future is not None and self.future.running():
            self._since = time.monotonic()
        return *self._rows, self._since


class ExecutorCrew:
    """As many blocks in flight as the executor has workers.

    make: gives the executor. owned: it is this crew's own, which may be ended and made anew; one that is lent is left
    as it is, and when it breaks that is an error. timed: whether calls have a limit, for which a worker is killed.
    """

    alone = True

    def __init__(self, make: Callable[[], Executor], *, owned: bool, timed: bool) -> None:
        self._make, self._owned, self._timed = make, owned, timed
        self.workers: list[_Slot] = []
        self._lost: list[_Slot] = []
        self._executor: Executor | None = None
        self.size = 1

    def grow(self, count: int) -> None:
        if self._executor is None:
            self._executor = self._started()
        while len(self.workers) < min(count, self.size):
            self.workers.append(_Slot(self._executor))

    def wait(self, seconds: float | None) -> list[tuple[_Slot, Outcome | Lost]]:
        answers: list[tuple[_Slot, Outcome | Lost]] = [(slot, Lost()) for slot in self._lost]
        self._lost = []
        slots = {slot.future: slot for slot in self.workers if slot.future is not None}
        for future in wait(slots, 0 if answers else seconds, FIRST_COMPLETED).done:
            slot = slots[future]
            try:
                answers.append((slot, future.result()))
                slot.future = None
            except BrokenExecutor as error:
                if not self._owned:
                    raise BoxError(
                        "the executor of a box is broken",
                        why=f"a worker of it ended ({error}), and an executor given as it is cannot be made anew",
                        remedy='give a function that makes it, or executor="processes:2"',
                    ) from error
                reached = {id(other) for other, _ in answers}
                in_flight = [other for other in slots.values() if id(other) not in reached]
                self._end()
                return answers + [(other, Lost("killed its worker process")) for other in in_flight]
            except Exception as error:
                wait(slots, _SETTLING)  # to end a ProcessPoolExecutor while it fails its tasks upsets its threads
                raise BoxError("the executor of a box failed", why=f"{type(error).__name__}: {error}") from error
        return answers

    def employs(self, thread: threading.Thread) -> bool:
        return thread in getattr(self._executor, "_threads", ())

    def replace(self, worker: _Slot) -> None:
        self._lost = [slot for slot in self.workers if slot is not worker and slot.future is not None]
        self._end()

    def close(self) -> None:
        if self._owned:
            self._end()
        for slot in self.workers:
            if slot.future is not None:
                slot.future.cancel()

    def _started(self) -> Executor:
        """A new executor, its workers begun: their start is no part of the first block's time."""
        executor = self._make()
        if not isinstance(executor, Executor):
            raise BoxError(
                f"the function that makes the executor of a box returned {type(executor).__name__}",
                remedy="return a concurrent.futures.Executor",
            )
        refuse_timed_threads(executor, self._timed)
        self.size = int(getattr(executor, "_max_workers", 0)) or processors()
        try:
            for begun in [executor.submit(_begin) for _ in range(self.size)]:
                begun.result()
        except Exception as error:
            raise BoxError("the executor of a box does not start", why=f"{type(error).__name__}: {error}") from error
        return executor

    def _end(self) -> None:
        """Without waiting for what hangs; of an executor whose processes are not known here, it only lets go."""
        executor, self._executor, self.workers = self._executor, None, []
        for process in list((getattr(executor, "_processes", None) or {}).values()):
            process.kill()
        if executor is not None:
            executor.shutdown(wait=False, cancel_futures=True)


def refuse_timed_threads(executor: Executor, timed: bool) -> None:
    """Python waits at exit for the threads of a `ThreadPoolExecutor`, so that one that hangs would hang the program."""
    if timed and isinstance(executor, ThreadPoolExecutor):
        raise BoxError(
            "a timeout does not go with a ThreadPoolExecutor",
            why="its threads cannot be ended, and Python waits for them when it exits",
            remedy='executor="threads:4", whose threads are left behind, or executor="processes:2"',
        )


def _perform(task: Task, block: Block) -> Outcome:
    return light(task(block, Progress([0.0] * 4)))


def _begin() -> None:
    """Nothing: by the time it is done, a worker has started."""
