"""What a box is: the interface that rules call, and the forward that all boxes share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from rewriter.runtime.domain import Domain, checked
from rewriter.runtime.errors import BoxError
from rewriter.runtime.estimators.arrays import Array as Array
from rewriter.runtime.estimators.arrays import is_finite
from rewriter.runtime.evaluator import Answer

from .arrays import NUMPY_DTYPES, TORCH_DTYPES, leave
from .contract import (
    NO_TENSORS,
    admitted_dtypes,
    masked,
    output_name,
    refuse_arguments,
    refuse_surplus_domains,
    rows_of,
)
from .operator import count_rows, evaluate_box, register

NonFinite = Literal["raise", "zero", "keep"]
Layout = tuple[tuple[tuple[int, ...], np.dtype[Any]], ...]  # per output: shape of one row, dtype
LayoutKey = tuple[tuple[tuple[int, ...], np.dtype[Any]], ...]  # per input: shape of one row, or of all if shared; dtype
_Known = tuple[Sequence[Array], int, LayoutKey]  # arrays as the box reads them, rows, key


class Box(nn.Module, ABC):
    """Something that is evaluated on rows but not differentiated; it holds no parameters and its state dict is empty.

    label:          for messages: file name or function name
    shared:         positions of the inputs that have no rows
    repeats_shared: whether `evaluate` takes shared inputs repeated per row, (n, ...), or as they are
    nonfinite:      what `answer` does with rows that hold NaN or infinity: "raise", "zero" or "keep"
    domains:        where inputs may be evaluated, by position
    noisy:          equal inputs do not give equal outputs, and no seed makes them
    """

    label: str
    shared: frozenset[int]
    repeats_shared: bool
    nonfinite: NonFinite
    domains: Mapping[int, Domain]
    noisy: bool
    output_names: tuple[str, ...]  # empty until known

    def __init__(
        self, label: str, nonfinite: NonFinite, domains: Mapping[int, Domain] | None = None, noisy: bool = False
    ) -> None:
        super().__init__()
        if nonfinite not in ("raise", "zero", "keep"):
            raise BoxError(f"nonfinite={nonfinite!r} is not known", where=label, remedy='"raise", "zero" or "keep"')
        self.label, self.nonfinite, self.noisy = label, nonfinite, noisy
        self._declare(domains or {})
        self.shared, self.repeats_shared, self.output_names = frozenset(), False, ()
        self._layouts: dict[LayoutKey, Layout] = {}
        self._handle = register(self)

    @property
    @abstractmethod
    def place(self) -> str:
        """For messages: where it comes from (path, or module and line)."""

    @abstractmethod
    def dtypes(self, *inputs: Tensor) -> tuple[torch.dtype, ...]:
        """The dtype in which each input is evaluated; integer inputs stay integer."""

    @abstractmethod
    def describe_inputs(self) -> str:
        """What the box takes, in words: one line."""

    @abstractmethod
    def compute(self, arrays: list[Array], rows: int) -> list[Array]:
        """Evaluate C-contiguous arrays of the right dtypes; a failed row is NaN. The outputs own their memory.

        An implementation may read the arrays, which alias the caller's tensors, but not write them.
        """

    @property
    def last_failure(self) -> str | None:
        """Why rows of this thread's last evaluation are NaN, where that is known."""
        return None

    def complete(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The inputs of one forward with the seeds of their rows, where the box takes seeds."""
        return inputs

    def check(self, *inputs: Tensor) -> None:
        """Check what `forward` is about to be given, without evaluating anything. Raises `BoxError` in plain words."""
        admitted_dtypes(self, self._repeat_shared(inputs))
        rows_of(self, self._repeat_shared(inputs))

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs in the box's own dtypes, tape-free, on the device of the first input; a failed row is all NaN.

        inputs: rows in dimension 0, any number of them; shared inputs repeated per row where `repeats_shared`.
        Tensors that have the box's dtype and lie on the CPU are read in place. May be called from several threads.
        Raises `BoxError` if an input or an output does not have the agreed shape or dtype, or if the box fails.
        """
        return tuple([_placed(output, inputs[0]) for output in self._answer(inputs)])

    def query(self, arrays: Sequence[Array], like: Sequence[Tensor]) -> Sequence[Array]:
        """As `evaluate`, from arrays to arrays; `like`, the inputs of the forward, says nothing new here."""
        known = self._known(arrays)
        if known is None:  # torch warns of arrays that it could write to but should not
            known = self._admitted([torch.from_numpy(a if a.flags.writeable else a.copy()) for a in arrays])
        return self._computed(*known)

    def answer(self, *inputs: Tensor) -> Answer:
        """What `forward` returns, and what `evaluate` does.

        Floating outputs are cast to the dtype of the caller's first floating input (torch's default dtype where there
        is none), at least float32; integer outputs are left alone. With nonfinite="zero", a row with a NaN or infinite
        entry in any floating output is 0 in all of them. Raises `BoxError` about such rows with nonfinite="raise".
        """
        outputs = self._answer(inputs)
        finite = True
        for array in outputs:
            if not is_finite(array):
                finite = False
        kept = tuple([_placed(output, inputs[0]) for output in outputs])
        returned = kept if finite or self.nonfinite == "keep" else masked(self, kept)
        dtype = _returned_dtype(inputs)
        for output in returned:
            if output.dtype is not dtype:
                returned = tuple([value.to(dtype) if value.is_floating_point() else value for value in returned])
                break
        return Answer(returned, kept, finite)

    def forward(self, *inputs: Tensor, **named: Any) -> Tensor | tuple[Tensor, ...]:
        """What `answer` returns; one operator, one node in any graph. A single output is returned bare.

        Differentiating it raises `BoxError`, unless no floating input requires a gradient.
        """
        if named or any(isinstance(value, NO_TENSORS) for value in inputs):
            refuse_arguments(self, inputs, named)
        outputs = evaluate_box(self._handle, list(inputs))
        if not self.output_names and isinstance(outputs, fx.Proxy):
            raise BoxError(
                f"how many outputs {self.label} has is not known yet",
                where=self.place,
                remedy="call the box once on real inputs before tracing it",
            )
        count = len(self.output_names) or len(outputs)
        return outputs[0] if count == 1 else tuple(outputs[position] for position in range(count))

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The operator's kernel."""
        return list(self.answer(*self._repeat_shared(self.complete(tuple(inputs)))).returned)

    def run_fake(self, inputs: list[Tensor]) -> list[Tensor]:
        """The operator's shapes and dtypes; evaluates two rows of zeros if these row shapes were never evaluated."""
        repeated = self._repeat_shared(self.complete(tuple(inputs)))
        wanted = admitted_dtypes(self, repeated)
        rows = rows_of(self, repeated)
        key = tuple(
            (tuple(int(size) for size in tensor.shape[position not in self.shared :]), NUMPY_DTYPES[dtype])
            for position, (tensor, dtype) in enumerate(zip(repeated, wanted, strict=True))
        )
        layout = self._layouts.get(key) or self._probe(key)
        floating = _returned_dtype(inputs)
        return [
            inputs[0].new_empty((rows, *shape), dtype=floating if dtype.kind == "f" else TORCH_DTYPES[dtype])
            for shape, dtype in layout
        ]

    def _declare(self, domains: Mapping[int, Domain]) -> None:
        self.domains = checked(domains, self.label)
        self._whole = frozenset(position for position, domain in domains.items() if domain.integer)

    def _answer(self, inputs: Sequence[Tensor]) -> Sequence[Array]:
        try:
            known = self._known([tensor.numpy() for tensor in inputs])
        except (RuntimeError, TypeError):  # on a tape, on another device, or of a dtype that numpy does not have
            known = None
        return self._computed(*(known or self._admitted(inputs)))

    def _known(self, arrays: Sequence[Array]) -> _Known | None:
        """Arrays that need no further look: their dtypes and row shapes have been seen, and they lie as a box reads."""
        key = self._layout_key(arrays)
        layout = self._layouts.get(key)
        if layout is None:
            return None
        rows = 0
        for position, array in enumerate(arrays):
            if not array.flags.c_contiguous:
                return None
            if position not in self.shared:
                if rows and len(array) != rows:
                    return None
                rows = len(array)
        return (arrays, rows, key) if rows else None

    def _admitted(self, inputs: Sequence[Tensor]) -> _Known:
        """The checked way in, with conversions."""
        wanted = admitted_dtypes(self, inputs)
        rows = rows_of(self, inputs)
        refuse_surplus_domains(self, inputs)
        arrays = list(map(leave, inputs, wanted))
        return arrays, rows, self._layout_key(arrays)

    def _computed(self, arrays: Sequence[Array], rows: int, key: LayoutKey) -> Sequence[Array]:
        layout = self._layouts.get(key)
        if rows == 0:
            return [np.empty((0, *shape), dtype) for shape, dtype in layout or self._probe(key)]
        given = [np.rint(a) if i in self._whole else a for i, a in enumerate(arrays)] if self._whole else list(arrays)
        outputs: Sequence[Array] = self.compute(given, rows)
        if layout is None or len(outputs) != len(layout):
            self._check_outputs(key, outputs, rows)
        else:
            for output, (shape, dtype) in zip(outputs, layout, strict=True):
                if output.dtype != dtype or output.shape != (rows, *shape):
                    self._check_outputs(key, outputs, rows)
        return outputs

    def _repeat_shared(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        if not self.repeats_shared or not self.shared:
            return inputs
        rows = rows_of(self, inputs)
        return [
            tensor.expand(rows, *tensor.shape) if position in self.shared else tensor
            for position, tensor in enumerate(inputs)
        ]

    def _layout_key(self, arrays: Sequence[Array]) -> LayoutKey:
        """What decides the layout of the outputs: of each input the dtype, and the shape of one row or of all of it."""
        if not self.shared:
            return tuple([(array.shape[1:], array.dtype) for array in arrays])
        return tuple([(array.shape[i not in self.shared :], array.dtype) for i, array in enumerate(arrays)])

    def _check_outputs(self, key: LayoutKey, outputs: Sequence[Array], rows: int) -> None:
        found = tuple([(output.shape[1:], output.dtype) for output in outputs])
        for position, output in enumerate(outputs):
            if output.shape[:1] != (rows,):
                raise BoxError(
                    f"{output_name(self, position)} has shape {output.shape} for {rows} rows of input",
                    where=self.place,
                    why="a box gives one row of output for each row of input, in dimension 0",
                    remedy="drop outputs that have no rows, or repeat them per row, inside the box",
                )
        layout = self._layouts.setdefault(key, found)
        if not self.output_names:
            self.output_names = tuple(map(str, range(len(found))))
        if found != layout or len(found) != len(self.output_names):
            raise BoxError(
                f"{self.label} changed the number, shape or dtype of its outputs: "
                f"now {_words(found)}, before {_words(layout)}",
                where=self.place,
                why="input rows of one shape must give output rows of one shape, and always as many outputs",
            )

    def _probe(self, key: LayoutKey) -> Layout:
        arrays = [
            np.zeros(shape if position in self.shared and not self.repeats_shared else (2, *shape), dtype)
            for position, (shape, dtype) in enumerate(key)
        ]
        try:
            outputs = self.compute(arrays, 2)
            count_rows(self._handle, 2)
        except BoxError as error:
            raise BoxError(
                f"the shapes that {self.label} returns are not known yet, and two rows of zeros do not tell",
                where=self.place,
                why=error.what,
                remedy="call the box once on real inputs before exporting or compiling it or giving it an empty batch",
            ) from error
        self._check_outputs(key, outputs, 2)
        return self._layouts[key]

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["_handle"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._handle = register(self)


def _placed(output: Array, like: Tensor) -> Tensor:
    placed = torch.from_numpy(output)
    return placed if like.is_cpu else placed.to(like.device)


def _returned_dtype(inputs: Sequence[Tensor]) -> torch.dtype:
    for tensor in inputs:
        dtype = tensor.dtype
        if dtype is torch.float32 or dtype is torch.float64:
            return dtype
        if dtype.is_floating_point:
            return torch.promote_types(dtype, torch.float32)
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def _words(layout: Layout) -> str:
    return ", ".join(f"rows of {dtype} {shape}" for shape, dtype in layout)
