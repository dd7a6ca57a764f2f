"""The coordinates in which probes move: logarithms for positive inputs, bounds that no probe crosses."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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

    def enter(self, values: Array, rounding: float, where: str) -> tuple["Coordinates", Array]:
        """The coordinates of values (n, d), with bounds that hold them. Raises RewriteError outside the domain.

        rounding: of the values, relative. A float32 clamped to .1 may be 1e-9 beyond .1: the bound is then where it is.
        """
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
        if not ((entered < self.low) | (entered > self.high)).any():
            return self, entered
        self._refuse_outside(entered, values, rounding, where)
        low, high = np.minimum(self.low, entered.min(0)), np.maximum(self.high, entered.max(0))
        low, high = np.where(self.integer, self.low, low), np.where(self.integer, self.high, high)
        return replace(self, low=low, high=high), entered

    def _refuse_outside(self, entered: Array, values: Array, rounding: float, where: str) -> None:
        """Raises RewriteError where more than rounding, to whole numbers or of the dtype, has led out of bounds."""
        slack = [rounding * (np.abs(bound) + self.logarithmic) for bound in (self.low, self.high)]
        below, above = (np.where(self.integer, _HALF_A_UNIT, each) for each in slack)
        outside = ((entered < self.low - below) | (entered > self.high + above)).any(0)
        if outside.any():
            found = values[:, int(np.argmax(outside))]
            raise RewriteError(
                "an input lies outside its declared domain",
                where=where,
                why=f"element {int(np.argmax(outside))} of a row reaches {found.min():.6g} .. {found.max():.6g}",
                remedy="keep it inside before the box (sigmoid, clamp), or declare the domain that the box really has",
            )

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

    @property
    def mixed(self) -> bool:
        """Whether whole numbers lie beside others: what a small step of the others changes drowns in their jumps."""
        return bool(self.integer.any() and not self.integer.all())

    def spread(self, spread: Array, step: float) -> Array:
        """The units (d,) to use with a step: at least half a unit for integers, within half a range for the others.

        Beside others, where probes follow coordinates, integers move by at least one, which rounding keeps.
        """
        least = 1 / math.sqrt(len(self.low)) if self.mixed else _HALF_A_UNIT
        reach = (self.high - self.low) / (_RANGE_PER_MOVE * step * self._farthest("orthogonal"))
        within: Array = np.where(self.integer, np.maximum(spread, least / step), np.minimum(spread, reach))
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
