"""What the cuts of one chain settle among themselves: copies by the noise of each, and who may enlarge the noise."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np

from .allocation import cut_counts
from .copies import Found
from .copy_watch import told_apart
from .cut_estimator import CutEstimator, Settings

log = logging.getLogger("rewriter.runtime")

_APART = 4.0  # times what copies should differ by: half the noise would still do, twice over


def share_signal(cuts: Sequence[CutEstimator]) -> None:
    """Lets each cut of a chain know the signal of all: where one has faded, more copies there would buy nothing."""
    if len(cuts) > 1 and all(cut.halves.measurements for cut in cuts):
        total = sum(max(cut.halves.signal, 0.0) for cut in cuts)
        for cut in cuts:
            cut.signal = total


def share_copies(cuts: Sequence[CutEstimator], costs: Sequence[float], even: bool) -> None:
    """Assigns the copies of a chain's cuts by the noise of each, at no more cost than those they want have in all.

    costs: of one copy at each cut. Until the noise of all is measured, each has what it wants.
    """
    wanted, units = np.array([cut.wanted for cut in cuts]), np.array(costs)
    known = all(cut.halves.measurements for cut in cuts)
    noises = np.array([cut.halves.noise for cut in cuts])
    counts = cut_counts(noises, units, float(wanted @ units), even=even) if known else wanted
    for cut, copies in zip(cuts, counts, strict=True):
        cut.assign(int(copies))


def resize(
    cuts: Sequence[CutEstimator],
    found: list[Found],
    settings: list[Settings],
    rounding: float,
    again: Callable[[int], Found],
) -> None:
    """More noise where, and while, copies are not told apart; less where they long have been, in later backwards.

    found, settings: of each cut, replaced in place; again(cut): settles with the noise of now and estimates. A cut that
    even the largest noise leaves silent while another is heard goes back to its own: what is kept from there has
    faded, and smoothing does not bring it back.
    """
    before = list(zip(found, settings, strict=True))
    for number, cut in enumerate(cuts):
        while not told_apart(found[number], rounding) and cut.size.grow():
            found[number] = again(number)
            log.info("%s: the losses of copies hardly differ; noise of %.2g", cut.label, cut.size.typical)
    heard = [told_apart(each, rounding) for each in found]
    for number, cut in enumerate(cuts):
        if any(heard) and not heard[number] and cut.size.grown:
            found[number], settings[number] = before[number]
            cut.size.shrink()
        cut.size.rest(told_apart(found[number], rounding, _APART))
