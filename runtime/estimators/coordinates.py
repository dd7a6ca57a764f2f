"""The coordinates in which probes move: logarithms for positive inputs, bounds that no probe crosses."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewriter.runtime.domain import Domain
from rewriter.runtime.errors import RewriteError

from .arrays import Array

_HALF_A_UNIT = 0.5  # the least an integer input is moved by: less changes nothing
_RANGE_PER_MOVE = 2.0  # the farthest probe moves a bounded input by half its range: one of its two sides is inside
_FARTHEST_NORMAL = 5.0  # a normal number is beyond once in two million


@dataclass(frozen=True)
class Coordinates:
    """Of d values side by side; all arrays are (d,).

    low, high: bounds in the coordinates that probes move in; logarithmic: these are logarithms; integer
    """

    low: Array
    high: Array
    logarithmic: Array
    integer: Array

    @staticmethod
    def of(
        positions: Sequence[int], widths: Sequence[int], domains: Mapping[int, Domain], where: str, dtype: np.dtype[Any]
    ) -> "Coordinates | None":
        """None where no domain is declared for any of the inputs at `positions`."""
        if not domains or not any(position in domains for position in positions):
            return None
        parts = []
        for position, width in zip(positions, widths, strict=True):
            domain = domains.get(position, Domain())
            low, high = domain.bounds(width, where)
            if domain.positive:
                low, high = np.log(np.maximum(low, np.finfo(dtype).tiny)), np.log(high)
            parts.append((low, high, np.full(width, domain.positive), np.full(width, domain.integer)))
        low, high, logarithmic, integer = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Coordinates(low.astype(dtype), high.astype(dtype), logarithmic, integer)

    def enter(self, values: Array, where: str) -> Array:
        """The coordinates of values (n, d). Raises RewriteError where they lie outside the domain."""
        entered = values
        if self.logarithmic.any():
            positive = values[:, self.logarithmic]
            if (positive <= 0).any():
                raise RewriteError(
                    "an input declared positive is not",
                    where=where,
                    why=f"its smallest value is {positive.min():.3g}",
                    remedy="map it to positive numbers before the box (softplus, exp), or declare Domain(low=...)",
                )
            entered = values.copy()
            entered[:, self.logarithmic] = np.log(positive)
        rounding = _HALF_A_UNIT * self.integer
        if ((entered < self.low - rounding) | (entered > self.high + rounding)).any():
            below = (entered < self.low - rounding).any(0)
            element = int(np.argmax(below | (entered > self.high + rounding).any(0)))
            found = values[:, element]
            raise RewriteError(
                "an input lies outside its declared domain",
                where=where,
                why=f"element {element} of a row reaches {found.min():.6g} .. {found.max():.6g}",
                remedy="keep it inside before the box (sigmoid, clamp), or declare the domain that the box really has",
            )
        return entered

    def leave(self, points: Array) -> Array:
        """The values at points (n, k, d), none of them outside the domain."""
        values = np.clip(points, self.low, self.high)
        if self.logarithmic.any():
            values[..., self.logarithmic] = np.exp(values[..., self.logarithmic])
        return values

    def pull_back(self, gradient: Array, values: Array) -> Array:
        """From the gradient in these coordinates, (n, d), to that of the values: d log x = dx / x."""
        if not self.logarithmic.any():
            return gradient
        pulled: Array = gradient / np.where(self.logarithmic, values, values.dtype.type(1))
        return pulled

    def spread(self, spread: Array, step: float) -> Array:
        """The units (d,) to use with a step: at least half a unit for integers, within half a range for the others."""
        reach = (self.high - self.low) / (_RANGE_PER_MOVE * step * self._farthest("orthogonal"))
        within: Array = np.where(self.integer, np.maximum(spread, _HALF_A_UNIT / step), np.minimum(spread, reach))
        return within.astype(spread.dtype)

    def near(self, base: Array, moved: Array, kind: str) -> Array:
        """(n,) bool: rows that directions of this kind may lead out of bounds; moved: (d,) unit times step."""
        farthest = moved * moved.dtype.type(self._farthest(kind))
        near: Array = ((base - farthest < self.low) | (base + farthest > self.high)).any(1)
        return near

    def _farthest(self, kind: str) -> float:
        """Largest entry of a direction."""
        length = math.sqrt(len(self.low))
        return max(length, _FARTHEST_NORMAL) if kind == "gaussian" else length

    def mirror(self, base: Array, offsets: Array) -> tuple[Array, Array | None]:
        """Offsets (n, k, d) turned inward, element by element, where they lead out of bounds; and which were."""
        ends = base[:, None] + offsets
        outside = (ends < self.low) | (ends > self.high)
        return (np.where(outside, -offsets, offsets), outside) if outside.any() else (offsets, None)

    def centred(self, base: Array, offsets: Array) -> Array:
        """Centres (n, k, d) nearest to base (n, d) from which both +offset and -offset stay within bounds."""
        reach = np.abs(offsets)
        centres: Array = np.minimum(np.maximum(base[:, None], self.low + reach), self.high - reach)
        return centres
