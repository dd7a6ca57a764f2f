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
    directions: (n, k, d) along which they are
    """

    values: Array
    usable: Array | None
    changed: Array | None
    failed: int
    queries: int
    directions: Array

    def first(self, count: int) -> "Slopes":
        """Of the first `count` directions."""
        usable = None if self.usable is None else self.usable[:, :count]
        return Slopes(self.values[:, :count], usable, None, self.failed, self.queries, self.directions[:, :count])

    @property
    def changed_share(self) -> float | None:
        """Share of the usable probes that changed an output, None where unknown."""
        if self.changed is None:
            return None
        usable = self.changed.size if self.usable is None else np.count_nonzero(self.usable)
        return int(np.count_nonzero(self.changed)) / int(usable) if usable else None


def forward_slopes(
    probed: Probed,
    directions: Array,
    spread: Array,
    length: float,
    *,
    want_changed: bool,
    counted: Array | None = None,
    **purposes: int,
) -> Slopes:
    """(f(x + h u) - f(x)) / h contracted with the cotangent; one query per direction.

    directions: (n, k, d), turned inward at bounds; spread: (d,) the unit of every dimension; length: h in these units;
    counted: (n, k) bool, the queries to make, None for all
    """
    offsets = _offsets(directions, spread, length)
    if probed.coordinates is not None:
        offsets, turned = probed.coordinates.mirror(probed.base, offsets)
        if turned is not None:
            directions = np.where(turned, -directions, directions)
    change = probed.evaluate(offsets + probed.base[:, None], counted, **purposes) - probed.outputs[:, None]
    return _contract(change, probed.cotangents, length, want_changed, directions, counted)


def central_slopes(
    probed: Probed,
    directions: Array,
    spread: Array,
    length: float,
    *,
    want_changed: bool,
    counted: Array | None = None,
    **purposes: int,
) -> Slopes:
    """(f(x + h u) - f(x - h u)) / 2h contracted with the cotangent; two queries per direction.

    Near bounds x is the nearest point from which both sides lie inside. Elsewhere, where one of the two fails, the
    other and f(x) make a one-sided difference.
    """
    count = directions.shape[1]
    offset = _offsets(directions, spread, length)
    base = probed.base[:, None]
    centre = base if probed.coordinates is None else probed.coordinates.centred(probed.base, offset)
    points = np.concatenate((centre + offset, centre - offset), 1)
    both = None if counted is None else np.concatenate((counted, counted), 1)
    outputs = probed.evaluate(points, both, **{purpose: 2 * amount for purpose, amount in purposes.items()})
    plus, minus, middle = outputs[:, :count], outputs[:, count:], probed.outputs[:, None]
    slopes = _contract(plus - minus, probed.cotangents, 2 * length, want_changed, directions, counted)
    slopes.queries *= 2
    if slopes.usable is None or slopes.failed == 0:
        return slopes
    at_base = (centre == base).all(2)
    upper = _contract(plus - middle, probed.cotangents, length, True, directions, counted)
    lower = _contract(middle - minus, probed.cotangents, length, True, directions, counted)
    slopes.failed = upper.failed + lower.failed
    for side in (upper, lower):
        assert slopes.changed is not None
        assert side.changed is not None
        found = (np.ones_like(slopes.usable) if side.usable is None else side.usable) & at_base
        values = np.where(slopes.usable, slopes.values, np.where(found, side.values, side.values.dtype.type(0)))
        slopes.values = np.asarray(values)
        slopes.changed = np.asarray(np.where(slopes.usable, slopes.changed, side.changed & found))
        slopes.usable = slopes.usable | found
    return slopes


def _offsets(directions: Array, spread: Array, length: float) -> Array:
    """What a probe adds to its row: (n, k, d), or (1, k, d) where the rows share their directions."""
    shared = directions.strides[0] == 0
    offsets: Array = (directions[:1] if shared else directions) * (spread * spread.dtype.type(length))
    return offsets


def _contract(
    change: Array, cotangents: Array, length: float, want_changed: bool, directions: Array, counted: Array | None
) -> Slopes:
    values = np.einsum("nkm,nm->nk", change, cotangents)
    values *= values.dtype.type(1 / length)
    size = float(np.vdot(values, values))  # neither zero nor infinite: the common case
    usable = None
    if not math.isfinite(size) and not np.isfinite(values).all():
        usable = np.isfinite(values)
        values = np.where(usable, values, values.dtype.type(0))
    changed = None
    if want_changed or usable is not None or size == 0:
        # a product with ones: numpy is slow at reducing many short rows
        changed = np.abs(change) @ np.ones(change.shape[2], change.dtype) > 0
        changed = changed if usable is None else changed & usable
    queries = values.size if counted is None else int(np.count_nonzero(counted))
    failed = 0 if usable is None else queries - int(np.count_nonzero(usable))
    return Slopes(values, usable, changed, failed, queries, directions)
