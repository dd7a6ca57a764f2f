"""What a box is: the interface that rules call, and the forward that all boxes share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rewriter.runtime.errors import BoxError

from .arrays import NUMPY_DTYPES, TORCH_DTYPES, dtype_class, in_words, leave
from .operator import count_rows, evaluate_box, register

Array = NDArray[Any]
NonFinite = Literal["raise", "zero", "keep"]
Layout = tuple[tuple[tuple[int, ...], np.dtype[Any]], ...]  # per output: shape of one row, dtype


class Box(nn.Module, ABC):
    """Something that is evaluated on rows but not differentiated; it holds no parameters and its state dict is empty.

    label:          for messages: file name or function name
    shared:         positions of the inputs that have no rows
    repeats_shared: whether `evaluate` takes shared inputs repeated per row, (n, ...), or as they are
    nonfinite:      what `finish` does with rows that hold NaN or infinity: "raise", "zero" or "keep"
    """

    label: str
    shared: frozenset[int]
    repeats_shared: bool
    nonfinite: NonFinite
    output_names: tuple[str, ...]  # empty until known

    def __init__(self, label: str, nonfinite: NonFinite) -> None:
        super().__init__()
        if nonfinite not in ("raise", "zero", "keep"):
            raise BoxError(f"nonfinite={nonfinite!r} is not known", where=label, remedy='"raise", "zero" or "keep"')
        self.label, self.nonfinite = label, nonfinite
        self.shared, self.repeats_shared, self.output_names = frozenset(), False, ()
        self._layouts: dict[tuple[tuple[int, ...], ...], Layout] = {}
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

    def check(self, *inputs: Tensor) -> None:
        """Check what `forward` is about to be given, without evaluating anything. Raises `BoxError` in plain words."""
        self._check_dtypes(self._repeat_shared(inputs))
        self._count_rows(self._repeat_shared(inputs))

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs in the box's own dtypes, tape-free, on the device of the first input; a failed row is all NaN.

        inputs: rows in dimension 0, any number of them; shared inputs repeated per row where `repeats_shared`.
        Tensors that have the box's dtype and lie on the CPU are read in place. May be called from several threads.
        Raises `BoxError` if an input or an output does not have the agreed shape or dtype, or if the box fails.
        """
        wanted = self._check_dtypes(inputs)
        rows = self._count_rows(inputs)
        arrays = list(map(leave, inputs, wanted))
        key = self._row_shapes(arrays)
        if rows == 0:
            layout = self._layouts.get(key) or self._probe(key, wanted)
            outputs = [np.empty((0, *shape), dtype) for shape, dtype in layout]
        else:
            outputs = self.compute(arrays, rows)
            self._check_outputs(key, outputs, rows)
        if inputs[0].is_cpu:
            return tuple(map(torch.from_numpy, outputs))
        return tuple(torch.from_numpy(output).to(inputs[0].device) for output in outputs)

    def finish(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What `forward` returns, from what `evaluate` returned.

        Floating outputs are cast to the dtype of the caller's first floating input (torch's default dtype where there
        is none), at least float32; integer outputs are left alone. With nonfinite="zero", a row with a NaN or infinite
        entry in any floating output is 0 in all of them. Raises `BoxError` about such rows with nonfinite="raise".
        """
        if self.nonfinite != "keep" and not all(map(_is_finite, outputs)):
            outputs = self._mask(outputs)
        dtype = _returned_dtype(inputs)
        return tuple(
            [
                output if output.dtype is dtype or not output.is_floating_point() else output.to(dtype)
                for output in outputs
            ]
        )

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Evaluate and finish; one operator, one node in any graph. A single output is returned bare.

        Differentiating it raises `BoxError`, unless no floating input requires a gradient.
        """
        outputs = evaluate_box(self._handle, list(inputs))
        count = len(self.output_names) or len(outputs)
        return outputs[0] if count == 1 else tuple(outputs[position] for position in range(count))

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The operator's kernel."""
        return list(self.finish(inputs, self.evaluate(*self._repeat_shared(inputs))))

    def run_fake(self, inputs: list[Tensor]) -> list[Tensor]:
        """The operator's shapes and dtypes; evaluates two rows of zeros if these row shapes were never evaluated."""
        repeated = self._repeat_shared(inputs)
        wanted = self._check_dtypes(repeated)
        rows = self._count_rows(repeated)
        key = tuple(
            tuple(int(size) for size in tensor.shape[position not in self.shared :])
            for position, tensor in enumerate(repeated)
        )
        layout = self._layouts.get(key) or self._probe(key, wanted)
        floating = _returned_dtype(inputs)
        return [
            inputs[0].new_empty((rows, *shape), dtype=floating if dtype.kind == "f" else TORCH_DTYPES[dtype])
            for shape, dtype in layout
        ]

    def _repeat_shared(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        if not self.repeats_shared or not self.shared:
            return inputs
        rows = self._count_rows(inputs)
        return [
            tensor.expand(rows, *tensor.shape) if position in self.shared else tensor
            for position, tensor in enumerate(inputs)
        ]

    def _row_shapes(self, arrays: Sequence[Array]) -> tuple[tuple[int, ...], ...]:
        """What decides the shapes of output rows: of each input the shape of one row, or of all of it if shared."""
        if not self.shared:
            return tuple([array.shape[1:] for array in arrays])
        return tuple([array.shape[position not in self.shared :] for position, array in enumerate(arrays)])

    def _count_rows(self, inputs: Sequence[Tensor]) -> int:
        rows = None
        for position, tensor in enumerate(inputs):
            if position in self.shared:
                continue
            if tensor.dim() == 0:
                raise BoxError(
                    f"input {position} of {self.label} is a single number without rows",
                    where=self.place,
                    remedy="give every input its rows in dimension 0, or declare it shared",
                )
            if rows is None:
                rows = tensor.shape[0]
            elif tensor.shape[0] != rows:
                raise BoxError(
                    f"the inputs of {self.label} differ in their number of rows: {rows}, and "
                    f"{tensor.shape[0]} in input {position}",
                    where=self.place,
                    remedy="give every input its rows in dimension 0, or declare it shared",
                )
        if rows is None:
            raise BoxError(f"{self.label} got no input with rows", where=self.place, why="all its inputs are shared")
        return rows

    def _check_dtypes(self, inputs: Sequence[Tensor]) -> tuple[torch.dtype, ...]:
        wanted = self.dtypes(*inputs)
        for position, tensor in enumerate(inputs):
            dtype = wanted[position]
            if tensor.dtype is not dtype and dtype_class(tensor.dtype) != dtype_class(dtype):
                raise BoxError(
                    f"input {position} of {self.label} must be {in_words(dtype)}, got {in_words(tensor.dtype)}",
                    where=self.place,
                    why=self.describe_inputs(),
                    remedy="convert it in the model; only the precision is adapted for you",
                )
        return wanted

    def _check_outputs(self, key: tuple[tuple[int, ...], ...], outputs: list[Array], rows: int) -> None:
        found = tuple([(output.shape[1:], output.dtype) for output in outputs])
        for position, output in enumerate(outputs):
            if output.shape[:1] != (rows,):
                raise BoxError(
                    f"{self._output(position)} has shape {output.shape} for {rows} rows of input",
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

    def _probe(self, key: tuple[tuple[int, ...], ...], dtypes: Sequence[torch.dtype]) -> Layout:
        arrays = [
            np.zeros(shape if position in self.shared and not self.repeats_shared else (2, *shape), NUMPY_DTYPES[dtype])
            for position, (shape, dtype) in enumerate(zip(key, dtypes, strict=True))
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

    def _mask(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        floating = [output for output in outputs if output.is_floating_point()]
        failed = torch.stack([~output.isfinite().reshape(output.shape[0], -1).all(1) for output in floating])
        if self.nonfinite == "raise" and bool(failed.any()):
            counts = failed.sum(1).tolist()
            positions = [position for position, output in enumerate(outputs) if output.is_floating_point()]
            parts = [
                f"{count} of {failed.shape[1]} rows of {self._output(position)}"
                for position, count in zip(positions, counts, strict=True)
                if count
            ]
            raise BoxError(
                f"not finite: {', '.join(parts)}",
                where=self.place,
                why="the box returned NaN or infinity",
                remedy='correct the inputs; or declare nonfinite="zero" (such rows become 0) or nonfinite="keep"',
            )
        rows = failed.any(0)
        return [
            output.masked_fill(rows.reshape(-1, *(1,) * (output.dim() - 1)), 0)
            if output.is_floating_point()
            else output
            for output in outputs
        ]

    def _output(self, position: int) -> str:
        name = self.output_names[position] if position < len(self.output_names) else position
        return f"output {name} of {self.label}"

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["_handle"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._handle = register(self)


def _is_finite(output: Tensor) -> bool:
    """One pass: a sum is finite only if all terms are; the exact test decides where finite terms overflow."""
    return not output.is_floating_point() or math.isfinite(output.sum().item()) or bool(output.isfinite().all())


def _returned_dtype(inputs: Sequence[Tensor]) -> torch.dtype:
    for tensor in inputs:
        if tensor.is_floating_point():
            return torch.promote_types(tensor.dtype, torch.float32)
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def _words(layout: Layout) -> str:
    return ", ".join(f"rows of {dtype} {shape}" for shape, dtype in layout)
