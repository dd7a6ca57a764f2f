"""The loss of one forward pass, for rules that evaluate it ahead of the model's own end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, autograd


class Objective:
    """Called with the model's flat outputs it gives the loss of this forward pass, as the user's loss would.

    tensors: the flat tensor arguments of the forward pass, by position of the graph's placeholders. weight: the
    cotangent of the loss, known in backward before any region is reached; None where the loss was never differentiated.
    """

    def __init__(self, function: Callable[[Sequence[Tensor]], Any], tensors: Sequence[Tensor]) -> None:
        self._function, self.tensors = function, tuple(tensors)
        self.weight: Tensor | None = None

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        loss = self._function(outputs)
        assert isinstance(loss, Tensor)
        return loss

    def weighed(self, loss: Tensor) -> Tensor:
        """The same number; its backward notes the loss's cotangent first (a gradient scaler's factor, 1 / steps)."""
        result: Tensor = _Weighed.apply(loss, self)  # type: ignore[no-untyped-call]
        return result


class _Weighed(autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, objective: Objective) -> Tensor:
        ctx.objective = objective
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, None]:
        (cotangent,) = cotangents
        ctx.objective.weight = cotangent
        return cotangent, None
