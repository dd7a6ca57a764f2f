"""Recurrences: a cell called again and again on its own state, and torch's own recurrent modules."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from torch import fx, nn

from rewriter.passes.program import Value

from .calls import Calls, alike, repeated_calls
from .operations import name_of
from .parts import add_helpers
from .repeats import operation, signature
from .result import Recurrence
from .stream import Stream

_EXPORTED = {"gru": "GRU", "lstm": "LSTM", "rnn_tanh": "RNN", "rnn_relu": "RNN"}


def recurrences(stream: Stream) -> tuple[Recurrence, ...]:
    """Loops over one cell and calls of `nn.GRU`, `nn.LSTM`, `nn.RNN`, in the order of the graph.

    A loop counts where each step reads what the step before left and nothing older, all steps do the same, and what
    stands between two calls of the cell holds no parameters of its own.
    """
    found = [(cells.calls[0][0], loop) for cells in repeated_calls(stream) if (loop := _Steps(stream, cells).loop())]
    found += list(_modules(stream))
    return tuple(recurrence for _, recurrence in sorted(found, key=lambda each: each[0]))


class _Steps:
    """The steps of one loop: the k-th is the k-th call of the cell and what lies between it and the next one."""

    def __init__(self, stream: Stream, cells: Calls) -> None:
        self._stream, self._cells = stream, cells
        self._step = self._numbered()
        self._nodes = self._members()

    def loop(self) -> Recurrence | None:
        states = self._states()
        if states is None or not self._alike() or not self._one_cell():
            return None
        stream = self._stream
        initial = self._first(states[0])
        states.append(self._last(states[-1]))
        steps = self._with_helpers()
        sides = [self._sides(nodes) for nodes in steps]
        return Recurrence(
            cell=self._cells.name,
            kind="loop",
            steps=len(self._nodes),
            parameters=tuple(dict.fromkeys(name for index in self._nodes[-1] for name in stream.parameters(index))),
            calls=tuple(map(stream.names, steps)),
            initial=stream.names(initial),
            states=tuple(map(stream.names, states)),
            side_inputs=tuple(map(stream.names, sides)),
        )

    def _numbered(self) -> dict[int, int]:
        """Each node that is in a call or computed from one -> the number of the latest such call."""
        own = {index: number for number, call in enumerate(self._cells.calls) for index in call}
        found: dict[int, int] = {}
        for index in range(self._cells.calls[0][0], len(self._stream)):
            numbers = [found[source] for source in self._stream.flows[index] if source in found]
            if index in own:
                numbers.append(own[index])
            if numbers:
                found[index] = max(numbers)
        return found

    def _members(self) -> list[list[int]]:
        last = self._cells.calls[-1]
        needed = {index for call in self._cells.calls for index in call}
        for index in range(last[-1], self._cells.calls[0][0] - 1, -1):
            if index in needed and index in self._step:
                needed.update(source for source in self._stream.flows[index] if source in self._step)
        members: list[list[int]] = [[] for _ in self._cells.calls]
        for index in sorted(needed & self._step.keys()):
            members[self._step[index]].append(index)
        return members

    def _states(self) -> list[list[int]] | None:
        """What each step hands to the next one; None where a step reads an older one."""
        states: list[list[int]] = []
        for number in range(1, len(self._nodes)):
            carried = self._carried(number)
            if not carried or any(self._step[source] != number - 1 for source in carried):
                return None
            states.append(sorted(carried))
        return states

    def _carried(self, number: int) -> set[int]:
        """What a step reads of the one before. What that only prepares (`cat([x, h])`) is moved to the step itself."""
        nodes, before = self._nodes[number], self._nodes[number - 1]
        carried = self._read(nodes)
        called = set(self._cells.calls[number - 1])
        for index in sorted(carried - called, reverse=True):
            needed = {source for source in self._stream.flows[index] if source in self._step}
            if needed < carried and not any(reader in before for reader in self._stream.readers[index]):
                carried.discard(index)
                before.remove(index)
                bisect.insort(nodes, index)
                self._step[index] = number
        return carried

    def _read(self, nodes: Sequence[int]) -> set[int]:
        own = set(nodes)
        return {s for index in nodes for s in self._stream.flows[index] if s in self._step and s not in own}

    def _alike(self) -> bool:
        """Whether the calls do the same, from the second on, and all that lies between two calls does."""
        calls = self._cells.calls[1:]
        same = all(alike(self._stream, call, earlier) for earlier, call in pairwise(calls))
        return same and len({signature(self._stream, nodes) for nodes in self._nodes[1:-1]}) < 2

    def _one_cell(self) -> bool:
        inside = {index for call in self._cells.calls for index in call}
        between = (index for nodes in self._nodes for index in nodes if index not in inside)
        return not any(self._stream.parameters(index) for index in between)

    def _first(self, states: Sequence[int]) -> list[int]:
        """What the first step starts from: what it reads where the second one reads `states`."""
        nodes, calls = self._stream.nodes, self._cells.calls
        twins = self._twins(self._nodes[1], alike(self._stream, calls[1], calls[0]) or {})
        found: dict[int, int] = {}
        for index, twin in twins.items():
            here, there = _operands(nodes[index]), _operands(nodes[twin])
            if len(here) == len(there):
                pairs = zip(here, there, strict=True)
                found.update((self._stream.number[a], self._stream.number[b]) for a, b in pairs)
        return [found[index] for index in states] if all(index in found for index in states) else []

    def _last(self, previous: Sequence[int]) -> list[int]:
        """The state after the last step: the nodes that stand where the last but one step has `previous`.

        What leads to them is added to the last step.
        """
        calls = self._cells.calls
        known = alike(self._stream, calls[-1], calls[-2]) or {}
        twins = self._twins(self._nodes[-2], {earlier: last for last, earlier in known.items()})
        if not all(index in twins for index in previous):
            return []
        self._nodes[-1] = sorted({*self._nodes[-1], *twins.values()})
        return [twins[index] for index in previous]

    def _twins(self, nodes: Sequence[int], known: dict[int, int]) -> dict[int, int]:
        """Each node of a step -> the one in its place in another, as far as both do the same. known: the cells' own."""
        stream, twins = self._stream, dict(known)
        taken = set(twins.values())
        for index in nodes:
            if index in twins:
                continue
            doing = operation(stream, index)
            beside = (twins[source] for source in stream.flows[index] if source in twins)
            readers = (reader for source in beside for reader in stream.readers[source])
            twin = next((r for r in readers if r not in taken and operation(stream, r) == doing), None)
            if twin is not None:
                twins[index] = twin
                taken.add(twin)
        return twins

    def _with_helpers(self) -> list[list[int]]:
        """The steps with the reads of parameters that each alone uses."""
        place = {index: number for number, nodes in enumerate(self._nodes, 1) for index in nodes}
        add_helpers(self._stream, place, [()] * (len(self._nodes) + 1))
        steps: list[list[int]] = [[] for _ in self._nodes]
        for index in sorted(place):
            steps[place[index] - 1].append(index)
        return steps

    def _sides(self, nodes: Sequence[int]) -> list[int]:
        inside = set(nodes)
        read = dict.fromkeys(source for index in nodes for source in self._stream.inputs[index])
        return [source for source in read if source not in inside and source not in self._step]


def _modules(stream: Stream) -> Iterator[tuple[int, Recurrence]]:
    """Calls of torch's recurrent modules, or of their operators in an exported graph."""
    for index, node in enumerate(stream.nodes):
        module = stream.module(index)
        if isinstance(module, nn.RNNBase):
            kind, path = module.mode.partition("_")[0], str(node.target)
            dimension = 1 if module.batch_first else 0
        elif node.op == "call_function" and "::" in str(getattr(node.target, "_name", "")):
            kind = _EXPORTED.get(name_of(node, stream.module_at), "")
            path, dimension = stream.block(index), 1 if node.args[-1] is True else 0
        else:
            continue
        if kind:
            steps = _length(stream.program.values.get(node.all_input_nodes[0].name), dimension)
            yield index, Recurrence(path, kind, steps, tuple(stream.parameters(index)), (), (), (), ())


def _operands(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments, one for each place."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _length(value: Any, dimension: int) -> int | None:
    if not isinstance(value, Value):
        return None
    return value.shape[dimension] if len(value.shape) == 3 else value.shape[0]
