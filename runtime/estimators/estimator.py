"""One estimator: probes, reconstruction, step, clip and quality of one group of values."""

import warnings
from typing import Any

import numpy as np

from rewriter.runtime.errors import RewriteError, RewriteWarning
from rewriter.runtime.random import Key

from .arrays import Array, is_finite
from .clip import Clip
from .differences import Slopes, central_slopes, forward_slopes
from .options import Options, Settings
from .probing import Probed
from .quality import Quality, QualityTracker, predicted_cosine
from .reconstruction import average, least_squares
from .scale import InputScale
from .step_size import FOLLOW_ROWS, StepSize, sweep

_SILENT_LIMIT = 20  # consecutive backwards in which no probe changed any output
_AUTO_QUANTILE = 0.9


class Estimator:
    """Row gradients J^T v from stacked differences, with the running statistics they need.

    label: names the box in messages; bounded: take no more probes than there are dimensions; width: d of the values
    last probed, None before
    """

    def __init__(self, options: Options, label: str, bounded: bool = False) -> None:
        self.options = options
        self._bounded = bounded
        self.label = label
        self.width: int | None = None
        fixed = None if isinstance(options.step_size, str) else options.step_size
        self.step = StepSize(fixed, needs_kind=options.clip == "auto")
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
        slopes, directions = self._probe(probed, key, spread, step_size, measuring)
        lost = lost_rows * self.queries_per_row
        failed = slopes.failed + lost
        self.check_failures(failed, slopes.queries + lost)
        main = slopes.first(self.probes) if measuring else slopes
        estimate = self._reconstruct(
            directions[:, : self.probes] if measuring else directions, main.values, main.usable
        )
        if measuring:
            self._measure(estimate, directions[:, -1], slopes, probed.norms)
        estimate = estimate / spread
        self._check_finite(estimate)
        ratio = frozen.clip_ratio if frozen else self._clip_ratio(estimate, probed.norms)
        clipped = 0.0
        if ratio is not None:
            estimate, clipped = self.clip.apply(estimate, probed.norms, ratio)
        if frozen is None:
            self._observe(slopes, clipped, failed / (slopes.queries + lost))
        return estimate, frozen or Settings(spread, step_size, ratio), failed

    def exact(self, probed: Probed, key: Key) -> Array:
        """Estimate (n, d) from every coordinate at the current step, without clip; changes no running statistic."""
        self.width = probed.base.shape[1]
        if self.scale.known:
            step_size, spread = self.step.value, self.scale.spread(probed.base.dtype)
        else:
            step_size, spread = self._settle(probed, key)
        directions = probed.directions("coordinate", key, probed.base.shape[1])
        slopes = self._differences(probed, directions, spread, step_size, want_changed=False, check=directions.shape[1])
        return average(directions, slopes.values, slopes.usable) / spread

    def check_failures(self, failed: int, queries: int) -> None:
        """Raises RewriteError where more than `max_failed` of the queries failed."""
        if failed > self.options.max_failed * queries:
            raise RewriteError(
                f"{failed / queries:.0%} of the queries of a black box failed",
                where=self.label,
                why=f"more than max_failed = {self.options.max_failed:.0%} of the points gave non-finite outputs",
                remedy="keep the box's inputs inside its domain, set a smaller step_size, or raise max_failed",
            )

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
            found = sweep(probed, self.options.directions, key, spread, self.step.largest)
            self.step.measured(found, self.options.difference == "central", typical, probed.base.shape[1])
        elif self.step.follow_due:
            self._follow_threshold(probed, key, spread)
        return self.step.value, spread

    def _follow_threshold(self, probed: Probed, key: Key, spread: Array) -> None:
        few = probed.sample(FOLLOW_ROWS)
        directions = few.directions(self.options.directions, key.named("threshold"), 1)
        slopes = forward_slopes(few, directions, spread, self.step.threshold, want_changed=True, step_size=1)
        changed = slopes.changed_share
        if changed is not None:
            self.step.follow(changed, probed.base.shape[1])

    def _probe(
        self, probed: Probed, key: Key, spread: Array, step_size: float, measuring: bool
    ) -> tuple[Slopes, Array]:
        count = self.probes
        directions = probed.directions(self.options.directions, key, count)
        purposes = {"probes": count}
        if measuring:
            extra = probed.directions(self.options.directions, key.named("quality"), 1)
            directions = np.concatenate((directions, extra), 1)
            purposes["quality"] = 1
        want_changed = measuring or self.step.kind != "smooth"
        return self._differences(
            probed, directions, spread, step_size, want_changed=want_changed, **purposes
        ), directions

    def _differences(
        self,
        probed: Probed,
        directions: Array,
        spread: Array,
        step_size: float,
        *,
        want_changed: bool,
        **purposes: int,
    ) -> Slopes:
        differences = forward_slopes if self.options.difference == "forward" else central_slopes
        return differences(probed, directions, spread, step_size, want_changed=want_changed, **purposes)

    def _reconstruct(self, directions: Array, slopes: Array, usable: Array | None) -> Array:
        if self.options.reconstruction == "average":
            return average(directions, slopes, usable)
        _, count, width = directions.shape
        complete = count <= width or (usable is None and count % width == 0)
        if self.options.directions in ("orthogonal", "coordinate") and complete:
            return average(directions, slopes, usable)  # equal to the solve: the Gram matrix is width x identity
        if self.options.directions == "rademacher" and count == 1:
            return average(directions, slopes, usable)
        return least_squares(directions, slopes, usable)

    def _measure(self, estimate: Array, direction: Array, slopes: Slopes, norms: Array) -> None:
        observed = slopes.values[:, -1]
        if slopes.usable is not None:
            rows = slopes.usable.all(1)
            if not rows.any():
                return
            estimate, direction, observed, norms = (v[rows] for v in (estimate, direction, observed, norms))
        self.tracker.measure(estimate, direction, observed, norms)

    def _clip_ratio(self, estimate: Array, norms: Array) -> float | None:
        clip = self.options.clip
        if clip is None or (clip == "auto" and self.step.kind not in ("piecewise-constant", "rough")):
            return None
        return self.clip.update(estimate, norms)

    def _observe(self, slopes: Slopes, clipped: float, failed: float) -> None:
        changed = slopes.changed_share
        self.step.observe(changed)
        self.tracker.count(changed, clipped, failed)
        if changed != 0:
            self._silent = 0
            return
        self._silent += 1
        remedy = "set a larger step_size or input_scale; check that the box depends on this input at all"
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
    def probes(self) -> int:
        """Directions per row."""
        asked = self.options.probes
        return min(asked, self.width) if self._bounded and self.width is not None else asked

    @property
    def queries_per_row(self) -> int:
        """Queries one backward makes for every live row."""
        return self.probes * (2 if self.options.difference == "central" else 1)

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
