"""A surrogate gradient as a control variate, used as far as its measured correlation with the losses goes."""

import math
from typing import Any

import torch
from torch import Tensor

CONTROLS = ("none", "last", "truncated", "distilled")

_DECAY = 0.95


class ControlVariate:
    """Scales a surrogate gradient by regression on earlier steps, and leaves it out where it does not pay.

    cost: of one surrogate, in units of all copies of a step. The scale comes from earlier steps only, so that the
    estimate stays unbiased.
    """

    def __init__(self, cost: float = 0.0) -> None:
        self.cost = cost
        self._products: tuple[float, float, float] | None = None  # means of d p, p p and d d

    @property
    def correlation(self) -> float | None:
        """Between the losses' differences and what the surrogate predicts of them; None before the first step."""
        if self._products is None:
            return None
        both, predicted, differences = self._products
        return both / (predicted * differences) ** 0.5 if predicted > 0 and differences > 0 else 0.0

    @property
    def pays(self) -> bool:
        """Whether the variance falls by more than the surrogate's cost would buy in copies."""
        correlation = self.correlation
        return correlation is not None and (1 - correlation**2) * (1 + self.cost) < 1

    @property
    def left(self) -> float:
        """Share of the variance that is left."""
        return 1 - (self.correlation or 0.0) ** 2 if self.pays else 1.0

    def scaled(self, surrogate: Tensor) -> Tensor | None:
        """The surrogate, (rows, width), times its regression coefficient; None where it does not pay."""
        if not self.pays or self._products is None:
            return None
        return surrogate * (self._products[0] / self._products[1])

    def observe(self, both: float, predicted: float, differences: float) -> None:
        """After a step: means over copies of d p, p^2 and d^2.

        d = f(z + sigma e) - f(z); p: what the unscaled surrogate predicts of it.
        """
        found = (both, predicted, differences)
        if not all(map(math.isfinite, found)):
            return  # a diverged step says nothing of the others
        before = self._products or found
        kept = [_DECAY * old + (1 - _DECAY) * new for old, new in zip(before, found, strict=True)]
        self._products = (kept[0], kept[1], kept[2])

    def get_state(self) -> dict[str, Any]:
        """Running products."""
        return {} if self._products is None else {"products": torch.tensor(self._products, dtype=torch.float64)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned."""
        found = state["products"].tolist() if "products" in state else None
        self._products = None if found is None else (found[0], found[1], found[2])
