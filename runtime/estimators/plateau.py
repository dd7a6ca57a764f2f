"""Which step of a sweep to use, and what kind of box it is.

Smooth boxes have a plateau: central differences at neighbouring steps agree between truncation error at large steps and
rounding or noise at small ones. Steps at which outputs do not move at all are no evidence, as zero agrees with zero.
Piecewise-constant boxes: the smallest step at which 95 % of probes change an output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .arrays import Array
from .sweep import Sweep, pooled

BoxKind = Literal["smooth", "piecewise-constant", "rough", "unknown"]

CHANGED_TARGET = 0.95
AGREEMENT = 0.2  # relative error below which there is a plateau
_ENOUGH = 5e-3  # relative error that no longer matters: other things decide below it
_NEARLY_BEST = 2.0  # a step whose error is within this factor of the least is as good
_SMOOTH_ORDER = 1.5  # central differences of a smooth function have order 2, of one with kinks at most 1
_NORMAL_QUANTILE = 1.645  # of a standard normal at CHANGED_TARGET


@dataclass(frozen=True)
class Choice:
    """What a sweep says.

    step: in units of the input scale; kind; error: estimated relative error of a directional derivative there, None
    where no plateau says so; gap: relative difference of the central differences there and half a decade below; order:
    by which power of the step the error of central differences grows above the plateau, None where it is not seen
    """

    step: float
    kind: BoxKind
    error: float | None = None
    gap: float | None = None
    order: float | None = None


def choose(found: Sweep, central: bool) -> Choice:
    """The step for forward or central differences.

    On a plateau truncation error is much the same in every row, so that the rows of the sweep show it. Kinks are not:
    few rows have one near. So of the steps whose error is small enough one of the finer is taken; more so where the
    error does not grow with the order of a smooth function, which is how kinks look from afar.
    """
    finite = found.finite
    moved_up = (found.plus != found.base[:, None]).any(2) & finite
    moved_down = (found.minus != found.base[:, None]).any(2) & finite
    moved = moved_up | moved_down
    alive = moved.any(1)
    if not alive.any():
        return Choice(float(found.steps[0]), "unknown")
    gaps, slopes, usable = _neighbour_gaps(found, finite & alive[:, None], moved)
    errors = np.full_like(gaps, math.inf)
    errors[1:-1] = (gaps[:-2] + gaps[1:-1]) / 2  # gaps[k] compares step k with step k + 1
    best = int(errors.argmin())
    if errors[best] < AGREEMENT:
        order = _order(found.steps, gaps, errors[best])
        if not central:
            errors = _forward_errors(found, slopes[:, best], finite, usable)
        index = _on_plateau(errors, smooth=order is None or order >= _SMOOTH_ORDER)
        return Choice(float(found.steps[index]), "smooth", float(errors[index]), float(gaps[index]), order)
    still = finite & ~moved
    if still[alive][:, -3:].sum() * 2 > finite[alive][:, -3:].sum():
        both = np.concatenate((moved_up[alive], moved_down[alive]))
        return Choice(_typical_threshold(found.steps, both), "piecewise-constant")
    return Choice(float(found.steps[best if errors[best] < math.inf else len(found.steps) // 2]), "rough")


def _on_plateau(errors: Array, smooth: bool) -> int:
    """Index of the step to use among the neighbours of the best whose error is small enough.

    Where the error is small beside what matters, towards the finer ones, more so with kinks; where noise keeps it
    from that, towards the coarser ones, as noise hits rows with small gradients harder than those of the sweep.
    """
    best = int(errors.argmin())
    good = errors <= max(_ENOUGH, _NEARLY_BEST * errors[best])
    first = last = best
    while first > 0 and good[first - 1]:
        first -= 1
    while last + 1 < len(errors) - 1 and good[last + 1]:
        last += 1
    if errors[best] > _ENOUGH / _NEARLY_BEST:
        return first + (last - first) // 3
    return last - round((last - first) / (3 if smooth else 6))


def _order(steps: Array, gaps: Array, least: float) -> float | None:
    """Slope of log error over log step where the error is far above its least, a line through at least three points."""
    above = np.isfinite(gaps) & (gaps > 10 * least) & (gaps < 0.5) & (np.arange(len(gaps)) < int(gaps.argmin()))
    if above.sum() < 3:
        return None
    return float(np.polyfit(np.log(steps[above]), np.log(gaps[above]), 1)[0])


def neighbour_gap(found: Sweep) -> float:
    """Of a sweep of two steps: relative difference of the central differences in a typical row, one if none moved.

    Zero where the dtype resolves only the larger step: there is nothing to compare.
    """
    if len(found.steps) < 2:
        return 0.0
    slopes = (found.plus - found.minus) / (2 * found.steps[:, None]) * found.weights[:, None]
    norms = np.linalg.norm(slopes, axis=2).max(1)
    moved = found.finite.all(1) & (norms > 0)
    if not moved.any():
        return 1.0
    return float(np.median(np.linalg.norm(slopes[moved, 0] - slopes[moved, 1], axis=1) / norms[moved]))


def _neighbour_gaps(found: Sweep, counted: Array, moved: Array) -> tuple[Array, Array, Array]:
    """Relative difference of the central differences at neighbouring steps, infinite where one has no evidence.

    Returns gaps (s,) with gaps[k] between k and k + 1; the weighted central differences (n, s, m), zero where not
    counted; and usable (s,): two thirds of the counted rows are finite and have moved.
    """
    difference = np.where(counted[:, :, None], found.plus, 0.0) - np.where(counted[:, :, None], found.minus, 0.0)
    slopes = difference / (2 * found.steps[:, None]) * found.weights[:, None]
    usable: Array = (counted & moved).sum(0) * 3 >= counted.any(1).sum() * 2
    both = (counted[:, 1:] & counted[:, :-1])[:, :, None]
    apart = pooled((slopes[:, 1:] - slopes[:, :-1]) * both)
    size = np.maximum(pooled(slopes[:, 1:] * both), pooled(slopes[:, :-1] * both))
    gaps = np.full_like(found.steps, math.inf)
    np.divide(apart, size, out=gaps[:-1], where=usable[1:] & usable[:-1] & (size > 0))
    return gaps, slopes, usable


def _forward_errors(found: Sweep, reference: Array, finite: Array, usable: Array) -> Array:
    """(s,) relative distance of both one-sided differences from the best central one, (n, m)."""
    weights, keep, base = found.weights[:, None], finite[:, :, None], found.base[:, None]
    sides = []
    for change in (found.plus - base, base - found.minus):
        slopes = np.where(keep, change, 0.0) / found.steps[:, None] * weights
        sides.append(pooled((slopes - reference[:, None]) * keep))
    errors: Array = np.where(usable, np.maximum(*sides) / np.linalg.norm(reference), math.inf)
    errors[-1] = math.inf  # as for central differences: no finer step confirms it
    return errors


def _typical_threshold(steps: Array, moved: Array) -> float:
    """95 % quantile of the smallest step that changes an output, a log-normal fitted to the thresholds of (n, s)."""
    half = 0.5 * math.log(10.0) / 2  # a threshold lies half a grid spacing above the largest step without a change
    logarithms = np.log(steps)
    last_still = np.where(moved, len(steps), np.arange(len(steps))).min(1)  # first in falling order
    thresholds = np.where(
        last_still == len(steps), logarithms[-1], logarithms[last_still.clip(max=len(steps) - 1)] + half
    )
    deviation = float(thresholds.std(ddof=1))
    return math.exp(min(float(thresholds.mean()) + _NORMAL_QUANTILE * deviation, float(thresholds.max()) + half))
