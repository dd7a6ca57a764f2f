"""Which rows of a batch are probed, and how their estimates return to their places."""

import math

import torch
from torch import Tensor


class LiveRows:
    """The rows whose cotangent is finite and not zero and whose outputs are finite.

    total: rows of the batch; live: number of these; norms: (live,) float64 norms of their cotangents, so that neither loss
    scales nor their inverses leave the range; index: of the live rows, None where all are; lost: number of rows with a
    cotangent but non-finite outputs; poisoned: whether any row's cotangent is not finite
    """

    def __init__(self, cotangents: Tensor, outputs: Tensor) -> None:
        """cotangents, outputs: (B, m) side by side."""
        self.total = self.live = cotangents.shape[0]
        self.lost, self.poisoned = 0, False
        self.index: Tensor | None = None
        self._poisoned_rows: Tensor | None = None
        self.norms: Tensor = torch.linalg.vector_norm(cotangents, dim=1, dtype=torch.float64)
        if self.total and self._all_live(outputs):
            return
        size = cotangents.abs().amax(1)
        wanted = (size > 0) & (size < math.inf)  # false for NaN
        sound = torch.isfinite(outputs).all(1)
        self.index = (wanted & sound).nonzero().squeeze(1)
        self.live = len(self.index)
        self.norms = self.norms[self.index]
        self.lost = int((wanted & ~sound).sum())
        self._poisoned_rows = ~torch.isfinite(size)
        self.poisoned = bool(self._poisoned_rows.any())

    def _all_live(self, outputs: Tensor) -> bool:
        """The common case in few operations; a sum that overflows only leads to the long way round."""
        least, most = self.norms.aminmax()
        return float(least) > 0 and float(most) < math.inf and math.isfinite(float(outputs.sum()))

    def take(self, value: Tensor) -> Tensor:
        """The live rows of a value with rows in dimension 0."""
        return value if self.index is None else value[self.index]

    def restore(self, found: Tensor) -> Tensor:
        """(live, d) -> (B, d): zero where not probed, NaN where the cotangent was not finite."""
        if self.index is None:
            return found
        full = found.new_zeros((self.total, found.shape[1]))
        full[self.index] = found
        assert self._poisoned_rows is not None
        return full.masked_fill_(self._poisoned_rows.unsqueeze(1), math.nan)
