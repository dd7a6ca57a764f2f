"""The step for boxes that answer differently each time: where bias and noise of a difference are least together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .arrays import Array
from .plateau import AGREEMENT, BoxKind, Choice
from .sweep import Sweep

_HALF_DECADE = math.sqrt(10.0)
_FITS = 4.0  # residuals over noise, as variances: neither is known to better than a factor of two


@dataclass(frozen=True)
class _Model:
    """Of a difference z(h) = a + b h^power: Var z = noise sigma^2 / h^2 as measured, error sigma^2 / h^2 as used."""

    power: int
    noise: float
    error: float

    def step(self, variance: float, squared_bias: float) -> float:
        """argmin over h of b^2 h^2p + error sigma^2 / h^2, where the derivative vanishes; infinite without bias."""
        if squared_bias <= 0:
            return math.inf
        return float((self.error * variance / (self.power * squared_bias)) ** (1 / (2 * self.power + 2)))


_FORWARD = _Model(power=1, noise=1.5, error=2.0)
_CENTRAL = _Model(power=2, noise=0.5, error=0.5)


def choose_noisy(found: Sweep, central: bool) -> Choice | None:
    """The step h at which bias^2 + variance of a directional derivative is least; None where repeats are all equal.

    Everything is contracted with the cotangent first. sigma^2 comes from the repeats at the base points. Central
    differences have bias b h^2 and variance sigma^2 / 2 h^2, so h^6 = sigma^2 / 4 b^2; b is fitted to the differences
    themselves. Forward differences have bias b h and variance 2 sigma^2 / h^2, so h^4 = 2 sigma^2 / b^2; b is fitted
    to second differences. Large steps are left out until the rest fits within the noise, as the power describes a box
    at small steps only. Capped at the largest step of the sweep.
    """
    model = _CENTRAL if central else _FORWARD
    base, plus, minus = (
        _contracted(values, found.weights) for values in (found.base[:, None], found.plus, found.minus)
    )
    repeated = found.repeated - found.base[:, None]  # exactly zero where nothing is noisy
    variance = _variance(_contracted(np.concatenate((np.zeros_like(repeated[:, :1]), repeated), 1), found.weights))
    if variance == 0:
        return None
    first = (plus - minus) / (2 * found.steps)
    differences = first if central else (plus - 2 * base + minus) / (2 * found.steps)
    fits = [
        _squared_bias(found.steps[largest:], differences[:, largest:], model, variance)
        for largest in range(max(1, len(found.steps) - 2))
    ]
    tolerable = _FITS * max(1.0, min(misfit for _, misfit in fits))  # the repeats alone may put the noise too low
    squared_bias = next(squared for squared, misfit in fits if misfit < tolerable)
    step = float(min(model.step(variance, squared_bias), found.steps[0]))
    squared_error = squared_bias * step ** (2 * model.power) + model.error * variance / step**2
    nearest = first[:, int(np.abs(np.log(found.steps / step)).argmin())]
    known = nearest[np.isfinite(nearest)]
    squared = float((known**2).mean()) - 0.5 * variance / step**2 if len(known) else 0.0  # less what the noise adds
    relative = math.sqrt(squared_error / squared) if squared > squared_error else 1.0
    kind: BoxKind = "smooth" if relative < AGREEMENT else "rough"
    return Choice(step, kind, relative, relative * _HALF_DECADE)


def _contracted(values: Array, weights: Array) -> Array:
    """(n, k, m) -> (n, k), NaN where a query failed."""
    contracted: Array = np.einsum("nkm,nm->nk", np.where(np.isfinite(values), values, math.nan), weights)
    return contracted


def _variance(repeats: Array) -> float:
    """Mean over rows of the variance of each row's repeats (n, r); zero where no row has two finite ones."""
    counts = np.isfinite(repeats).sum(1)
    kept = repeats[counts >= 2]
    return float(np.nanvar(kept, 1, ddof=1).mean()) if len(kept) else 0.0


def _squared_bias(steps: Array, differences: Array, model: _Model, variance: float) -> tuple[float, float]:
    """Of differences (n, s): mean over rows of b^2, less what noise adds to it, and the residuals' variance over noise.

    a and b are fitted by least squares with the weights h^2 that the noise asks for.
    """
    squares, residuals, freedom = [], 0.0, 0
    for row in differences:
        known = np.isfinite(row)
        weights = steps[known]  # the inverse deviation, in units of sqrt(model.noise * variance)
        columns = [np.ones_like(weights), weights**model.power] if model.power == 2 else [weights]
        if len(weights) <= len(columns):
            continue
        design = np.stack(columns, 1) * weights[:, None]
        fitted, *_ = np.linalg.lstsq(design, row[known] * weights)
        doubt = model.noise * variance * np.linalg.inv(design.T @ design)[-1, -1]
        squares.append(float(fitted[-1]) ** 2 - doubt)
        residuals += float(((row[known] * weights - design @ fitted) ** 2).sum())
        freedom += len(weights) - len(columns)
    if not squares:
        return 0.0, 0.0
    return max(sum(squares) / len(squares), 0.0), residuals / (freedom * model.noise * variance)
