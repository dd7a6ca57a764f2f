"""A numpy function as a box: batched or per row, inline or over threads, processes or any executor."""

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from rewriter.runtime.domain import Domain
from rewriter.runtime.errors import BoxError

from .assemble import assemble
from .contract import rows_of
from .protocol import Array, Box, NonFinite
from .task import Failure, Task
from .workers import Lent, Workers


@final
class CallableBox(Box):
    """A box made of `function`, which takes and returns numpy arrays: one array, or a tuple or list of them.

    function: batched, (n, ...) arrays in, (n, ...) arrays out; with `per_row=True` it gets one row of each input
              (an array, or a number where rows are numbers) and returns one row of each output
    executor: what evaluates blocks of rows. "threads:4"; "processes:2" (by spawn, with single-threaded numeric
              libraries); a function without arguments that makes a `concurrent.futures.Executor`; or an `Executor`.
              None: one thread per processor with `per_row`, else no block and no worker but a call on the whole batch.
              Processes start when rows first come; each loads a pickle of the function as it was when the box was
              made. Boxes with equal functions share them
    timeout:  seconds that one call of the function may take: one row with `per_row`, else whatever rows it was given,
              which are then tried in halves. The worker is replaced (a thread is left behind: after 16 of them,
              `BoxError`), the row is masked. Not for an `Executor` given as it is: it is not the box's to end
    retries:  how often a row that raised is evaluated again, with the same arguments. A row that kills its worker is
              tried again at least once
    seed:     the keyword by which `function` takes seeds: with `per_row` a number for each row, else int64 (n,). They
              are one more input, the last, which `complete` draws from torch's generator: rows with equal seeds are
              evaluated with common random numbers
    shared:   positions of inputs without rows. A batched function gets them as they are; of a function that
              evaluates single rows, each row may get its own, so `evaluate` takes them repeated per row.
              (A batched function that can take such an input with rows: pass it expanded, as an ordinary input.)
    domains:  where floating inputs may be evaluated, by position: bounds, whole numbers, positive numbers
    noisy:    equal inputs do not give equal outputs, and no seed makes them
    dtype:    in which floating inputs are given to the function; integers are given as they are

    A row whose call raises, takes too long, kills its worker or returns another layout than the other rows is masked:
    its floating outputs are NaN, its integer outputs 0, and `last_failure` says why. Where that cannot be said, because
    no row has outputs and none ever had, or because all outputs are integers, `BoxError` is raised. A batched function
    that fails is called on halves until the rows are found, 4 log2(n) + 16 times at most. Rows are evaluated alike for
    any number of workers; the blocks that a batched function gets depend on it, and on time.

    The arrays given to the function are read-only, because they may be the caller's tensors; what it returns is copied.
    Copying and pickling keep the function (which must be picklable for the latter), never the workers.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        per_row: bool = False,
        executor: Executor | Callable[[], Executor] | str | None = None,
        timeout: float | None = None,
        retries: int = 0,
        seed: str | None = None,
        shared: Iterable[int] = (),
        domains: Mapping[int, Domain] | None = None,
        noisy: bool = False,
        dtype: torch.dtype = torch.float64,
        nonfinite: NonFinite = "raise",
        name: str | None = None,
    ) -> None:
        super().__init__(name or _name(function), nonfinite, domains, noisy)
        if dtype not in (torch.float16, torch.float32, torch.float64):
            raise BoxError(f"dtype={dtype} is no floating dtype of numpy", where=self.label, remedy="torch.float64")
        if timeout is not None and not timeout > 0:
            raise BoxError(f"timeout={timeout} is no duration", where=self.label, remedy="seconds, or None")
        if retries < 0:
            raise BoxError(f"retries={retries} is no number of times", where=self.label, remedy="0 or more")
        if seed is not None and not _takes(function, seed):
            raise BoxError(f"{self.label} takes no seed={seed!r}", where=_place(function), remedy="name its keyword")
        self.function, self.per_row, self.dtype, self.seed = function, per_row, dtype, seed
        self.timeout, self.retries = timeout, retries
        self.executor = Lent(executor) if isinstance(executor, Executor) else executor
        self.shared, self.repeats_shared = frozenset(shared), per_row
        self._employ()

    @property
    def place(self) -> str:
        """Module and line of the function."""
        return _place(self.function)

    @property
    def last_failure(self) -> str | None:
        """Why the first masked row of this thread's last evaluation was masked, and how many were; None: none was."""
        return getattr(self._last, "failure", None)

    def complete(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The inputs with the seeds of their rows, which are drawn from torch's global generator if not yet there."""
        if self.seed is None or self._has_seeds(inputs):
            return inputs
        rows = rows_of(self, inputs)
        return (*inputs, torch.randint(0, 2**62, (rows,), dtype=torch.int64).to(inputs[0].device))

    def dtypes(self, *inputs: Tensor) -> tuple[torch.dtype, ...]:
        """The declared dtype for floating inputs, their own for all others."""
        return tuple(self.dtype if tensor.is_floating_point() else tensor.dtype for tensor in inputs)

    def describe_inputs(self) -> str:
        """What the function takes, in words."""
        taken = "one row of each input" if self.per_row else "arrays with rows in dimension 0"
        seeds = f", and {self.seed}= from the last input" if self.seed else ""
        return f"{self.label} takes {taken}, floating inputs as {str(self.dtype).removeprefix('torch.')}{seeds}"

    def compute(self, arrays: Sequence[Array], rows: int) -> list[Array]:
        """Call the function on all rows; see the class for what happens to those that fail."""
        if self.seed is not None and (arrays[-1].dtype != np.int64 or arrays[-1].shape != (rows,)):
            raise BoxError(
                f"the seeds of {self.label} are missing",
                where=self.place,
                why=f"seed={self.seed!r} makes its last input int64 of shape (rows,)",
                remedy="add the seeds as the last input, or call the box as a module",
            )
        known = self._layouts.get(self._layout_key(arrays))
        self._last.failure = None
        answers = self._workers.evaluate(arrays, rows, known)
        outputs, failures = assemble(answers, rows, known)
        if failures:
            row = min(failures)
            self._last.failure = f"row {row} {failures[row].reason} ({len(failures)} of {rows} rows failed)"
            if not any(output.dtype.kind == "f" for output in outputs):
                first = next((answer.first for answer in answers if answer.first is not None), failures[row])
                raise self._error(first)
        return outputs

    def _error(self, failure: Failure) -> BoxError:
        error = BoxError(f"{self.label} {failure.reason}", where=self.place, remedy=failure.remedy)
        error.__cause__ = failure.error
        return error

    def _has_seeds(self, inputs: Sequence[Tensor]) -> bool:
        """By their dtype and shape; an input that the function has a place for is none."""
        last = inputs[-1]
        if last.dtype is not torch.int64 or last.dim() != 1 or len(inputs) - 1 in self.shared:
            return False
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):
            return True
        if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
            return True
        places = [
            p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != self.seed
        ]
        return len(inputs) > len(places)

    def _employ(self) -> None:
        """What is neither copied nor pickled: workers, none of which starts yet, and what each thread last saw."""
        task = Task(self.function, self.per_row, self.shared, self.seed, self.retries)
        try:
            self._workers = Workers(task, self.executor, self.timeout)
        except BoxError as error:
            raise BoxError(error.what, where=self.place, why=error.why, remedy=error.remedy) from error.__cause__
        self._last = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key not in ("_workers", "_last")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._employ()


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


def _takes(function: Callable[..., Any], keyword: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return True  # it does not say
    named = parameters.get(keyword)
    return (
        named.kind is not named.POSITIONAL_ONLY
        if named
        else any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    )
