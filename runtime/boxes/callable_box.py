"""A numpy function as a box: batched, or per row over a pool of threads."""

import functools
import inspect
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from rewriter.runtime.errors import BoxError

from .operator import user_code
from .protocol import Array, Box, Layout, NonFinite

_BLOCKS_PER_WORKER = 4  # rows may differ in cost: small blocks keep all workers busy to the end


@final
class CallableBox(Box):
    """A box made of `function`, which takes and returns numpy arrays: one array, or a tuple or list of them.

    function: batched, (n, ...) arrays in, (n, ...) arrays out; with `per_row=True` it gets one row of each input
              (an array, or a number where rows are numbers) and returns one row of each output
    workers:  threads that evaluate rows (per_row only; default: the number of processors)
    shared:   positions of inputs without rows. A batched function gets them as they are; of a function that
              evaluates single rows, each row may get its own, so `evaluate` takes them repeated per row.
              (A batched function that can take such an input with rows: pass it expanded, as an ordinary input.)
    dtype:    in which floating inputs are given to the function; integers are given as they are
    on_error: what an exception in the function does: "raise" a `BoxError`, or "mask": that row's floating outputs are
              NaN and its integer outputs 0. A batched function is then called on halves until the rows are found.

    The arrays given to the function are read-only, because they may be the caller's tensors; what it returns is copied.
    Copying and pickling keep the function (which must be picklable for the latter), never the threads.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        per_row: bool = False,
        workers: int | None = None,
        shared: Iterable[int] = (),
        dtype: torch.dtype = torch.float64,
        nonfinite: NonFinite = "raise",
        on_error: Literal["raise", "mask"] = "raise",
        name: str | None = None,
    ) -> None:
        super().__init__(name or _name(function), nonfinite)
        if on_error not in ("raise", "mask"):
            raise BoxError(f"on_error={on_error!r} is not known", where=self.label, remedy='"raise" or "mask"')
        if dtype not in (torch.float16, torch.float32, torch.float64):
            raise BoxError(f"dtype={dtype} is no floating dtype of numpy", where=self.label, remedy="torch.float64")
        self.function, self.per_row, self.on_error, self.dtype = function, per_row, on_error, dtype
        self.workers = workers or os.cpu_count() or 1
        self.shared, self.repeats_shared = frozenset(shared), per_row
        self._pool = self._new_pool()

    @property
    def place(self) -> str:
        """Module and line of the function."""
        return _place(self.function)

    def dtypes(self, *inputs: Tensor) -> tuple[torch.dtype, ...]:
        """The declared dtype for floating inputs, their own for all others."""
        return tuple(self.dtype if tensor.is_floating_point() else tensor.dtype for tensor in inputs)

    def describe_inputs(self) -> str:
        """What the function takes, in words."""
        taken = "one row of each input" if self.per_row else "arrays with rows in dimension 0"
        return f"{self.label} takes {taken}, floating inputs as {str(self.dtype).removeprefix('torch.')}"

    def compute(self, arrays: list[Array], rows: int) -> list[Array]:
        """Call the function; see the class for what happens to its exceptions."""
        for array in arrays:
            array.flags.writeable = False
        known = self._layouts.get(self._row_shapes(arrays))
        blocks = self._rows(arrays, rows) if self.per_row else self._halves(arrays, 0, rows)
        outputs = blocks[0] if len(blocks) == 1 else None
        if outputs is None or isinstance(outputs, _Failed):
            outputs = self._joined(blocks, known)
        return outputs if known is None or len(known) != len(outputs) else list(map(_settled, outputs, known))

    def _call(self, arrays: list[Array]) -> "list[Array] | _Failed":
        try:
            with user_code():
                returned = self.function(*arrays)
            return [
                self._output_array(part) for part in (returned if isinstance(returned, tuple | list) else (returned,))
            ]
        except BoxError:
            raise
        except Exception as error:
            if self.on_error == "mask":
                return _Failed(error)
            raise self._error(error) from error

    def _output_array(self, returned: Any) -> Array:
        array = np.array(returned, order="C", copy=True)
        if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
            raise BoxError(
                f"{self.label} returned an array of {array.dtype}",
                where=self.place,
                remedy="return arrays of floating numbers (up to float64), integers or booleans, or a tuple of them",
            )
        return array.astype(array.dtype.newbyteorder("="), copy=False)

    def _error(self, error: BaseException) -> BoxError:
        read_only = isinstance(error, ValueError) and "read-only" in str(error)
        return BoxError(
            f"{self.label} raised {type(error).__name__}: {error}",
            where=self.place,
            why="its inputs may be the caller's tensors, so they are read-only" if read_only else "",
            remedy="work on a copy: x = x.copy()" if read_only else 'correct it, or declare on_error="mask"',
        )

    def _halves(self, arrays: list[Array], start: int, stop: int) -> "list[list[Array] | _Failed]":
        """The batched function on rows start:stop; where it fails, on both halves."""
        part = [array if i in self.shared else array[start:stop] for i, array in enumerate(arrays)]
        result = self._call(part)
        if not isinstance(result, _Failed):
            self._check_rows(result, stop - start)
            return [result]
        if stop - start == 1:
            return [result]
        middle = (start + stop) // 2
        return self._halves(arrays, start, middle) + self._halves(arrays, middle, stop)

    def _check_rows(self, outputs: list[Array], rows: int) -> None:
        for position, output in enumerate(outputs):
            if output.ndim == 0 or output.shape[0] != rows:
                raise BoxError(
                    f"output {position} of {self.label} has shape {output.shape} for {rows} rows of input",
                    where=self.place,
                    why="a batched function returns one row for each row it gets, in dimension 0",
                    remedy="declare per_row=True if the function takes one row at a time",
                )

    def _rows(self, arrays: list[Array], rows: int) -> "list[list[Array] | _Failed]":
        """The per-row function on all rows, blocks of rows spread over the threads."""

        def block(start: int, stop: int) -> "list[list[Array] | _Failed]":
            return [self._row(arrays, row) for row in range(start, stop)]

        size = -(-rows // (self.workers * _BLOCKS_PER_WORKER))
        if self._pool is None or rows == 1:
            return block(0, rows)
        futures: list[Future[list[list[Array] | _Failed]]] = [
            self._pool.submit(block, start, min(start + size, rows)) for start in range(0, rows, size)
        ]
        try:
            return [result for future in futures for result in future.result()]
        finally:
            for future in futures:
                future.cancel()

    def _row(self, arrays: list[Array], row: int) -> "list[Array] | _Failed":
        result = self._call([array[row] for array in arrays])
        return result if isinstance(result, _Failed) else [part[None] for part in result]

    def _joined(self, blocks: "list[list[Array] | _Failed]", known: Layout | None) -> list[Array]:
        """The outputs of all blocks below each other, failed rows filled in after the pattern of the others."""
        good = [block for block in blocks if not isinstance(block, _Failed)]
        failed = next((block for block in blocks if isinstance(block, _Failed)), None)
        if not good and known is not None:
            good = [[np.empty((1, *shape), dtype) for shape, dtype in known]]
        # Without a pattern nothing can be filled in, and integers cannot say that they are missing.
        if failed and (not good or all(part.dtype.kind != "f" for part in good[0])):
            raise self._error(failed.error) from failed.error
        missing = [_missing(part) for part in good[0]]
        parts = [missing if isinstance(block, _Failed) else block for block in blocks]
        if any(len(part) != len(missing) for part in parts):
            raise BoxError(f"{self.label} returned different numbers of outputs for different rows", where=self.place)
        try:
            return [np.concatenate(column) for column in zip(*parts, strict=True)]
        except ValueError as error:
            raise BoxError(
                f"{self.label} returned rows of different shapes", where=self.place, why=str(error)
            ) from error

    def _new_pool(self) -> ThreadPoolExecutor | None:
        """Starts no thread before the first rows come."""
        if not self.per_row or self.workers == 1:
            return None
        return ThreadPoolExecutor(self.workers, thread_name_prefix=f"rewriter-{self.label}")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pool": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pool = self._new_pool()


class _Failed:
    """The exception that rows of a function ended in."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _missing(part: Array) -> Array:
    return np.full((1, *part.shape[1:]), np.nan if part.dtype.kind == "f" else 0, part.dtype)


def _settled(output: Array, known: tuple[tuple[int, ...], np.dtype[Any]]) -> Array:
    """A function may return 0 where it first returned .5: what converts without loss takes the first dtype."""
    return output.astype(known[1]) if output.dtype != known[1] and np.can_cast(output.dtype, known[1]) else output


def _plain(function: Callable[..., Any]) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.unwrap(function)


def _name(function: Callable[..., Any]) -> str:
    plain = _plain(function)
    return str(getattr(plain, "__name__", type(plain).__name__))


def _place(function: Callable[..., Any]) -> str:
    plain = _plain(function)
    code = getattr(plain, "__code__", None)
    module = getattr(plain, "__module__", type(plain).__module__)
    return f"{module}, line {code.co_firstlineno}" if code else str(module)
