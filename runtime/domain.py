"""Where an input of a box may be evaluated: bounds, whole numbers, positive numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import BoxError


@dataclass(frozen=True)
class Domain:
    """What one floating input of a box may be; no probe leaves it.

    low, high: bounds, a number or one for each element of a row (of the whole input where it is shared)
    integer:   the box is given whole numbers, the nearest ones; probes move such an input by half a unit at least, so
               that its gradient is that of the smoothed box
    positive:  greater than zero and spread over decades: probes multiply it instead of adding to it

    Raises BoxError for bounds that contradict each other.
    """

    low: float | Sequence[float] | None = None
    high: float | Sequence[float] | None = None
    integer: bool = False
    positive: bool = False

    def __post_init__(self) -> None:
        if self.positive and self.integer:
            raise BoxError("a domain is both integer and positive", remedy="for counts: Domain(low=1, integer=True)")
        try:
            low, high = self._bounds()
        except (TypeError, ValueError) as error:
            raise BoxError(f"{self} has a bound that is no number", why=str(error)) from error
        alike = low.ndim <= 1 and high.ndim <= 1 and (low.shape == high.shape or not low.ndim or not high.ndim)
        if not alike or not bool((low < high).all()):
            raise BoxError(
                f"{self} is empty or has no order",
                remedy="low < high, each a number or a flat sequence of one for each element of a row",
            )
        if self.positive and bool((low < 0).any()):
            raise BoxError(f"{self} has a negative bound", remedy="leave low away, or give a positive one")

    def bounds(self, width: int, where: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """low, high: (width,) float64. Raises BoxError where there are not as many as elements."""
        low, high = self._bounds()
        for bound in (low, high):
            if bound.ndim and bound.shape != (width,):
                raise BoxError(
                    f"a domain has {bound.size} bounds for {width} elements of a row",
                    where=where,
                    remedy="give one number, or one for each element of a row, flattened",
                )
        return np.broadcast_to(low, (width,)), np.broadcast_to(high, (width,))

    def _bounds(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        least = 0.0 if self.positive else -math.inf
        low = np.asarray(least if self.low is None else self.low, dtype=np.float64)
        high = np.asarray(math.inf if self.high is None else self.high, dtype=np.float64)
        return (np.ceil(low), np.floor(high)) if self.integer else (low, high)


def checked(domains: Mapping[int, Domain], where: str) -> dict[int, Domain]:
    """Domains by position. Raises BoxError where they are anything else."""
    if not isinstance(domains, Mapping) or not all(
        isinstance(position, int) and position >= 0 and isinstance(domain, Domain)
        for position, domain in domains.items()
    ):
        raise BoxError(
            f"domains={domains!r} does not say which input has which Domain",
            where=where,
            remedy="give a Domain for the position (0, 1, ...) of each input that has one: {0: Domain(low=0.0)}",
        )
    return dict(domains)
