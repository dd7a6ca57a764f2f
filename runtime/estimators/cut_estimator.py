"""What is learnt of one cut, and what each backward settles on from it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from rewriter.runtime.errors import RewriteError
from rewriter.runtime.random import Key

from .copies import Batch, Estimation, estimate, estimate_by
from .copy_watch import CopyWatch
from .cut_options import CutOptions
from .noise import check_noise, relative_variance
from .noise_size import NoiseSize
from .quality import Quality
from .split_half import SplitHalf

log = logging.getLogger("rewriter.runtime")

_FIRST_COPIES = 8
_MOST_COPIES = 256


@dataclass(frozen=True)
class Settings:
    """What one backward used and a second one through the same forward uses again."""

    copies: int
    sigma: float | Tensor


class CutEstimator:
    """Noise, copies and quality of one cut.

    ratio: cost of a step without copies in units of one copy; label: for messages.
    """

    def __init__(self, options: CutOptions, ratio: float, label: str) -> None:
        self.options, self.ratio, self.label = options, ratio, label
        self.size = NoiseSize(options.sigma)
        self.halves = SplitHalf()
        self.watch = CopyWatch()
        self._counters = {"copies": 0, "width": 0, "rows": 0}

    def settle(self, value: Tensor, samples: Tensor) -> Settings:
        """Copies and noise for a batch of rows, (rows, width); samples: (n, m), what the noise is to be small against.

        Raises RewriteError where copies or noise do not fit the width.
        """
        rows, width = value.shape
        self._counters["rows"], self._counters["width"] = rows, width
        self.size.observe(samples)
        sigma = self.size.value(value)
        if isinstance(sigma, Tensor) and sigma.shape != (width,):
            raise RewriteError(
                f"sigma has {len(sigma)} numbers for {width} elements of a row at the cut",
                where=self.label,
                remedy="pass one number, or one for each element of a row, the cut's values side by side",
            )
        copies = self.copies
        if copies != self._counters["copies"]:
            self._counters["copies"] = copies
            log.info("%s: %d copies of each row", self.label, copies)
        check_noise(self.options.directions, copies, width, self.options.antithetic)
        return Settings(copies, sigma)

    def estimation(self, value: Tensor, clean: Tensor, first_row: int, settings: Settings, key: Key) -> Estimation:
        """Of the gradient at `value`, (rows, width); clean: (rows,), the losses there; first_row: among all ranks'."""
        batch = Batch(value, clean, first_row, settings.sigma)
        if self.options.allocation != "doubt":
            return estimate(batch, self.options, settings.copies, key)
        # 1 - exp(-loss), the loss in units in which the rows' add up to their number times the mean.
        losses = clean.double().cpu().numpy() * len(clean)
        return estimate_by(batch, self.options, settings.copies, key, -np.expm1(-np.maximum(losses, 0.0)))

    @property
    def copies(self) -> int:
        """Of a row, on average: as given, or from measured noise and costs."""
        if isinstance(self.options.copies, int):
            return self.options.copies
        known = self.halves.best_copies(self.ratio, 4, _MOST_COPIES)
        return _FIRST_COPIES if known is None else known // 2 * 2

    @property
    def width(self) -> int | None:
        """Elements of a row; None before the first backward."""
        return self._counters["width"] or None

    @property
    def rows_per_backward(self) -> int | None:
        return self.copies * self._counters["rows"] or None

    @property
    def quality(self) -> Quality | None:
        """Of the rows' gradients; None before the first backward."""
        if self.width is None:
            return None
        options, copies = self.options, self.copies
        baseline = options.baseline_for(copies)
        variance = relative_variance(options.directions, copies, self.width, baseline, options.antithetic)
        return Quality(
            predicted_cosine=(1 + variance) ** -0.5,
            measured_cosine=self.halves.cosine(copies),
            slope=None,
            parameter_cosine=None,
            changed=self.watch.changed,
            clipped=0.0,
            failed=self.watch.failed,
            bias=f"smoothing over noise of {self.size.typical:.2e}",
        )

    def describe(self) -> dict[str, Any]:
        """Plain facts for reports; what is not known before the first backward is None."""
        quality = self.quality
        return {
            "width": self.width,
            "copies": self.copies,
            "sigma": self.size.typical if quality else None,
            "predicted_cosine": quality.predicted_cosine if quality else None,
            "measured_cosine": quality.measured_cosine if quality else None,
        }

    def get_state(self) -> dict[str, Any]:
        """Running statistics."""
        return {
            "size": self.size.get_state(),
            "halves": self.halves.get_state(),
            "watch": self.watch.get_state(),
            "counters": self._counters.copy(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned."""
        self.size.set_state(state["size"])
        self.halves.set_state(state["halves"])
        self.watch.set_state(state["watch"])
        self._counters.update(state["counters"])
