"""How to estimate the gradient at a cut."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rewriter.runtime.errors import RewriteError

from .baselines import BASELINES, check_baseline
from .control import CONTROLS
from .learned_allocation import LEARNED
from .noise import KINDS

ALLOCATIONS = ("uniform", "doubt", "norm", *LEARNED)
ACROSS = ("uniform", "neyman")


@dataclass(frozen=True)
class CutOptions:
    """How to estimate, as the entry `UlrCut` says. Raises RewriteError for a value outside its range."""

    copies: int | str = "auto"
    sigma: float | Sequence[float] | str = "auto"
    directions: str = "orthogonal"
    baseline: str = "auto"
    antithetic: bool = False
    allocation: str = "uniform"
    across: str = "uniform"
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
        numbers = self.sigma if isinstance(self.sigma, list | tuple) else [self.sigma]
        named = isinstance(self.sigma, str) and self.sigma in ("auto", "learned")
        if not named and not (numbers and all(map(_is_positive, numbers))):
            expected = 'a positive number, one for each element of a row, "auto" or "learned"'
            raise _refused("sigma", self.sigma, expected)
        for name, known in (
            ("directions", KINDS),
            ("baseline", ("auto", *BASELINES)),
            ("allocation", ALLOCATIONS),
            ("across", ACROSS),
            ("control", CONTROLS),
            ("antithetic", (False, True)),
        ):
            if getattr(self, name) not in known:
                raise _refused(name, getattr(self, name), f"one of {', '.join(map(str, known))}")
        if not 0 <= self.max_failed <= 1:
            raise _refused("max_failed", self.max_failed, "a number from 0 to 1")
        check_baseline(self.baseline, self.directions)
        if self.directions == "sobol" and self.copies == "auto":
            raise _refused(
                "copies", self.copies, "a number, at least 16 for each element of a row: Sobol sets want many"
            )
        uneven = [name for name in ("allocation", "across") if getattr(self, name) != "uniform"]
        if self.directions == "sobol" and uneven:
            expected = '"uniform", as parts of a Sobol set are no Sobol sets'
            raise _refused(uneven[0], getattr(self, uneven[0]), expected)

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
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _refused(name: str, value: object, expected: str) -> RewriteError:
    return RewriteError(f"{name}={value!r} is not an option of UlrCut", remedy=f"set {name} to {expected}")
