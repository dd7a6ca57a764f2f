"""True gradients for benchmarks/step_size.py, by means that have nothing of the library."""

import math

import numpy as np
import torch
from step_size_case import Array, Case
from torch import Tensor

LEVELS = 6


def ridders(case: Case, x: Array, v: Array, spread: Array) -> tuple[Array, Array]:
    """Gradient (n, d) of v . clean and its error estimate, by extrapolated central differences.

    Every entry has its own tableau from each of six first steps, and the entry with the smallest error estimate stands
    (Ridders 1982). A step that leaves the domain or crosses a kink shows in the estimate and loses.
    """
    best = np.full(x.shape, math.nan)
    doubt = np.full(x.shape, math.inf)
    for column in range(x.shape[1]):
        for first in 10.0 ** -np.arange(0.5, 6.5):
            table: list[list[Array]] = []
            for level in range(LEVELS):
                h = first * spread[column] / 1.6**level
                up, down = x.copy(), x.copy()
                up[:, column] += h
                down[:, column] -= h
                assert case.clean is not None
                with np.errstate(all="ignore"):
                    change = case.clean(up) - case.clean(down)
                    line = [(change * v).sum(1) / (up[:, column] - down[:, column])]
                    for order, coarser in enumerate(table[-1] if table else [], 1):
                        factor = 1.6 ** (2 * order)
                        line.append((factor * line[-1] - coarser) / (factor - 1))
                        error = np.maximum(np.abs(line[-1] - line[-2]), np.abs(line[-1] - coarser))
                        better = error < doubt[:, column]
                        best[better, column], doubt[better, column] = line[-1][better], error[better]
                table.append(line)
    return best, doubt


def reference(case: Case, v: Tensor, spread: Array) -> tuple[Array, float]:
    """True gradients (n, d) and their own largest relative error as estimated, zero for autograd."""
    x = case.x.double()
    if case.exact is not None:
        leaf = x.clone().requires_grad_()
        (true,) = torch.autograd.grad((case.exact(leaf) * v).sum(), leaf)
        return true.numpy(), 0.0
    true, doubt = ridders(case, x.numpy(), v.numpy(), spread)
    return true, float((norms(doubt * spread) / norms(true * spread)).max())


def norms(values: Array) -> Array:
    """Of each row."""
    return np.asarray(np.sqrt((values**2).sum(1)))


def cotangents(case: Case) -> Tensor:
    """Normal numbers over the deviation of each output, as if a loss were taken of standardised outputs."""
    with torch.no_grad():
        y = case.box(case.x).double()
    deviation = y.std(0)
    v = torch.from_numpy(np.random.default_rng(9).standard_normal(tuple(y.shape)))
    return v / torch.where(deviation > 0, deviation, 1.0)
