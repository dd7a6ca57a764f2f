"""The rows of one batch over workers: blocks of the right size, limits of time, crashes, and giving up."""

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from .protocol import Array, Layout
from .task import Block, Failure, Outcome, Task

_LONGEST_BLOCK = 0.1  # seconds, or 50 times the overhead if that is more: what may be lost when a worker dies
_OVERHEADS_IN_LONGEST = 50
_SHARE_OF_OVERHEAD = 0.1  # in a short block; far less in those that make up a long batch
_SHORTEST_BLOCK = 2.5  # times the overhead: the last blocks of a batch
_GIVE_UP = 16  # rows that hang or kill their worker, before it is asked whether most do
_GRACE = 0.05  # seconds between looks at a worker that does not say when a call began
_LONGEST_WAIT = 3600.0  # seconds; some systems refuse a wait of months
_STALL = 1.0  # seconds by which a wait ends late: this process was stopped, and its workers perhaps with it


@dataclass(frozen=True)
class Lost:
    """In the place of an answer: the worker died (`reason`), or another's end took the work with it (no reason)."""

    reason: str = ""


class Worker(Protocol):
    """Evaluates one block at a time."""

    ready: bool

    def send(self, task: Task, block: Block) -> None:
        """Start on a block; raises OSError where the worker is dead."""
        ...

    def under_way(self) -> tuple[int, int, float]:
        """Rows start:stop of the present call, and since when (`time.monotonic`; infinite: no call is under way)."""
        ...


WorkerT = TypeVar("WorkerT", bound=Worker)


@dataclass
class Pace:
    """What was measured: seconds per row inside workers, seconds per block around that. None: nothing yet."""

    row: float | None = None
    block: float = 5e-4

    def update(self, seconds: float, rows: int, total: float) -> None:
        """One block of `rows` rows took `seconds` inside its worker and `total` from sending to receiving."""
        row = seconds / rows
        self.row = row if self.row is None else 0.5 * (self.row + row)
        self.block += 0.1 * (min(max(total - seconds, 0.0), 2e-2) - self.block)

    def rows(self, remaining: int, workers: int, per_row: bool) -> int:
        """Rows of the next block: half of an equal share of what remains, within bounds of overhead and of length."""
        share = math.ceil(remaining / (2 * workers))
        if self.row is None:
            return 1 if per_row else share
        seconds = max(self.row, 1e-7)
        least = math.ceil(self.block / (_SHARE_OF_OVERHEAD * seconds))
        most = math.ceil(max(_LONGEST_BLOCK, _OVERHEADS_IN_LONGEST * self.block) / seconds)
        shortest = math.ceil(_SHORTEST_BLOCK * self.block / seconds)
        return max(min(share, most), min(least, math.ceil(remaining / workers)), shortest)


class Crew(Protocol[WorkerT]):
    """Workers of one kind.

    size: how many at most; alone: whether a crash of one loses the work of all: blocks under suspicion then run alone
    """

    size: int
    alone: bool
    workers: list[WorkerT]

    def grow(self, count: int) -> None:
        """See to it that there are min(count, size) workers. Raises `BoxError` if none can be started."""
        ...

    def wait(self, seconds: float | None) -> list[tuple[WorkerT, Outcome | Lost]]:
        """What workers have to report, waiting at most so long for the first. Raises `BoxError` as `grow` does."""
        ...

    def employs(self, thread: threading.Thread) -> bool:
        """Whether this thread is one of the workers."""
        ...

    def replace(self, worker: WorkerT) -> None:
        """Let go of a worker that does not answer; `grow` starts another. Raises `BoxError` if there cannot be one."""
        ...

    def close(self) -> None:
        """End the workers; what is under way is lost."""
        ...


@dataclass
class _Span:
    """Rows start:stop; strikes: how often a worker died over a block that held them."""

    start: int
    stop: int
    strikes: int = 0
    suspect: bool = False
    sent: float = 0.0


class Dispatch:
    """One batch. timeout: seconds a call of the function may take; pace: what earlier batches of this task measured.

    A row whose call takes longer is a failure, its worker is replaced, and all other rows of the block are evaluated
    again with the same arguments. So it is after a crash, where the row itself is tried again too. Where nobody knows
    which row it was (a batched function, an executor of the user), the block is halved.
    """

    def __init__(
        self,
        crew: Crew[Any],
        task: Task,
        arrays: Sequence[Array],
        rows: int,
        known: Layout | None,
        timeout: float | None,
        pace: Pace,
    ) -> None:
        self.crew, self.task, self.arrays, self.known = crew, task, arrays, known
        self.timeout, self.pace, self.crashes = timeout, pace, max(2, task.retries + 1)
        self.pending = deque([_Span(0, rows)])
        self.busy: dict[int, tuple[Worker, _Span]] = {}
        self.answers: list[Outcome] = []
        self.finished = self.losses = 0
        self.resumed = -math.inf

    def run(self) -> list[Outcome]:
        """All rows, each in exactly one answer. Raises `BoxError` if workers cannot be had."""
        while self.pending or self.busy:
            self.crew.grow(len(self.busy) + sum(span.stop - span.start for span in self.pending))
            self._feed()
            for worker, answer in self._wait():
                self._receive(worker, answer)
            self._end_overdue()
            if self.losses > _GIVE_UP and self.losses > self.finished:
                self._give_up()
        return self.answers

    def _feed(self) -> None:
        for worker in self.crew.workers:
            if not self.pending:
                return
            if not worker.ready or id(worker) in self.busy:
                continue
            if self.crew.alone and self.busy and self._under_suspicion():
                return
            span = self._next()
            span.sent = time.monotonic()
            self.busy[id(worker)] = worker, span
            try:
                worker.send(self.task, self.task.cut(self.arrays, span.start, span.stop, self.known))
            except OSError:
                self._receive(worker, Lost())

    def _under_suspicion(self) -> bool:
        return self.pending[0].suspect or any(span.suspect for _, span in self.busy.values())

    def _next(self) -> _Span:
        span = self.pending.popleft()
        remaining = span.stop - span.start + sum(other.stop - other.start for other in self.pending)
        size = self.pace.rows(remaining, self.crew.size, self.task.per_row)
        if self.timeout is not None and self.crew.alone and self.pace.row is not None:
            size = min(size, max(1, int(self.timeout / (4 * max(self.pace.row, 1e-7)))))
        if span.suspect or span.stop - span.start <= size:
            return span
        self.pending.appendleft(_Span(span.start + size, span.stop, span.strikes))
        return _Span(span.start, span.start + size, span.strikes)

    def _receive(self, worker: Worker, answer: Outcome | Lost) -> None:
        held = self.busy.pop(id(worker), None)
        if held is None:
            return  # a worker that died between batches
        span = held[1]
        rows = span.stop - span.start
        if isinstance(answer, Outcome):
            self.finished += rows
            self.answers.append(answer)
            self.pace.update(answer.seconds, rows, time.monotonic() - span.sent)
        elif not answer.reason:
            self.pending.appendleft(span)
        else:
            self._lose(span, worker.under_way(), answer.reason)

    def _lose(self, span: _Span, call: tuple[int, int, float], reason: str, *, hung: bool = False) -> None:
        """The worker ended over this block: blame the rows of its last call, evaluate the others again."""
        self.losses += 1
        start, stop, since = call
        if since == math.inf:
            start, stop = span.start, span.stop
        strikes = span.strikes + 1
        guilty = range(start, stop)
        again: list[_Span] = []
        if len(guilty) > 1:
            middle = (start + stop) // 2
            again = [_Span(start, middle, strikes, True), _Span(middle, stop, strikes, True)]
        elif hung or strikes >= self.crashes:
            answer = Outcome()
            answer.fail(guilty, Failure(reason))
            self.answers.append(answer)
        else:
            again = [_Span(start, stop, strikes, True)]
        around = [_Span(span.start, start, span.strikes), _Span(stop, span.stop, span.strikes)]
        self.pending.extendleft(rest for rest in around if rest.start < rest.stop)
        self.pending.extend(again)

    def _wait(self) -> list[tuple[Any, Outcome | Lost]]:
        """For answers, at most until the first worker may be overdue."""
        if self.timeout is None:
            return self.crew.wait(None)
        now = time.monotonic()
        waits = [self.timeout, _GRACE if self.crew.alone else _LONGEST_WAIT]
        waits += [max(worker.under_way()[2], self.resumed) + self.timeout - now for worker, _ in self.busy.values()]
        seconds = max(min(waits), 0.0) + 1e-3
        answers = self.crew.wait(seconds)
        if time.monotonic() - now > seconds + _STALL:
            self.resumed = time.monotonic()
        return answers

    def _end_overdue(self) -> None:
        if self.timeout is None:
            return
        now = time.monotonic()
        for worker, span in list(self.busy.values()):
            call = worker.under_way()
            if now - max(call[2], self.resumed) > self.timeout:
                del self.busy[id(worker)]
                self.crew.replace(worker)
                self._lose(span, call, f"took longer than {self.timeout:g} s", hung=True)
                if self.crew.alone:
                    return  # the others were lost with it, or say so in their own time

    def _give_up(self) -> None:
        """Most of what was tried hung or killed its worker: the rest would take as long for each row."""
        reason = (
            f"was not tried any more: {self.losses} blocks of rows hung or killed their worker, and "
            f"{self.finished} rows did not"
        )
        answer = Outcome()
        for span in self.pending:
            answer.fail(range(span.start, span.stop), Failure(reason))
        self.answers.append(answer)
        self.pending.clear()
