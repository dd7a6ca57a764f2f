"""Whether a window, and a surrogate that looks one sub-chain ahead, reach anything that the loss reads."""

from __future__ import annotations

from torch import fx

from rewriter.runtime.errors import RewriteError
from rewriter.runtime.noisy_tail import Course

from .course import Outline


def check_reach(window: int | None, control: str, chain: bool) -> None:
    """Raises RewriteError for options that make sense in chains only, and for a window that is no number."""
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise RewriteError(
            f"window={window!r} is no number of sub-chains", where="UlrCut", remedy="a whole number from 1, or None"
        )
    if window is not None and not chain:
        raise RewriteError(
            f"window={window} counts sub-chains, and there are none", where="UlrCut", remedy="set every="
        )
    if control == "truncated" and not chain:
        raise RewriteError(
            'control="truncated" needs a chain',
            where="UlrCut",
            why="at a single cut it would differentiate everything behind it, which is what the ordinary tape does",
            remedy='set every=, or control="distilled"',
        )


def check_course(course: Course, control: str, kind: str, where: str) -> None:
    """Raises RewriteError where gradients at some cut would be zero because nothing within reach is part of the loss.

    kind: of the tail, as `TailFacts` says.
    """
    if control == "truncated" and kind in ("box", "steps"):
        found = "a box" if kind == "box" else "operations without a derivative on every way"
        raise RewriteError(
            'control="truncated" differentiates what follows a cut',
            where=where,
            why=f"that holds {found}",
            remedy='control="distilled" or "last", which need no derivative of it',
        )
    silent = [] if course.window is None else _unreached(course, course.window)
    if silent:
        raise RewriteError(
            f"window={course.window} ends before anything that the loss reads",
            where=where,
            why=f"of {len(course.cuts)} cuts, number {silent[0] + 1} would get the gradient zero",
            remedy="a longer window, or none: losses at the end are reached by whole chains only",
        )
    if control == "truncated" and len(_unreached(course, 1)) == len(course.cuts) - 1:
        raise RewriteError(
            'control="truncated" looks one sub-chain ahead',
            where=where,
            why="the loss reads nothing of any sub-chain but the last",
            remedy='control="distilled" or "last", or a loss at every step',
        )


def within(outline: Outline, cut: int, window: int) -> list[fx.Node]:
    """Nodes that copies run through which join at a cut: so many stages, and the last."""
    first = outline.nodes[cut : cut + window]
    last = outline.nodes[-1:] if cut + window < len(outline.nodes) else ()
    return [node for nodes in (*first, *last) for node in nodes]


def _unreached(course: Course, window: int) -> list[int]:
    """Cuts of which copies that leave after so many sub-chains have changed nothing that the loss reads."""
    leaving = range(max(0, len(course.stages) - window))
    return [cut for cut in leaving if not course.kept(cut, window)]
