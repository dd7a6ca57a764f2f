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
    failed, queries: number of rows evaluated that came back non-finite, and of all
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
    return _contract(probed, change, length, want_changed, directions, counted)


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
    slopes = _contract(probed, plus - minus, 2 * length, want_changed, directions, counted)
    slopes.queries *= 2
    if slopes.failed == 0:
        return slopes
    at_base = (centre == base).all(2)
    upper = _contract(probed, plus - middle, length, True, directions, counted)
    lower = _contract(probed, middle - minus, length, True, directions, counted)
    slopes.failed = upper.failed + lower.failed
    if slopes.usable is None:  # of every probe some rows are left
        return slopes
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
    probed: Probed, change: Array, length: float, want_changed: bool, directions: Array, counted: Array | None
) -> Slopes:
    values = np.einsum("nkm,nm->nk", change, probed.cotangents)
    values *= values.dtype.type(1 / length)
    size = float(np.vdot(values, values))  # neither zero nor infinite: the common case
    usable = None
    queries = (values.size if counted is None else int(np.count_nonzero(counted))) * probed.rows_per_query
    failed = 0
    if not math.isfinite(size) and not np.isfinite(values).all():
        if probed.rows_per_query > 1:
            values, usable, failed = _without_lost_rows(probed, change, length)
        else:
            usable = np.isfinite(values)
            values = np.where(usable, values, values.dtype.type(0))
            failed = queries - int(np.count_nonzero(usable))
    changed = None
    if want_changed or usable is not None or size == 0:
        # a product with ones: numpy is slow at reducing many short rows
        moved = np.abs(change) if failed == 0 else np.nan_to_num(np.abs(change))
        changed = moved @ np.ones(change.shape[2], change.dtype) > 0
        changed = changed if usable is None else changed & usable
    return Slopes(values, usable, changed, failed, queries, directions)


def _without_lost_rows(probed: Probed, change: Array, length: float) -> tuple[Array, Array | None, int]:
    """Values (1, k) of probes of a whole batch in which rows are lost, usable (1, k), and how many were lost.

    A row counts for as many probes as it was lost in fewer, as if each row were averaged on its own.
    """
    rows, count = probed.rows_per_query, change.shape[1]
    parts = np.einsum(
        "krm,rm->kr", change.reshape(count, rows, -1), probed.cotangents.reshape(rows, -1), dtype=np.float64
    )
    sound = np.isfinite(parts)
    usable = sound.any(1)
    share = sound[usable].mean(0) if usable.any() else np.ones(rows)
    values = (np.where(sound, parts, 0.0) / np.where(share > 0, share, 1.0)).sum(1) / length
    lost = sound.size - int(np.count_nonzero(sound))
    return values.astype(change.dtype)[None], None if usable.all() else usable[None], lost
