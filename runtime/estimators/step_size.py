"""The step of a finite difference, measured at the box and followed in training.

Smooth boxes: plateau rule. Central differences at half-decade steps are compared with their neighbours; between
truncation error at large steps and rounding at small ones they agree. Steps at which outputs do not move at all are
no evidence, as zero agrees with zero. Piecewise-constant boxes: a multiple of the smallest step at which 95 % of
probes change an output, see `StepSize`.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rewriter.runtime.random import Key

from .arrays import Array
from .probing import Probed

BoxKind = Literal["smooth", "piecewise-constant", "rough", "unknown"]

CHANGED_TARGET = 0.95
_SAMPLES = 3  # base rows, each with a direction of its own
_FINEST = -17  # half decades below the input scale: 2 x 18 steps x 3 rows are 108 queries
_AGREEMENT = 0.2  # relative difference of neighbouring steps below which there is a plateau
_REMEASURE_EVERY = 1000
_REMEASURE_DRIFT = 2.0
FOLLOW_EVERY = 10  # backwards
FOLLOW_ROWS = 32
_MOST_WIDENING = 13.0  # some forty pieces crossed by a probe, however many coordinates there are
_LARGEST_WIDENED = 4.0  # in units of the input scale: further out there is no data
_NORMAL_QUANTILE = 1.645  # of a standard normal at CHANGED_TARGET


@dataclass(frozen=True)
class Sweep:
    """Outputs at steps in falling order along one direction per row.

    steps: (s,); base: (n, m); plus, minus: (n, s, m); weights: (n, m) how much each output matters (its cotangent)
    """

    steps: Tensor
    base: Tensor
    plus: Tensor
    minus: Tensor
    weights: Tensor


def sweep(probed: Probed, kind: str, key: Key, spread: Array, largest: float = 1.0) -> Sweep:
    """Evaluates a few rows of `probed` at every candidate step on both sides, in one stacked call."""
    sample = probed.sample(_SAMPLES)
    finest = max(_FINEST, math.ceil(2 * math.log10(3 * sample.epsilon)))
    steps = largest * 10.0 ** (np.arange(0, finest - 1, -1) / 2)
    offsets = sample.directions(kind, key.named("step size"), 1) * spread * steps.astype(spread.dtype)[:, None]
    base = sample.base[:, None]
    points = np.concatenate((base + offsets, base - offsets), 1)  # (n, 2s, d)
    outputs = torch.from_numpy(sample.evaluate(points, step_size=2 * len(steps))).double()
    plus, minus = outputs[:, : len(steps)], outputs[:, len(steps) :]
    known, weights = torch.from_numpy(sample.outputs).double(), torch.from_numpy(sample.cotangents).double()
    return Sweep(torch.from_numpy(steps), known, plus, minus, weights)


def choose(found: Sweep, central: bool) -> tuple[float, BoxKind]:
    """The step for forward or central differences, and what kind of box this is."""
    finite = torch.isfinite(found.plus).all(2) & torch.isfinite(found.minus).all(2)  # (n, s)
    moved_up = (found.plus != found.base[:, None]).any(2) & finite
    moved_down = (found.minus != found.base[:, None]).any(2) & finite
    moved = moved_up | moved_down
    alive = moved.any(1)
    if not bool(alive.any()):
        return float(found.steps[0]), "unknown"
    gaps, slopes, usable = _neighbour_gaps(found, finite & alive[:, None], moved)
    errors = torch.full_like(gaps, math.inf)
    errors[1:-1] = (gaps[:-2] + gaps[1:-1]) / 2  # gaps[k] compares step k with step k + 1
    best = int(errors.argmin())
    if bool(errors[best] < _AGREEMENT):
        return float(found.steps[best if central else _best_forward(found, slopes[:, best], finite, usable)]), "smooth"
    still = finite & ~moved
    if bool((still[alive][:, -3:].sum() * 2 > finite[alive][:, -3:].sum()).item()):
        return _typical_threshold(found.steps, torch.cat((moved_up[alive], moved_down[alive]))), "piecewise-constant"
    return float(found.steps[best] if errors[best] < math.inf else found.steps[len(found.steps) // 2]), "rough"


def _neighbour_gaps(found: Sweep, counted: Tensor, moved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Relative difference of the central differences at neighbouring steps, infinite where one has no evidence.

    Returns gaps (s,) with gaps[k] between k and k + 1; the weighted central differences (n, s, m), zero where not
    counted; and usable (s,): two thirds of the counted rows are finite and have moved.
    """
    weights = found.weights[:, None] * counted.any(1)[:, None, None]
    slopes = (found.plus - found.minus) / (2 * found.steps[:, None]) * weights
    slopes = slopes.masked_fill(~counted[:, :, None], 0.0)
    usable = (counted & moved).sum(0) * 3 >= counted.any(1).sum() * 2
    both = (counted[:, 1:] & counted[:, :-1])[:, :, None]
    difference = _pooled((slopes[:, 1:] - slopes[:, :-1]) * both)
    size = torch.maximum(_pooled(slopes[:, 1:] * both), _pooled(slopes[:, :-1] * both))
    gaps = torch.full_like(found.steps, math.inf)
    evidence = usable[1:] & usable[:-1] & (size > 0)
    gaps[:-1] = torch.where(evidence, difference / size.clamp(min=torch.finfo(size.dtype).tiny), math.inf)
    return gaps, slopes, usable


def _best_forward(found: Sweep, reference: Tensor, finite: Tensor, usable: Tensor) -> int:
    """Index of the step at which both one-sided differences are nearest to the best central one."""
    weights = found.weights[:, None]
    up = (found.plus - found.base[:, None]) / found.steps[:, None] * weights
    down = (found.base[:, None] - found.minus) / found.steps[:, None] * weights
    keep = finite[:, :, None]
    errors = _pooled((up - reference[:, None]).masked_fill(~keep, 0.0))
    errors = torch.maximum(errors, _pooled((down - reference[:, None]).masked_fill(~keep, 0.0)))
    return int(torch.where(usable, errors, math.inf).argmin())


def _pooled(values: Tensor) -> Tensor:
    """(n, s, m) -> (s,) norm over rows and outputs."""
    return values.square().sum((0, 2)).sqrt()


def _typical_threshold(steps: Tensor, moved: Tensor) -> float:
    """95 % quantile of the smallest step that changes an output, a log-normal fitted to the thresholds of (n, s)."""
    half = 0.5 * math.log(10.0) / 2  # a threshold lies half a grid spacing above the largest step without a change
    logarithms = steps.log()
    positions = torch.arange(len(steps))
    last_still = torch.where(moved, len(steps), positions).amin(1)  # first in falling order
    thresholds = torch.where(
        last_still == len(steps), logarithms[-1], logarithms[last_still.clamp(max=len(steps) - 1)] + half
    )
    mean, deviation = float(thresholds.mean()), float(thresholds.std())
    return math.exp(min(mean + _NORMAL_QUANTILE * deviation, float(thresholds.max()) + half))


class StepSize:
    """The step in use, in units of the input scale: fixed, or measured and followed.

    On piecewise-constant boxes the threshold is the step at which 95 % of probes change an output. A probe moves all
    coordinates at once, so at its threshold it crosses some three pieces in all; the step in use is as much longer as
    one needs to cross them along each coordinate: the mean of |u|_1 = .8 d, but no more than _MOST_WIDENING.
    """

    def __init__(self, fixed: float | None, needs_kind: bool) -> None:
        """needs_kind: measure what kind of box it is even where the step is fixed."""
        self.fixed = fixed is not None
        self.value = fixed if fixed is not None else 1.0
        self.kind: BoxKind = "unknown"
        self._threshold = self.value
        self._stale = fixed is None or needs_kind
        self._grown = False
        self._age = 0
        self._measured_at_scale = 1.0
        self._followed = 0

    def due(self, typical_scale: float) -> bool:
        """Whether to measure first: never yet, inputs drifted twofold, or a thousand backwards ago."""
        if self._stale or self.fixed or self.kind not in ("smooth", "rough"):
            return self._stale
        drift = typical_scale / self._measured_at_scale
        return self._age >= _REMEASURE_EVERY or not 1 / _REMEASURE_DRIFT <= drift <= _REMEASURE_DRIFT

    @property
    def largest(self) -> float:
        """The largest step worth measuring at: the input scale, or where growing from there has led."""
        return max(1.0, self.value) if self.kind == "unknown" and not self.fixed else 1.0

    def measured(self, found: Sweep, central: bool, typical_scale: float, width: int) -> None:
        """Takes over what a sweep says; of a fixed step only the kind of box."""
        step, self.kind = choose(found, central)
        self._stale, self._age, self._measured_at_scale, self._grown = False, 0, typical_scale, False
        if not self.fixed:
            self.value = self._threshold = step
            if self.kind == "piecewise-constant":
                self._followed = 0
                self._widen(width)

    @property
    def follow_due(self) -> bool:
        """Whether to spend a few queries at the threshold: at first in every backward, then in every tenth."""
        due = self._followed < FOLLOW_EVERY or self._age % FOLLOW_EVERY == 0
        return due and not self.fixed and self.kind == "piecewise-constant"

    @property
    def threshold(self) -> float:
        """The step at which 95 % of probes change an output."""
        return self._threshold

    def follow(self, changed: float, width: int) -> None:
        """Moves the threshold, given the share of probes that changed an output there.

        Robbins-Monro on its logarithm. If pieces are crossed at random, the share has slope .15 at 95 %, so that
        gains up to 7 converge; it stays at 2 so that the step goes on following the inputs.
        """
        gain = 2.0 + 4.0 / (1.0 + self._followed / 3)
        self._followed += 1
        self._threshold *= math.exp(max(-0.35, min(gain * (CHANGED_TARGET - changed), 0.7)))
        self._widen(width)

    def _widen(self, width: int) -> None:
        widening = min(max(1.0, 0.8 * width), _MOST_WIDENING)
        self.value = max(self._threshold, min(widening * self._threshold, _LARGEST_WIDENED))

    def observe(self, changed: float | None) -> None:
        """After one backward: the share of its probes that changed an output, None where nobody looked.

        A step at which nothing changes grows, and once something does it is measured again from there.
        """
        self._age += 1
        if changed is None or self.fixed:
            if self.kind == "unknown" and changed is not None and changed < 1:
                self.kind = "piecewise-constant"
        elif changed == 0:
            self.value *= 2.0
            self._threshold *= 2.0
            self._grown = True
        elif self._grown or self.kind == "unknown":
            self._stale = True

    def get_state(self) -> dict[str, Any]:
        """Numbers, strings and flags."""
        return {name.lstrip("_"): getattr(self, name) for name in _STATE}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned."""
        for name in _STATE:
            setattr(self, name, state[name.lstrip("_")])


_STATE = ("value", "kind", "_threshold", "_stale", "_grown", "_age", "_measured_at_scale", "_followed")
