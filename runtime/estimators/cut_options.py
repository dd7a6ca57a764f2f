"""How to estimate the gradient at a cut."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rewriter.runtime.errors import RewriteError

from .baselines import BASELINES, check_baseline
from .control import CONTROLS
from .noise import KINDS

ALLOCATIONS = ("uniform", "doubt", "norm")


@dataclass(frozen=True)
class CutOptions:
    """How to estimate; `UlrCutRule` says what each field does. Raises RewriteError for a value outside its range."""

    copies: int | str = "auto"
    sigma: float | Sequence[float] | str = "auto"
    directions: str = "orthogonal"
    baseline: str = "auto"
    antithetic: bool = False
    allocation: str = "uniform"
    max_rows: int | None = None
    max_failed: float = 0.5
    control: str = "none"

    def __post_init__(self) -> None:
        if self.copies != "auto" and not _is_count(self.copies, 2):
            raise _refused("copies", self.copies, 'a whole number from 2, or "auto"')
        if self.antithetic and isinstance(self.copies, int) and self.copies % 2:
            raise _refused("copies", self.copies, "an even number, as antithetic copies come in pairs")
        if self.max_rows is not None and not _is_count(self.max_rows, 1):
            raise _refused("max_rows", self.max_rows, "a whole number from 1")
        if self.sigma != "auto":
            numbers = self.sigma if isinstance(self.sigma, Sequence) else [self.sigma]
            if isinstance(self.sigma, str) or not all(map(_is_positive, numbers)):
                raise _refused("sigma", self.sigma, 'a positive number, one for each element of a row, or "auto"')
        for name, known in (
            ("directions", KINDS),
            ("baseline", ("auto", *BASELINES)),
            ("allocation", ALLOCATIONS),
            ("control", CONTROLS),
            ("antithetic", (False, True)),
        ):
            if getattr(self, name) not in known:
                raise _refused(name, getattr(self, name), f"one of {', '.join(map(str, known))}")
        if not 0 <= self.max_failed <= 1:
            raise _refused("max_failed", self.max_failed, "a number from 0 to 1")
        check_baseline(self.baseline, self.directions)
        if self.directions == "sobol" and self.allocation != "uniform":
            raise _refused("allocation", self.allocation, '"uniform", as parts of a Sobol set are no Sobol sets')

    def baseline_for(self, copies: int) -> str:
        """What "auto" means: the mean of the other copies where there are some, as it suits discontinuous losses too.

        With few copies the clean loss, which is known anyway, errs less.
        """
        if self.baseline != "auto":
            return self.baseline
        return "clean" if copies < 8 or self.directions == "sobol" else "leave-one-out"


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _refused(name: str, value: object, expected: str) -> RewriteError:
    return RewriteError(f"{name}={value!r} is not an option of UlrCut", remedy=f"set {name} to {expected}")
