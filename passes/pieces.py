"""A recurrent module's one call over a sequence as several, each over a piece of it, with the state handed on."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from .base import Refused
from .program import Cost, Program, Value
from .regions import hooked
from .targets import Place


def in_pieces(place: Place, every: int, program: Program) -> Program | Refused:
    """The program with each call of an `nn.RNN`, `nn.GRU` or `nn.LSTM` in pieces of `every` steps.

    Pieces count as calls of the module: the k-th is `name@k`. Refused where the result would not be the same numbers:
    two directions, dropout between layers, packed or unbatched sequences; and for a second call of the module.
    """
    module = program.module(place.module)
    assert isinstance(module, nn.RNNBase)
    calls = [node for node in program.graph.nodes if node.op == "call_module" and node.target == place.module]
    refused = hooked(place, program) or _unsuitable(place, module, calls, program)
    if refused is not None:
        return refused
    graph = program.edit()
    own = {node.name: node for node in graph.nodes}
    writer = _Writer(program, graph, own[calls[0].name], module, every)
    return writer.rewritten()


def _unsuitable(place: Place, module: nn.RNNBase, calls: Sequence[fx.Node], program: Program) -> Refused | None:
    where, remedy = place.module, "call a cell in a loop"
    if type(module) not in (nn.GRU, nn.LSTM, nn.RNN) or len(calls) != 1:
        return Refused(where, f"{len(calls)} calls of {type(module).__name__} cannot be cut into pieces", remedy)
    if module.bidirectional:
        return Refused(where, "its second direction runs against the cuts", "cut behind it, or use one direction")
    if module.training and module.dropout > 0 and module.num_layers > 1:
        return Refused(where, "its dropout between layers would draw other numbers", "set its dropout to 0")
    x = _arguments(calls[0])[0]
    value = program.values.get(x.name) if isinstance(x, fx.Node) else None
    if not isinstance(value, Value) or len(value.shape) != 3:
        return Refused(where, "its input is not one tensor of three dimensions", "pass padded sequences in batches")
    if any(user.target is not operator.getitem for user in calls[0].users):
        return Refused(where, "its results are passed on as one tuple", "take the tuple apart where it is returned")
    return None


def _arguments(call: fx.Node) -> tuple[Any, Any]:
    given = dict(zip(("input", "hx"), call.args, strict=False)) | dict(call.kwargs)
    return given.get("input"), given.get("hx")


def _fixed(x: fx.Node, program: Program) -> Iterator[str]:
    """That the sizes which the sequence's length may come from stay as they are: all but the numbers of rows."""
    given = [node for node in program.graph.nodes if node.op == "placeholder"]
    wanted, stack = {x}, [x]
    while stack:
        sources = [source for source in stack.pop().all_input_nodes if source not in wanted]
        wanted.update(sources)
        stack += sources
    for number, node in enumerate(given):
        value = program.values.get(node.name)
        if node in wanted and isinstance(value, Value):
            rows = None if value.rows is None else value.rows.dimension
            yield from (f"s[{number}][{d}] == {size}" for d, size in enumerate(value.shape) if d != rows)


class _Writer:
    """Writes the pieces in place of one call."""

    def __init__(self, program: Program, graph: fx.Graph, call: fx.Node, module: nn.RNNBase, every: int) -> None:
        self.program, self.graph, self.call, self.module, self.every = program, graph, call, module, every
        self.values = dict(program.values)
        self.costs = dict(program.costs)
        self.block = tuple(call.meta.get("block", ()))[:-1]
        self.time = 1 if module.batch_first else 0
        found = program.values[call.name]
        assert isinstance(found, tuple)
        self.result: Any = found
        if isinstance(module, nn.LSTM) and not isinstance(found[1], tuple):
            self.result = (found[0], (found[1], found[1]))  # both states are alike

    def rewritten(self) -> Program:
        x, state = _arguments(self.call)
        value = self.program.values[x.name]
        assert isinstance(value, Value)
        length = value.shape[self.time]
        starts = range(0, length, self.every)
        outputs: list[fx.Node] = []
        with self.graph.inserting_before(self.call):
            for number, start in enumerate(starts):
                size = min(self.every, length - start)
                piece = self._note(
                    self.graph.call_method("narrow", (x, self.time, start, size)), None, self._long(value, size)
                )
                output, state = self._piece(number, piece, state, size, size / length)
                outputs.append(output)
            whole = self._note(self.graph.call_function(torch.cat, (outputs, self.time)), None, self.result[0])
        self._replace(whole, state)
        self.graph.lint()
        conditions = (*self.program.conditions, *_fixed(self.program.node(x.name), self.program))
        return self.program.with_(graph=self.graph, values=self.values, costs=self.costs, conditions=conditions)

    def _piece(self, number: int, piece: fx.Node, state: Any, size: int, share: float) -> tuple[fx.Node, Any]:
        """One call and the items of its result."""
        target = str(self.call.target)
        arguments = (piece,) if state is None else (piece, state)
        output = self._long(self.result[0], size)
        call = self._note(self.graph.call_module(target, arguments), number, (output, self.result[1]))
        spent = self.program.costs.get(self.call.name, Cost())
        self.costs[call.name] = Cost(round(spent.flops * share), round(spent.saved * share))
        first = self._item(call, 0, number, output)
        last = self._item(call, 1, number, self.result[1])
        if not isinstance(self.module, nn.LSTM):
            return first, last
        return first, tuple([self._item(last, place, number, self.result[1][place]) for place in (0, 1)])

    def _item(self, source: fx.Node, place: int, number: int, value: Any) -> fx.Node:
        return self._note(self.graph.call_function(operator.getitem, (source, place)), number, value)

    def _note(self, node: fx.Node, number: int | None, value: Any) -> fx.Node:
        node.meta["block"] = self.block if number is None else (*self.block, (str(self.call.target), number))
        if "source" in self.call.meta:
            node.meta["source"] = self.call.meta["source"]
        self.values[node.name] = value
        return node

    def _long(self, value: Value, size: int) -> Value:
        return replace(value, shape=(*value.shape[: self.time], size, *value.shape[self.time + 1 :]))

    def _replace(self, output: fx.Node, state: Any) -> None:
        for item in list(self.call.users):
            if item.args[1] == 0:
                item.replace_all_uses_with(output)
            elif isinstance(state, tuple):
                for part in list(item.users):
                    part.replace_all_uses_with(state[part.args[1]])  # type: ignore[index]
                    self.graph.erase_node(part)
            else:
                item.replace_all_uses_with(state)
            self.graph.erase_node(item)
        self.graph.erase_node(self.call)
