"""What a box of benchmarks/step_size.py is: a batch, and its derivative by other means."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rewriter import CallableBox, OnnxBox

Array = NDArray[np.float64]
ROWS = 32


@dataclass(frozen=True)
class Case:
    """A box, a batch, and its derivative by other means.

    box: what the library sees; x: (rows, d); clean: the same function in float64 arrays, without noise or rounding, for
    Ridders' method; exact: the same in torch, for autograd, where there is one; tolerance: of a row's relative error
    """

    box: nn.Module
    x: Tensor
    clean: Callable[[Array], Array] | None = None
    exact: Callable[[Tensor], Tensor] | None = None
    tolerance: float = 0.01


def uniform(low: list[float], high: list[float], seed: int = 0, rows: int = ROWS) -> Array:
    """(rows, d) between the bounds."""
    return np.random.default_rng(seed).uniform(low, high, (rows, len(low)))


def normal(width: int, seed: int = 0, rows: int = ROWS) -> Array:
    """(rows, width) standard normal numbers."""
    return np.random.default_rng(seed).standard_normal((rows, width))


def plain(function: Callable[[Array], Array], x: Array, **rest: Any) -> Case:
    """A batched float64 function that is its own clean version."""
    return Case(CallableBox(function), torch.from_numpy(x), clean=function, **rest)


def onnx_file(module: nn.Module, width: int) -> Path:
    """The module exported with a free number of rows."""
    path = Path(tempfile.mkdtemp()) / "box.onnx"
    batch = torch.export.Dim("batch")
    torch.onnx.export(module, (torch.randn(4, width),), path, dynamo=True, verbose=False, dynamic_shapes=({0: batch},))
    return path


def exported(module: nn.Sequential, width: int, **rest: Any) -> Case:
    """A float32 ONNX box; autograd on the same weights in float64 is its derivative."""
    module.eval().requires_grad_(False)
    path = onnx_file(module, width)
    return Case(OnnxBox(path), torch.from_numpy(normal(width)).float(), exact=module.double(), **rest)


def torch_case(function: Callable[[Tensor], Tensor], x: Array, **rest: Any) -> Case:
    """A float64 box whose function is written in torch, so that autograd knows its derivative."""

    def arrays(a: Array) -> Array:
        return function(torch.from_numpy(a.copy())).numpy()

    return Case(CallableBox(arrays), torch.from_numpy(x), exact=function, **rest)


def matrix(inputs: int, outputs: int, seed: int = 1) -> Tensor:
    return torch.from_numpy(normal(outputs, seed, inputs)) / math.sqrt(inputs)
