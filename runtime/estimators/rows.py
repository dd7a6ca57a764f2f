"""Which rows of a batch are probed, and how their estimates return to their places."""

import math

import numpy as np
import torch
from torch import Tensor

from .arrays import Array, row_norms


class LiveRows:
    """The rows whose cotangent is finite and not zero and whose outputs are finite.

    total: rows of the batch; live: number of these; index: of these, None where all are; norms: (live,) float64 norms
    of their cotangents, so that neither loss scales nor their inverses leave the range; lost: number of rows with a
    cotangent but non-finite outputs; poisoned: whether any row's cotangent is not finite
    """

    def __init__(self, cotangents: Array, outputs: Array) -> None:
        """cotangents, outputs: (B, m) side by side."""
        self.total = self.live = len(cotangents)
        self.lost, self.poisoned = 0, False
        self.index: Array | None = None
        self._poisoned_rows: Array | None = None
        self.norms = row_norms(cotangents)
        if self.total == np.count_nonzero(self.norms) and math.isfinite(self.norms.sum() + outputs.sum()):
            return  # the common case; a sum that overflows only leads to the long way round
        size = np.abs(cotangents).max(1, initial=0)
        wanted = (size > 0) & (size < math.inf)  # false for NaN
        sound = np.isfinite(outputs).all(1)
        self.index = (wanted & sound).nonzero()[0]
        self.live = len(self.index)
        self.norms = self.norms[self.index]
        self.lost = int((wanted & ~sound).sum())
        self._poisoned_rows = ~np.isfinite(size)
        self.poisoned = bool(self._poisoned_rows.any())

    def take(self, values: Array) -> Array:
        """The live rows."""
        return values if self.index is None else values[self.index]

    def take_tensor(self, value: Tensor) -> Tensor:
        """The live rows of a tensor with rows in dimension 0."""
        return value if self.index is None else value[torch.from_numpy(self.index).to(value.device)]

    def restore(self, found: Array) -> Array:
        """(live, d) -> (B, d): zero where not probed, NaN where the cotangent was not finite."""
        if self.index is None:
            return found
        full = np.zeros((self.total, found.shape[1]), found.dtype)
        full[self.index] = found
        full[self._poisoned_rows] = math.nan
        return full
