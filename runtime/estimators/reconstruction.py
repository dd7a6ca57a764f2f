"""From directional derivatives back to a gradient, row by row."""

import numpy as np
import torch
from torch import Tensor

from .arrays import Array
from .precision import aligned, full_precision

_WORST_PIVOT = 1e-4  # below it the normal equations have lost half of float64's digits


def average(directions: Array, slopes: Array, usable: Array | None) -> Array:
    """Mean of slope x direction over the usable probes, (rows, width); zero where a row has none.

    directions: (rows, probes, width); slopes: (rows, probes), zero where not usable; usable: bool, None where all are.
    Unbiased as E[u u^T] = I. For orthogonal sets that do not exceed the width it is the scaled least-squares solution.
    """
    if directions.shape[1] == 1:
        return slopes * directions[:, 0]
    counts = slopes.shape[1] if usable is None else np.maximum(np.count_nonzero(usable, 1, keepdims=True), 1)
    weights = slopes / np.asarray(counts, slopes.dtype)
    combined: Array = np.matmul(weights[:, None], directions)[:, 0]
    return combined


@full_precision
def least_squares(directions: Array, slopes: Array, usable: Array | None) -> Array:
    """Minimum-norm solution of direction . gradient = slope over the usable probes, times width / rank: (rows, width).

    The projection on a random subspace of that rank has mean rank / width, so the scale makes it unbiased. Gram
    matrices are factorised in float64; rows with dependent directions go through a singular value decomposition.
    """
    rows, count, width = directions.shape
    under = count <= width
    wide = torch.zeros(rows, aligned(count), aligned(width), dtype=torch.float64)
    wide[:, :count, :width] = torch.from_numpy(directions)
    target = torch.zeros(rows, wide.shape[1], dtype=torch.float64)
    target[:, :count] = torch.from_numpy(slopes)
    kept = torch.full((rows,), count)
    idle = torch.zeros(rows, wide.shape[1] if under else wide.shape[2], dtype=torch.float64)
    idle[:, count if under else width :] = width
    if usable is not None:
        mask = torch.from_numpy(usable)
        wide[:, :count] *= mask.unsqueeze(2)
        kept = mask.sum(1)
        if under:
            idle[:, :count] = ~mask * float(width)  # a lost probe becomes an equation of its own: 0 = 0
    gram = torch.bmm(wide, wide.transpose(1, 2)) if under else torch.bmm(wide.transpose(1, 2), wide)
    gram.diagonal(dim1=1, dim2=2).add_(idle)
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal(dim1=1, dim2=2)
    dependent = (failed != 0) | ~(pivots.amin(1) >= _WORST_PIVOT * pivots.amax(1))
    factor = torch.where(dependent[:, None, None], torch.eye(gram.shape[1], dtype=factor.dtype), factor)
    if under:
        solution = _combine(wide, torch.cholesky_solve(target.unsqueeze(2), factor).squeeze(2))
    else:
        solution = torch.cholesky_solve(_combine(wide, target).unsqueeze(2), factor).squeeze(2)
    solution *= (width / kept.clamp(1, width)).unsqueeze(1)
    if bool(dependent.any()):
        solution[dependent] = _through_singular_values(wide[dependent], target[dependent], width)
    found: Array = solution[:, :width].numpy().astype(directions.dtype)
    return found


def _through_singular_values(directions: Tensor, slopes: Tensor, width: int) -> Tensor:
    left, values, right = torch.linalg.svd(directions, full_matrices=False)
    cutoff = values.amax(1, keepdim=True) * (1e-12 * max(directions.shape[1:]))
    inside = values > cutoff
    weights = _combine(left, slopes).masked_fill(~inside, 0.0) / values.masked_fill(~inside, 1.0)
    scale = width / inside.sum(1, keepdim=True).clamp(min=1)
    return torch.mul(_combine(right, weights), scale)


@full_precision
def _combine(vectors: Tensor, weights: Tensor) -> Tensor:
    """Sum over k of weights[:, k] x vectors[:, k]."""
    combined: Tensor = torch.bmm(weights.unsqueeze(1), vectors).squeeze(1)
    return combined
