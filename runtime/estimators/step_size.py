"""The step of a finite difference: fixed, or measured at the box and followed in training."""

from __future__ import annotations

import math
from typing import Any

from .noisy import choose_noisy
from .plateau import CHANGED_TARGET, BoxKind, Choice, choose, neighbour_gap
from .sweep import Grid, Sweep, noise_floor

# Half decades below the largest step: at most 108 queries each.
_DETERMINISTIC = Grid(3, tuple(10.0 ** (-k / 2) for k in range(18)))
_NOISY = Grid(6, tuple(10.0 ** (-k / 2) for k in range(8)), repeats=2)

_REMEASURE_EVERY = 1000
_REMEASURE_DRIFT = 2.0
_REVIEW_EVERY = 100  # backwards
_REVIEW_ROWS = 3
_MORE_GAP = 10.0  # so much more disagreement than when it was measured, and the box is another
_LEAST_GAP = 0.02  # disagreement that is no reason to measure again
_THRESHOLD_DRIFT = 30.0
_MOST_GROWTH = 1e3  # input scales; a box that is constant over that much is constant
FOLLOW_EVERY = 10  # backwards
FOLLOW_ROWS = 32
_MOST_WIDENING = 13.0  # some forty pieces crossed by a probe, however many coordinates there are
_LARGEST_WIDENED = 4.0  # in units of the input scale: further out there is no data


class StepSize:
    """The step in use, in units of the input scale.

    On piecewise-constant boxes the threshold is the step at which 95 % of probes change an output. A probe moves all
    coordinates at once, so at its threshold it crosses some three pieces in all; the step in use is as much longer as
    one needs to cross them along each coordinate: the mean of |u|_1 = .8 d, but no more than _MOST_WIDENING.

    kind; noise_floor: deviation of the outputs' noise over their size; error: estimated relative error of a
    directional derivative at the step; order: power of the step by which the error of central differences grows, 2 for
    smooth functions. The last three are None where a sweep did not show them.
    """

    def __init__(self, fixed: float | None, needs_kind: bool, noisy: bool = False) -> None:
        """needs_kind: measure what kind of box it is even where the step is fixed; noisy: repeats differ."""
        self.fixed = fixed is not None
        self.value = fixed if fixed is not None else 1.0
        self.kind: BoxKind = "unknown"
        self.noise_floor: float | None = None
        self.error: float | None = None
        self.order: float | None = None
        self._noisy = noisy
        self._threshold = self._measured_threshold = self.value
        self._gap = 0.0
        self._stale = fixed is None or needs_kind
        self._grown = False
        self._age = 0
        self._measured_at_scale = 1.0
        self._followed = 0

    def due(self, typical_scale: float) -> bool:
        """Whether to measure first: never yet, the box or its inputs changed, or a thousand backwards ago."""
        if self._stale or self.fixed or self.kind not in ("smooth", "rough"):
            return self._stale
        drift = typical_scale / self._measured_at_scale
        return self._age >= _REMEASURE_EVERY or not 1 / _REMEASURE_DRIFT <= drift <= _REMEASURE_DRIFT

    @property
    def grid(self) -> Grid:
        """Where to measure: down from the input scale, or from where growing has led."""
        largest = max(1.0, self.value) if self.kind == "unknown" and not self.fixed else 1.0
        grid = _NOISY if self._noisy else _DETERMINISTIC
        return Grid(grid.rows, tuple(largest * step for step in grid.steps), grid.repeats)

    def measured(self, found: Sweep, central: bool, typical_scale: float, width: int) -> None:
        """Takes over what a sweep says; of a fixed step only the kind of box and its noise."""
        choice: Choice | None = choose_noisy(found, central) if self._noisy else None
        choice = choice or choose(found, central)
        self.kind, self.order, self.noise_floor = choice.kind, choice.order, noise_floor(found)
        self._stale, self._age, self._measured_at_scale, self._grown = False, 0, typical_scale, False
        if self.fixed:
            return
        self.value = self._threshold = self._measured_threshold = choice.step
        self.error, self._gap = choice.error, choice.gap or 0.0
        if self.kind == "piecewise-constant":
            self._followed = 0
            self._widen(width)

    @property
    def review_due(self) -> bool:
        """Whether to spend a few queries on whether the plateau is still there."""
        return self._age > 0 and self._age % _REVIEW_EVERY == 0 and not self.fixed and self.kind == "smooth"

    @property
    def review_grid(self) -> Grid:
        """Where: at the step in use and half a decade below."""
        return Grid(_REVIEW_ROWS, (self.value, self.value / math.sqrt(10.0)))

    def review(self, found: Sweep) -> None:
        """Measures again in the next backward where these two steps disagree much more than they did."""
        if neighbour_gap(found) > max(_LEAST_GAP, _MORE_GAP * self._gap):
            self._stale = True

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
        gains up to 7 converge; it stays at 2 so that the step goes on following the inputs. Where that leads far from
        what was measured, the box is measured again: it may be of another kind.
        """
        gain = 2.0 + 4.0 / (1.0 + self._followed / 3)
        self._followed += 1
        self._threshold *= math.exp(max(-0.35, min(gain * (CHANGED_TARGET - changed), 0.7)))
        self._threshold = min(self._threshold, _MOST_GROWTH)
        self._stale = abs(math.log(self._threshold / self._measured_threshold)) > math.log(_THRESHOLD_DRIFT)
        self._widen(width)

    def _widen(self, width: int) -> None:
        widening = min(max(1.0, 0.8 * width), _MOST_WIDENING)
        self.value = max(self._threshold, min(widening * self._threshold, _LARGEST_WIDENED))

    def observe(self, changed: float | None) -> None:
        """After one backward: the share of its probes that changed an output, None where nobody looked.

        Where nothing changes at the plateau of a box that had one, it is measured again. Elsewhere a step at which
        nothing changes grows, up to _MOST_GROWTH, and once something does it is measured again from there.
        """
        self._age += 1
        if changed is None or self.fixed:
            if self.kind == "unknown" and changed is not None and changed < 1:
                self.kind = "piecewise-constant"
        elif changed == 0 and self.kind in ("smooth", "rough"):
            self._stale = True
        elif changed == 0:
            self.value = min(2.0 * self.value, _MOST_GROWTH)
            self._threshold = min(2.0 * self._threshold, _MOST_GROWTH)
            self._grown = True
        elif self._grown or self.kind == "unknown":
            self._stale = True

    def get_state(self) -> dict[str, Any]:
        """Numbers, strings, flags, and None for what is not known."""
        return {name.lstrip("_"): getattr(self, name) for name in _STATE}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned."""
        for name in _STATE:
            setattr(self, name, state[name.lstrip("_")])


_STATE = (
    *("value", "kind", "noise_floor", "error", "order", "_threshold", "_measured_threshold", "_gap"),
    *("_stale", "_grown", "_age", "_measured_at_scale", "_followed"),
)
