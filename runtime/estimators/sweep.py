"""Outputs of a few rows at many steps: what the step of a finite difference is chosen from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rewriter.runtime.random import Key

from .arrays import Array
from .probing import Probed


@dataclass(frozen=True)
class Grid:
    """Where to evaluate: `rows` rows, each along a direction of its own, at falling steps on both sides.

    repeats: further evaluations of each row at its base point, whose spread is the noise of a noisy box
    """

    rows: int
    steps: tuple[float, ...]
    repeats: int = 0


@dataclass(frozen=True)
class Sweep:
    """What came back; all arrays are float64.

    steps: (s,) in units of the input scale, falling; base: (n, m); plus, minus: (n, s, m); weights: (n, m) how much
    each output matters, its cotangent; repeated: (n, r, m) further outputs at the base points
    """

    steps: Array
    base: Array
    plus: Array
    minus: Array
    weights: Array
    repeated: Array

    @property
    def finite(self) -> Array:
        """(n, s) whether both sides are."""
        return np.asarray(np.isfinite(self.plus).all(2) & np.isfinite(self.minus).all(2))


def sweep(probed: Probed, kind: str, key: Key, spread: Array, grid: Grid) -> Sweep:
    """Evaluates rows of `probed` on a grid, in one stacked call; steps the dtype cannot resolve are left out.

    kind: of directions; for coordinates, too, the sweep's are dense, as few coordinates say little of the others.
    """
    sample = probed.sample(grid.rows)
    resolved = [step for step in grid.steps if step >= 3 * sample.epsilon]
    steps = np.array(resolved or grid.steps[:1])
    dense = "orthogonal" if kind == "coordinate" else kind
    unit = sample.directions(dense, key.named("step size"), 1) * spread  # (n, 1, d)
    offsets = unit * steps.astype(spread.dtype)[:, None]
    base = sample.base[:, None]
    repeats = np.repeat(base, grid.repeats, 1)
    points = np.concatenate((base + offsets, base - offsets, repeats), 1)  # (n, 2s + r, d)
    outputs = sample.evaluate(points, step_size=points.shape[1]).astype(np.float64)
    plus, minus, repeated = np.split(outputs, (len(steps), 2 * len(steps)), 1)
    known, weights = sample.outputs.astype(np.float64), sample.cotangents.astype(np.float64)
    return Sweep(steps, known, plus, minus, weights, repeated)


def pooled(values: Array) -> Array:
    """(n, s, m) -> (s,) norm over rows and outputs."""
    norms: Array = np.sqrt(np.einsum("nsm,nsm->s", values, values))
    return norms


def noise_floor(found: Sweep) -> float | None:
    """Standard deviation of the outputs' noise over their size, both weighted with the cotangents; None if unknown.

    Second differences f(x + hu) - 2 f(x) + f(x - hu) fall as h^2 until they are noise, of variance 6 sigma^2: the
    smallest median of three neighbouring steps at which outputs move (the idea of More and Wild 2011). An upper bound
    where the finest step still shows curvature.
    """
    keep = found.finite & ((found.plus != found.base[:, None]) | (found.minus != found.base[:, None])).any(2)
    second = (found.plus - 2 * found.base[:, None] + found.minus) * found.weights[:, None]
    second = np.where(keep[:, :, None], second, 0.0)
    counted = keep.sum(0)
    size = math.sqrt(float(((found.base * found.weights) ** 2).sum(1).mean()))
    usable = np.flatnonzero(counted * 3 >= 2 * len(keep))
    if not size or len(usable) < 3:
        return None
    noise = pooled(second)[usable] / np.sqrt(6.0 * counted[usable])
    return float(np.median(np.lib.stride_tricks.sliding_window_view(noise, 3), 1).min()) / size
