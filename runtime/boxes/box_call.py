"""A box called with its arguments in another order, or with one tensor twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from rewriter.runtime.domain import Domain
from rewriter.runtime.estimators.arrays import Array
from rewriter.runtime.evaluator import Answer

from .protocol import Box

_Value = TypeVar("_Value", Tensor, Array)


class BoxCall:
    """Seen from a region, whose inputs are distinct tensors: `positions[i]` is the region input that the box takes as
    its i-th. A tensor the box takes twice is perturbed in both places at once, as its gradient demands."""

    def __init__(self, box: Box, positions: tuple[int, ...]) -> None:
        self.box, self.positions = box, positions
        self.label, self.repeats_shared, self.noisy = box.label, box.repeats_shared, box.noisy
        self.domains: Mapping[int, Domain] = {
            positions[i]: domain for i, domain in box.domains.items() if i < len(positions)
        }
        self.shared = frozenset(position for i, position in enumerate(positions) if i in box.shared)

    def complete(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        arguments = tuple(self._arguments(inputs))
        return (*inputs, *self.box.complete(arguments)[len(arguments) :])

    def dtypes(self, *inputs: Tensor) -> tuple[torch.dtype, ...]:
        distinct = len(set(self.positions))
        positions = (*self.positions, *range(distinct, len(inputs)))
        wanted = dict(zip(positions, self.box.dtypes(*self._arguments(inputs)), strict=True))
        return tuple(wanted[position] for position in range(len(inputs)))

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.box.evaluate(*self._arguments(inputs))

    def query(self, arrays: Sequence[Array], like: Sequence[Tensor]) -> Sequence[Array]:
        return self.box.query(self._arguments(arrays), self._arguments(like))

    def answer(self, *inputs: Tensor) -> Answer:
        return self.box.answer(*self._arguments(inputs))

    def _arguments(self, inputs: Sequence[_Value]) -> list[_Value]:
        """What the box takes; a seed that `complete` has added comes last in both orders."""
        return [inputs[position] for position in self.positions] + list(inputs[len(set(self.positions)) :])


def is_box_operator(target: Any) -> bool:
    """Whether a graph node's target is the operator that evaluates boxes."""
    return target is torch.ops.rewriter.evaluate_box.default
