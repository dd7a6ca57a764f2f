"""What follows cuts of a chain, evaluated forward only on copies of rows that join at each cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import RewriteError
from .objective import Copied, Objective
from .row_weights import RowWeights, flat, unflat
from .segment import Segment
from .stacking import Layout

_ELEMENTS = 2**24  # of the widest value in one evaluation, unless the user says how many rows


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
    perturbed in place of the values; names: of the cuts, for messages. window: stages that copies run through, None for
    all: what later ones make is then that of the clean pass.
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
    window: int | None = None

    def length(self, cut: int, window: int | None) -> int:
        """Stages that copies at a cut run through: those within the window, and the last."""
        following = len(self.stages) - cut
        return following if window is None or window >= following else window + 1

    def kept(self, cut: int, window: int) -> frozenset[str]:
        """What the last stage reads, and the outputs, of what copies make that leave after so many stages."""
        end = cut + window
        made = {*self.cuts[cut], *(name for stage in self.stages[cut:end] for name in stage.writes)}
        return frozenset(made & {*self.stages[-1].reads, *self.outputs} - {*self.cuts[end]})

    def layout(self, name: str) -> Layout:
        found = self.layouts[name]
        assert found is not None
        return found


class Request(NamedTuple):
    """Rows, (n,), with values, (n, width), at a cut: of what is perturbed there."""

    cut: int
    source: Tensor
    value: Tensor


class _Part(NamedTuple):
    """Copies on their way through the stages: source (n,), the rows that they are copies of, and what they hold."""

    source: Tensor
    held: dict[str, Tensor]


class NoisyTail:
    """One forward pass's tail: its clean values, the loss, and how many rows it has been evaluated on.

    inputs, parameters: the region's, kept by the forward. `values` are (rows, width), float32 or wider, one for each
    cut, of what is perturbed there: the tensors side by side, or the weights of the layer before them, the same in each
    row. Evaluations leave torch's random numbers alone. watch(cut, moved, changed) is told of all copies how far their
    values moved, (n, width), and how the flat outputs changed, (n, outputs).
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
        self.evaluated = self.staged = self.calls = 0
        self.at = [[self._inputs[name] for name in names] for names in course.cuts]
        self.rows = course.layout(course.cuts[0][0]).rows(self.at[0][0])
        self.values = [
            flat(self.weights[cut]).expand(self.rows, -1) if cut in self.weights else self.side_by_side(cut, tensors)
            for cut, tensors in enumerate(self.at)
        ]
        self.clean = self.weighed(objective.rows(self.outputs, None), None)
        self.watch: Callable[[int, Tensor, Tensor], None] | None = None

    def side_by_side(self, cut: int, tensors: Sequence[Tensor]) -> Tensor:
        """(rows, width), float32 or wider, from tensors that lie as those at a cut."""
        wide = torch.float64 if any(value.dtype is torch.float64 for value in tensors) else torch.float32
        split = [self.course.layout(n).split(v) for n, v in zip(self.course.cuts[cut], tensors, strict=True)]
        return torch.cat([each.flatten(1).to(wide) for each in split], 1)

    def shapes(self, cut: int) -> list[tuple[int, ...]]:
        """(multiplicity, the other dimensions) of a row in each tensor at a cut."""
        layouts = [self.course.layout(name) for name in self.course.cuts[cut]]
        return [tuple(each.split(value).shape[1:]) for each, value in zip(layouts, self.at[cut], strict=True)]

    def weighed_against(self, cut: int) -> Tensor:
        """Samples, (n, width), with whose deviation noise there is compared."""
        return self.values[cut][0, :, None] if cut in self.weights else self.values[cut]

    def parts(self, cut: int) -> list[int]:
        """Widths of what `weighed_against` has side by side."""
        return [1] if cut in self.weights else [math.prod(shape) for shape in self.shapes(cut)]

    @property
    def scale(self) -> Tensor:
        """What the estimates from `clean` and `losses` are still to be multiplied with."""
        weight = self.objective.weight
        assert weight is not None
        return weight.detach().abs().max() if weight.ndim else weight.detach()

    def weighed(self, contributions: Tensor, source: Tensor | None) -> Tensor:
        """(n,): each row's contributions, weighed by the loss's cotangent where that is one for each of them."""
        weight = self.objective.weight
        if weight is not None and weight.ndim:
            largest = self.scale
            relative = (weight.detach() / torch.where(largest > 0, largest, 1)).to(contributions.dtype)
            contributions = contributions * (relative if source is None else relative[source])
        return contributions.flatten(1).sum(1) if contributions.ndim > 1 else contributions

    @cached_property
    def doubts(self) -> Tensor:
        """(rows,): length of the gradient of what each row contributes in the model's outputs.

        Raises RewriteError where the loss has none there.
        """
        found, weight = self.objective.doubts(self.outputs), self.objective.weight
        if found is None:
            raise RewriteError(
                'allocation="doubt" found no gradient of the loss in the model\'s outputs',
                why="the loss is not differentiable there, so it does not say which rows matter",
                remedy='allocation="norm", which asks a pilot',
            )
        if weight is None or not weight.ndim:
            return found
        weights: Tensor = weight.detach().to(found.dtype).reshape(len(found), -1).norm(dim=1)
        return found * weights

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
            source, outputs = self.swept([request.cut for request in requests], given, self.course.window)
            found = self.objective.rows(outputs, Copied(source, self.rows, self.outputs))
        torch.set_rng_state(generator)  # a box may have drawn seeds
        if self.watch is not None:
            changes = torch.split(
                self.flat(outputs) - self.flat(self.outputs)[source], [len(request.source) for request in requests]
            )
            for request, changed in zip(requests, changes, strict=True):
                self.watch(request.cut, request.value - self.values[request.cut][request.source], changed)
        self.evaluated, self.calls = self.evaluated + len(source), self.calls + 1
        return self.weighed(found, source)

    def swept(
        self, cuts: Sequence[int], given: Sequence[tuple[Tensor, list[Tensor]]], window: int | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Rows of all that joined, and their outputs: one way through the stages, copies joining at their cuts.

        They leave after `window` stages and come back to the last, with the clean state and what they made on the way.
        """
        course, joining, last = self.course, dict(zip(cuts, given, strict=True)), len(self.course.stages) - 1
        inside, left = _Part(torch.arange(0), {}), list[_Part]()
        ends = [(cut + window, cut, len(source)) for cut, (source, _) in joining.items() if window]
        for number in range(cuts[0], len(course.stages)):
            names = (*course.cuts[number], *course.live[number])
            for _, cut, rows in [end for end in ends if end[0] == number]:
                leaving, inside = self._parted(inside, names, rows)
                kept = course.kept(cut, number - cut)
                left.append(_Part(leaving.source, {name: leaving.held[name].clone() for name in kept}))
            parts = [self._completed(part, names) for part in left] if number == last else []
            parts += [inside] if len(inside.source) else []
            if number in joining:
                new, values = joining[number]
                parts.append(self._completed(_Part(new, dict(zip(course.cuts[number], values, strict=True))), names))
            if not parts:
                continue
            inside = parts[0] if len(parts) == 1 else self._stacked(parts, names)
            source, held = inside
            read = [held[name] if name in held else self._taken(name, source) for name in course.stages[number].reads]
            held.update(zip(course.stages[number].writes, course.stages[number].segment.run(tuple(read)), strict=True))
            self.staged += len(source)
        source, held = inside
        return source, [held[name] if name in held else self._taken(name, source) for name in course.outputs]

    def flat(self, outputs: Sequence[Tensor]) -> Tensor:
        """(rows, outputs): the floating outputs that have rows, side by side."""
        laid = [(self.course.layouts[name], value) for name, value in zip(self.course.outputs, outputs, strict=True)]
        split = [layout.split(value) for layout, value in laid if layout is not None and value.is_floating_point()]
        return torch.cat([each.reshape(len(each), -1).to(self.values[0].dtype) for each in split], 1)

    def _completed(self, part: _Part, names: Sequence[str]) -> _Part:
        """With the clean values of what it does not hold."""
        held = {name: part.held[name] if name in part.held else self._taken(name, part.source) for name in names}
        return _Part(part.source, held)

    def _parted(self, part: _Part, names: Sequence[str], rows: int) -> tuple[_Part, _Part]:
        pairs = {name: self.course.layout(name).parted(part.held[name], rows) for name in names}
        first, rest = ({name: pair[side] for name, pair in pairs.items()} for side in (0, 1))
        return _Part(part.source[:rows], first), _Part(part.source[rows:], rest)

    def _stacked(self, parts: Sequence[_Part], names: Sequence[str]) -> _Part:
        dimensions = {name: self.course.layout(name).dimension for name in names}
        held = {name: torch.cat([part.held[name] for part in parts], at) for name, at in dimensions.items()}
        return _Part(torch.cat([part.source for part in parts]), held)

    def _taken(self, name: str, source: Tensor) -> Tensor:
        layout = self.course.layouts[name]
        return self._inputs[name] if layout is None else layout.take(self._inputs[name], source)

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
        """Of the clean loss in what is perturbed at a cut, by ordinary differentiation of the whole tail; or None.

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
            _, outputs = self.swept([cut], [(every, values)], None)
            loss = self.weighed(self.objective.rows(outputs, None), None).sum()
            if not loss.requires_grad:
                return [None] * len(self.weights.get(cut, leaves))
            found = list(torch.autograd.grad(loss, leaves, allow_unused=True))
        if cut in self.weights:
            found = [None] * len(self.weights[cut]) if found[0] is None else self.gradients(cut, found[0])
        return [None if each is None else each * self.scale.to(each.dtype) for each in found]
