"""What follows cuts of a chain, evaluated forward only on copies of rows that join at each cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import RewriteError
from .objective import Copied, Objective
from .row_weights import RowWeights, flat, unflat
from .segment import Segment
from .stacking import Layout

_ELEMENTS = 2**24  # of the widest value in one evaluation, unless the user says how many rows
_TOLERANCE = 1e3  # in units of rounding


@dataclass(frozen=True)
class Stage:
    """Code from one cut to the next, or from the last to the outputs; reads, writes: names of tensors."""

    segment: Segment
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Course:
    """What follows a chain's cuts.

    cuts: names of the values behind each; stages: one behind each; live: per cut, the names that copies which join
    there must have beside the values; outputs: names. places: by name, where among the region's inputs the clean
    values lie, of the cuts' values those before the cut. layouts: by name, None where a value has no rows. widest:
    elements per row of the widest value. layers: by number of a cut, the layer before it where its weights are
    perturbed in place of the values; names: of the cuts, for messages.
    """

    cuts: tuple[tuple[str, ...], ...]
    stages: tuple[Stage, ...]
    live: tuple[tuple[str, ...], ...]
    outputs: tuple[str, ...]
    places: Mapping[str, int]
    layouts: Mapping[str, Layout | None]
    widest: int
    layers: Mapping[int, RowWeights] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    def layout(self, name: str) -> Layout:
        found = self.layouts[name]
        assert found is not None
        return found


class Request(NamedTuple):
    """Rows, (n,), with values, (n, width), at a cut: of what is perturbed there."""

    cut: int
    source: Tensor
    value: Tensor


class NoisyTail:
    """One forward pass's tail: its clean values, the loss, and how many rows it has been evaluated on.

    inputs, parameters: the region's, kept by the forward. `values` are (rows, width), float32 or wider, one for each
    cut, of what is perturbed there: the tensors side by side, or the weights of the layer before them, the same in each
    row. Evaluations leave torch's random numbers alone.
    """

    def __init__(
        self,
        course: Course,
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
        objective: Objective,
        max_rows: int | None,
    ) -> None:
        self.course, self.objective = course, objective
        self.weights = {cut: layer.of(parameters) for cut, layer in course.layers.items()}
        self._inputs = {name: inputs[place] for name, place in course.places.items()}
        self.outputs = [self._inputs[name] for name in course.outputs]
        numbers = [sum(weight.numel() for weight in weights) for weights in self.weights.values()]
        self.max_rows = max_rows or max(1, _ELEMENTS // max(1, course.widest, *numbers))
        self.evaluated = self.calls = 0
        self.at = [[self._inputs[name] for name in names] for names in course.cuts]
        self.rows = course.layout(course.cuts[0][0]).rows(self.at[0][0])
        self.values = [self._side_by_side(cut) for cut in range(len(course.cuts))]
        self.clean = self._weighed(objective.rows(self.outputs, None), None)

    def _side_by_side(self, cut: int) -> Tensor:
        if cut in self.weights:
            return flat(self.weights[cut]).expand(self.rows, -1)
        tensors = self.at[cut]
        wide = torch.float64 if any(value.dtype is torch.float64 for value in tensors) else torch.float32
        split = [self.course.layout(n).split(v) for n, v in zip(self.course.cuts[cut], tensors, strict=True)]
        return torch.cat([each.reshape(self.rows, -1).to(wide) for each in split], 1)

    def weighed_against(self, cut: int) -> Tensor:
        """Samples, (n, width), with whose deviation noise there is compared."""
        return self.values[cut][0, :, None] if cut in self.weights else self.values[cut]

    @property
    def scale(self) -> Tensor:
        """What the estimates from `clean` and `losses` are still to be multiplied with."""
        weight = self.objective.weight
        assert weight is not None
        return weight.detach().abs().max() if weight.ndim else weight.detach()

    def _weighed(self, contributions: Tensor, source: Tensor | None) -> Tensor:
        """(n,): each row's contributions, weighed by the loss's cotangent where that is one for each of them."""
        weight = self.objective.weight
        if weight is not None and weight.ndim:
            largest = self.scale
            relative = (weight.detach() / torch.where(largest > 0, largest, 1)).to(contributions.dtype)
            contributions = contributions * (relative if source is None else relative[source])
        return contributions.flatten(1).sum(1) if contributions.ndim > 1 else contributions

    def losses(self, requests: Sequence[Request]) -> list[Tensor]:
        """For each request, (n,): what its rows would contribute to the loss with these values at that cut.

        Requests come in the order of their cuts, one at most for each.
        """
        most = max(1, self.max_rows // len(requests))
        found: list[list[Tensor]] = [[] for _ in requests]
        for start in range(0, max(len(request.source) for request in requests), most):
            part = {
                number: Request(r.cut, r.source[start : start + most], r.value[start : start + most])
                for number, r in enumerate(requests)
                if start < len(r.source)
            }
            sizes = [len(request.source) for request in part.values()]
            losses = self._evaluated(list(part.values())).split(sizes)  # type: ignore[no-untyped-call]
            for number, each in zip(part, losses, strict=True):
                found[number].append(each)
        return [each[0] if len(each) == 1 else torch.cat(each) for each in found]

    def _evaluated(self, requests: list[Request]) -> Tensor:
        generator = torch.get_rng_state()
        with torch.no_grad():
            given = [(request.source, self._arising(*request)) for request in requests]
            source, outputs = self._swept([request.cut for request in requests], given)
            found = self.objective.rows(outputs, Copied(source, self.rows, self.outputs))
        torch.set_rng_state(generator)  # a box may have drawn seeds
        self.evaluated, self.calls = self.evaluated + len(source), self.calls + 1
        return self._weighed(found, source)

    def _swept(self, cuts: Sequence[int], given: Sequence[tuple[Tensor, list[Tensor]]]) -> tuple[Tensor, list[Tensor]]:
        """Rows of all that joined, and their outputs: one way through the stages, copies joining at their cuts."""
        course, joining = self.course, dict(zip(cuts, given, strict=True))
        held: dict[str, Tensor] = {}
        source: Tensor | None = None
        for number in range(cuts[0], len(course.stages)):
            stage = course.stages[number]
            if number in joining:
                new, values = joining[number]
                fresh = dict(zip(course.cuts[number], values, strict=True))
                fresh |= {name: self._taken(name, new) for name in course.live[number]}
                held = fresh if source is None else {name: self._stacked(name, held, fresh) for name in fresh}
                source = new if source is None else torch.cat((source, new))
            assert source is not None
            read = [held[name] if name in held else self._taken(name, source) for name in stage.reads]
            held.update(zip(stage.writes, stage.segment.run(tuple(read)), strict=True))
        assert source is not None
        return source, [held[name] if name in held else self._taken(name, source) for name in course.outputs]

    def _taken(self, name: str, source: Tensor) -> Tensor:
        layout = self.course.layouts[name]
        return self._inputs[name] if layout is None else layout.take(self._inputs[name], source)

    def _stacked(self, name: str, held: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> Tensor:
        return torch.cat((held[name], fresh[name]), self.course.layout(name).dimension)

    def _arising(self, cut: int, source: Tensor, value: Tensor) -> list[Tensor]:
        """The tensors at a cut, for rows, (n,), with values, (n, width), of what is perturbed there."""
        if cut not in self.weights:
            return self._given(cut, value)
        layer = self.course.layers[cut]
        taken = [
            self._inputs[name] if layout is None else layout.take(self._inputs[name], source)
            for name, layout in zip(layer.reads, layer.layouts, strict=True)
        ]
        return layer.run(taken, unflat(value, self.weights[cut]))

    def _given(self, cut: int, value: Tensor) -> list[Tensor]:
        """Rows of values side by side, (n, width), as the tensors at a cut."""
        layouts = [self.course.layout(name) for name in self.course.cuts[cut]]
        shapes = [layout.split(like).shape[1:] for layout, like in zip(layouts, self.at[cut], strict=True)]
        parts = torch.split(value, [shape.numel() for shape in shapes], 1)
        return [
            layout.joined(part.reshape(len(value), *shape)).to(like.dtype)
            for layout, part, shape, like in zip(layouts, parts, shapes, self.at[cut], strict=True)
        ]

    def gradients(self, cut: int, rows: Tensor) -> list[Tensor]:
        """From a gradient of each row, (rows, width), those of the tensors at a cut, or of the layer's weights."""
        if cut in self.weights:
            return unflat(rows.sum(0), self.weights[cut])
        return self._given(cut, rows)

    def gradient(self, cut: int) -> list[Tensor | None]:
        """Of the clean loss in what is perturbed at a cut, by ordinary differentiation of the tail; None where none is.

        Raises what differentiating the tail raises.
        """
        every = torch.arange(self.rows, device=self.values[cut].device)
        with torch.enable_grad():
            if cut in self.weights:
                leaves = [self.values[cut].clone().requires_grad_()]
                values = self._arising(cut, every, leaves[0])
            else:
                leaves = [value.detach().requires_grad_() for value in self.at[cut]]
                values = [leaf.clone() for leaf in leaves]
            _, outputs = self._swept([cut], [(every, values)])
            loss = self._weighed(self.objective.rows(outputs, None), None).sum()
            if not loss.requires_grad:
                return [None] * len(self.weights.get(cut, leaves))
            found = list(torch.autograd.grad(loss, leaves, allow_unused=True))
        if cut in self.weights:
            found = [None] * len(self.weights[cut]) if found[0] is None else self.gradients(cut, found[0])
        return [None if each is None else each * self.scale.to(each.dtype) for each in found]

    def prove(self, cut: int, region: str, noise: Tensor, eps: float) -> None:
        """Raises RewriteError where rows have other losses once they are copies, or with other rows beside them.

        noise: (rows, width), of the size to be used; eps: relative rounding of what computes the losses.
        """
        limit = _TOLERANCE * eps * float(self.clean.double().nan_to_num().abs().max())
        order = torch.arange(self.rows, device=noise.device)
        value = self.values[cut]
        again = self.losses([Request(cut, order.flip(0), value.flip(0))])[0].flip(0)
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
        beside = self.losses([Request(cut, order, value + torch.where(moved[:, None], noise, 0))])[0]
        if not _alike(beside[~moved], self.clean[~moved], limit):
            raise RewriteError(
                "what follows a cut couples the rows of a batch",
                where=region,
                why="the losses of some rows change with the noise of others",
                remedy="cut behind what couples them, or give it the statistics of eval()",
            )


def _alike(found: Tensor, expected: Tensor, limit: float) -> bool:
    return torch.allclose(found.double(), expected.double(), rtol=0, atol=limit, equal_nan=True)
