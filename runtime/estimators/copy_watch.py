"""Whether the copies of a backward said anything: failures, silence, rounding."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from rewriter.runtime.errors import RewriteError, RewriteWarning

from .copies import Found

_SILENT_LIMIT = 20  # consecutive backwards in which no copy's loss differed
_RESOLVED = 30.0  # roundings of the loss that the differences between copies should exceed
_COARSE = 1e-4  # relative rounding of low precision: of the tail then, not of the loss's sums, and one must do
_MOST = 0.5  # of the copies of a row, where any of them says something
_SHARE = 0.05  # of the newest backward in the running shares


def resolved(found: Found, rounding: float, margin: float = 1.0) -> bool:
    """Whether copies' losses differ by more than what computed them rounds (root mean squares, relative rounding)."""
    roundings = _RESOLVED if rounding < _COARSE else 1.0
    return found.spread > (margin * roundings * rounding) ** 2 * found.size


def told_apart(found: Found, rounding: float, margin: float = 1.0) -> bool:
    """Whether copies are resolved, and not most of them on the same step of a loss that is constant in between."""
    return resolved(found, rounding, margin) and found.changed >= _MOST * found.heard


def warn_where_lost(region: str, sigma: float, found: Sequence[Found], rounding: float) -> None:
    """Warns where no copy at any cut differs by much more than the rounding of single precision."""
    if any(each.changed for each in found) and not any(resolved(each, rounding) for each in found):
        warnings.warn(
            f"{region}: the losses of copies hardly differ by more than their rounding: noise of {sigma:.2g} is small; "
            'sigma="auto" or a larger one',
            RewriteWarning,
            2,
        )


class CopyWatch:
    """Running shares of copies whose loss differed and of those that failed; raises where an estimate is worthless."""

    def __init__(self) -> None:
        self.changed = 1.0
        self.failed = 0.0
        self._silent = 0

    def judge(self, region: str, found: Found, sigma: float, rounding: float, max_failed: float) -> None:
        """Raises RewriteError where too many copies failed, an estimate is not finite, or rounding hides the copies."""
        if found.failed > max_failed * found.total:
            raise RewriteError(
                f"{found.failed} of {found.total} noisy copies have no finite loss",
                where=region,
                why=f"noise of {sigma:.2g} leaves where the tail is defined, or the tail fails",
                remedy="a smaller sigma, or a larger max_failed",
            )
        if not torch.isfinite(found.gradient).all():
            raise RewriteError(
                "an estimate is not finite, though every loss is",
                where=region,
                why="the differences of losses overflow",
                remedy="scale the loss down",
            )
        if found.size and rounding > _COARSE and not resolved(found, rounding):
            raise RewriteError(
                "the losses of noisy copies differ by no more than their rounding",
                where=region,
                why=f"what follows the cut computes in low precision, and noise of {sigma:.2g} is lost in it",
                remedy='sigma="auto" or a larger one, or run that part in float32 (no autocast)',
            )

    def observe(self, region: str, found: Found, sigma: float, heard: bool) -> None:
        """After a forward's first backward: a gradient that is zero because nothing changed is told, then refused.

        heard: some copy changed the loss, here or at another cut of the chain: where only an early cut is silent, what
        is kept from there has faded, which is the gradient's own affair.
        """
        self.changed += _SHARE * (found.changed - self.changed)
        self.failed += _SHARE * (found.failed / found.total - self.failed)
        self._silent = 0 if heard else self._silent + 1
        if not self._silent:
            return
        why = f"the loss is constant over noise of {sigma:.2g}, so the gradient comes out zero"
        remedy = "check that the loss depends on this value; if it does, a larger sigma"
        if self._silent >= _SILENT_LIMIT:
            what = f"in {self._silent} consecutive backwards no noisy copy changed the loss"
            raise RewriteError(what, where=region, why=why, remedy=remedy)
        if self._silent == 1:
            warnings.warn(f"{region}: no noisy copy changed the loss: {why}; {remedy}", RewriteWarning, 2)

    def get_state(self) -> dict[str, Any]:
        """Numbers."""
        return vars(self).copy()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned."""
        vars(self).update(state)
