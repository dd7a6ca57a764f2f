"""From tensors to the arrays a box reads: in place where dtype and device allow it."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rewriter.runtime.errors import BoxError

NUMPY_DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    getattr(torch, name): np.dtype(name)
    for name in (
        *("float16", "float32", "float64", "bool", "int8", "int16", "int32", "int64"),
        *("uint8", "uint16", "uint32", "uint64", "complex64", "complex128"),
    )
}
TORCH_DTYPES = {in_numpy: in_torch for in_torch, in_numpy in NUMPY_DTYPES.items()}


def dtype_class(dtype: torch.dtype) -> str:
    """Float, integer, boolean or complex: inside a class precision is adapted, between classes nothing is."""
    if dtype.is_floating_point:
        return "floating"
    if dtype.is_complex:
        return "complex"
    return "boolean" if dtype is torch.bool else "integer"


def in_words(dtype: torch.dtype) -> str:
    """For messages: `floating (float32)`."""
    return f"{dtype_class(dtype)} ({str(dtype).removeprefix('torch.')})"


def leave(tensor: Tensor, dtype: torch.dtype) -> NDArray[Any]:
    """The tensor as a C-contiguous array of `dtype`; shares memory with a contiguous CPU tensor of that dtype.

    Raises `BoxError` if an integer does not fit into a narrower integer dtype.
    """
    if tensor.dtype is not dtype:
        tensor = _cast(tensor, dtype)
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    # `force` covers devices and tensors on a tape, and costs three times the plain view.
    array: NDArray[Any] = tensor.numpy(force=tensor.requires_grad or not tensor.is_cpu)
    return array


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.detach().to(dtype)
    if not dtype.is_floating_point and not bool((cast.to(tensor.dtype) == tensor).all()):
        raise BoxError(
            f"an integer input does not fit into {in_words(dtype)}",
            why=f"the box takes {in_words(dtype)}, the tensor is {in_words(tensor.dtype)} and holds larger numbers",
        )
    return cast
