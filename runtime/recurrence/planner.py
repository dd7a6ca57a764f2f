"""When a recurrence's backward is taken apart, and when it stays on the ordinary tape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from rewriter.runtime.errors import RewriteError
from rewriter.runtime.iterations import Iterations

from .iterated import Highway

Result = TypeVar("Result")
Reasons = Sequence[tuple[bool, str]]

# From this many steps on the costs before and after the loop are paid back.
FEWEST_STEPS = 24
# FLOP of one step's product with the state, and from there on how many iterations are faster than the exact loop.
_PAYS = ((3_000_000, 0), (700_000, 1), (200_000, 2), (0, 4))
_DTYPES = (torch.float32, torch.float64)


class Planner:
    """Says why the ordinary tape runs a sequence, and remembers it for `explain()`.

    where: the part of the model; always: refuse what cannot be taken apart instead of leaving it to the tape;
    iterations, shift: of Highway-BP, None for the exact backward.
    """

    def __init__(self, where: str, always: bool, iterations: Iterations | None = None, shift: float = 0.0) -> None:
        self.where, self.always, self.iterations, self.shift = where, always, iterations, shift
        self._reason: str | None = None
        self._steps, self._work, self._forward = 1, 0.0, 0

    def choose(
        self,
        sizes: Sequence[int],
        steps: int,
        dtype: torch.dtype,
        device: str,
        autocast: bool,
        others: Reasons,
        work: float = 0.0,
    ) -> str | None:
        """None where it is taken apart. others: (whether it holds, reason), beside those that all recurrences have.

        work: FLOP of one step's product with the state, which decides how many iterations of Highway-BP pay.
        Raises RewriteError under `always` where precision is mixed or below float32.
        """
        self._steps, self._work = steps, work
        if 0 in sizes:
            self._reason = "there is nothing in the sequence"
        elif self.always:
            self._refuse(dtype, autocast)
            self._reason = None
        else:
            reasons = (
                (device != "cpu", f"this was not timed on {device}, where torch has kernels of its own"),
                (autocast, "autocast is on"),
                (dtype not in _DTYPES, f"the sequence is {dtype}"),
                *others,
                (steps < FEWEST_STEPS, f"{steps} steps are too few to pay (from {FEWEST_STEPS} on)"),
            )
            self._reason = next((reason for holds, reason in reasons if holds), None)
        return self._reason

    def _refuse(self, dtype: torch.dtype, autocast: bool) -> None:
        if autocast or dtype not in _DTYPES:
            raise RewriteError(
                "a recurrence taken apart needs float32 or float64 throughout",
                where=self.where,
                why="autocast is on" if autocast else f"the sequence is {dtype}",
                remedy="leave `tape` at 'auto', which keeps the ordinary tape here, or run this part in float32",
            )

    def describe(self) -> dict[str, Any]:
        if self._reason is not None:
            return {"rule": f"exact, on the ordinary tape: {self._reason}", "deferred": False}
        if self.iterations is None:
            return {"rule": "exact, weight gradients after the loop over time", "deferred": True}
        slower = self._slower()
        found = self.iterations.describe()
        rule = f"Highway-BP through time, iterations: {found}" + (f", shift {self.shift}" if self.shift else "")
        if slower:
            rule = f"exact, weight gradients after the loop over time: {slower}"
        return {"rule": rule, "deferred": True, "iterations": found, "shift": self.shift}

    def _slower(self) -> str | None:
        """Why the exact loop over time runs instead of the iterations."""
        iterations, forward = self.iterations, self._forward
        if self.always or iterations is None or iterations.exact(forward):
            return None
        most = next(count for least, count in _PAYS if self._work >= least)
        if iterations.watches(forward):
            return None if most else "one iteration takes longer here"
        count = iterations.limit(forward, self._steps - 1)
        return f"{count} iterations take longer here, and only up to {most} do not" if count > most else None

    def highway(self, forward: int) -> Highway | None:
        """How to go through time backward for this forward pass; None for exactly. Needs `choose`."""
        self._forward = max(forward, 0)
        if self.iterations is None or self._slower():
            return None
        return Highway(self.iterations, forward, self.shift)

    def get_state(self) -> dict[str, Any]:
        """What "auto" has learnt."""
        return {} if self.iterations is None else self.iterations.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned; raises ValueError where there is nothing to learn."""
        if self.iterations is not None:
            self.iterations.set_state(state)
        elif state:
            raise ValueError(f"the deferred rule learns nothing, yet a state was given: {sorted(state)}")


def undisturbed(make: Callable[[], Result]) -> Result:
    """Without the caller's saved-tensor hooks (checkpoint, offloading), which tracing a vjp does not allow.

    They belong to the thread, so a fresh one is free of them.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return make()

    def run() -> Result:
        with torch.no_grad():
            return make()

    with ThreadPoolExecutor(1) as fresh:
        return fresh.submit(run).result()
