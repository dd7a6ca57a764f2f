"""What a worker does with a block of rows: it calls the function and answers with arrays and reasons."""

import math
import pickle
import time
import traceback
from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .operator import user_code
from .protocol import Array, Layout

_PLAIN_CALLS, _CALLS_PER_HALVING = 16, 4


@dataclass(frozen=True)
class Failure:
    """Why a row has no outputs: `reason` follows "row 3" in a sentence; `error` is what the function raised."""

    reason: str
    remedy: str = ""
    error: BaseException | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickling and rebuilding the error are code of the user: where they fail, its text takes its place."""
        if self.error is None:
            return Failure, (self.reason, self.remedy)
        text = "In the worker:\n" + "".join(traceback.format_exception(self.error))
        try:
            self.error.add_note(text)
            pickled = pickle.dumps(self.error)
        except Exception:
            pickled = b""
        return _rebuilt, (self.reason, self.remedy, pickled, text)


def _rebuilt(reason: str, remedy: str, pickled: bytes, text: str) -> Failure:
    try:
        error = pickle.loads(pickled)
    except Exception:
        error = None
    return Failure(reason, remedy, error if isinstance(error, BaseException) else RuntimeError(text))


@dataclass
class Outcome:
    """Of one block. parts: rows (numbered within the whole batch) and their outputs; failures: row and reason."""

    parts: list[tuple[Sequence[int], list[Array]]] = field(default_factory=list)
    failures: list[tuple[int, Failure]] = field(default_factory=list)
    first: Failure | None = None  # the first in time: of a batched function, it tells of a whole call
    seconds: float = 0.0  # inside the worker

    def fail(self, rows: range, failure: Failure) -> None:
        """None of these rows has outputs, for one and the same reason."""
        self.first = self.first or failure
        self.failures.extend((row, failure) for row in rows)


class Progress:
    """Which rows a worker's present call is about and since when: written by the worker, read by who waits for it.

    The memory is a list between threads and shared doubles between processes: [start, stop, since, cancelled]. `since`
    (seconds of `time.monotonic`; infinite between calls) is written first and read last, so that a reader never takes
    the start of an earlier call for that of a later one.
    """

    def __init__(self, memory: MutableSequence[float]) -> None:
        self.memory = memory
        self.end()

    def begin(self, start: int, stop: int) -> None:
        """A call about rows start:stop begins."""
        self.memory[2] = time.monotonic()
        self.memory[0], self.memory[1] = start, stop

    def end(self) -> None:
        """No call is under way."""
        self.memory[2] = math.inf

    def read(self) -> tuple[int, int, float]:
        """start, stop, since."""
        start, stop = int(self.memory[0]), int(self.memory[1])
        return start, stop, self.memory[2]

    def cancel(self) -> None:
        """Tells the worker that nobody waits for its answer any more."""
        self.memory[3] = 1.0

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self.memory[3] != 0.0


@dataclass(frozen=True)
class Block:
    """Rows start:stop of a batch: what a task is given. known: the layout of the outputs, where the box has one."""

    arrays: Sequence[Array]
    start: int
    stop: int
    known: Layout | None


@dataclass(frozen=True)
class Task:
    """The function and how it is called; picklable where the function is.

    per_row: one call for each row, or one for the block; shared: inputs of a batched function that have no rows;
    seed: the keyword that takes the last array; retries: further calls with the same arguments after an exception.
    """

    function: Callable[..., Any]
    per_row: bool
    shared: frozenset[int]
    seed: str | None
    retries: int

    def cut(self, arrays: Sequence[Array], start: int, stop: int, known: Layout | None) -> Block:
        """Rows start:stop of a batch, read-only."""
        return Block(self._cut(arrays, start, stop), start, stop, known)

    def __call__(self, block: Block, progress: Progress) -> Outcome:
        """Evaluate the block. An exception of the function, and what is no row of outputs, becomes a `Failure`."""
        answer, began = Outcome(), time.monotonic()
        if self.per_row:
            self._evaluate_rows(block, progress, answer)
        else:
            self._evaluate_halves(block, progress, answer)
        progress.end()
        answer.seconds = time.monotonic() - began
        return answer

    def _evaluate_rows(self, block: Block, progress: Progress, answer: Outcome) -> None:
        groups: dict[Layout, tuple[list[int], list[list[Array]]]] = {}
        for position, row in enumerate(range(block.start, block.stop)):
            if progress.is_cancelled:
                return
            result = self._attempt(progress, range(row, row + 1), [array[position] for array in block.arrays])
            if isinstance(result, Failure):
                answer.fail(range(row, row + 1), result)
                continue
            layout = tuple([(output.shape, output.dtype) for output in result])
            rows, outputs = groups.setdefault(layout, ([], []))
            rows.append(row)
            outputs.append(result)
        for rows, outputs in groups.values():
            answer.parts.append((rows, [np.stack(column) for column in zip(*outputs, strict=True)]))

    def _evaluate_halves(self, block: Block, progress: Progress, answer: Outcome) -> None:
        """The batched function on the block; where that fails, on both halves, until the rows are found.

        A function that fails everywhere is given up after 4 log2(rows) + 16 calls.
        """
        calls = allowed = _PLAIN_CALLS + _CALLS_PER_HALVING * math.ceil(math.log2(block.stop - block.start))
        pending = [(block.start, block.stop)]
        while pending and not progress.is_cancelled:
            start, stop = pending.pop()
            rows = range(start, stop)
            if not calls:
                reason = f"was given up after {allowed} calls for a block of rows, as an earlier one"
                assert answer.first is not None  # nothing is halved before a call failed
                answer.fail(rows, Failure(f"{reason} {answer.first.reason}", answer.first.remedy, answer.first.error))
                continue
            calls -= 1
            result = self._attempt(progress, rows, self._cut(block.arrays, start - block.start, stop - block.start))
            final = len(rows) == 1
            if not isinstance(result, Failure):
                result = _one_row_each(result, len(rows), block.known)
                # Of a function that never was right, single rows may only look right: a sum over rows does.
                final = final or block.known is None
            if not isinstance(result, Failure):
                answer.parts.append((rows, result))
            elif final:
                answer.fail(rows, result)
            else:
                answer.first = answer.first or result
                middle = (start + stop) // 2
                pending += [(middle, stop), (start, middle)]

    def _cut(self, arrays: Sequence[Array], start: int, stop: int) -> list[Array]:
        """Views that cannot be written: the memory may be the caller's tensors."""
        parts = [
            array[...] if i in self.shared and not self.per_row else array[start:stop] for i, array in enumerate(arrays)
        ]
        for part in parts:
            part.flags.writeable = False
        return parts

    def _attempt(self, progress: Progress, rows: range, arguments: list[Any]) -> list[Array] | Failure:
        keywords: dict[str, Any] = {}
        if self.seed is not None:
            seed = arguments.pop()
            keywords[self.seed] = int(seed) if self.per_row else seed
        progress.begin(rows.start, rows.stop)
        result = self._call(arguments, keywords)
        for _ in range(self.retries):
            if not isinstance(result, Failure) or progress.is_cancelled:
                break
            progress.begin(rows.start, rows.stop)
            result = self._call(arguments, keywords)
        return result

    def _call(self, arguments: list[Any], keywords: dict[str, Any]) -> list[Array] | Failure:
        try:
            with user_code():
                returned = self.function(*arguments, **keywords)
            parts = returned if isinstance(returned, tuple | list) else (returned,)
            outputs = [np.array(part, order="C", copy=True) for part in parts]
        except (Exception, SystemExit) as error:
            read_only = isinstance(error, ValueError) and "read-only" in _text(error)
            remedy = "inputs are read-only: work on a copy, x = x.copy()" if read_only else ""
            return Failure(f"raised {_text(error)}", remedy, error)
        if not outputs:
            return Failure("returned nothing", "return an array, or a tuple of them")
        for position, output in enumerate(outputs):
            if output.dtype.kind not in "fiub" or output.dtype.itemsize > 8:
                remedy = "return floating numbers (up to float64), integers or booleans: an array or a tuple of arrays"
                return Failure(f"returned an array of {output.dtype} as output {position}", remedy)
        return [output.astype(output.dtype.newbyteorder("="), copy=False) for output in outputs]


def _text(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # its own text is code of the user, too
        return type(error).__name__


def _one_row_each(outputs: list[Array], rows: int, known: Layout | None) -> list[Array] | Failure:
    """The outputs of a batched function, if each has as many rows as the input and rows of the known shape."""
    for position, output in enumerate(outputs):
        if output.ndim == 0 or output.shape[0] != rows:
            return Failure(
                f"returned an output {position} of shape {output.shape} for {rows} row{'s' * (rows > 1)} of input",
                "a batched function returns one row for each row it gets, in dimension 0; declare per_row=True if "
                "the function takes one row at a time",
            )
    shapes = [output.shape[1:] for output in outputs]
    if known is not None and shapes != [shape for shape, _ in known]:
        return Failure(f"returned {in_words([*zip(shapes, [o.dtype for o in outputs], strict=True)], known)}")
    return outputs


def in_words(found: Sequence[tuple[tuple[int, ...], np.dtype[Any]]], known: Sequence[tuple[Any, Any]]) -> str:
    """For messages: what came, and what every other row is."""
    texts = [", ".join(f"{dtype} {shape}" for shape, dtype in layout) for layout in (found, known)]
    return f"rows of {texts[0]} where others are {texts[1]}"
