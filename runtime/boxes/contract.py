"""What a call of a box must look like, and what becomes of rows that are not finite: said in the box's own words."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from rewriter.runtime.errors import BoxError

from .arrays import dtype_class, in_words

if TYPE_CHECKING:
    from .protocol import Box

# Not "everything but tensors": the proxies that stand for them in a graph pass.
NO_TENSORS = (int, float, complex, str, bytes, list, tuple, dict, np.ndarray, NoneType)


def refuse_arguments(box: Box, inputs: Sequence[Any], named: dict[str, Any]) -> NoReturn:
    """Raises `BoxError` about keyword arguments, and about inputs that are no tensors."""
    shown = [f"{name}=" for name in named] + [type(value).__name__ for value in inputs if isinstance(value, NO_TENSORS)]
    raise BoxError(
        f"{box.label} was called with {', '.join(shown)}",
        where=box.place,
        why=f"a box takes tensors, by position; {box.describe_inputs()}",
        remedy="pass numbers as tensors (torch.full((rows,), number)), and keep options inside the box",
    )


def refuse_surplus_domains(box: Box, inputs: Sequence[Tensor]) -> None:
    """Raises `BoxError` about a domain of an input that is not there, or that has no gradient to estimate."""
    for position in box.domains:
        if position >= len(inputs) or not inputs[position].is_floating_point():
            found = f"it got {len(inputs)}" if position >= len(inputs) else f"it is {in_words(inputs[position].dtype)}"
            raise BoxError(
                f"{box.label} has a domain for input {position}, but {found}",
                where=box.place,
                why="a domain says where the probes of a floating input may go",
                remedy="declare it for the position of a floating input (positions count from 0)",
            )


def rows_of(box: Box, inputs: Sequence[Tensor]) -> int:
    """How many rows the inputs have. Raises `BoxError` where they have none, or differ."""
    rows = None
    for position, tensor in enumerate(inputs):
        if position in box.shared:
            continue
        if tensor.dim() == 0:
            raise BoxError(
                f"input {position} of {box.label} is a single number without rows",
                where=box.place,
                remedy="give every input its rows in dimension 0, or declare it shared",
            )
        if rows is None:
            rows = tensor.shape[0]
        elif tensor.shape[0] != rows:
            raise BoxError(
                f"the inputs of {box.label} differ in their number of rows: {rows}, and "
                f"{tensor.shape[0]} in input {position}",
                where=box.place,
                remedy="give every input its rows in dimension 0, or declare it shared",
            )
    if rows is None:
        raise BoxError(f"{box.label} got no input with rows", where=box.place, why="all its inputs are shared")
    return rows


def admitted_dtypes(box: Box, inputs: Sequence[Tensor]) -> tuple[torch.dtype, ...]:
    """The dtype in which each input is evaluated. Raises `BoxError` where more than the precision would change."""
    wanted = box.dtypes(*inputs)
    for position, tensor in enumerate(inputs):
        dtype = wanted[position]
        if tensor.dtype is not dtype and dtype_class(tensor.dtype) != dtype_class(dtype):
            raise BoxError(
                f"input {position} of {box.label} must be {in_words(dtype)}, got {in_words(tensor.dtype)}",
                where=box.place,
                why=box.describe_inputs(),
                remedy="convert it in the model; only the precision is adapted for you",
            )
    return wanted


def masked(box: Box, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Outputs in which a row that is not finite in one is 0 in all that are floating.

    Raises `BoxError` about such rows, with the reason where the box knows it, under nonfinite="raise".
    """
    floating = [output for output in outputs if output.is_floating_point()]
    failed = torch.stack([~output.isfinite().reshape(output.shape[0], -1).all(1) for output in floating])
    if box.nonfinite == "raise" and bool(failed.any()):
        positions = [position for position, output in enumerate(outputs) if output.is_floating_point()]
        parts = [
            f"{count} of {failed.shape[1]} rows of {output_name(box, position)}"
            for position, count in zip(positions, failed.sum(1).tolist(), strict=True)
            if count
        ]
        raise BoxError(
            f"not finite: {', '.join(parts)}",
            where=box.place,
            why=box.last_failure or "the box returned NaN or infinity",
            remedy='correct the inputs; or declare nonfinite="zero" (such rows become 0) or nonfinite="keep"',
        )
    rows = failed.any(0)
    return tuple(
        output.masked_fill(rows.reshape(-1, *(1,) * (output.dim() - 1)), 0) if output.is_floating_point() else output
        for output in outputs
    )


def output_name(box: Box, position: int) -> str:
    """For messages: by the name that the box gives it, if it does."""
    name = box.output_names[position] if position < len(box.output_names) else position
    return f"output {name} of {box.label}"
