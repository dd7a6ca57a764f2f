"""Probe directions: unit variance per entry, E[u u^T] = I, independent from row to row."""

import math

import numpy as np
import torch
from torch import Tensor

from rewriter.runtime.random import Key, normal, signs, subsets

from .precision import aligned, full_precision

KINDS = ("orthogonal", "rademacher", "gaussian", "coordinate")


def draw(
    kind: str, key: Key, rows: int, count: int, width: int, first_row: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`count` directions for every row, (rows, count, width), contiguous.

    orthogonal: Haar-distributed frames of squared length `width`, in independent blocks of `width` directions;
    coordinate: sqrt(width) e_j for a random subset of the coordinates, all of them in their order at count = width;
    rademacher, gaussian: independent entries.
    """
    if kind == "rademacher":
        return signs(key, rows, count * width, first_row).view(rows, count, width).to(dtype)
    if kind == "gaussian":
        return normal(key, rows, count * width, first_row).view(rows, count, width).to(dtype)
    complete, partial = (_rotated_basis, _frame) if kind == "orthogonal" else (_basis, _coordinates)
    if count < width:
        return partial(key, rows, count, width, first_row, dtype)
    blocks = [complete(key.named(f"block{i}"), rows, width, first_row, dtype) for i in range(count // width)]
    if count % width:
        blocks.append(partial(key, rows, count % width, width, first_row, dtype))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


def _basis(key: Key, rows: int, width: int, first_row: int, dtype: torch.dtype) -> Tensor:
    return (math.sqrt(width) * torch.eye(width, dtype=dtype)).repeat(rows, 1, 1)


def _coordinates(key: Key, rows: int, count: int, width: int, first_row: int, dtype: torch.dtype) -> Tensor:
    chosen = subsets(key, rows, width, count, first_row)
    return torch.zeros(rows, count, width, dtype=dtype).scatter_(2, chosen.unsqueeze(2), math.sqrt(width))


@full_precision
def _rotated_basis(key: Key, rows: int, width: int, first_row: int, dtype: torch.dtype) -> Tensor:
    """Complete frames: one Haar rotation a call, its columns' signs flipped at random in each row.

    Each row's frame is Haar-distributed; as complete frames have no estimation error on a linear box, nothing is lost
    by sharing the rotation, and one QR replaces `rows` of them.
    """
    basis, triangle = torch.linalg.qr(normal(key.named("rotation"), width, width).to(dtype))
    basis = basis * triangle.diagonal().sign() * math.sqrt(width)
    flips = signs(key, rows, width, first_row).to(dtype)
    rotated: Tensor = basis.contiguous() * flips.unsqueeze(1)
    return rotated


def _frame(key: Key, rows: int, count: int, width: int, first_row: int, dtype: torch.dtype) -> Tensor:
    """Incomplete frames: `count` orthogonal directions, the span of each row Haar-distributed."""
    if count > 1:
        return _reflections(key, rows, count, width, first_row, dtype)
    gaussian = normal(key, rows, width, first_row).to(dtype).numpy()
    length = np.sqrt(np.einsum("nd,nd->n", gaussian, gaussian) / gaussian.dtype.type(width))
    return torch.from_numpy(gaussian / length[:, None]).unsqueeze(1)


@full_precision
def _reflections(key: Key, rows: int, count: int, width: int, first_row: int, dtype: torch.dtype) -> Tensor:
    """The first `count` columns of a Haar rotation in each row.

    A product of Householder reflections of Gaussian vectors of falling length (Stewart 1980) in its compact form
    Q = I - V^T T V, with inverse(T) = unit upper triangle of V V^T once |v|^2 = 2 (Joffrain et al. 2006): stable in
    float32, with one small triangular solve per row.
    """
    size = aligned(count)
    vectors = torch.zeros(rows, size, aligned(width), dtype=dtype)
    vectors[:, :count, :width] = normal(key, rows, count * width, first_row).view(rows, count, width).triu()
    diagonal = vectors.diagonal(dim1=1, dim2=2)[:, :count]  # (rows, count), a view
    length = torch.linalg.vector_norm(vectors[:, :count], dim=2)
    sign = torch.where(diagonal < 0, -1.0, 1.0).to(dtype)
    norm = torch.sqrt(length * (length + diagonal.abs()))
    diagonal += sign * length
    vectors[:, :count] /= norm.unsqueeze(2)
    gram = torch.bmm(vectors, vectors.transpose(1, 2))
    corner = vectors.new_zeros(rows, size, size)
    corner[:, :, :count] = vectors[:, :, :count]
    inner = torch.linalg.solve_triangular(gram, corner, upper=True, unitriangular=True)
    frame = torch.bmm(inner.transpose(1, 2), vectors)[:, :count, :width].neg()
    frame.diagonal(dim1=1, dim2=2).add_(1.0)
    return frame.mul_(sign.mul_(-math.sqrt(width)).unsqueeze(2))
