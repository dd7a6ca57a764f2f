"""Probe directions: unit variance per entry, E[u u^T] = I, independent from row to row."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rewriter.runtime.random import Key, normal, signs, subsets

from .arrays import Array
from .precision import aligned, full_precision

KINDS = ("orthogonal", "rademacher", "gaussian", "coordinate")


def draw(
    kind: str, key: Key, rows: int, count: int, width: int, first_row: int = 0, dtype: npt.DTypeLike = np.float32
) -> Array:
    """`count` directions for every row, (rows, count, width).

    orthogonal: Haar-distributed frames of squared length `width`, in independent blocks of `width` directions;
    coordinate: sqrt(width) e_j for a random subset of the coordinates, all of them in their order at count = width;
    rademacher, gaussian: independent entries.
    """
    if kind in ("rademacher", "gaussian"):
        entries = signs if kind == "rademacher" else normal
        return entries(key, rows, count * width, first_row).astype(dtype, copy=False).reshape(rows, count, width)
    complete, partial = (_rotated_basis, _frame) if kind == "orthogonal" else (_basis, _coordinates)
    if count < width:
        return partial(key, rows, count, width, first_row, dtype)
    blocks = [complete(key.named(f"block{i}"), rows, width, first_row, dtype) for i in range(count // width)]
    if count % width:
        blocks.append(partial(key, rows, count % width, width, first_row, dtype))
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks, 1)


def _basis(key: Key, rows: int, width: int, first_row: int, dtype: npt.DTypeLike) -> Array:
    basis = np.eye(width, dtype=dtype) * _root(width, dtype)
    return np.broadcast_to(basis, (rows, width, width))  # the same for every row: no copy


def _root(width: int, dtype: npt.DTypeLike) -> Any:
    return np.asarray(math.sqrt(width), dtype)


def _coordinates(key: Key, rows: int, count: int, width: int, first_row: int, dtype: npt.DTypeLike) -> Array:
    chosen = subsets(key, rows, width, count, first_row)
    directions = np.zeros((rows, count, width), dtype)
    np.put_along_axis(directions, chosen[:, :, None], _root(width, dtype), 2)
    return directions


def _rotated_basis(key: Key, rows: int, width: int, first_row: int, dtype: npt.DTypeLike) -> Array:
    """Complete frames: one Haar rotation a call, its columns' signs flipped at random in each row.

    Each row's frame is Haar-distributed; as complete frames have no estimation error on a linear box, nothing is lost
    by sharing the rotation, and one QR replaces `rows` of them.
    """
    basis, triangle = np.linalg.qr(normal(key.named("rotation"), width, width).astype(dtype, copy=False))
    basis *= np.sign(triangle.diagonal()) * _root(width, dtype)
    flipped: Array = basis * signs(key, rows, width, first_row).astype(dtype, copy=False)[:, None]
    return flipped


def _frame(key: Key, rows: int, count: int, width: int, first_row: int, dtype: npt.DTypeLike) -> Array:
    """Incomplete frames: `count` orthogonal directions, the span of each row Haar-distributed."""
    gaussian = normal(key, rows, count * width, first_row).astype(dtype, copy=False).reshape(rows, count, width)
    if count > 1:
        return haar_frames(gaussian)
    length = np.einsum("nkd,nkd->nk", gaussian, gaussian)
    length *= length.dtype.type(1 / width)
    np.sqrt(length, out=length)
    direction: Array = gaussian / length[:, :, None]
    return direction


@full_precision
def haar_frames(gaussian: Array) -> Array:
    """(rows, count, width) Gaussian numbers -> the first `count` columns of a Haar rotation in each row.

    A product of Householder reflections of Gaussian vectors of falling length (Stewart 1980) in its compact form
    Q = I - V^T T V, with inverse(T) = unit upper triangle of V V^T once |v|^2 = 2 (Joffrain et al. 2006): stable in
    float32, with one small triangular solve per row.
    """
    rows, count, width = gaussian.shape
    size = aligned(count)
    normals = torch.from_numpy(gaussian)
    vectors = normals.new_zeros(rows, size, aligned(width))
    vectors[:, :count, :width] = normals.triu()
    diagonal = vectors.diagonal(dim1=1, dim2=2)[:, :count]  # (rows, count), a view
    length = torch.linalg.vector_norm(vectors[:, :count], dim=2)
    sign = torch.where(diagonal < 0, -1.0, 1.0).to(vectors.dtype)
    norm = torch.sqrt(length * (length + diagonal.abs()))
    diagonal += sign * length
    vectors[:, :count] /= norm.unsqueeze(2)
    gram = torch.bmm(vectors, vectors.transpose(1, 2))
    corner = vectors.new_zeros(rows, size, size)
    corner[:, :, :count] = vectors[:, :, :count]
    inner = torch.linalg.solve_triangular(gram, corner, upper=True, unitriangular=True)
    frame = torch.bmm(inner.transpose(1, 2), vectors)[:, :count, :width].neg()
    frame.diagonal(dim1=1, dim2=2).add_(1.0)
    frame *= sign.mul_(-math.sqrt(width)).unsqueeze(2)
    directions: Array = frame.contiguous().numpy()
    return directions
