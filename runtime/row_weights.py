"""A layer evaluated with weights of its own for each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .segment import Segment
from .stacking import Layout


@dataclass(frozen=True)
class RowWeights:
    """A layer's code, vectorised over rows and weights alike.

    reads: names of the tensors it takes, with their layouts (None: the same for all rows); returns: the layouts of
    what it returns; names: of the weights that differ, qualified; places: of them among the region's parameters.
    """

    segment: Segment
    reads: tuple[str, ...]
    layouts: tuple[Layout | None, ...]
    returns: tuple[Layout, ...]
    names: tuple[str, ...]
    places: tuple[int, ...] = ()

    def of(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The weights among the region's parameters."""
        return [parameters[place] for place in self.places]

    def run(self, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """What it returns for n rows: inputs as read, of these rows; weights: (n, shape of each).

        Raises what vectorising the layer's operations raises.
        """
        known = self.segment.parameters()
        keys = [id(known[name]) for name in self.names]

        def one(own: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            both = zip(self.layouts, given, strict=True)
            placed = [value if at is None else value.movedim(0, at.dimension) for at, value in both]
            outputs = self.segment.run(tuple(placed), dict(zip(keys, own, strict=True)))
            return tuple([y.movedim(at.dimension, 0) for at, y in zip(self.returns, outputs, strict=True)])

        split = [x if at is None else at.split(x) for at, x in zip(self.layouts, inputs, strict=True)]
        each_row = tuple([None if at is None else 0 for at in self.layouts])
        found = torch.func.vmap(one, in_dims=(0, each_row))(tuple(weights), tuple(split))
        return [at.joined(rows) for at, rows in zip(self.returns, found, strict=True)]


def flat(weights: Sequence[Tensor]) -> Tensor:
    """(numbers,): weights side by side, float32 or wider."""
    wide = torch.float64 if any(weight.dtype is torch.float64 for weight in weights) else torch.float32
    return torch.cat([weight.detach().reshape(-1).to(wide) for weight in weights])


def unflat(numbers: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """From numbers, (..., numbers), to (..., shape of each), in their dtypes."""
    parts = numbers.split([weight.numel() for weight in like], -1)  # type: ignore[no-untyped-call]
    return [
        part.reshape(*numbers.shape[:-1], *weight.shape).to(weight.dtype)
        for part, weight in zip(parts, like, strict=True)
    ]
