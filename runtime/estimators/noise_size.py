"""How large the noise at a cut is: small against the value, large enough for the losses to tell copies apart."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter.runtime.errors import RewriteError

_SHARE = 0.1  # of the value's deviation: the smoothing of a sine of unit slope is half a percent
_LARGEST = 10.0  # times that, where the losses do not tell copies apart
_SMALLEST, _WIDEST = 1e-3, 100.0  # times the start, between which noise is learnt
_DECAY = 0.95
_CALM = 20  # backwards in a row with copies well apart, after which enlarged noise is halved
_PAUSE = 50  # backwards after which enlarging is tried again where it did not help


class NoiseSize:
    """sigma: a number, one for each element of a row, "auto" or "learned".

    "auto": a tenth of the value's running deviation over rows. It doubles, up to ten times, while the losses of copies
    do not differ by more than their rounding, and halves again once they have long differed by far more. "learned": as
    `value` is told, from a tenth of the first batch's deviation on; what doubles and halves is its lower bound.
    """

    def __init__(self, sigma: float | Sequence[float] | str) -> None:
        self.fixed = None if isinstance(sigma, str) else sigma
        self.learned = sigma == "learned"
        self.factor = self._least = _SMALLEST if self.learned else 1.0
        self._calm = self._pause = 0
        self._variances: list[float] = []
        self._parts: list[int] = []
        self._start: float | None = None
        self.range = (0.0, 0.0)

    def observe(self, value: Tensor, parts: Sequence[int]) -> None:
        """A batch of rows, (rows, width), about to be perturbed; parts: widths of the tensors side by side there."""
        wide = value.double()
        centre = wide.mean(0) if len(wide) > 1 else wide.new_zeros(())
        spread, squares = (wide - centre).square().mean(0), wide.square().mean(0)
        pairs = zip(torch.split(spread, list(parts)), torch.split(squares, list(parts)), strict=True)
        found = [float(own.mean()) or float(whole.mean()) for own, whole in pairs]
        if not all(0 < each < math.inf for each in found):
            return
        known = self._variances if len(self._variances) == len(found) else found
        self._variances = [_DECAY * old + (1 - _DECAY) * new for old, new in zip(known, found, strict=True)]
        self._parts = list(parts)
        self._start = self._start or math.sqrt(sum(found) / len(found)) * _SHARE

    def value(self, like: Tensor) -> float | Tensor:
        """sigma, in units of the value; (width,) where it was given so."""
        if self.fixed is None:
            return self._automatic(like)
        if isinstance(self.fixed, Sequence):
            return torch.tensor(self.fixed, dtype=like.dtype, device=like.device)
        return float(self.fixed)

    def _automatic(self, like: Tensor) -> float | Tensor:
        """The same for all elements of a tensor, and for all where there is one tensor."""
        if len(self._variances) < 2:
            return self.typical
        sizes = torch.tensor([_SHARE * self.factor * v**0.5 for v in self._variances], dtype=like.dtype)
        return sizes.repeat_interleave(torch.tensor(self._parts)).to(like.device)

    def bounded(self, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Of learnt logarithms, in units of the start: sigma, and where a bound holds it: 1 from below, -1 from above.

        Raises RewriteError where they are not finite.
        """
        if not log_sigma.isfinite().all():
            raise RewriteError(
                "a learnt standard deviation is not finite",
                why="a step of the optimizer made log_sigma so",
                remedy="a smaller learning rate, or clip gradients",
            )
        ratio = log_sigma.exp()
        kept = ratio.clamp(self.factor, _WIDEST)
        sigma = kept * (_SHARE if self._start is None else self._start)
        self.range = (float(sigma.min()), float(sigma.max()))
        return sigma, (kept - ratio).sign()

    @property
    def typical(self) -> float:
        """One number: where tensors differ, the geometric mean of theirs."""
        if self.learned:
            return math.sqrt(self.range[0] * self.range[1])
        if self.fixed is None:
            logs = [math.log(variance) / 2 for variance in self._variances] or [0.0]
            return _SHARE * self.factor * math.exp(sum(logs) / len(logs))
        return sum(self.fixed) / len(self.fixed) if isinstance(self.fixed, Sequence) else float(self.fixed)

    def grow(self) -> bool:
        """Doubles the noise; False where it is fixed, as large as it gets, or larger noise has just been no help."""
        if self.fixed is not None or self.factor >= _LARGEST or self._pause:
            return False
        present = max(self.factor, self.range[1] / self._start) if self.learned and self._start else self.factor
        self.factor = min(2 * present, _LARGEST)
        self._calm = 0
        return True

    @property
    def grown(self) -> bool:
        return self.factor > self._least

    def shrink(self) -> None:
        """Takes back what was added: larger noise did not tell copies apart either."""
        self.factor, self._pause = self._least, _PAUSE

    def rest(self, apart: bool) -> None:
        """After a backward; apart: copies differed by so much that half the noise would do."""
        self._pause = max(0, self._pause - 1)
        self._calm = self._calm + 1 if apart else 0
        if self._calm >= _CALM:
            self.factor, self._calm = max(self.factor / 2, self._least), 0

    def get_state(self) -> dict[str, Any]:
        """Numbers."""
        known = {"start": self._start}
        present = {"factor": self.factor, "calm": self._calm, "pause": self._pause, "range": list(self.range)}
        present |= {"variances": list(self._variances), "parts": list(self._parts)}
        return {**present, **{name: number for name, number in known.items() if number is not None}}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned."""
        self.factor, self._start = state["factor"], state.get("start")
        self._variances, self._parts = list(state["variances"]), list(state["parts"])
        self._calm, self._pause = state.get("calm", 0), state.get("pause", 0)
        low, high = state.get("range", (0.0, 0.0))
        self.range = (low, high)
