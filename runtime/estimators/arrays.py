"""Estimators compute with numpy on the host: boxes take arrays, and an operation costs a third of what torch asks."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]


def host(value: Tensor) -> Array:
    """The tensor's numbers on the host, in place where they lie there; bfloat16, which numpy lacks, as float32."""
    value = value.detach()
    if value.dtype is torch.bfloat16:
        value = value.float()
    array: Array = value.numpy() if value.is_cpu else value.cpu().numpy()
    return array


def side_by_side(values: Sequence[Array], dtype: np.dtype[Any]) -> Array:
    """(rows, sum of widths) in `dtype`, from arrays with rows in dimension 0."""
    flat = [v if v.ndim == 2 else v.reshape(len(v), math.prod(v.shape[1:])) for v in values]
    if len(flat) > 1:
        return np.concatenate(flat, 1, dtype=dtype)
    return flat[0] if flat[0].dtype == dtype else flat[0].astype(dtype)


def divided(values: Array, widths: Sequence[int]) -> list[Array]:
    """(rows, sum of widths) -> one (rows, width) for each."""
    if len(widths) == 1:
        return [values]
    return np.split(values, np.cumsum(widths)[:-1], 1)


def is_finite(values: Array) -> bool:
    """Whether all are; a sum of squares that overflows only leads to the long way round."""
    if values.dtype.kind != "f":
        return True
    return math.isfinite(np.vdot(values, values)) or bool(np.isfinite(values).all())


def row_norms(values: Array) -> Array:
    """(rows,) norms in float64: loss scales and their inverses must not leave the range of a square."""
    wide = values.astype(np.float64, copy=False)
    norms: Array = np.sqrt(np.einsum("nd,nd->n", wide, wide))
    return norms
