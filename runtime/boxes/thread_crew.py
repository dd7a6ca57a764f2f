"""Threads as workers. One that hangs cannot be ended: it is left behind, and counted."""

import os
import queue
import threading

from rewriter.runtime.errors import BoxError

from .dispatch import Lost
from .task import Block, Outcome, Progress, Task

_MOST_LEFT_BEHIND = 16

_Inbox = queue.SimpleQueue[tuple[Task, Block] | None]
_Outbox = queue.SimpleQueue[tuple["_Thread", Outcome | BaseException]]


class _Thread:
    """A daemon thread: neither waited for at exit, nor keeping anything of its last task alive."""

    ready = True

    def __init__(self, outbox: _Outbox) -> None:
        self.progress = Progress([0.0] * 4)
        self.inbox: _Inbox = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._serve, args=(outbox,), name="rewriter-box", daemon=True)
        self.thread.start()

    def send(self, task: Task, block: Block) -> None:
        self.inbox.put((task, block))

    def under_way(self) -> tuple[int, int, float]:
        return self.progress.read()

    def _serve(self, outbox: _Outbox) -> None:
        while (message := self.inbox.get()) is not None:
            try:
                outbox.put((self, message[0](message[1], self.progress)))
            except BaseException as error:
                outbox.put((self, error))
            del message


class ThreadCrew:
    """At most `size` threads. After 16 that hang, `BoxError`."""

    alone = False

    def __init__(self, size: int) -> None:
        self.size = size
        self.workers: list[_Thread] = []
        self._outbox: _Outbox = queue.SimpleQueue()
        self._left_behind: list[_Thread] = []

    def grow(self, count: int) -> None:
        while len(self.workers) < min(count, self.size):
            self.workers.append(_Thread(self._outbox))

    def wait(self, seconds: float | None) -> list[tuple[_Thread, Outcome | Lost]]:
        events = []
        try:
            events.append(self._outbox.get(timeout=seconds))
            while True:
                events.append(self._outbox.get_nowait())
        except queue.Empty:
            pass
        answers: list[tuple[_Thread, Outcome | Lost]] = []
        for worker, answer in events:
            if worker.progress.is_cancelled:
                continue
            if isinstance(answer, BaseException):
                raise answer
            answers.append((worker, answer))
        return answers

    def employs(self, thread: threading.Thread) -> bool:
        return any(worker.thread is thread for worker in self.workers)

    def replace(self, worker: _Thread) -> None:
        self.workers.remove(worker)
        worker.progress.cancel()
        worker.inbox.put(None)
        self._left_behind = [other for other in self._left_behind if other.thread.is_alive()] + [worker]
        if len(self._left_behind) > _MOST_LEFT_BEHIND:
            raise BoxError(
                f"{len(self._left_behind)} threads of a box hang",
                why="each took longer than its timeout allows, and a thread cannot be ended",
                remedy='use processes, which can: executor="processes:2"',
            )

    def close(self) -> None:
        for worker in self.workers:
            worker.progress.cancel()
            worker.inbox.put(None)
        self.workers = []


def processors() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
