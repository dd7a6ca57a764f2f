"""The loss of one forward pass, for rules that evaluate it ahead of the model's own end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, autograd

from .errors import RewriteError


class Copied(NamedTuple):
    """Outputs that belong to other rows than their own.

    source: (n,), for each row of the outputs the row of the batch it is a copy of; rows: of the batch; clean: the
    outputs of the batch itself.
    """

    source: Tensor
    rows: int
    clean: Any


class Objective:
    """Called with the model's flat outputs it gives the loss of this forward pass, as the user's loss would.

    tensors: the flat tensor arguments of the forward pass, by position of the graph's placeholders. weight: the
    cotangent of the loss, known in backward before any region is reached; None where the loss was never differentiated.
    rows(outputs, copied): the part each row of the outputs has in the loss, (n,) or (n, T), where the loss has rows.
    doubts(outputs): length of the gradient of each row's part in its outputs, (n,); None where there is none.
    read: what the loss reads beside the outputs. anchors: scalars of regions whose outputs carry no gradient: the
    loss's backward reaches the regions through them.
    """

    def __init__(
        self,
        function: Callable[[Sequence[Tensor]], Any],
        tensors: Sequence[Tensor],
        rows: Callable[[Sequence[Tensor], Copied | None], Tensor],
        doubts: Callable[[Sequence[Tensor]], Tensor | None] = lambda _: None,
        read: Sequence[Tensor] = (),
    ) -> None:
        self._function, self.tensors, self.rows, self.doubts = function, tuple(tensors), rows, doubts
        self.read = tuple(read)
        self.weight: Tensor | None = None
        self.anchors: list[Tensor] = []

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        loss = self._function(outputs)
        assert isinstance(loss, Tensor)
        return loss

    def weighed(self, loss: Any) -> Tensor:
        """The same number; its backward notes the loss's cotangent first (a gradient scaler's factor, 1 / steps).

        Raises RewriteError where the loss is no tensor.
        """
        if not isinstance(loss, Tensor):
            raise RewriteError(
                f"the loss returns a {type(loss).__name__}, not a tensor",
                where="loss",
                why="an entry of the plan evaluates it, and needs the number itself",
                remedy="return the tensor that backward is called on",
            )
        anchors, self.anchors = self.anchors, []
        result: Tensor = _Weighed.apply(loss, self, *anchors)  # type: ignore[no-untyped-call]
        return result


class _Weighed(autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, objective: Objective, *anchors: Tensor) -> Tensor:
        ctx.objective, ctx.anchors = objective, [anchor.shape for anchor in anchors]
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        (cotangent,) = cotangents
        ctx.objective.weight = cotangent
        nothing = [None if cotangent is None else cotangent.new_zeros(shape) for shape in ctx.anchors]
        return cotangent, None, *nothing
