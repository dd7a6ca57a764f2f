"""Directional derivatives of cotangent . box, from differences of stacked evaluations."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .precision import full_precision
from .probing import Probed


@dataclass
class Slopes:
    """What the probes found.

    values: (n, k) derivative of cotangent . box along each direction, zero where unusable
    usable: (n, k) bool, None where every one is
    changed: (n, k) bool, whether a probe changed any output; None where nobody asked and some slope is not zero
    failed, queries: number of queries that came back non-finite, and of all
    """

    values: Tensor
    usable: Tensor | None
    changed: Tensor | None
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
        usable = self.changed.numel() if self.usable is None else int(self.usable.sum())
        return int(self.changed.sum()) / usable if usable else None


def forward_slopes(
    probed: Probed, directions: Tensor, spread: Tensor, step_size: float, *, want_changed: bool, **purposes: int
) -> Slopes:
    """(f(x + h u) - f(x)) / h contracted with the cotangent; one query per direction.

    directions: (n, k, d); spread: (d,) the unit of every dimension; step_size: h in these units
    """
    points = torch.addcmul(probed.base.unsqueeze(1), directions, spread, value=step_size)
    change = probed.evaluate(points, **purposes) - probed.outputs.unsqueeze(1)
    return _contract(change, probed.cotangents, step_size, want_changed)


def central_slopes(
    probed: Probed, directions: Tensor, spread: Tensor, step_size: float, *, want_changed: bool, **purposes: int
) -> Slopes:
    """(f(x + h u) - f(x - h u)) / 2h contracted with the cotangent; two queries per direction, one-sided where one fails."""
    count = directions.shape[1]
    offset = directions * (spread * step_size)
    base = probed.base.unsqueeze(1)
    outputs = probed.evaluate(torch.cat((base + offset, base - offset), 1), **{p: 2 * a for p, a in purposes.items()})
    plus, minus = outputs[:, :count], outputs[:, count:]
    slopes = _contract(plus - minus, probed.cotangents, 2 * step_size, want_changed)
    slopes.queries *= 2
    if slopes.usable is None:
        return slopes
    upper = _contract(plus - probed.outputs.unsqueeze(1), probed.cotangents, step_size, want_changed)
    lower = _contract(probed.outputs.unsqueeze(1) - minus, probed.cotangents, step_size, want_changed)
    slopes.failed = upper.failed + lower.failed
    for side in (upper, lower):
        found = torch.ones_like(slopes.usable) if side.usable is None else side.usable
        slopes.values = torch.where(slopes.usable, slopes.values, side.values)
        if slopes.changed is not None and side.changed is not None:
            slopes.changed = torch.where(slopes.usable, slopes.changed, side.changed)
        slopes.usable = slopes.usable | found
    return slopes


@full_precision
def _contract(change: Tensor, cotangents: Tensor, step_size: float, want_changed: bool) -> Slopes:
    values = torch.bmm(change, cotangents.unsqueeze(2)).squeeze(2).mul_(1 / step_size)
    total = float(torch.linalg.vector_norm(values))
    usable = None
    if not math.isfinite(total):
        finite = torch.isfinite(values)
        usable = None if bool(finite.all()) else finite
    if usable is not None:
        values = values.masked_fill(~usable, 0.0)
    changed = None
    if want_changed or total == 0 or usable is not None:
        changed = (change != 0).any(2)
        changed = changed if usable is None else changed & usable
    failed = 0 if usable is None else int((~usable).sum())
    return Slopes(values, usable, changed, failed, values.numel())
