"""How good an estimate is: predicted from its construction, measured from an independent probe, its bias named."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .arrays import Array

EVERY = 50  # backwards between two measurements
_DECAY = 0.95
_MEASURE_DECAY = 0.8  # of the measurements, which are fifty times rarer
_REMEMBERED = 20  # calls of `measure` that the running parameter cosine reaches back
_POINTS = 1024  # of a history, at most


@dataclass(frozen=True)
class Quality:
    """Quality of one region's gradients.

    predicted_cosine: of rows, root mean square over them, for a box that is linear over a step; measured_cosine,
    slope: of rows, running, from independent probes (None before the first); parameter_cosine: of the gradient of all
    parameters, as if this region alone were estimated, running over the calls of `step.measure` (None before the
    first); changed, clipped, failed: running shares of probes that changed an output, of rows that were clipped, of
    queries that failed (changed is None before the first); bias: what the cosines leave out

    A cosine is between an estimate and what it estimates, a slope the estimate's length along that: 1 is right. Those
    of rows are taken before a clip.
    """

    predicted_cosine: float
    measured_cosine: float | None
    slope: float | None
    parameter_cosine: float | None
    changed: float | None
    clipped: float
    failed: float
    bias: str


@dataclass
class History:
    """Qualities over a training, to plot: every measurement, then every second, fourth, ... as it grows too long.

    points: (index of the forward pass, quality)
    """

    points: list[tuple[int, Quality]] = field(default_factory=list)
    _every: int = 1
    _seen: int = 0

    def append(self, forward: int, quality: Quality) -> None:
        """One measurement."""
        if self._seen % self._every == 0:
            self.points.append((forward, quality))
            if len(self.points) == _POINTS:
                del self.points[1::2]
                self._every *= 2
        self._seen += 1


@dataclass
class ParameterCosine:
    """Running parameter cosine from replicates: gradients of one forward from independent random numbers.

    Of two, G1 and G2, E|G1 - G2|^2 / 2 is the noise s, E|G|^2 - s the square of the gradient's length, so that the
    cosine is sqrt(1 - s / E|G|^2) = sqrt(<G1, G2> / mean |G|^2): the split-half estimate.
    """

    calls: int = 0
    signal: float = 0.0
    noise: float = 0.0

    def record(self, signal: float, noise: float) -> None:
        """One call's |gradient|^2 and noise, both as shares of that call's mean |G|^2."""
        self.calls += 1
        weight = max(1 / self.calls, 1 / _REMEMBERED)
        self.signal += weight * (signal - self.signal)
        self.noise += weight * (noise - self.noise)

    @property
    def value(self) -> float | None:
        """None before the first call."""
        return cosine_of(self.signal, self.noise) if self.calls else None


def cosine_of(signal: float, noise: float) -> float:
    """sqrt(signal / (signal + noise)), in 0 .. 1 whatever noise has made of the two."""
    signal = max(signal, 0.0)
    return math.sqrt(min(signal / total, 1.0)) if (total := signal + max(noise, 0.0)) > 0 else 0.0


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
        self.measurements = 0
        self._backwards = 0
        self._products: list[float] | None = None  # means of p c, p p and c c

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

    @property
    def slope(self) -> float | None:
        """Running <estimate, gradient> / |gradient|^2 of rows; E[c c] = |g|^2."""
        if self._products is None or self._products[2] <= 0:
            return None
        return self._products[0] / self._products[2]

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
        self.measurements += 1
        observed = observed / norms
        pairs = ((predicted, observed), (predicted, predicted), (observed, observed))
        products = [float((a * b).mean()) for a, b in pairs]
        before = products if self._products is None else self._products
        self._products = [_running(old, new, _MEASURE_DECAY) for old, new in zip(before, products, strict=True)]

    def get_state(self) -> dict[str, Any]:
        """Numbers."""
        state: dict[str, Any] = {"clipped": self.clipped, "failed": self.failed, "backwards": self._backwards}
        if self.changed is not None:
            state["changed"] = self.changed
        if self._products is not None:
            state["products"] = self._products
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned."""
        self.changed, self.clipped, self.failed = state.get("changed"), state["clipped"], state["failed"]
        self._backwards = state["backwards"]
        self._products = state.get("products")


def _running(before: float, now: float, decay: float) -> float:
    return decay * before + (1 - decay) * now
