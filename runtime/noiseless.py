"""What rules share whose gradients hold no noise: there is nothing to measure, and mostly nothing to learn."""

from __future__ import annotations

from typing import Any

from .estimators.quality import History


class Noiseless:
    """The part of `Rule` that is about estimates, for a rule that estimates nothing by chance."""

    def __init__(self) -> None:
        self.history = History()

    def record(self, forward: int, signal: float, noise: float) -> None:
        """There is no noise."""

    @property
    def quality(self) -> None:
        return None

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} learns nothing, yet a state was given: {sorted(state)}")
