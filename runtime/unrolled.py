"""The rule behind `Deferred` for a cell called in a Python loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .exact import ExactRule
from .iterations import Iterations
from .ledger import Ledger
from .noiseless import Noiseless
from .recurrence.joint import Tensors
from .recurrence.planner import Planner, Reasons, undisturbed
from .recurrence.recurrence import Recurrence
from .rule import Call, Gradients, Taken
from .segment import Segment

Optional = Tensor | None

# FLOP of one call from which on its own work, not the tape's, is what takes the time.
_LARGE = 2_000_000
_MOST_TRACES = 8


class Roles(NamedTuple):
    """What a region's inputs and outputs are to the loop; all numbers are positions among the region's inputs.

    inputs: per argument that changes from call to call, one position a call; states: of the initial states; shared: of
    arguments that all calls have in common; outputs: per output of the region (result of a call, number of the call);
    flops: of one call.
    """

    steps: int
    inputs: tuple[tuple[int, ...], ...]
    states: tuple[int, ...]
    shared: tuple[int, ...]
    outputs: tuple[tuple[int, int], ...]
    flops: int

    def against(self) -> Reasons:
        """What speaks for the ordinary tape, beside what holds for all recurrences."""
        return (
            (self.flops >= _LARGE, f"a call takes {self.flops / 1e6:.1f} MFLOP, beside which the tape costs little"),
        )


@dataclass(frozen=True)
class _Memory:
    """recurrence: traced for these shapes; slots: place of each weight among the region's parameters, None if none."""

    recurrence: Recurrence
    slots: tuple[int | None, ...]


class UnrolledRule(Noiseless):
    """Forward call by call, as the user's loop does; backward through time on the running cotangents alone.

    step: one call, (*inputs, *states, *shared) -> (*next states, *other results). What `DeferredRule` says of gradients
    holds here too. `parameters` are `segment.trainable()`, in that order.
    """

    def __init__(
        self,
        segment: Segment,
        step: Segment,
        ledger: Ledger,
        roles: Roles,
        always: bool,
        iterations: Iterations | None = None,
        shift: float = 0.0,
    ) -> None:
        self.segment, self.step, self.ledger, self.roles = segment, step, ledger, roles
        super().__init__()
        self.planner = Planner(step.name, always, iterations, shift)
        self._tape = ExactRule(segment, ledger)
        self._traces: dict[Any, Recurrence] = {}

    def choose(self, dtype: torch.dtype, device: str, autocast: bool, rows: int) -> str | None:
        """Why the ordinary tape runs the loop, or None. Raises RewriteError where `always` cannot be met."""
        steps = self.roles.steps
        work = self.roles.flops / 2  # the other half belongs to the input
        return self.planner.choose((steps, rows), steps, dtype, device, autocast, self.roles.against(), work)

    def forward(self, call: Call, inputs: tuple[Any, ...], parameters: tuple[Tensor, ...]) -> Taken:
        first = inputs[self.roles.states[0]]
        autocast = call.ambient.autocast is not None
        reason = self.choose(first.dtype, first.device.type, autocast, first.numel())
        if reason is not None or True not in call.needed:
            return self._tape.forward(call, inputs, parameters)
        return undisturbed(lambda: self._forward(call, inputs, parameters))

    def _forward(self, call: Call, inputs: tuple[Any, ...], parameters: tuple[Tensor, ...]) -> Taken:
        roles = self.roles
        stepwise = [[inputs[position] for position in positions] for positions in roles.inputs]
        shared = tuple([inputs[position] for position in roles.shared])
        states: Tensors = tuple([inputs[position] for position in roles.states])
        found = [states]
        results = []
        for given in zip(*stepwise, strict=True) if stepwise else ((),) * roles.steps:
            result = self.step(*given, *states, *shared)
            states = result[: len(states)]
            found.append(states)
            results.append(result)
        held = self._held()
        trainable = [id(parameter) for parameter in self.segment.trainable()]
        slots = tuple([trainable.index(key) if key in trainable else None for key in held])
        pairs = zip(slots, held.values(), strict=True)
        weights = (*(parameters[slot] if slot is not None else each.detach() for slot, each in pairs), *shared)
        wanted = [*(any(call.needed[p] for p in positions) for positions in roles.inputs)]
        wanted += [slot is not None and call.needed[len(inputs) + slot] for slot in slots]
        wanted += [call.needed[position] for position in roles.shared]
        stacked = [torch.stack(each) for each in stepwise]
        before = [torch.stack(each) for each in zip(*found[:-1], strict=True)]
        recurrence = self._traced(tuple(each[0] for each in stacked), found[0], weights, tuple(wanted))
        outputs = tuple([results[number][result] for result, number in roles.outputs])
        return Taken(outputs, (*stacked, *before, *weights), _Memory(recurrence, slots))

    def _held(self) -> dict[int, Tensor]:
        """Every tensor that a call reads by name: parameters, and buffers and constants read directly."""
        direct = [place.mapping[place.key] for place in self.step.places]
        tensors = [*self.step.parameters().values(), *(each for each in direct if isinstance(each, Tensor))]
        return {id(tensor): tensor for tensor in tensors}

    def _traced(self, inputs: Tensors, states: Tensors, weights: Tensors, needed: tuple[bool, ...]) -> Recurrence:
        given = tuple((tuple(each.shape), each.dtype, each.device) for each in (*inputs, *states, *weights))
        key = (given, needed)
        if key not in self._traces:
            if len(self._traces) == _MOST_TRACES:
                del self._traces[next(iter(self._traces))]
            self._traces[key] = Recurrence(self._cell, inputs, states, weights, needed)
        return self._traces[key]

    def _cell(self, inputs: Tensors, states: Tensors, weights: Tensors) -> Tensors:
        held = self._held()
        replaced = dict(zip(held, weights, strict=False))
        return self.step.run((*inputs, *states, *weights[len(held) :]), replaced)

    def backward(self, call: Call, taken: Taken, cotangents: Gradients, needed: tuple[bool, ...]) -> Gradients:
        memory, roles = taken.memory, self.roles
        if not isinstance(memory, _Memory):
            return self._tape.backward(call, taken, cotangents, needed)
        if all(cotangent is None for cotangent in cotangents):
            return tuple([None] * len(needed))
        first = len(roles.inputs)
        inputs, rest = taken.tensors[:first], taken.tensors[first:]
        states, weights = rest[: len(roles.states)], rest[len(roles.states) :]
        buffers, others = self._given(memory.recurrence, states, cotangents)
        highway = self.planner.highway(call.key.forward)
        pulled = undisturbed(lambda: memory.recurrence.pull(inputs, states, weights, (), buffers, others, highway))
        vjps = roles.steps if highway is None else highway.vjps
        self.ledger.add(call.region, vjps=vjps, forwards=roles.steps)
        gradients: list[Optional] = [None] * len(needed)
        for positions, each in zip(roles.inputs, pulled.inputs, strict=True):
            for position, gradient in zip(positions, () if each is None else each.unbind(0), strict=False):
                _accumulate(gradients, position, gradient)
        for position, gradient in zip(roles.states, pulled.states, strict=True):
            _accumulate(gradients, position, gradient)
        offset = len(needed) - len(self.segment.trainable())
        places = [*(None if slot is None else offset + slot for slot in memory.slots), *roles.shared]
        for place, weight in zip(places, pulled.weights, strict=True):
            if place is not None and weight is not None:
                _accumulate(gradients, place, weight)
        return tuple([gradient if need else None for gradient, need in zip(gradients, needed, strict=True)])

    def _given(
        self, recurrence: Recurrence, states: Sequence[Tensor], cotangents: Gradients
    ) -> tuple[list[Tensor], Tensors]:
        """Cotangents from outside: per state before every step and after the last, and of the other results."""
        rows: list[list[Optional]] = [[None] * self.roles.steps for _ in recurrence.joint.results]
        for (result, number), cotangent in zip(self.roles.outputs, cotangents, strict=True):
            rows[result][number] = cotangent
        stacked: list[Tensor] = []
        for own, node in zip(rows, recurrence.joint.results, strict=True):
            zero = states[0].new_zeros(node.meta["val"].shape, dtype=node.meta["val"].dtype)
            filled = [zero if each is None else each for each in own]
            stacked.append(torch.stack([zero, *filled] if len(stacked) < len(states) else filled))
        return stacked[: len(states)], tuple(stacked[len(states) :])

    def describe(self) -> dict[str, Any]:
        return self.planner.describe()

    def get_state(self) -> dict[str, Any]:
        return self.planner.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self.planner.set_state(state)


def _accumulate(gradients: list[Optional], place: int, gradient: Tensor) -> None:
    before = gradients[place]
    gradients[place] = gradient if before is None else before + gradient
