"""How large the noise at a cut is: small against the value, large enough for the losses to tell copies apart."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_SHARE = 0.1  # of the value's deviation: the smoothing of a sine of unit slope is half a percent
_LARGEST = 10.0  # times that, where the losses do not tell copies apart
_DECAY = 0.95


class NoiseSize:
    """sigma: a number, one for each element of a row, or "auto": a tenth of the value's running deviation over rows.

    "auto" doubles, up to ten times, while the losses of copies do not differ by more than their rounding.
    """

    def __init__(self, sigma: float | Sequence[float] | str) -> None:
        self.fixed = None if isinstance(sigma, str) else sigma
        self.factor = 1.0
        self._variance: float | None = None

    def observe(self, value: Tensor) -> None:
        """A batch of rows, (rows, width), about to be perturbed."""
        wide = value.double()
        centre = wide.mean(0) if len(wide) > 1 else wide.new_zeros(())
        found = float((wide - centre).square().mean()) or float(wide.square().mean())
        if 0 < found < float("inf"):
            known = self._variance
            self._variance = found if known is None else _DECAY * known + (1 - _DECAY) * found

    def value(self, like: Tensor) -> float | Tensor:
        """sigma, in units of the value; (width,) where it was given so."""
        if self.fixed is None:
            return self.typical
        if isinstance(self.fixed, Sequence):
            return torch.tensor(self.fixed, dtype=like.dtype, device=like.device)
        return float(self.fixed)

    @property
    def typical(self) -> float:
        """One number."""
        if self.fixed is None:
            return _SHARE * self.factor * (1.0 if self._variance is None else self._variance**0.5)
        return sum(self.fixed) / len(self.fixed) if isinstance(self.fixed, Sequence) else float(self.fixed)

    def grow(self) -> bool:
        """Doubles the noise; False where it is fixed, or as large as it gets."""
        if self.fixed is not None or self.factor >= _LARGEST:
            return False
        self.factor = min(2 * self.factor, _LARGEST)
        return True

    def get_state(self) -> dict[str, Any]:
        """Numbers."""
        return {"factor": self.factor, **({} if self._variance is None else {"variance": self._variance})}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned."""
        self.factor, self._variance = state["factor"], state.get("variance")
