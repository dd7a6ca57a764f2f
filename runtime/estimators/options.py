"""How to estimate, and what one backward settled on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rewriter.runtime.errors import RewriteError

from .allocation import ALLOCATIONS
from .arrays import Array
from .directions import KINDS


@dataclass(frozen=True)
class Options:
    """How to estimate; `BlackBoxRule` says what each field does. Raises RewriteError for a value outside its range."""

    probes: int = 1
    directions: str = "orthogonal"
    difference: str = "auto"
    step_size: float | str = "auto"
    clip: float | str | None = "auto"
    reconstruction: str = "least_squares"
    input_scale: float | Sequence[float] | None = None
    max_rows: int | None = None
    max_failed: float = 0.5
    allocation: str = "uniform"

    def __post_init__(self) -> None:
        _check_count("probes", self.probes)
        if self.max_rows is not None:
            _check_count("max_rows", self.max_rows)
        _check_choice("directions", self.directions, KINDS)
        _check_choice("difference", self.difference, ("auto", "forward", "central"))
        _check_choice("allocation", self.allocation, ALLOCATIONS)
        _check_choice("reconstruction", self.reconstruction, ("least_squares", "average"))
        if self.step_size != "auto":
            _check_number("step_size", self.step_size, math.inf)
        if self.clip not in ("auto", None):
            _check_number("clip", self.clip, 1.0)
        for scale in self.input_scale if isinstance(self.input_scale, Sequence) else (self.input_scale,):
            if scale is not None:
                _check_number("input_scale", scale, math.inf)
        if self.max_failed != 0:
            _check_number("max_failed", self.max_failed, 1.0)


@dataclass(frozen=True)
class Settings:
    """What one backward used and a second backward through the same forward must use again.

    spread: (d,) the unit of every dimension; step_size: in these units; clip_ratio: None where no row is clipped
    """

    spread: Array
    step_size: float
    clip_ratio: float | None


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        _refuse(name, value, "a whole number from 1")


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        _refuse(name, value, "one of " + ", ".join(allowed))


def _check_number(name: str, value: object, most: float) -> None:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or not 0 < value <= most:
        _refuse(name, value, "a positive number" + ("" if most == math.inf else f" up to {most:g}"))


def _refuse(name: str, value: object, expected: str) -> None:
    raise RewriteError(f"{name}={value!r} is not an option of the black-box rule", remedy=f"set {name} to {expected}")
