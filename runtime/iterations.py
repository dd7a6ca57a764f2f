"""How often the backward of a chain is iterated, and when that is enough."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

from .errors import RewriteError, RewriteWarning

Verdict = Literal["on", "stop", "exact"]
Count = int | Literal["exact"]

_EVERY = 100  # forwards between two measurements
_TOLERANCE = 0.1  # of what the iterations left out, as a share of the cotangents' length
_CEILING = 32  # iterations after which "auto" no longer hopes for convergence


class Iterations:
    """How many iterations of Highway-BP a region runs, and when to stop.

    wanted: a number; "auto", which measures on the first forward and every 100 after it, and keeps the count between;
    or a schedule, pairs (forward index, number or "exact") from index 0 on in rising order. where: the region's name.
    Raises RewriteError for anything else.

    A rule's backward asks `exact`, then `limit`, and where `watches` holds calls `watch` after every iteration.
    """

    def __init__(self, wanted: int | str | Sequence[tuple[int, int | str]], where: str) -> None:
        self.where = where
        self._auto = isinstance(wanted, str) and wanted == "auto"
        self._schedule = () if self._auto else _schedule(wanted, where)
        self._count = 0
        self._exact = False
        self._measured: int | None = None
        self._warned = False

    def exact(self, forward: int) -> bool:
        """Whether the exact backward is to run instead: it was asked for, or "auto" saw that iterations do not pay."""
        if self._auto:
            return self._exact and not self.watches(forward)
        return self._at(forward) == "exact"

    def limit(self, forward: int, most: int) -> int:
        """Iterations to run at most. most: the number after which nothing changes any more."""
        if self._auto:
            return min(most, _CEILING if self.watches(forward) else self._count)
        count = self._at(forward)
        return most if count == "exact" else min(most, count)

    def watches(self, forward: int) -> bool:
        """Whether "auto" measures on this forward."""
        if not self._auto:
            return False
        measured = self._measured
        return measured is None or measured == forward or abs(forward - measured) >= _EVERY

    def watch(self, forward: int, most: int, lengths: Sequence[float], total: float) -> Verdict:
        """Whether to go on after an iteration, stop with what there is, or run the exact backward instead.

        lengths: |d^0|, |d^1|, ... |d^k| of the terms so far, each the norm over all blocks; total: |w^k| of their sum.
        Stops when the estimate of the terms to come, |d^k| q / (1 - q) with q = |d^k| / |d^(k-1)| * k / (k + 1) (each
        term then is at most q times the one before), falls below a tenth of `total`. Growing terms, or too many, give
        "exact" and warn once. A region of several chains calls this for each; the largest count of a forward is kept.
        """
        done = len(lengths) - 1
        if not all(map(math.isfinite, (*lengths, total))) or total == 0.0:
            return "stop"  # nothing can be learnt from this forward
        if tail(lengths) < _TOLERANCE * total:
            return self._learn(forward, done, exact=False)
        if done >= most:  # as it stands this is exact, and the exact backward gives it for less
            return self._learn(forward, done, exact=True)
        if _grows(lengths) or done >= _CEILING:
            self._learn(forward, done, exact=True)
            self._warn(lengths)
            return "exact"
        return "on"

    def _learn(self, forward: int, count: int, exact: bool) -> Verdict:
        again = self._measured == forward
        self._count = max(self._count, count) if again else count
        self._exact = exact or (self._exact and again)
        self._measured = forward
        return "stop"

    def _warn(self, lengths: Sequence[float]) -> None:
        if self._warned:
            return
        self._warned = True
        terms = ", ".join(f"{length:.2g}" for length in lengths[-3:])
        warnings.warn(
            f"the iterations of {self.where} do not converge (the last terms have lengths {terms}): its gradient is "
            "computed exactly instead; a `shift` between 0 and 1 helps where blocks cancel part of their input, and "
            "larger segments need fewer iterations",
            RewriteWarning,
            stacklevel=2,
        )

    def _at(self, forward: int) -> Count:
        return [count for start, count in self._schedule if start <= max(forward, 0)][-1]

    def describe(self) -> str:
        """For `explain()`."""
        if not self._auto:
            steps = [f"{count} from forward {start} on" for start, count in self._schedule[1:]]
            return ", ".join([str(self._schedule[0][1]), *steps])
        if self._measured is None:
            return "auto, not measured yet"
        found = "exact, as the iterations do not pay" if self._exact else str(self._count)
        return f"auto: {found} (measured at forward {self._measured})"

    def get_state(self) -> dict[str, Any]:
        """What "auto" has learnt, as plain numbers; empty where there is nothing to learn."""
        if self._measured is None:
            return {}
        return {"count": self._count, "exact": self._exact, "measured": self._measured}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned."""
        if state and self._auto:
            self._count, self._exact = int(state["count"]), bool(state["exact"])
            self._measured = int(state["measured"])


def tail(lengths: Sequence[float]) -> float:
    """Estimate of the length of all terms to come, infinite where the last two do not give one."""
    done = len(lengths) - 1
    if lengths[-1] == 0.0:
        return 0.0
    if done == 0 or lengths[-2] == 0.0:
        return math.inf
    share = lengths[-1] / lengths[-2] * done / (done + 1)
    return lengths[-1] * share / (1 - share) if share < 1 else math.inf


def _grows(lengths: Sequence[float]) -> bool:
    return len(lengths) > 2 and lengths[-1] > lengths[-2] > lengths[-3]


def _schedule(wanted: object, where: str) -> tuple[tuple[int, Count], ...]:
    if isinstance(wanted, int) and _is_number(wanted):
        return ((0, wanted),)
    pairs = list(wanted) if isinstance(wanted, tuple | list) else []
    if all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        starts = [pair[0] for pair in pairs]
        whole = all(_is_number(start) for start in starts) and all(_is_count(pair[1]) for pair in pairs)
        if whole and starts[:1] == [0] and all(a < b for a, b in itertools.pairwise(starts)):
            return tuple([(start, count) for start, count in pairs])
    raise RewriteError(
        f"iterations={wanted!r} is not known",
        where=where,
        remedy="a whole number from 0 on, 'auto', or a schedule such as ((0, 1), (1000, 3), (5000, 'exact')): forwards "
        "in rising order from 0 on",
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_count(value: object) -> bool:
    return _is_number(value) or value == "exact"
