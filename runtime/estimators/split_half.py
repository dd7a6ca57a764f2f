"""Signal and noise of an estimate from two independent halves of it."""

import math
from typing import Any

from torch import Tensor

from .quality import cosine_of

_DECAY = 0.8  # of measurements, which are rare


class SplitHalf:
    """Running means over rows of |g|^2 and of the noise of estimates of g, from independent pairs of them.

    E a.b = |g|^2 and E |a - b|^2 / 2 = the variance of one; neither needs another way to the gradient.
    """

    def __init__(self) -> None:
        self.measurements = 0
        self.signal = 0.0
        self.noise = 0.0

    def record(self, first: Tensor, second: Tensor, copies: float) -> None:
        """Two estimates of the same rows, (rows, width), of `copies` copies each: noise is kept per copy."""
        a, b = first.double(), second.double()
        signal = float((a * b).sum(1).mean())
        noise = float((a - b).square().sum(1).mean()) / 2 * copies
        if not (math.isfinite(signal) and math.isfinite(noise)):
            return  # a diverged step says nothing of the others
        share = 1.0 if self.measurements == 0 else 1 - _DECAY
        self.signal += share * (signal - self.signal)
        self.noise += share * (noise - self.noise)
        self.measurements += 1

    def cosine(self, copies: float) -> float | None:
        """Of an estimate from that many copies with the gradient; None before the first measurement."""
        return cosine_of(self.signal, self.noise / copies) if self.measurements else None

    def best_copies(self, cost_ratio: float, least: int, most: int, signal: float | None = None) -> int | None:
        """sqrt(noise / signal x cost_ratio), within bounds: copies with which a step's cost buys most.

        cost_ratio: cost of a step without copies in units of one copy; signal: of all cuts of the chain together, where
        there are several. Rows are taken to differ as much as they are long; None before the first measurement.
        """
        if not self.measurements:
            return None
        signal = self.signal if signal is None else signal
        if signal <= 0:
            return most
        return max(least, min(most, round(math.sqrt(self.noise / signal * cost_ratio))))

    def get_state(self) -> dict[str, Any]:
        """Numbers."""
        return vars(self).copy()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned."""
        vars(self).update(state)
