"""What the loop over time does in one step, done for all steps at once."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from .all_steps import Values, function_of
from .collapse import Collapse
from .forms import Apply, Fill, Form
from .joint import RUNNING, STATIC, Joint, cone, shape

Read = Callable[[fx.Node], Tensor | None]


class AtOnce:
    """Carries out the loop's instructions for given cotangents of the states after every step.

    `linear` leaves out what comes from the cell's other outputs, so that the result is linear in those cotangents.
    """

    def __init__(self, joint: Joint, collapse: Collapse) -> None:
        self._joint = joint
        self._outside = {node for node in joint.kinds if cone([node], []).intersection(joint.output_cotangents)}
        self._stages: list[Fill | _Group] = []
        fetched = [each.node for each in collapse.instructions if isinstance(each, Apply)]
        for kind, each in itertools.groupby(collapse.instructions, type):
            if kind is Fill:
                self._stages += list(each)  # type: ignore[arg-type]
            else:
                nodes = [one.node for one in each if one.node.target is not operator.getitem]
                items = [node for node in fetched if node.target is operator.getitem and node.args[0] in nodes]
                self._stages.append(_Group(joint, [*nodes, *items]))
        self._filled = [each.node for each in collapse.instructions if isinstance(each, Fill)]

    def buffers(self, steps: int, like: Tensor) -> Values:
        """Room for every filled node."""
        return {node: _room(node, steps, like) for node in self._filled}

    def fill(self, values: Values, given: Sequence[Tensor], room: Values, linear: bool) -> Values:
        """The values of everything the loop holds, in views of `room`. given: per state, (rows, *state)."""
        rows = len(given[0])
        found: Values = dict(zip(self._joint.state_cotangents, given, strict=True))
        read = self._reader(values, found, rows, linear)
        for stage in self._stages:
            if isinstance(stage, _Group):
                found.update(stage(read))
                continue
            target = found[stage.node] = room[stage.node][:rows]
            for start, end, form in stage.pieces:
                write(form, read, target[..., start:end] if target.dim() > 1 else target)
        return found

    def update(self, form: Form, values: Values, found: Values, out: Tensor, linear: bool) -> None:
        """Writes one state's update. found: of `fill`."""
        rows = len(out)
        first = {node: each[:rows] for node, each in found.items()}
        write(form, self._reader(values, first, rows, linear), out)

    def _reader(self, values: Values, found: Values, rows: int, linear: bool) -> Read:
        """A node's value for the first rows; None for a zero."""

        def read(node: fx.Node) -> Tensor | None:
            if self._joint.kinds[node] == RUNNING:
                return found[node]
            if linear and node in self._outside:
                return None
            return values[node] if self._joint.kinds[node] == STATIC else values[node][:rows]

        return read


class _Group:
    """Nodes carried out as they stand, one after the other, for all steps at once."""

    def __init__(self, joint: Joint, nodes: Sequence[fx.Node]) -> None:
        self.nodes = [node for node in nodes if shape(node) is not None]
        sources = {source for node in nodes for source in node.all_input_nodes} - set(nodes)
        self._sources = [node for node in joint.root.graph.nodes if node in sources]
        self._along = tuple([None if joint.kinds[node] == STATIC else 0 for node in self._sources])
        self._function = function_of(joint, self._sources, self.nodes)

    def __call__(self, read: Read) -> Values:
        given = [read(node) for node in self._sources]
        rows = next(each.shape[0] for each, a in zip(given, self._along, strict=True) if each is not None and a == 0)
        filled = [
            node.meta["val"].new_zeros(()).expand(rows, *node.meta["val"].shape) if each is None else each
            for node, each in zip(self._sources, given, strict=True)
        ]
        return dict(zip(self.nodes, torch.vmap(self._function, in_dims=self._along)(*filled), strict=True))


def write(form: Form, read: Read, out: Tensor) -> None:
    """Evaluates a form for many steps at once. out: (rows, *value)."""
    fresh = True
    for base, coefficient in form.terms.items():
        value = read(base)
        factor = None if coefficient is None else read(coefficient)
        assert value is not None
        _add_term(out, value, factor, fresh)
        fresh = False
    constant = None if form.constant is None else read(form.constant)
    if constant is not None:
        out.copy_(constant) if fresh else out.add_(constant)
        fresh = False
    for node, weight in form.products:
        left, right = read(node), read(weight)
        assert left is not None
        assert right is not None
        rows, target = left.flatten(0, 1), out.view(-1, out.shape[-1])
        torch.mm(rows, right, out=target) if fresh else target.addmm_(rows, right)
        fresh = False
    if fresh:
        out.zero_()


def _add_term(out: Tensor, value: Tensor, factor: Tensor | None, fresh: bool) -> None:
    """out = or += factor * value, the value repeated along the last dimension where it is narrower."""
    if factor is None:
        out.copy_(value) if fresh else out.add_(value)
        return
    groups = out.shape[-1] // value.shape[-1] if value.dim() > 1 and value.shape[-1] else 1
    if groups > 1:
        out, factor = (torch.unflatten(each, -1, (groups, -1)) for each in (out, factor))
        value = value.unsqueeze(-2)
    torch.mul(factor, value, out=out) if fresh else out.addcmul_(factor, value)


def _room(node: fx.Node, steps: int, like: Tensor) -> Tensor:
    example = node.meta["val"]
    return like.new_empty((steps, *example.shape), dtype=example.dtype)
