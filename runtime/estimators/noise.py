"""Noise for likelihood ratios: samples of unit variance per entry, independent from row to row, and their scores."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rewriter.runtime.errors import RewriteError
from rewriter.runtime.random import Key, normal, words

from .arrays import Array
from .directions import haar_frames

KINDS = ("orthogonal", "gaussian", "sobol", "laplace")

_SOBOL_BITS = 30  # of torch's engine
_SOBOL_WIDEST = 21201  # likewise
_SOBOL_POINTS = 16  # points per dimension from which a low-discrepancy set beats independent samples


def draw_noise(
    kind: str,
    key: Key,
    rows: int,
    copies: int,
    width: int,
    *,
    antithetic: bool = False,
    first_row: int = 0,
    dtype: npt.DTypeLike = np.float32,
) -> Array:
    """Noise of `copies` copies of every row, (rows, copies, width).

    orthogonal: blocks of up to `width` orthogonal directions, Haar-distributed, with the lengths of Gaussian vectors,
    so that each alone is standard normal; gaussian; laplace; sobol: standard normal by inverse distribution function
    from one scrambled Sobol set, shifted at random (bit by bit) for each row. antithetic: copies 2k and 2k + 1 are
    negatives of each other. Raises RewriteError as `check_noise` does.
    """
    check_noise(kind, copies, width, antithetic)
    if antithetic:
        half = draw_noise(kind, key, rows, copies // 2, width, first_row=first_row, dtype=dtype)
        return np.stack((half, -half), 2).reshape(rows, copies, width)
    if kind == "orthogonal":
        starts = range(0, copies, width)
        sizes = [min(width, copies - start) for start in starts]
        blocks = [
            _block(key.named(f"block{number}"), rows, size, width, first_row, dtype)
            for number, size in enumerate(sizes)
        ]
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks, 1)
    draw = {"gaussian": normal, "laplace": _laplace, "sobol": None}[kind]
    if draw is None:
        return _sobol(key, rows, copies, width, first_row).astype(dtype, copy=False)
    return draw(key, rows, copies * width, first_row).reshape(rows, copies, width).astype(dtype, copy=False)


def score(kind: str, noise: torch.Tensor) -> torch.Tensor:
    """-grad log density of unit noise: what a loss is multiplied with."""
    return noise.sign() * math.sqrt(2) if kind == "laplace" else noise


def size_score(kind: str, noise: torch.Tensor) -> torch.Tensor:
    """Derivative of log density in the logarithm of each entry's sigma: e^2 - 1, of Laplace noise sqrt(2) |e| - 1."""
    return (noise.abs() * math.sqrt(2) if kind == "laplace" else noise.square()) - 1


def check_noise(kind: str, copies: int, width: int, antithetic: bool = False) -> None:
    """Raises RewriteError for an odd number of antithetic copies, and where a Sobol set would do harm."""
    if antithetic and copies % 2:
        raise RewriteError(f"{copies} copies do not make pairs", remedy="an even number of copies")
    points = copies // 2 if antithetic else copies
    if kind == "sobol" and (points < _SOBOL_POINTS * width or width > _SOBOL_WIDEST):
        raise RewriteError(
            f"{points} Sobol points in {width} dimensions are worse than independent samples",
            why=f"a low-discrepancy set pays from {_SOBOL_POINTS} points per dimension on",
            remedy='directions="orthogonal"',
        )


def relative_variance(kind: str, copies: int, width: int, baseline: str, antithetic: bool = False) -> float:
    """E |estimate - g|^2 / |g|^2 for a loss that is linear over the noise, baseline "none" counted as "clean".

    With K copies, d = width: Gaussian (d + 1) / K, Laplace (2 d - 1) / K, both with K - 1 for "leave-one-out" and
    "constant"; antithetic, K / 2 pairs count; orthogonal blocks of m directions (d + 2) / m - 1 each. Of Sobol sets
    only that they are not worse than independent samples.
    """
    count = copies // 2 if antithetic else copies
    single = 2 * width - 1 if kind == "laplace" else width + 1
    if kind != "orthogonal":
        own = baseline in ("leave-one-out", "constant") and not antithetic
        return single / max(1, count - 1 if own else count)
    sizes = [min(width, count - start) for start in range(0, count, width)]
    return float(sum((size / count) ** 2 * ((width + 2) / size - 1) for size in sizes))


def _block(key: Key, rows: int, count: int, width: int, first_row: int, dtype: npt.DTypeLike) -> Array:
    """Up to `width` orthogonal directions with independent lengths.

    The reflections read a Gaussian vector's last entries, and of these the direction only; its whole length is
    therefore independent of the frame, and chi-distributed as it should be.
    """
    gaussian = normal(key, rows, count * width, first_row).astype(dtype, copy=False).reshape(rows, count, width)
    if count == 1:
        return gaussian
    lengths = np.sqrt(np.einsum("rkd,rkd->rk", gaussian, gaussian) / width)
    frames = haar_frames(gaussian)
    frames *= lengths.astype(frames.dtype)[:, :, None]
    return frames


def _laplace(key: Key, rows: int, width: int, first_row: int) -> npt.NDArray[np.float64]:
    uniform = ((words(key, rows, width, first_row)[:, :width] >> np.uint64(11)) + 0.5) * 2.0**-53 - 0.5
    found: npt.NDArray[np.float64] = -np.sign(uniform) * np.log1p(-2 * np.abs(uniform)) / math.sqrt(2)
    return found


def _sobol(key: Key, rows: int, points: int, width: int, first_row: int) -> Array:
    seed = int(words(key.named("scramble"), 1, 1)[0, 0] >> np.uint64(1))
    engine = torch.quasirandom.SobolEngine(width, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    drawn = engine.draw(points, dtype=torch.float64)
    integers = (drawn * 2**_SOBOL_BITS).to(torch.int64).numpy()
    shifts: Any = words(key, rows, width, first_row)[:, None, :width] >> np.uint64(64 - _SOBOL_BITS)
    uniform = ((integers[None] ^ shifts.astype(np.int64)) + 0.5) * 2.0**-_SOBOL_BITS
    found: Array = torch.special.ndtri(torch.from_numpy(uniform)).numpy()
    return found
