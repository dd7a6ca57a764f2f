"""A recurrence: a cell run forward step by step, and its exact backward with deferred weight gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx

from .all_steps import AllSteps, Statics, Values, function_of
from .collapse import Collapse
from .forms import Form
from .iterated import Highway, Iterated
from .joint import RUNNING, STATIC, Cell, Joint, Tensors, cone, shape, trace
from .loop import Loop
from .time_sums import time_sum

Optional = Tensor | None


@dataclass(frozen=True)
class Ran:
    """A forward. states: after every step, (steps, *state); outputs: the cell's others; kept: for backward."""

    states: Tensors
    outputs: Tensors
    kept: Tensors = ()


@dataclass(frozen=True)
class Pulled:
    """Gradients of the inputs (steps, ...), of the states before the first step, and of the weights."""

    inputs: tuple[Optional, ...]
    states: Tensors
    weights: tuple[Optional, ...]


class Recurrence:
    """`cell(inputs, states, weights) -> (*next states, *outputs)`, repeated over time, for tensors of fixed shapes.

    Its vjp is traced once. Backward evaluates whatever does not depend on the running cotangents for all steps at once,
    then runs through time with what is left (`loop.source`), then takes the gradients of inputs and weights for all
    steps at once. Exact up to the order of additions. inputs, states, weights: examples for one step; needed: per input
    and then per weight, whether its gradient is wanted.
    Raises RewriteError for a cell that draws random numbers or writes into what it is given.
    """

    def __init__(self, cell: Cell, inputs: Tensors, states: Tensors, weights: Tensors, needed: Sequence[bool]) -> None:
        self.joint = joint = trace(cell, inputs, states, weights, needed)
        self._sums = [None if node is None else time_sum(joint, node) for node in joint.weight_gradients]
        gradients = [node for node in joint.input_gradients if node is not None]
        later = [*gradients, *(node for each in self._sums if each is not None for node in each.reads)]
        self._collapse = collapse = Collapse(joint, later)
        self.loop = Loop(joint, collapse)
        self._parts = collapse.parts
        self._later = _Later(joint, collapse, self.loop, later)
        self._forward_nodes = cone(joint.results, [])
        reads = (*self.loop.reads, *self._later.reads)
        self._hoisted = hoisted = [node for node in reads if joint.kinds[node] != RUNNING]
        self._recomputed = AllSteps(joint, self._given, hoisted)
        self.kept = self._kept(hoisted)
        self._fetched = AllSteps(joint, [*self._given, *self.kept], hoisted)
        self._step = _Step(joint, [*joint.results, *self.kept])
        self._plain_step = _Step(joint, joint.results)

    @cached_property
    def _iterated(self) -> Iterated:
        return Iterated(self.joint, self._collapse, list(dict.fromkeys(self._hoisted)))

    @property
    def _given(self) -> list[fx.Node]:
        return [*self.joint.inputs, *self.joint.states, *self.joint.output_cotangents]

    def _kept(self, hoisted: Sequence[fx.Node]) -> list[fx.Node]:
        """What a tape would keep: values of the forward pass that something outside it reads."""
        joint, given = self.joint, set(self._given)
        varying = {node for node in self._forward_nodes if joint.kinds[node] != STATIC} - given
        needed = cone(hoisted, given)
        return [
            node
            for node in joint.root.graph.nodes
            if node in varying
            and shape(node) is not None
            and any(user in needed and user not in self._forward_nodes for user in node.users)
        ]

    def run(self, inputs: Tensors, states: Tensors, weights: Tensors, keep: bool) -> Ran:
        """inputs: (steps, ...). keep: what backward would otherwise evaluate again from the states."""
        step = self._step if keep else self._plain_step
        found = step(inputs, states, weights, len(states))
        results = len(self.joint.results)
        return Ran(found[: len(states)], found[len(states) : results], found[results:])

    def reads_inputs(self, kept: bool) -> bool:
        """Whether `pull` needs the cell's inputs, given what `run` kept or not."""
        before = self._fetched if kept else self._recomputed
        return not set(self.joint.inputs).isdisjoint([*before.known, *self._later.reads])

    def pull(
        self,
        inputs: Sequence[Optional],
        states: Tensors,
        weights: Tensors,
        kept: Tensors,
        cotangents: Sequence[Tensor],
        output_cotangents: Tensors = (),
        highway: Highway | None = None,
    ) -> Pulled:
        """The gradients, exact unless `highway` is given.

        inputs: of `run`, None where `reads_inputs` is false; kept: of `run`, or empty.
        states: before every step, (steps, *state). cotangents: per state a buffer (steps + 1, *state), in row t the
        cotangent from outside of the state before step t; it is written to. output_cotangents: of the cell's other
        outputs, (steps, ...).
        """
        joint = self.joint
        known = (*inputs, *states, *weights, *output_cotangents)
        nodes = (*joint.inputs, *joint.states, *joint.weights, *joint.output_cotangents)
        values: Values = {node: value for node, value in zip(nodes, known, strict=True) if value is not None}
        values.update(zip(self.kept, kept, strict=True) if kept else ())
        (self._fetched if kept else self._recomputed)(values)
        if highway is None or not self._iterations(values, cotangents, highway):
            self._through_time(values, cotangents)
        for node, (whole, start, end) in self._parts.items():
            values[node] = values[whole][..., start:end]
        self._later(values)
        steps = len(cotangents[0]) - 1
        return Pulled(
            tuple([None if node is None else values[node] for node in joint.input_gradients]),
            tuple([buffer[0] for buffer in cotangents]),
            tuple([None if each is None else each.compute(values, steps) for each in self._sums]),
        )

    def _through_time(self, values: Values, cotangents: Sequence[Tensor]) -> None:
        nodes = self.joint.state_cotangents
        targets = dict(zip(nodes, (buffer[:-1] for buffer in cotangents), strict=True))
        values.update(zip(nodes, (buffer[1:] for buffer in cotangents), strict=True))
        for node in self.loop.filled:
            example = node.meta["val"]
            rows = (len(cotangents[0]) - 1, *example.shape)
            values[node] = torch.empty(rows, dtype=example.dtype, device=cotangents[0].device)
        self.loop(values, targets)

    def _iterations(self, values: Values, cotangents: Sequence[Tensor], highway: Highway) -> bool:
        """False where the loop over time is still to run."""
        exact = highway.iterations.exact(highway.forward)
        if not exact and self._iterated(values, cotangents, highway):
            return True
        highway.vjps += len(cotangents[0]) - 1
        return False


class _Step:
    """Runs some nodes of the forward pass step after step, and stacks them."""

    def __init__(self, joint: Joint, wanted: Sequence[fx.Node]) -> None:
        self._weights, self._wanted = joint.weights, wanted
        inside = cone(wanted, [])
        varying = {node for node in inside if joint.kinds[node] != STATIC}
        read = {source for node in varying for source in node.all_input_nodes if joint.kinds[source] == STATIC}
        self._read = [node for node in joint.root.graph.nodes if node in read]
        self._statics = Statics(joint, self._read)
        self._function = function_of(joint, [*joint.inputs, *joint.states, *self._read], wanted).forward

    def __call__(self, inputs: Tensors, states: Tensors, weights: Tensors, carried: int) -> Tensors:
        values: Values = dict(zip(self._weights, weights, strict=True))
        self._statics(values)
        fixed = [values[node] for node in self._read]
        found = []
        for given in zip(*(each.unbind(0) for each in inputs), strict=True):
            result = self._function(*given, *states, *fixed)
            states = result[:carried]
            found.append(result)
        return tuple([torch.stack(each) for each in zip(*found, strict=True)])


class _Later:
    """What follows the loop, for all steps at once; `reads` are the values it needs from before the loop."""

    def __init__(self, joint: Joint, collapse: Collapse, loop: Loop, wanted: Sequence[fx.Node]) -> None:
        applied = [node for node in loop.applied if shape(node) is not None]
        there = {*joint.state_cotangents, *loop.filled, *applied, *collapse.parts}
        varying = {node for node, kind in joint.kinds.items() if kind != RUNNING}
        plain = [node for node, form in collapse.forms.items() if not form.products and shape(node) is not None]
        formed = set(plain) - there
        inside = cone(wanted, {*there, *varying, *formed})
        border = {source for node in inside for source in node.all_input_nodes} | set(wanted)
        order = list(joint.root.graph.nodes)
        self._formed = [(node, collapse.forms[node]) for node in order if node in border & formed]
        parts = [node for _, form in self._formed for node in _nodes_of(form) if node in varying]
        self.reads = list(dict.fromkeys([*(node for node in order if node in border & varying), *parts]))
        known = [node for node in order if node in border and node not in inside and joint.kinds[node] != STATIC]
        self._rest = AllSteps(joint, known, [node for node in wanted if node in inside])

    def __call__(self, values: Values) -> None:
        for node, form in self._formed:
            values[node] = _evaluated(form, values)
        self._rest(values)


def _nodes_of(form: Form) -> list[fx.Node]:
    found = [*form.terms, *form.terms.values(), form.constant]
    return [node for node in found if node is not None]


def _evaluated(form: Form, values: Values) -> Tensor:
    """A form without products for all steps at once."""
    total = None if form.constant is None else values[form.constant]
    for base, coefficient in form.terms.items():
        value = values[base]
        if coefficient is not None:
            factor = values[coefficient]
            groups = factor.shape[-1] // value.shape[-1] if value.dim() > 1 else 1
            if groups > 1:
                value = (torch.unflatten(factor, -1, (groups, -1)) * value.unsqueeze(-2)).flatten(-2)
            else:
                value = factor * value
        total = value if total is None else total + value
    assert total is not None
    return total
