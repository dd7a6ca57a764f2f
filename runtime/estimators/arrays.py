"""Estimators compute with numpy on the host: boxes take arrays, and an operation costs a third of what torch asks."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]


def side_by_side(values: Sequence[Tensor], dtype: torch.dtype) -> Array:
    """(rows, sum of widths) in `dtype`, from tensors with rows in dimension 0."""
    flat = [value.detach().to("cpu", dtype).numpy() for value in values]
    flat = [value if value.ndim == 2 else value.reshape(len(value), math.prod(value.shape[1:])) for value in flat]
    return flat[0] if len(flat) == 1 else np.concatenate(flat, 1)


def divided(values: Array, widths: Sequence[int]) -> list[Array]:
    """(rows, sum of widths) -> one (rows, width) for each."""
    if len(widths) == 1:
        return [values]
    return np.split(values, np.cumsum(widths)[:-1], 1)


def is_finite(values: Array) -> bool:
    """Whether all are; a sum that overflows only leads to the long way round."""
    return math.isfinite(float(values.sum())) or bool(np.isfinite(values).all())


def row_norms(values: Array) -> Array:
    """(rows,) norms in float64: loss scales and their inverses must not leave the range of a square."""
    wide = values.astype(np.float64, copy=False)
    norms: Array = np.sqrt(np.einsum("nd,nd->n", wide, wide))
    return norms
