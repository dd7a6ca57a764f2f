"""What is learnt of a cut in order to foretell its gradient: from earlier steps only, so that it knows no noise."""

from typing import Any

import torch
from torch import Tensor

_DECAY = 0.95
_LEAST_RATE = 0.1  # rows that differ in their map cost at most 1 / 20 more than the best one


class MeanGradient:
    """The running mean of rows' gradients at a cut; says what rows have in common."""

    def __init__(self) -> None:
        self._mean: Tensor | None = None

    def surrogate(self, like: Tensor) -> Tensor | None:
        """(rows, width), the same for every row; None before the first step, and where the width has changed."""
        if self._mean is None or self._mean.shape != like.shape[1:]:
            return None
        return self._mean.to(like).expand_as(like)

    def learn(self, gradient: Tensor) -> None:
        """From a step's estimate, (rows, width)."""
        found = gradient.mean(0)
        if not torch.isfinite(found).all():
            return
        known = self._mean
        kept = known is not None and known.shape == found.shape
        self._mean = _DECAY * known.to(found) + (1 - _DECAY) * found if kept and known is not None else found

    def get_state(self) -> dict[str, Any]:
        """The mean."""
        return {} if self._mean is None else {"mean": self._mean.cpu()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned."""
        self._mean = state.get("mean")


class LinearTail:
    """A linear map from changes of the value at a cut to changes of the model's outputs, learnt from noisy copies.

    For noise e of unit covariance the map of least squares error is E e d^T / sigma, with d the change of the outputs.
    Steps go towards it by what the map still gets wrong, J += rate x mean e (d - sigma J e)^T / sigma, so that a tail
    that is linear is found exactly; the rate is the one of least expected error for n copies of that width
    (normalised least mean squares, Widrow and Hoff 1960).
    """

    def __init__(self) -> None:
        self._map: Tensor | None = None
        self._steps = 0
        self._errors: Tensor | None = None
        self._copies = 0

    def surrogate(self, slopes: Tensor, width: int) -> Tensor | None:
        """(rows, width), from the loss's gradient in the outputs, (rows, outputs); None where no map is known."""
        if self._map is None or self._map.shape != (width, slopes.shape[1]):
            return None
        return slopes @ self._map.to(slopes).T

    def see(self, moved: Tensor, changed: Tensor, sigma: float | Tensor) -> None:
        """Copies: how far the value moved, (n, width), and how the outputs changed, (n, outputs)."""
        sound = torch.isfinite(changed).all(1)
        moved, changed = moved[sound], changed[sound].to(moved.dtype)
        shape = (moved.shape[1], changed.shape[1])
        if self._map is None or self._map.shape != shape:
            self._map, self._steps, self._errors = moved.new_zeros(shape), 0, None
        self._map = self._map.to(moved)
        wrong = (moved / sigma / sigma).T @ (changed - moved @ self._map)
        self._errors = wrong if self._errors is None else self._errors + wrong
        self._copies += len(moved)

    def learn(self) -> None:
        """From all that was seen since the last call."""
        errors, copies = self._errors, self._copies
        self._errors, self._copies = None, 0
        if self._map is None or errors is None or not copies or not torch.isfinite(errors).all():
            return
        self._steps += 1
        share = max(1 / self._steps, _LEAST_RATE) / (1 + (len(errors) + 1) / copies)
        self._map = self._map + share * errors / copies

    def get_state(self) -> dict[str, Any]:
        """The map."""
        return {} if self._map is None else {"map": self._map.cpu(), "steps": self._steps}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned."""
        self._map, self._steps = state.get("map"), state.get("steps", 0)
        self._errors, self._copies = None, 0
