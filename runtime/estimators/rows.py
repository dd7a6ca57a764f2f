"""Which rows of a batch are probed, and how their estimates return to their places."""

import math

import numpy as np

from .arrays import Array, is_finite


class LiveRows:
    """The rows whose cotangent is finite and not zero and whose outputs are finite.

    total: rows of the batch; live: number of these; index: of these, None where all are; lost: number of rows with a
    cotangent but non-finite outputs; poisoned: whether any row's cotangent is not finite
    """

    def __init__(self, cotangents: Array, outputs: Array, finite: bool) -> None:
        """cotangents, outputs: (B, m) side by side; finite: the outputs are known to be finite."""
        self.total = self.live = len(cotangents)
        self.lost, self.poisoned = 0, False
        self.index: Array | None = None
        self._poisoned_rows: Array | None = None
        if (finite or is_finite(outputs)) and _all_alive(cotangents):
            return
        size = np.abs(cotangents).max(1, initial=0)
        wanted = (size > 0) & (size < math.inf)  # false for NaN
        sound = np.isfinite(outputs).all(1)
        self.index = (wanted & sound).nonzero()[0]
        self.live = len(self.index)
        self.lost = int((wanted & ~sound).sum())
        self._poisoned_rows = ~np.isfinite(size)
        self.poisoned = bool(self._poisoned_rows.any())

    def take(self, values: Array) -> Array:
        """The live rows."""
        return values if self.index is None else values[self.index]

    def restore(self, found: Array) -> Array:
        """(live, d) -> (B, d): zero where not probed, NaN where the cotangent was not finite."""
        if self.index is None:
            return found
        full = np.zeros((self.total, found.shape[1]), found.dtype)
        full[self.index] = found
        full[self._poisoned_rows] = math.nan
        return full


def _all_alive(cotangents: Array) -> bool:
    """Whether every row is finite and not zero: no row can be zero where a column has no zero."""
    if not cotangents.size or not is_finite(cotangents):
        return False
    return np.count_nonzero(cotangents[:, 0]) == len(cotangents) or bool(cotangents.any(1).all())
