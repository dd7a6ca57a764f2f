"""What follows a cut, evaluated forward only on copies of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import RewriteError
from .objective import Copied, Objective
from .segment import Segment
from .stacking import Layout

_ELEMENTS = 2**24  # of the widest value in one evaluation, unless the user says how many rows
_TOLERANCE = 1e3  # in units of rounding


@dataclass(frozen=True)
class Roles:
    """What a region's inputs are, by position.

    values: at the cut; sides: what else the tail reads; outputs: of the model, in order; layouts: of the values and
    then of the sides, None where a side has no rows; widest: elements per row of the widest value behind the cut.
    """

    values: tuple[int, ...]
    sides: tuple[int, ...]
    outputs: tuple[int, ...]
    layouts: tuple[Layout | None, ...]
    widest: int

    def value_layouts(self) -> tuple[Layout, ...]:
        return tuple([each for each in self.layouts[: len(self.values)] if each is not None])


class NoisyTail:
    """One forward pass's tail: its values and sides, the loss, and how many rows it has been evaluated on.

    inputs: the region's, kept by the forward; `value` is (rows, width), float32 or wider, all values at the cut side
    by side. Evaluations have no tape and leave torch's random numbers alone.
    """

    def __init__(
        self, segment: Segment, roles: Roles, inputs: Sequence[Tensor], objective: Objective, max_rows: int | None
    ) -> None:
        self.segment, self.roles, self.objective = segment, roles, objective
        self.values = [inputs[place] for place in roles.values]
        self.sides = [inputs[place] for place in roles.sides]
        self.outputs = [inputs[place] for place in roles.outputs]
        self.max_rows = max_rows or max(1, _ELEMENTS // max(1, roles.widest))
        self.evaluated = self.calls = 0
        split = [layout.split(v) for layout, v in zip(roles.value_layouts(), self.values, strict=True)]
        self._shapes = [each.shape[1:] for each in split]
        self.rows = len(split[0])
        wide = torch.float64 if any(v.dtype is torch.float64 for v in self.values) else torch.float32
        self.value = torch.cat([each.reshape(self.rows, -1).to(wide) for each in split], 1)
        found = objective.rows(self.outputs, None)
        self.clean = self.weighed(found)

    @property
    def scale(self) -> Tensor:
        """What the estimates from `clean` and `losses` are still to be multiplied with."""
        weight = self.objective.weight
        assert weight is not None
        return weight.detach().abs().max() if weight.ndim else weight.detach()

    def weighed(self, contributions: Tensor, source: Tensor | None = None) -> Tensor:
        """(n,): each row's contributions, weighed by the loss's cotangent where that is one for each of them."""
        weight = self.objective.weight
        if weight is not None and weight.ndim:
            largest = self.scale
            relative = (weight.detach() / torch.where(largest > 0, largest, 1)).to(contributions.dtype)
            contributions = contributions * (relative if source is None else relative[source])
        return contributions.flatten(1).sum(1) if contributions.ndim > 1 else contributions

    def losses(self, source: Tensor, value: Tensor) -> Tensor:
        """(n,): what the rows `source`, (n,), would contribute to the loss with these values, (n, width)."""
        found = [
            self._losses(source[start : start + self.max_rows], value[start : start + self.max_rows])
            for start in range(0, len(source), self.max_rows)
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _losses(self, source: Tensor, value: Tensor) -> Tensor:
        given = self.given(value)
        layouts = self.roles.layouts[len(self.values) :]
        sides = [s if layout is None else layout.take(s, source) for s, layout in zip(self.sides, layouts, strict=True)]
        generator = torch.get_rng_state()
        with torch.no_grad():
            outputs = self.segment.run((*given, *sides))
            found = self.objective.rows(outputs, Copied(source, self.rows, self.outputs))
        torch.set_rng_state(generator)  # a box may have drawn seeds
        self.evaluated, self.calls = self.evaluated + len(source), self.calls + 1
        return self.weighed(found, source)

    def given(self, value: Tensor) -> list[Tensor]:
        """Rows of values side by side, (n, width), as the tail takes them."""
        parts = torch.split(value, [shape.numel() for shape in self._shapes], 1)
        return [
            layout.joined(part.reshape(len(value), *shape)).to(like.dtype)
            for layout, part, shape, like in zip(
                self.roles.value_layouts(), parts, self._shapes, self.values, strict=True
            )
        ]

    def gradient(self) -> list[Tensor | None]:
        """Of the clean loss in each value at the cut, by ordinary differentiation of the tail; None where it has none.

        Raises what differentiating the tail raises.
        """
        with torch.enable_grad():
            values = [value.detach().requires_grad_() for value in self.values]
            outputs = self.segment.run((*(value.clone() for value in values), *self.sides))
            loss = self.weighed(self.objective.rows(outputs, None)).sum()
            if not loss.requires_grad:
                return [None] * len(values)
            found = torch.autograd.grad(loss, values, allow_unused=True)
        return [None if each is None else each * self.scale.to(each.dtype) for each in found]

    def prove(self, region: str, noise: Tensor, eps: float) -> None:
        """Raises RewriteError where rows have other losses once they are copies, or with other rows beside them.

        noise: (rows, width), of the size to be used; eps: relative rounding of what computes the losses.
        """
        limit = _TOLERANCE * eps * float(self.clean.double().nan_to_num().abs().max())
        order = torch.arange(self.rows, device=self.value.device)
        again = self.losses(order.flip(0), self.value.flip(0)).flip(0)
        if not _alike(again, self.clean, limit):
            raise RewriteError(
                "what follows a cut cannot be evaluated on copies of rows",
                where=region,
                why="evaluated again without noise, in another order, it gives rows other losses "
                f"(by up to {float((again - self.clean).abs().max()):.2g}): it couples rows, draws random numbers, "
                "or changes what it reads",
                remedy="put such a part into eval(), or before the cut",
            )
        moved = order % 2 == 0
        beside = self.losses(order, self.value + torch.where(moved[:, None], noise, 0))
        if not _alike(beside[~moved], self.clean[~moved], limit):
            raise RewriteError(
                "what follows a cut couples the rows of a batch",
                where=region,
                why="the losses of some rows change with the noise of others",
                remedy="cut behind what couples them, or give it the statistics of eval()",
            )


def _alike(found: Tensor, expected: Tensor, limit: float) -> bool:
    return torch.allclose(found.double(), expected.double(), rtol=0, atol=limit, equal_nan=True)
