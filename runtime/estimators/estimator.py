"""One estimator: probes, reconstruction, step, clip and quality of one group of values."""

import warnings
from typing import Any

import numpy as np

from rewriter.runtime.errors import RewriteError, RewriteWarning
from rewriter.runtime.random import Key

from .allocation import neyman_counts
from .arrays import Array, is_finite
from .clip import Clip
from .differences import Slopes, central_slopes, forward_slopes
from .options import Options, Settings
from .probing import Probed
from .quality import Quality, QualityTracker, predicted_cosine
from .reconstruction import average, least_squares
from .scale import InputScale
from .step_size import FOLLOW_ROWS, StepSize
from .sweep import sweep

_SILENT_LIMIT = 20  # consecutive backwards in which no probe changed any output
_AUTO_QUANTILE = 0.9


class Estimator:
    """Row gradients J^T v from stacked differences, with the running statistics they need.

    label: names the box in messages; bounded: take no more probes than there are dimensions; noisy: equal inputs do not
    give equal outputs; width: d of the values last probed, None before
    """

    def __init__(self, options: Options, label: str, bounded: bool = False, noisy: bool = False) -> None:
        self.options = options
        self._bounded = bounded
        self._central = options.difference == "central" or (options.difference == "auto" and noisy)
        self.label = label
        self.width: int | None = None
        fixed = None if isinstance(options.step_size, str) else options.step_size
        self.step = StepSize(fixed, needs_kind=options.clip == "auto", noisy=noisy)
        self.scale = InputScale(options.input_scale)
        self.clip = Clip(options.clip if isinstance(options.clip, int | float) else _AUTO_QUANTILE)
        self.tracker = QualityTracker()
        self._silent = 0
        self._warned = False

    def gradient(
        self, probed: Probed, key: Key, lost_rows: int, frozen: Settings | None
    ) -> tuple[Array, Settings, int]:
        """Estimate (n, d), the settings it used, and the number of failed queries.

        lost_rows: rows that cannot be probed because the box failed at their base point; frozen: settings of an
        earlier backward through the same forward, which then changes no statistics. Raises RewriteError past
        `max_failed`, after 20 backwards in which no probe changed an output, or for a non-finite estimate.
        """
        self.width = probed.base.shape[1]
        step_size, spread = (frozen.step_size, frozen.spread) if frozen else self._settle(probed, key)
        measuring = frozen is None and self.tracker.due
        slopes = self._probe(probed, key, spread, step_size, measuring)
        lost = lost_rows * self.queries_per_row  # queries that could not be made
        share = self.check_failures(slopes.failed + lost, slopes.queries + lost)
        main = slopes.first(slopes.values.shape[1] - 1) if measuring else slopes
        estimate = self._reconstruct(main)
        if measuring:
            self._measure(estimate, slopes, probed)
        estimate = estimate / spread
        self._check_finite(estimate)
        ratio, clipped = frozen.clip_ratio if frozen else None, 0.0
        if frozen is None and self._clips:
            ratio = self.clip.update(estimate, probed.norms)
        if ratio is not None:
            estimate, clipped = self.clip.apply(estimate, probed.norms, ratio)
        if frozen is None:
            self._observe(slopes, clipped, share)
        return estimate, frozen or Settings(spread, step_size, ratio), slopes.failed

    def exact(self, probed: Probed, key: Key) -> Array:
        """Estimate (n, d) from every coordinate at the current step, without clip; changes no running statistic."""
        self.width = probed.base.shape[1]
        if self.scale.known:
            step_size = self.step.value
            spread = _within(probed, self.scale.spread(probed.base.dtype), step_size)
        else:
            step_size, spread = self._settle(probed, key)
        directions = probed.directions("coordinate", key, probed.base.shape[1])
        slopes = self._differences(probed, directions, spread, step_size, want_changed=False, check=directions.shape[1])
        return average(slopes.directions, slopes.values, None) / spread  # a coordinate that failed is zero

    def check_failures(self, failed: int, queries: int) -> float:
        """The share of failed queries. Raises RewriteError where it exceeds `max_failed`."""
        if failed > self.options.max_failed * queries:
            raise RewriteError(
                f"{failed / queries:.0%} of the queries of a black box failed",
                where=self.label,
                why=f"more than max_failed = {self.options.max_failed:.0%} of the points gave non-finite outputs",
                remedy="keep the box's inputs inside its domain, set a smaller step_size, or raise max_failed",
            )
        return failed / queries if queries else 0.0

    def _check_finite(self, estimate: Array) -> None:
        if not is_finite(estimate):
            raise RewriteError(
                "a black-box gradient overflowed",
                where=self.label,
                why=f"finite outputs differ by more than {estimate.dtype} can hold once divided by the step",
                remedy="scale the outputs of the box, or set a larger step_size",
            )

    def _settle(self, probed: Probed, key: Key) -> tuple[float, Array]:
        self.scale.update(probed.base)
        spread = self.scale.spread(probed.base.dtype)
        typical = self.scale.typical
        if self.step.due(typical):
            found = sweep(probed, self.options.directions, key, spread, self.step.grid)
            self.step.measured(found, self._central, typical, probed.base.shape[1])
        elif self.step.review_due:
            self.step.review(sweep(probed, self.options.directions, key, spread, self.step.review_grid))
        elif self.step.follow_due:
            self._follow_threshold(probed, key, spread)
        return self.step.value, _within(probed, spread, self.step.value)

    def _follow_threshold(self, probed: Probed, key: Key, spread: Array) -> None:
        few = probed.sample(FOLLOW_ROWS)
        directions = few.directions(self.options.directions, key.named("threshold"), 1)
        slopes = forward_slopes(few, directions, spread, self.step.threshold, want_changed=True, step_size=1)
        changed = slopes.changed_share
        if changed is not None:
            self.step.follow(changed, probed.base.shape[1])

    def _probe(self, probed: Probed, key: Key, spread: Array, step_size: float, measuring: bool) -> Slopes:
        moved = spread * spread.dtype.type(step_size)
        directions, counted = self._allotted(probed, key, moved)
        purposes = {"probes": directions.shape[1]}
        if measuring:
            extra = self._directions(probed, key.named("quality"), 1, moved)
            directions = np.concatenate((directions, extra), 1)
            purposes["quality"] = 1
            counted = None if counted is None else np.pad(counted, ((0, 0), (0, 1)), constant_values=True)
        return self._differences(
            probed,
            directions,
            spread,
            step_size,
            want_changed=measuring or self.step.kind != "smooth",
            counted=counted,
            **purposes,
        )

    def _allotted(self, probed: Probed, key: Key, moved: Array) -> tuple[Array, Array | None]:
        """Directions (n, k, d), and which of them each row probes, (n, k); None: all of them."""
        count = self.probes
        if self.options.allocation == "uniform" or self._bounded:
            return self._directions(probed, key, count, moved), None
        width = probed.base.shape[1]
        counts = neyman_counts(probed.norms, count, width)
        most = int(counts.max())
        counted = np.arange(most) < counts[:, None]
        directions = self._directions(probed, key, most, moved)
        if most == width > 1:  # complete sets have an order, or a rotation, that rows share: no part of them will do
            partial = np.pad(self._directions(probed, key.named("partial"), width - 1, moved), ((0, 0), (0, 1), (0, 0)))
            directions = np.where((counts < width)[:, None, None], partial, directions)
        return directions, counted

    def _directions(self, probed: Probed, key: Key, count: int, moved: Array) -> Array:
        """Directions (n, count, d); a row that one of them might lead out of bounds goes along coordinates instead.

        A coordinate is still itself when it is turned inward. Of any other direction, turning an element inward gives
        that element a mean, and two such elements leak into each other. So do the jumps of whole numbers into others.
        """
        kind = self.options.directions
        if probed.coordinates is not None and probed.coordinates.mixed:
            return probed.directions("coordinate", key, count)
        directions = probed.directions(kind, key, count)
        if probed.coordinates is None or self._central or kind == "coordinate":
            return directions
        near = probed.coordinates.near(probed.base, moved, kind)
        if not near.any():
            return directions
        return np.where(near[:, None, None], probed.directions("coordinate", key.named("near"), count), directions)

    def _differences(self, probed: Probed, directions: Array, spread: Array, step_size: float, **how: Any) -> Slopes:
        differences = central_slopes if self._central else forward_slopes
        return differences(probed, directions, spread, step_size, **how)

    def _reconstruct(self, slopes: Slopes) -> Array:
        directions, values, usable = slopes.directions, slopes.values, slopes.usable
        _, count, width = directions.shape
        if self.options.reconstruction == "average":
            return average(directions, values, usable)
        complete = count <= width or (usable is None and count % width == 0)
        if self.options.directions in ("orthogonal", "coordinate") and complete:
            return average(directions, values, usable)  # equal to the solve: the Gram matrix is width x identity
        if self.options.directions == "rademacher" and count == 1:
            return average(directions, values, usable)
        return least_squares(directions, values, usable)

    def _measure(self, estimate: Array, slopes: Slopes, probed: Probed) -> None:
        observed, direction, norms = slopes.values[:, -1], slopes.directions[:, -1], probed.norms
        if slopes.usable is not None:
            rows = slopes.usable[:, -1]
            if not rows.any():
                return
            estimate, direction, observed, norms = (v[rows] for v in (estimate, direction, observed, norms))
        self.tracker.measure(estimate, direction, observed, norms)

    @property
    def _clips(self) -> bool:
        clip = self.options.clip
        return clip is not None and (clip != "auto" or self.step.kind in ("piecewise-constant", "rough"))

    def _observe(self, slopes: Slopes, clipped: float, failed: float) -> None:
        changed = slopes.changed_share
        self.step.observe(changed)
        self.tracker.count(changed, clipped, failed)
        if changed != 0:
            self._silent = 0
            return
        self._silent += 1
        remedy = "check that the box depends on this input; if it does, set input_scale to how far it has to move"
        if self._silent >= _SILENT_LIMIT:
            raise RewriteError(
                f"in {self._silent} consecutive backwards no probe changed any output of a black box",
                where=self.label,
                why=f"it is constant over a step of {self.absolute_step:.2e}, so its gradient came out zero",
                remedy=remedy,
            )
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"no probe changed any output of {self.label}: its gradient is zero here; {remedy}", RewriteWarning, 2
            )

    @property
    def absolute_step(self) -> float:
        """The step in the typical unit of the inputs."""
        return self.step.value * self.scale.typical

    @property
    def difference(self) -> str:
        """Which one "auto" became."""
        return "central" if self._central else "forward"

    @property
    def probes(self) -> int:
        """Directions per row."""
        asked = self.options.probes
        return min(asked, self.width) if self._bounded and self.width is not None else asked

    @property
    def queries_per_row(self) -> int:
        """Queries one backward makes for every live row."""
        return self.probes * (2 if self._central else 1)

    @property
    def quality(self) -> Quality | None:
        """None before the first backward."""
        if self.width is None:
            return None
        averaged = self.options.reconstruction == "average"
        smoothing = self.step.kind in ("piecewise-constant", "rough")
        return Quality(
            predicted_cosine=predicted_cosine(self.options.directions, self.probes, self.width, averaged),
            measured_cosine=self.tracker.measured_cosine,
            slope=self.tracker.slope,
            parameter_cosine=None,
            changed=self.tracker.changed,
            clipped=self.tracker.clipped,
            failed=self.tracker.failed,
            bias=f"{'smoothing over step' if smoothing else 'step bias at'} {self.absolute_step:.2e}",
        )

    def get_state(self) -> dict[str, Any]:
        """Running statistics."""
        state = {
            "step": self.step.get_state(),
            "scale": self.scale.get_state(),
            "clip": self.clip.get_state(),
            "quality": self.tracker.get_state(),
            "silent": self._silent,
        }
        return state if self.width is None else {**state, "width": self.width}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned."""
        self.step.set_state(state["step"])
        self.scale.set_state(state["scale"])
        self.clip.set_state(state["clip"])
        self.tracker.set_state(state["quality"])
        self._silent, self.width = state["silent"], state.get("width")


def _within(probed: Probed, spread: Array, step_size: float) -> Array:
    return spread if probed.coordinates is None else probed.coordinates.spread(spread, step_size)
