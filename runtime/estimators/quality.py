"""How good an estimate is: predicted from its construction, measured from an independent probe, its bias named."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import Array

EVERY = 50  # backwards between two measurements
_DECAY = 0.95
_MEASURE_DECAY = 0.8  # of the measurements, which are fifty times rarer


@dataclass(frozen=True)
class Quality:
    """Quality of one region's row gradients.

    predicted_cosine: root mean square over rows for a box that is linear over a step; measured_cosine: running, from
    independent probes, None before the first; changed, clipped, failed: running shares of probes that changed an
    output, of rows that were clipped, of queries that failed (None before the first); bias: what both cosines leave
    out
    """

    predicted_cosine: float
    measured_cosine: float | None
    changed: float | None
    clipped: float
    failed: float
    bias: str


def predicted_cosine(kind: str, probes: int, width: int, averaged: bool) -> float:
    """Row cosine with the exact gradient, sqrt(1 / (1 + relative mean-square error)).

    Averages: sqrt(q / (q + d + 1)) Gaussian, sqrt(q / (q + d - 1)) Rademacher. Least squares and orthogonal sets
    project on a random subspace: sqrt(min(q, d) / d). Averaged sets that exceed the width by r leave only r of the q
    probes incomplete.
    """
    if averaged and kind in ("gaussian", "rademacher"):
        return math.sqrt(probes / (probes + width + (1 if kind == "gaussian" else -1)))
    rest = probes % width
    if not averaged or probes <= width or rest == 0:
        return math.sqrt(min(probes, width) / width)
    return math.sqrt(1.0 / (1.0 + rest * (width - rest) / (probes * probes)))


class QualityTracker:
    """Running shares and the running regression of observed on predicted directional derivatives.

    For an unbiased estimate g^ and a probe u independent of it, with p = u.g^ and c = u.g, E[p c] = <g^, g> = |g|^2
    and E[p p] = |g^|^2, so sum(p c) / sum(p p) estimates the squared cosine. This is the split-half estimate with the
    common noise of numerator and denominator cancelled. A probe of the same orthogonal set would give p = 0: it must
    be independent.
    """

    def __init__(self) -> None:
        self.changed: float | None = None
        self.clipped = 0.0
        self.failed = 0.0
        self._backwards = 0
        self._products: tuple[float, float] | None = None

    @property
    def due(self) -> bool:
        """Whether this backward takes one extra probe."""
        return self._backwards % EVERY == 0

    @property
    def measured_cosine(self) -> float | None:
        """Running row cosine, in 0 .. 1."""
        if self._products is None or self._products[1] <= 0:
            return None
        return math.sqrt(min(max(self._products[0] / self._products[1], 0.0), 1.0))

    def count(self, changed: float | None, clipped: float, failed: float) -> None:
        """After one backward: its shares."""
        self._backwards += 1
        if changed is not None:
            self.changed = changed if self.changed is None else _running(self.changed, changed, _DECAY)
        self.clipped = _running(self.clipped, clipped, _DECAY)
        self.failed = _running(self.failed, failed, _DECAY)

    def measure(self, estimate: Array, direction: Array, observed: Array, norms: Array) -> None:
        """One extra probe per row: estimate, direction (n, d); observed (n,) = u.g; norms (n,) of the cotangents."""
        predicted = np.einsum("nd,nd->n", estimate, direction, dtype=np.float64) / norms
        products = (float((predicted * observed / norms).mean()), float((predicted * predicted).mean()))
        before = products if self._products is None else self._products
        self._products = (
            _running(before[0], products[0], _MEASURE_DECAY),
            _running(before[1], products[1], _MEASURE_DECAY),
        )

    def get_state(self) -> dict[str, Any]:
        """Numbers."""
        state = {"clipped": self.clipped, "failed": self.failed, "backwards": self._backwards}
        if self.changed is not None:
            state["changed"] = self.changed
        if self._products is not None:
            state["product"], state["square"] = self._products
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned."""
        self.changed, self.clipped, self.failed = state.get("changed"), state["clipped"], state["failed"]
        self._backwards = state["backwards"]
        self._products = (state["product"], state["square"]) if "product" in state else None


def _running(before: float, now: float, decay: float) -> float:
    return decay * before + (1 - decay) * now
