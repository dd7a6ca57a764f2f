"""Directional derivatives of cotangent . box, from differences of stacked evaluations."""

import math
from dataclasses import dataclass

import numpy as np

from .arrays import Array
from .probing import Probed


@dataclass
class Slopes:
    """What the probes found.

    values: (n, k) derivative of cotangent . box along each direction, zero where unusable
    usable: (n, k) bool, None where every one is
    changed: (n, k) bool, whether a probe changed any output; None where nobody asked and some slope is not zero
    failed, queries: number of queries that came back non-finite, and of all
    """

    values: Array
    usable: Array | None
    changed: Array | None
    failed: int
    queries: int

    def first(self, count: int) -> "Slopes":
        """Of the first `count` directions."""
        usable = None if self.usable is None else self.usable[:, :count]
        return Slopes(self.values[:, :count], usable, None, self.failed, self.queries)

    @property
    def changed_share(self) -> float | None:
        """Share of the usable probes that changed an output, None where unknown."""
        if self.changed is None:
            return None
        usable = self.changed.size if self.usable is None else np.count_nonzero(self.usable)
        return int(np.count_nonzero(self.changed)) / int(usable) if usable else None


def forward_slopes(
    probed: Probed, directions: Array, spread: Array, length: float, *, want_changed: bool, **purposes: int
) -> Slopes:
    """(f(x + h u) - f(x)) / h contracted with the cotangent; one query per direction.

    directions: (n, k, d); spread: (d,) the unit of every dimension; length: h in these units
    """
    points = directions * (spread * spread.dtype.type(length))
    points += probed.base[:, None]
    change = probed.evaluate(points, **purposes) - probed.outputs[:, None]
    return _contract(change, probed.cotangents, length, want_changed)


def central_slopes(
    probed: Probed, directions: Array, spread: Array, length: float, *, want_changed: bool, **purposes: int
) -> Slopes:
    """(f(x + h u) - f(x - h u)) / 2h contracted with the cotangent; two queries per direction.

    Where one of the two fails, the other and f(x) make a one-sided difference.
    """
    count = directions.shape[1]
    offset = directions * (spread * spread.dtype.type(length))
    base = probed.base[:, None]
    points = np.concatenate((base + offset, base - offset), 1)
    outputs = probed.evaluate(points, **{purpose: 2 * amount for purpose, amount in purposes.items()})
    plus, minus, middle = outputs[:, :count], outputs[:, count:], probed.outputs[:, None]
    slopes = _contract(plus - minus, probed.cotangents, 2 * length, want_changed)
    slopes.queries *= 2
    if slopes.usable is None:
        return slopes
    upper = _contract(plus - middle, probed.cotangents, length, True)
    lower = _contract(middle - minus, probed.cotangents, length, True)
    slopes.failed = upper.failed + lower.failed
    for side in (upper, lower):
        assert slopes.changed is not None
        assert side.changed is not None
        found = np.ones_like(slopes.usable) if side.usable is None else side.usable
        slopes.values = np.where(slopes.usable, slopes.values, side.values)
        slopes.changed = np.asarray(np.where(slopes.usable, slopes.changed, side.changed))
        slopes.usable = slopes.usable | found
    return slopes


def _contract(change: Array, cotangents: Array, length: float, want_changed: bool) -> Slopes:
    values = np.einsum("nkm,nm->nk", change, cotangents)
    values *= values.dtype.type(1 / length)
    size = float(np.einsum("nk,nk->", values, values))  # neither zero nor infinite: the common case
    usable = None
    if not math.isfinite(size) and not np.isfinite(values).all():
        usable = np.isfinite(values)
        values = np.where(usable, values, values.dtype.type(0))
    changed = None
    if want_changed or usable is not None or size == 0:
        # a product with ones: numpy is slow at reducing many short rows
        changed = np.abs(change) @ np.ones(change.shape[2], change.dtype) > 0
        changed = changed if usable is None else changed & usable
    failed = 0 if usable is None else int(usable.size - np.count_nonzero(usable))
    return Slopes(values, usable, changed, failed, values.size)
