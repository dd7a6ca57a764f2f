"""The unit of a perturbation: how much each input dimension varies."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rewriter.runtime.errors import RewriteError

from .arrays import Array

_DECAY = 0.95
_EVERY = 5  # batches, once the first few have been seen
_MEAN_SHARE = 0.1  # a dimension that hardly varies is given this share of its magnitude

_Vector = npt.NDArray[np.float64]


class InputScale:
    """Running standard deviation per dimension, floored by a share of the running |mean|, never zero.

    Perturbing in unequal units costs accuracy: probe noise spreads evenly over the scaled coordinates, so it is
    amplified in those of small scale. Dimensions within half a decade of their geometric mean therefore share one
    unit, and others differ from it by whole powers of ten. A fixed scale (one number, or one per dimension) is taken
    as it is.
    """

    def __init__(self, fixed: float | Sequence[float] | None = None) -> None:
        self._fixed = None if fixed is None else np.asarray(fixed, dtype=np.float64)
        self._mean: _Vector | None = None
        self._variance: _Vector | None = None
        self._units: _Vector | None = None
        self._typical = 1.0
        self._age = 0

    def update(self, base: Array) -> None:
        """Moves the running statistics towards those of `base`, (rows, d): at first every time, then every fifth."""
        if self._units is not None and len(self._units) == base.shape[1]:
            self._age += 1
            if self._fixed is not None or (self._age > _EVERY and self._age % _EVERY):
                return
        if self._fixed is not None:
            self._units = self._broadcast(base.shape[1])
            self._typical = _geometric_mean(self._units)
            return
        mean = base.mean(0, dtype=np.float64)
        variance = base.var(0, dtype=np.float64)
        if not np.isfinite(mean + variance).all():  # such a row must not spoil the statistics of all later ones
            if self._units is None or self._units.shape != mean.shape:
                self._units = np.ones_like(mean)
            return
        if self._mean is None or self._variance is None or self._mean.shape != mean.shape:
            self._mean, self._variance, self._age = mean, variance, 0
        else:
            decay = _DECAY if self._age <= _EVERY else _DECAY**_EVERY
            shift = mean - self._mean
            self._mean = self._mean + (1 - decay) * shift
            self._variance = decay * (self._variance + (1 - decay) * shift * shift) + (1 - decay) * variance
        self._units = _units(np.maximum(np.sqrt(self._variance), _MEAN_SHARE * np.abs(self._mean)))
        self._typical = _geometric_mean(self._units)

    def _broadcast(self, width: int) -> _Vector:
        assert self._fixed is not None
        if self._fixed.ndim and self._fixed.shape != (width,):
            raise RewriteError(
                f"input_scale has {self._fixed.size} numbers for {width} input elements per row",
                why="a sequence gives one scale for each element of the probed inputs of one row, side by side",
                remedy=f"pass one number, or {width}",
            )
        return np.broadcast_to(self._fixed, (width,)).copy()

    def spread(self, dtype: np.dtype[Any]) -> Array:
        """(d,) the unit of every dimension."""
        assert self._units is not None, "update() comes first"
        return self._units.astype(dtype)

    @property
    def known(self) -> bool:
        """Whether there has been a batch."""
        return self._units is not None

    @property
    def typical(self) -> float:
        """Geometric mean of the units; 1 before the first batch."""
        return self._typical

    def get_state(self) -> dict[str, Any]:
        """Running statistics: tensors and a number."""
        vectors = {"mean": self._mean, "variance": self._variance, "units": self._units}
        return {"age": self._age, **{name: torch.from_numpy(v.copy()) for name, v in vectors.items() if v is not None}}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned."""
        self._mean, self._variance, self._units = (
            state[name].numpy().copy() if name in state else None for name in ("mean", "variance", "units")
        )
        self._age = state["age"]
        self._typical = 1.0 if self._units is None else _geometric_mean(self._units)


def _geometric_mean(units: _Vector) -> float:
    return float(np.exp(np.log(units).mean()))


def _units(deviations: _Vector) -> _Vector:
    """Deviations rounded to their geometric mean times a power of ten."""
    positive = deviations > 0
    if not positive.any():
        return np.ones_like(deviations)
    logarithms = np.log10(deviations, where=positive, out=np.zeros_like(deviations))
    typical = logarithms.sum() / positive.sum()
    decades = np.where(positive, np.rint(logarithms - typical), 0.0)
    return np.asarray(10.0 ** (typical + decades))
