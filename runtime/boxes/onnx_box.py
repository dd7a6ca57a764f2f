"""An ONNX file as a box."""

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from rewriter.runtime.domain import Domain
from rewriter.runtime.errors import BoxError

from .arrays import dtype_class, in_words
from .contract import output_name
from .onnx_check import Allowed
from .onnx_file import Declared, declared_inputs, digest, open_session, output_names, provider_names
from .protocol import Array, Box, NonFinite


@final
class OnnxBox(Box):
    """A box that runs an ONNX file on onnxruntime.

    path:      the file; its weights may lie in files beside it
    providers: None for the CPU, "cuda" for CUDA, or onnxruntime's provider names; never a silent fall-back
    shared:    names of the inputs without rows; None: those with a fixed first dimension where others have a free one
               (or, in a file of one fixed batch, a first dimension other than the first input's), and single numbers
    domains:   where floating inputs may be evaluated, by name: bounds, whole numbers, positive numbers
    noisy:     equal inputs do not give equal outputs
    threads:   of one call; None: onnxruntime's choice
    max_rows:  of one call; more rows are evaluated in several calls. A file of one fixed batch gets as many rows as it
               takes, the last call filled up and cut
    max_bytes: limit on the file, on its constants together, and on any value whose size it fixes
    max_nodes: limit on its nodes, those of inner graphs and (at every call) of functions among them
    custom_ops: a library of custom operators, whose code is loaded; None: only operators of ONNX and onnxruntime

    The file need not be trusted: it is checked first, its weights must lie in its own folder, and making the box
    executes no code of the file's choosing and writes nothing (evaluating it may take as long as the file asks).
    Declared output shapes are ignored: the first evaluation decides. Raises `BoxError`, naming the file, for whatever
    cannot be loaded or run. Copies and pickles hold the path and a SHA-256 of the files, not the weights: the session
    is opened again at first use, and a missing or changed file is an error then (set `path` to where the file is now).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        providers: str | Sequence[str] | None = None,
        shared: Iterable[str] | None = None,
        domains: Mapping[str, Domain] | None = None,
        noisy: bool = False,
        threads: int | None = 1,
        nonfinite: NonFinite = "raise",
        max_rows: int | None = None,
        max_bytes: int = 2**31,
        max_nodes: int = 100_000,
        custom_ops: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(Path(path).name, nonfinite, noisy=noisy)
        self.path, self.threads, self.providers = Path(path).absolute(), threads, provider_names(providers)
        library = None if custom_ops is None else Path(custom_ops).absolute()
        self.allowed = Allowed(max_bytes, max_nodes, library)
        self._digest = digest(self.path, self.allowed)
        self._lock = threading.Lock()
        self._session: Any = open_session(self.path, self.providers, threads, self.allowed)
        self.inputs: tuple[Declared, ...] = declared_inputs(self._session, self.path)
        self.output_names = output_names(self._session, self.path)
        self._names = tuple(declared.name for declared in self.inputs)
        self._dtypes = tuple(declared.dtype for declared in self.inputs)
        self._find_rows(None if shared is None else frozenset(shared))
        self._check_names("domains", domains or ())
        self._declare({self._names.index(name): domain for name, domain in (domains or {}).items()})
        self.max_rows = max_rows

    @property
    def place(self) -> str:
        """The path."""
        return str(self.path)

    def dtypes(self, *inputs: Tensor) -> tuple[torch.dtype, ...]:
        """The dtypes that the file declares. Raises `BoxError` for a wrong number of inputs."""
        if len(inputs) != len(self._dtypes):
            raise BoxError(
                f"{self.label} takes {len(self._dtypes)} inputs, got {len(inputs)}",
                where=self.place,
                why=self.describe_inputs(),
            )
        return self._dtypes

    def describe_inputs(self) -> str:
        """What the file takes, in words."""
        parts = [
            f"{declared}{', shared' if position in self.shared else ''}"
            for position, declared in enumerate(self.inputs)
        ]
        return f"{self.label} takes {'; '.join(parts)}"

    def check(self, *inputs: Tensor) -> None:
        """Check number, dtype class, rank and fixed dimensions of what `forward` is about to be given."""
        super().check(*inputs)
        repeated = self._repeat_shared(inputs)
        for position, (declared, tensor) in enumerate(zip(self.inputs, repeated, strict=True)):
            self._check_input(position, declared, tuple(tensor.shape), tensor.dtype)

    def compute(self, arrays: list[Array], rows: int) -> list[Array]:
        """Run the session, in chunks where the file or `max_rows` limits the rows of a call."""
        chunk = self._batch or self.max_rows
        if chunk is None or rows == chunk or (self._batch is None and rows < chunk):
            return self._call(arrays)
        parts = [self._call(self._rows(arrays, start, chunk, rows)) for start in range(0, rows, chunk)]
        for position, output in enumerate(parts[0]):
            if self._batch and (output.ndim == 0 or output.shape[0] != chunk):
                raise BoxError(
                    f"{output_name(self, position)} has shape {output.shape} for a batch of {chunk} rows",
                    where=self.place,
                    why="a box gives one row of output for each row of input, in dimension 0",
                )
        return [np.concatenate(column)[:rows] for column in zip(*parts, strict=True)]

    def _rows(self, arrays: list[Array], start: int, chunk: int, rows: int) -> list[Array]:
        """Rows start:start + chunk, filled up with copies of the last row in a file of one fixed batch."""
        stop = min(start + chunk, rows)
        missing = start + chunk - stop if self._batch else 0
        part = []
        for position, array in enumerate(arrays):
            if position in self.shared and not self.repeats_shared:
                part.append(array)
            elif missing:
                part.append(np.concatenate([array[start:stop], np.repeat(array[stop - 1 : stop], missing, axis=0)]))
            else:
                part.append(array[start:stop])
        return part

    def _call(self, arrays: list[Array]) -> list[Array]:
        session = self._session or self._reopened()
        try:
            outputs: list[Array] = session.run(self.output_names, dict(zip(self._names, arrays, strict=True)))
        except Exception as error:
            for position, (declared, array) in enumerate(zip(self.inputs, arrays, strict=True)):
                self._check_input(position, declared, array.shape, declared.dtype)
            raise BoxError(
                f"{self.label} failed on {arrays[0].shape[0] if arrays[0].ndim else 1} rows",
                where=self.place,
                why=str(error),
            ) from error
        return outputs

    def _check_input(self, position: int, declared: Declared, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        wrong = ""
        free = 0 if self._batch and position not in self.shared else None  # a fixed batch is chunked and filled up
        if dtype_class(dtype) != dtype_class(declared.dtype):
            wrong = f"it must be {in_words(declared.dtype)}, got {in_words(dtype)}"
        elif len(shape) != len(declared.shape):
            wrong = f"it has {len(declared.shape)} dimensions, got {len(shape)}: {shape}"
        else:
            for dimension, (size, got) in enumerate(zip(declared.shape, shape, strict=True)):
                if isinstance(size, int) and size != got and dimension != free:
                    wrong = f"dimension {dimension} is fixed at {size}, got {got}: {shape}"
        if wrong:
            raise BoxError(
                f"input {declared.name} of {self.label} does not fit: {wrong}",
                where=self.place,
                why=self.describe_inputs(),
                remedy="convert or reshape it in the model; only the precision of a number is adapted for you",
            )

    def _check_names(self, argument: str, names: Iterable[str]) -> None:
        unknown = sorted(set(names) - set(self._names))
        if unknown:
            raise BoxError(
                f"{self.label} has no input {', '.join(unknown)}",
                where=self.place,
                remedy=f"{argument}= takes names among: {', '.join(sorted(self._names))}",
            )

    def _find_rows(self, names: frozenset[str] | None) -> None:
        """Which inputs have rows, whether the batch is fixed, and how shared inputs are given."""
        named = names or frozenset()
        self._check_names("shared", named)
        first = {
            position: declared.shape[0]
            for position, declared in enumerate(self.inputs)
            if declared.shape and declared.name not in named
        }
        if not first:
            raise BoxError(f"{self.label} has no input with rows", where=self.place, why=self.describe_inputs())
        free = [size for size in first.values() if not isinstance(size, int)]
        self._batch = None if free else next(size for size in first.values() if isinstance(size, int))
        rowed = {
            position for position, size in first.items() if (not isinstance(size, int) if free else size == self._batch)
        }
        self.shared = frozenset(range(len(self.inputs))) - rowed
        self.repeats_shared = self._are_repeated(free[0] if free else None)
        self._refuse_inner_rows(free[0] if free else None)

    def _are_repeated(self, symbol: str | int | None) -> bool:
        """Shared inputs are repeated per row where the file gives them the same free first dimension as the rows."""
        floating = [self.inputs[position] for position in self.shared if self.inputs[position].dtype.is_floating_point]
        free = [
            bool(declared.shape) and not isinstance(declared.shape[0], int) and declared.shape[0] == symbol
            for declared in floating
        ]
        if any(free) and (not all(free) or len(floating) < len(self.shared)):
            raise BoxError(
                f"{self.label} takes some shared inputs with rows and some without",
                where=self.place,
                why=self.describe_inputs(),
                remedy="expand those with rows in the model (parameter.expand(rows, ...)) and leave them out of shared",
            )
        return any(free)

    def _refuse_inner_rows(self, symbol: str | int | None) -> None:
        for position in self.shared:
            declared = self.inputs[position]
            if symbol is not None and symbol in declared.shape[1:]:
                dimension = declared.shape.index(symbol, 1)
                raise BoxError(
                    f"input {declared.name} of {self.label} has its rows in dimension {dimension}",
                    where=self.place,
                    why=f"{self.describe_inputs()}; a box has its rows in dimension 0",
                    remedy="export the model with the rows of every input and output in dimension 0",
                )

    def _reopened(self) -> Any:
        with self._lock:
            if self._session is None:
                if digest(self.path, self.allowed) != self._digest:
                    raise BoxError(
                        f"{self.label} is not the file this box was made from",
                        where=self.place,
                        why="its SHA-256 differs",
                        remedy="restore the file, set .path of the box to where it is now, or make a new OnnxBox",
                    )
                self._session = open_session(self.path, self.providers, self.threads, self.allowed)
            return self._session

    def __getstate__(self) -> dict[str, Any]:
        state = {**super().__getstate__(), "_session": None}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.Lock()
