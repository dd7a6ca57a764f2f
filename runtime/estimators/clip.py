"""A limit on the norm of each row's gradient, for boxes whose differences now and then jump."""

import math
from typing import Any

import numpy as np

from .arrays import Array, row_norms

_DECAY = 0.95


class Clip:
    """Limits row norms at a running quantile of |g_i| / mean_j |v_j|, times mean_j |v_j|: of degree one in v."""

    def __init__(self, quantile: float) -> None:
        self.quantile = quantile
        self.ratio: float | None = None

    def update(self, gradient: Array, cotangent_norms: Array) -> float | None:
        """The running ratio after moving it towards this batch's quantile; gradient (n, d), cotangent_norms (n,).

        Rows whose gradient is zero do not count: where most are, the quantile would be zero too. None until one is not.
        """
        norms = row_norms(gradient)
        norms = norms[norms > 0]
        if len(norms):
            rank = min(len(norms) - 1, math.ceil(self.quantile * len(norms)) - 1)
            ratio = float(np.partition(norms, rank)[rank] / cotangent_norms.mean())
            self.ratio = ratio if self.ratio is None else _DECAY * self.ratio + (1 - _DECAY) * ratio
        return self.ratio

    @staticmethod
    def apply(gradient: Array, cotangent_norms: Array, ratio: float) -> tuple[Array, float]:
        """The gradient with row norms at most ratio x mean |v|, and the share of rows that were shortened."""
        limit = ratio * float(cotangent_norms.mean())
        norms = row_norms(gradient)
        over = int(np.count_nonzero(norms > limit))
        if over:
            factors = (limit / np.maximum(norms, limit)).astype(gradient.dtype)
            gradient = gradient * factors[:, None]
        return gradient, over / len(norms)

    def get_state(self) -> dict[str, Any]:
        """The running ratio."""
        return {} if self.ratio is None else {"ratio": self.ratio}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned."""
        self.ratio = state.get("ratio")
