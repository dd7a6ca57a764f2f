"""A box called with its arguments in another order, or with one tensor twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .protocol import Box


class BoxCall:
    """Seen from a region, whose inputs are distinct tensors: `positions[i]` is the region input that the box takes as
    its i-th. A tensor the box takes twice is perturbed in both places at once, as its gradient demands."""

    def __init__(self, box: Box, positions: tuple[int, ...]) -> None:
        self.box, self.positions = box, positions
        self.label, self.repeats_shared = box.label, box.repeats_shared
        self.shared = frozenset(position for i, position in enumerate(positions) if i in box.shared)

    def dtypes(self, *inputs: Tensor) -> tuple[torch.dtype, ...]:
        wanted = dict(zip(self.positions, self.box.dtypes(*self._arguments(inputs)), strict=True))
        return tuple(wanted[position] for position in range(len(inputs)))

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.box.evaluate(*self._arguments(inputs))

    def finish(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self.box.finish(self._arguments(inputs), outputs)

    def _arguments(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [inputs[position] for position in self.positions]


def is_box_operator(target: Any) -> bool:
    """Whether a graph node's target is the operator that evaluates boxes."""
    return target is torch.ops.rewriter.evaluate_box.default
