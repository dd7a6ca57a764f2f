"""The rule behind `Deferred`: a recurrent module's exact pullback, its weight gradients taken after the time loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .errors import RewriteError
from .exact import ExactRule
from .iterations import Iterations
from .ledger import Ledger
from .noiseless import Noiseless
from .recurrence.iterated import Highway
from .recurrence.joint import Tensors
from .recurrence.planner import Planner, undisturbed
from .recurrence.stack import Kind, Layer, Stack
from .rule import Call, Gradients, Taken
from .segment import Segment

Optional = Tensor | None


class Roles(NamedTuple):
    """What a region's inputs and outputs are to the module.

    input: position of the sequence among the region's inputs; states: positions of the initial states, none for zeros;
    outputs: per output of the region 0 for the sequence, 1 for h_n, 2 for c_n.
    """

    input: int
    states: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class _Memory:
    """stack: what ran; tree: how its tensors lie in `Taken`; slots: per weight its place among the parameters."""

    stack: Stack
    tree: TreeSpec
    places: tuple[int, ...]
    leaves: int
    slots: list[tuple[int | None, ...]]
    batched: bool
    turned: bool


class DeferredRule(Noiseless):
    """Forward by torch's own kernels; backward in three parts: before, inside and after the loop over time.

    Gate derivatives are evaluated for all steps at once, the loop holds products and additions only, and every weight's
    gradient is one product. Exact; sums over time are taken in another order than autograd does. always: also where the
    ordinary tape is expected to be faster; iterations, shift: of Highway-BP, which has products for all steps
    at once in place of the loop and is exact with one iteration less than there are steps. `parameters` are
    `segment.trainable()`, in that order.
    """

    def __init__(
        self,
        segment: Segment,
        ledger: Ledger,
        module: str,
        roles: Roles,
        always: bool,
        iterations: Iterations | None = None,
        shift: float = 0.0,
    ) -> None:
        self.segment, self.ledger, self.roles = segment, ledger, roles
        super().__init__()
        self.planner = Planner(module, always, iterations, shift)
        self._tape = ExactRule(segment, ledger)
        self._place = next(place for place in segment.places if place.path == module)

    @property
    def module(self) -> nn.RNNBase:
        found: nn.RNNBase = self._place.mapping[self._place.key]
        return found

    def choose(self, shape: Sequence[int], dtype: torch.dtype, device: str, autocast: bool) -> str | None:
        """Why the ordinary tape runs a sequence of this shape, or None. Raises RewriteError where `always` cannot."""
        module = self.module
        if self.planner.always and device != "cpu" and module.dropout and module.training:
            raise RewriteError(
                "dropout between layers draws other numbers than cuDNN's",
                where=self.planner.where,
                why=f"the sequence is on {device}",
                remedy="set dropout=0, or leave `tape` at 'auto'",
            )
        steps = shape[1] if module.batch_first and len(shape) == 3 else shape[0]
        mkldnn: Any = torch.backends.mkldnn
        fused = module.mode == "LSTM" and dtype == torch.float32 and mkldnn.is_available() and mkldnn.enabled
        others = ((bool(fused), "torch's fused float32 LSTM is faster"),)
        rows = 1 if len(shape) < 3 else shape[0] if module.batch_first else shape[1]
        work = 2.0 * rows * module.get_parameter("weight_hh_l0").numel()
        return self.planner.choose(shape, steps, dtype, device, autocast, others, work)

    def forward(self, call: Call, inputs: tuple[Any, ...], parameters: tuple[Tensor, ...]) -> Taken:
        x = inputs[self.roles.input]
        autocast = call.ambient.autocast is not None
        if self.choose(x.shape, x.dtype, x.device.type, autocast) is not None or True not in call.needed:
            return self._tape.forward(call, inputs, parameters)
        return undisturbed(lambda: self._forward(call, inputs, parameters))

    def _forward(self, call: Call, inputs: tuple[Any, ...], parameters: tuple[Tensor, ...]) -> Taken:
        module, kind = self.module, Kind.of(self.module)
        trainable = [id(parameter) for parameter in self.segment.trainable()]
        wanted = call.needed[len(inputs) :]
        own = [tuple(getattr(module, name) for name in names) for names in kind.names()]
        slots = [tuple(trainable.index(id(w)) if id(w) in trainable else None for w in each) for each in own]
        needed = [tuple(slot is not None and wanted[slot] for slot in each) for each in slots]
        # How torch multiplies by a weight depends on whether it requires a gradient, even where none is recorded.
        for parameter, want in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(want)
        weights = [
            tuple(w.detach() if slot is None else parameters[slot] for w, slot in zip(each, places, strict=True))
            for each, places in zip(own, slots, strict=True)
        ]
        x = inputs[self.roles.input]
        batched, turned = x.dim() == 3, x.dim() == 3 and module.batch_first
        x = x.transpose(0, 1) if turned else x if batched else x.unsqueeze(1)
        stack = Stack(kind, needed, call.needed[self.roles.input])
        layers, finals = stack.forward(x, self._states(inputs, x), weights, module.training)
        sequence = layers[-1].output
        sequence = sequence.transpose(0, 1) if turned else sequence if batched else sequence.squeeze(1)
        last = [torch.stack(each) for each in zip(*finals, strict=True)]
        outputs = [sequence, *(each if batched else each.squeeze(1) for each in last)]
        leaves, tree = tree_flatten((layers, weights))
        places = tuple([index for index, leaf in enumerate(leaves) if leaf is not None])
        memory = _Memory(stack, tree, places, len(leaves), slots, batched, turned)
        kept = tuple([leaves[index] for index in places])
        return Taken(tuple([outputs[position] for position in self.roles.outputs]), kept, memory)

    def _states(self, inputs: tuple[Any, ...], x: Tensor) -> Tensors:
        """Before the first step, (layers and directions, batch, size)."""
        kind = Kind.of(self.module)
        expected = (kind.layers * kind.directions, x.shape[1], self.module.hidden_size)
        given = tuple([inputs[position] for position in self.roles.states])
        if not given:
            return (x.new_zeros(expected),) * kind.states
        wide = tuple([each if each.dim() == 3 else each.unsqueeze(1) for each in given])
        for each in wide:
            if tuple(each.shape) != expected:
                raise RuntimeError(f"Expected hidden size {expected}, got {list(each.shape)}")
        return wide

    def backward(self, call: Call, taken: Taken, cotangents: Gradients, needed: tuple[bool, ...]) -> Gradients:
        memory = taken.memory
        if not isinstance(memory, _Memory):
            return self._tape.backward(call, taken, cotangents, needed)
        if all(cotangent is None for cotangent in cotangents):
            return tuple([None] * len(needed))
        leaves: list[Any] = [None] * memory.leaves
        for index, tensor in zip(memory.places, taken.tensors, strict=True):
            leaves[index] = tensor
        layers, weights = tree_unflatten(leaves, memory.tree)
        sequence, finals = self._given(memory, cotangents, len(weights))
        highway = self.planner.highway(call.key.forward)
        found = undisturbed(lambda: memory.stack.backward(layers, weights, sequence, finals, highway))
        self._count(call.region, layers, len(weights), highway)
        gradients: list[Optional] = [None] * len(needed)
        offset = len(needed) - sum(1 for _ in self.segment.trainable())
        if found.input is not None:
            gradients[self.roles.input] = _outside(found.input, memory)
        for index, position in enumerate(self.roles.states):
            whole = torch.stack([states[index] for states in found.states])
            gradients[position] = whole if memory.batched else whole.squeeze(1)
        for slots, each in zip(memory.slots, found.weights, strict=True):
            for slot, gradient in zip(slots, each, strict=True):
                if slot is not None and gradient is not None:
                    before = gradients[offset + slot]
                    gradients[offset + slot] = gradient if before is None else before + gradient
        return tuple([gradient if need else None for gradient, need in zip(gradients, needed, strict=True)])

    def _given(
        self, memory: _Memory, cotangents: Gradients, places: int
    ) -> tuple[Optional, list[tuple[Optional, ...]]]:
        """The sequence's cotangent, time first, and the last states' per layer and direction."""
        by_role: list[Optional] = [None] * (1 + memory.stack.kind.states)
        for role, cotangent in zip(self.roles.outputs, cotangents, strict=True):
            if cotangent is not None:
                by_role[role] = cotangent if memory.batched else cotangent.unsqueeze(1)
        sequence, *last = by_role
        if sequence is not None and memory.turned:
            sequence = sequence.transpose(0, 1)
        finals = [tuple([None if each is None else each[place] for each in last]) for place in range(places)]
        return sequence, finals

    def _count(self, region: str, layers: Sequence[Layer], recurrences: int, highway: Highway | None) -> None:
        """A vjp for every step of every layer and direction; a forward where its results were not kept."""
        steps = len(layers[0].input)
        again = sum(steps * len(layer.states) for layer in layers if not layer.kept)
        vjps = steps * recurrences if highway is None else highway.vjps
        self.ledger.add(region, vjps=vjps, forwards=again)

    def describe(self) -> dict[str, Any]:
        return self.planner.describe()

    def get_state(self) -> dict[str, Any]:
        return self.planner.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self.planner.set_state(state)


def _outside(gradient: Tensor, memory: _Memory) -> Tensor:
    """A sequence's gradient in the layout the module was given it in."""
    if memory.turned:
        return gradient.transpose(0, 1)
    return gradient if memory.batched else gradient.squeeze(1)
