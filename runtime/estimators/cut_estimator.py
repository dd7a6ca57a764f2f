"""What is learnt of one cut, and what each backward settles on from it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rewriter.runtime.errors import RewriteError
from rewriter.runtime.random import Key

from .arrays import Array
from .control import ControlVariate
from .copies import Batch, Estimation, Found, counts_by, estimate, estimate_by
from .copy_watch import CopyWatch
from .cut_options import CutOptions
from .learned_allocation import LEARNED
from .noise import check_noise, relative_variance
from .noise_size import NoiseSize
from .quality import Quality
from .split_half import SplitHalf
from .surrogates import LinearTail, MeanGradient

log = logging.getLogger("rewriter.runtime")

_FIRST_COPIES = 8
_MOST_COPIES = 256
_LEARNT: dict[str, type[MeanGradient] | type[LinearTail]] = {"last": MeanGradient, "distilled": LinearTail}


@dataclass(frozen=True)
class Settings:
    """What one backward used and a second one through the same forward uses again.

    held: as `NoiseSize.bounded` says, where sigma is learnt; parameters: of the allocator, where one learns; surrogate,
    control: of the gradient, (rows, width), as it is and as far as it is used.
    """

    copies: int
    sigma: float | Tensor
    held: Tensor | None = None
    parameters: Array | None = None
    surrogate: Tensor | None = None
    control: Tensor | None = None


class CutEstimator:
    """Noise, copies and quality of one cut.

    ratio: cost of a step without copies in units of one copy; label: for messages.
    """

    def __init__(self, options: CutOptions, ratio: float, label: str) -> None:
        self.options, self.ratio, self.label = options, ratio, label
        self.size = NoiseSize(options.sigma)
        self.halves = SplitHalf()
        self.watch = CopyWatch()
        self.signal: float | None = None  # of all cuts of the chain; None where this is the only one
        self.allocator = LEARNED[options.allocation]() if options.allocation in LEARNED else None
        self.control = ControlVariate()
        self.learnt = _LEARNT[options.control]() if options.control in _LEARNT else None
        self._counters = {"copies": 0, "width": 0, "rows": 0, "assigned": 0}

    def assign(self, copies: int) -> None:
        """So many of a row from now on, in place of `wanted`: the chain's budget is shared by what is measured."""
        self._counters["assigned"] = copies

    def settle(
        self,
        value: Tensor,
        samples: Tensor,
        parts: Sequence[int],
        learnt: tuple[Tensor, Tensor] | None = None,
    ) -> Settings:
        """Copies and noise for a batch of rows, (rows, width); samples: (n, m), what the noise is to be small against;
        parts: widths of the tensors there, side by side.

        learnt: logarithms of standard deviations, (channels,), and the channel of each element, (width,). Raises
        RewriteError where copies or noise do not fit the width.
        """
        rows, width = value.shape
        self._counters["rows"], self._counters["width"] = rows, width
        self.size.observe(samples, parts)
        sigma, held = self.sized(value, learnt)
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
        return Settings(copies, sigma, held, None if self.allocator is None else self.allocator.parameters)

    def sized(self, value: Tensor, learnt: tuple[Tensor, Tensor] | None) -> tuple[float | Tensor, Tensor | None]:
        """The noise of now for a batch that it has seen, and what holds it where it is learnt."""
        if learnt is None:
            return self.size.value(value), None
        sigma, held = self.size.bounded(learnt[0])
        return sigma.to(value)[learnt[1].to(value.device)], held

    def estimation(
        self,
        value: Tensor,
        clean: Tensor,
        first_row: int,
        settings: Settings,
        key: Key,
        doubts: Tensor | None = None,
    ) -> Estimation:
        """Of the gradient at `value`, (rows, width); clean: (rows,), the losses there; first_row: among all ranks'.

        doubts: (rows,), what allocation="doubt" goes by.
        """
        batch = Batch(value, clean, first_row, settings.sigma, settings.surrogate, settings.control)
        norms = self._norms(clean, first_row, settings, key) if doubts is None else doubts.double().cpu().numpy()
        if norms is None:
            return estimate(batch, self.options, settings.copies, key)
        return estimate_by(batch, self.options, settings.copies, key, norms)

    def learn(self, clean: Tensor, first_row: int, settings: Settings, key: Key, found: Found) -> None:
        """What an estimation, given the same, found: once for each forward."""
        norms = self._norms(clean, first_row, settings, key)
        if self.allocator is not None and norms is not None:
            counts = counts_by(norms, self.options, settings.copies, found.gradient.shape[1])
            self.allocator.learn(_mean_losses(clean), norms, counts, found.squares.cpu().numpy())

    def _norms(self, clean: Tensor, first_row: int, settings: Settings, key: Key) -> Array | None:
        """What rows' copies are to be in proportion to, known before any of them."""
        if self.allocator is None or settings.parameters is None:
            return None
        return self.allocator.shares(_mean_losses(clean), key.named("shares"), first_row, settings.parameters)

    @property
    def copies(self) -> int:
        """Of a row, on average: as assigned, or as wanted."""
        return self._counters["assigned"] or self.wanted

    @property
    def wanted(self) -> int:
        """Of a row, on average: as given, or from measured noise and costs."""
        if isinstance(self.options.copies, int):
            return self.options.copies
        known = self.halves.best_copies(self.ratio, 4, _MOST_COPIES, self.signal)
        return _FIRST_COPIES if known is None else self._whole_frames(known // 2 * 2)

    def _whole_frames(self, copies: int) -> int:
        """These, or one or two complete frames of orthogonal directions, whichever buy more: the last direction of a
        frame takes away most of what noise is left."""
        width = self._counters["width"]
        if self.options.directions != "orthogonal" or self.halves.signal <= 0:
            return copies
        share = self.halves.signal / (self.signal or self.halves.signal)
        pairs = 2 if self.options.antithetic else 1

        def price(count: int) -> float:
            baseline = self.options.baseline_for(count)
            noise = relative_variance("orthogonal", count, width, baseline, self.options.antithetic)
            return (self.ratio + count) * (1 + share * noise)

        frames = [number * width * pairs for number in (1, 2)]
        return min([copies, *(count for count in frames if 4 <= count <= _MOST_COPIES)], key=price)

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
            predicted_cosine=(1 + variance * self.control.left) ** -0.5,
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
            **({} if self.allocator is None else {"allocator": self.allocator.get_state()}),
            "control": self.control.get_state(),
            "learnt": {} if self.learnt is None else self.learnt.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned."""
        self.size.set_state(state["size"])
        self.halves.set_state(state["halves"])
        self.watch.set_state(state["watch"])
        self._counters.update(state["counters"])
        self.control.set_state(state.get("control", {}))
        if self.learnt is not None:
            self.learnt.set_state(state.get("learnt", {}))
        if self.allocator is not None:
            self.allocator.set_state(state["allocator"])


def _mean_losses(clean: Tensor) -> Array:
    """In units in which the rows' losses add up to their number times the mean."""
    losses: Array = clean.double().cpu().numpy() * len(clean)
    return losses
