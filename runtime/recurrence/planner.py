"""When a recurrence's backward is taken apart, and when it stays on the ordinary tape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from rewriter.runtime.errors import RewriteError

Result = TypeVar("Result")
Reasons = Sequence[tuple[bool, str]]

# From this many steps on the costs before and after the loop are paid back.
FEWEST_STEPS = 24
_DTYPES = (torch.float32, torch.float64)


class Planner:
    """Says why the ordinary tape runs a sequence, and remembers it for `explain()`.

    where: the part of the model; always: refuse what cannot be taken apart instead of leaving it to the tape.
    """

    def __init__(self, where: str, always: bool) -> None:
        self.where, self.always = where, always
        self._reason: str | None = None

    def choose(
        self, sizes: Sequence[int], steps: int, dtype: torch.dtype, device: str, autocast: bool, others: Reasons
    ) -> str | None:
        """None where it is taken apart. others: (whether it holds, reason), beside those that all recurrences have.

        Raises RewriteError under `always` where precision is mixed or below float32.
        """
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
                "deferred weight gradients need float32 or float64 throughout",
                where=self.where,
                why="autocast is on" if autocast else f"the sequence is {dtype}",
                remedy="leave `tape` at 'auto', which keeps the ordinary tape here, or run this part in float32",
            )

    def describe(self) -> dict[str, Any]:
        if self._reason is not None:
            return {"rule": f"exact, on the ordinary tape: {self._reason}", "deferred": False}
        return {"rule": "exact, weight gradients after the loop over time", "deferred": True}


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
