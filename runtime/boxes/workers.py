"""The workers of one box: what the user names, started when first needed, ended with the box."""

import atexit
import contextlib
import functools
import hashlib
import os
import pickle
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any, NoReturn

from rewriter.runtime.errors import BoxError

from .dispatch import Crew, Dispatch, Pace
from .executor_crew import ExecutorCrew, refuse_timed_threads
from .process_crew import ProcessCrew
from .protocol import Array, Layout
from .task import Outcome, Progress, Task
from .thread_crew import ThreadCrew, processors

_Crew = Crew[Any]

_EXECUTORS = 'an Executor, a function without arguments that makes one, "threads:4", "processes:2", or None'
_SHARED: "weakref.WeakValueDictionary[object, _Staff]" = weakref.WeakValueDictionary()
_ALIVE: "weakref.WeakKeyDictionary[_Crew, int]" = weakref.WeakKeyDictionary()  # and the process it belongs to


class Lent:
    """An executor that belongs to the user: copies of a box share it, and it cannot be pickled."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    def give(self) -> Executor:
        """The executor itself."""
        return self.executor

    def __deepcopy__(self, memo: dict[int, Any]) -> "Lent":
        return self

    def __reduce__(self) -> NoReturn:
        raise BoxError(
            "a box over an executor cannot be pickled",
            why=f"the {type(self.executor).__name__} belongs to this process",
            remedy='give a function that makes it, or a name such as "processes:2"',
        )


class Workers:
    """Evaluates batches of rows: inline, or over a crew of workers. Safe to call from several threads.

    executor: as in `CallableBox`, an `Executor` as `Lent`. Raises `BoxError` at once where the task cannot be carried
    out as wished: an unknown name, a function that does not pickle, a timeout over workers that cannot be ended.
    """

    def __init__(self, task: Task, executor: Lent | Callable[[], Executor] | str | None, timeout: float | None) -> None:
        self._task, self._timeout, self._pace = task, timeout, Pace()
        self._staff = _staff(task, executor, timeout is not None)

    def evaluate(self, arrays: Sequence[Array], rows: int, known: Layout | None) -> list[Outcome]:
        """Every row of the arrays, each in one of the answers. Raises `BoxError` where workers cannot be had."""
        if self._staff is None:
            return [self._task(self._task.cut(arrays, 0, rows, known), Progress([0.0] * 4))]
        with self._staff.at_work() as crew:
            return Dispatch(crew, self._task, arrays, rows, known, self._timeout, self._pace).run()


class _Staff:
    """A crew, for one batch at a time; there is none before the first, nor after one that went wrong."""

    def __init__(self, recruit: Callable[[], _Crew]) -> None:
        self._recruit = recruit
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._crew: _Crew | None = None
        self._end: weakref.finalize[Any, Any] | None = None

    @contextlib.contextmanager
    def at_work(self) -> Iterator[_Crew]:
        if self._process != os.getpid():  # a fork: neither the workers nor the state of the lock are this process's
            self._process, self._crew, self._lock = os.getpid(), None, threading.Lock()
        if self._crew is not None and self._crew.employs(threading.current_thread()):
            raise BoxError(
                "a box was called by its own workers, or by those it shares with the box that called it",
                why="they would wait for each other for ever",
                remedy="give the inner box an executor of its own",
            )
        with self._lock:
            if self._crew is None:
                self._crew = self._recruit()
                _ALIVE[self._crew] = os.getpid()
                self._end = weakref.finalize(self, _close, self._crew, os.getpid())
                self._end.atexit = False  # too late: `multiprocessing` would wait for its processes before
            try:
                yield self._crew
            except BaseException:  # what is still under way belongs to this batch: nobody must take it for another's
                self._crew = None
                if self._end is not None:
                    self._end()
                raise


def _close(crew: _Crew, process: int) -> None:
    if process == os.getpid():
        crew.close()


def _close_all() -> None:
    for crew, process in list(_ALIVE.items()):
        _close(crew, process)


atexit.register(_close_all)  # after that of `multiprocessing`, imported above, so that it runs before


def _staff(task: Task, executor: Lent | Callable[[], Executor] | str | None, timed: bool) -> _Staff | None:
    """Where workers do not hold what is particular to a box, boxes share them: copies of one, to begin with.

    None: no workers, the caller's own thread.
    """
    if executor is None:
        executor = f"threads:{processors() if task.per_row else 1}"
    if isinstance(executor, str):
        kind, count = _named(executor)
        if kind == "threads":
            return _Staff(functools.partial(ThreadCrew, count)) if count > 1 or timed else None
        payload = _pickled(task)
        digest = hashlib.blake2b(payload).digest()
        return _SHARED.setdefault((count, digest), _Staff(functools.partial(ProcessCrew, count, payload)))
    if isinstance(executor, Lent):
        _check_lent(executor.executor, task, timed)
        make, owned = executor.give, False
    elif callable(executor):
        make, owned = executor, True
    else:
        raise BoxError(f"executor={executor!r} is none", remedy=_EXECUTORS)
    staff = _Staff(functools.partial(ExecutorCrew, make, owned=owned, timed=timed))
    return _SHARED.setdefault((id(executor), timed), staff)


def _check_lent(executor: Executor, task: Task, timed: bool) -> None:
    refuse_timed_threads(executor, timed)
    if timed:
        raise BoxError(
            "a timeout does not go with an executor given as it is",
            why="a worker that hangs must be ended, and the executor is not the box's to end",
            remedy='give a function that makes the executor, or "threads:4" or "processes:2"',
        )
    if isinstance(executor, ProcessPoolExecutor):
        _pickled(task)


def _named(executor: str) -> tuple[str, int]:
    found = re.fullmatch(r"(threads|processes):([1-9][0-9]*)", executor)
    if found is None:
        raise BoxError(f"executor={executor!r} is not known", remedy=_EXECUTORS)
    return found[1], int(found[2])


def _pickled(task: Task) -> bytes:
    try:
        return pickle.dumps(task)
    except Exception as error:
        raise BoxError(
            "the function of a box over processes does not pickle",
            why=f"{type(error).__name__}: {error}",
            remedy="define it at the top of a module, or make it an instance of a class defined there",
        ) from error
