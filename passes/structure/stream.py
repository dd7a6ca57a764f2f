"""The values that gradients flow through, numbered in the order of the graph."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from torch import fx, nn

from rewriter.passes.program import Program, Value

from .operations import writes

Block = tuple[tuple[str, int], ...]


class Stream:
    """A program's nodes by number, who reads whom, and along which reads a gradient may come back.

    Numbers are places in the graph's order, so whatever a node reads has a smaller one. A read of a value that was
    written in place reads what the write returned. `flows` leaves out what carries no cotangent: whole numbers, sizes,
    and the step from a differentiable value to one that is not (`detach`). What came before the first differentiable
    value (inputs, masks, parameters) is kept: whether it counts is for the reader of the stream to say.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._modules: dict[str, nn.Module] = {}
        self.nodes: list[fx.Node] = [node for node in program.graph.nodes if node.op != "output"]
        self.number = {node: index for index, node in enumerate(self.nodes)}
        self.inputs = self._reads()
        self.floating = [False] * len(self.nodes)
        self.differentiable = [False] * len(self.nodes)
        self.rows = [False] * len(self.nodes)
        for index, node in enumerate(self.nodes):
            values = _values(program.values.get(node.name) or self._written(index))
            self.floating[index] = any(value.dtype.is_floating_point for value in values)
            self.differentiable[index] = any(value.differentiable for value in values)
            self.rows[index] = any(value.rows is not None for value in values)
        self.flows = [self._flowing(index) for index in range(len(self.nodes))]
        self.readers = _turned(self.inputs)
        self.returned = {self.number[node] for node in program.graph.output_node().all_input_nodes}

    def __len__(self) -> int:
        return len(self.nodes)

    def names(self, indices: Iterable[int]) -> tuple[str, ...]:
        return tuple(self.nodes[index].name for index in indices)

    def module(self, index: int) -> nn.Module | None:
        """The module that a node calls."""
        node = self.nodes[index]
        return self.module_at(str(node.target)) if node.op == "call_module" else None

    def module_at(self, path: str) -> nn.Module:
        """The module of that name."""
        known = self._modules.get(path)
        if known is None:
            known = self._modules[path] = self.program.module(path)
        return known

    def block(self, index: int) -> str:
        """The innermost module that a node belongs to; "" for the model's own forward."""
        block = self.blocks(index)
        return block[-1][0] if block else ""

    def blocks(self, index: int) -> Block:
        """The calls of modules that a node belongs to, outermost first: (name, which call)."""
        block: Block = self.nodes[index].meta.get("block", ())
        return block

    def parameters(self, index: int) -> dict[str, nn.Parameter]:
        """The parameters a node uses, by name: the module's that it calls, or those it reads or that were made ready
        for it alone (`weight.t()`)."""
        module = self.module(index)
        if module is not None:
            path = str(self.nodes[index].target)
            return {f"{path}.{name}": parameter for name, parameter in module.named_parameters()}
        found: dict[str, nn.Parameter] = {}
        stack = [index]
        while stack:
            current = stack.pop()
            node = self.nodes[current]
            if node.op == "get_attr":
                value = self.program.attribute(str(node.target))
                found.update({str(node.target): value} if isinstance(value, nn.Parameter) else {})
            stack.extend(source for source in reversed(self.inputs[current]) if self.fixed[source])
        return found

    @cached_property
    def fixed(self) -> list[bool]:
        """Whether a node depends on nothing that the model is given: parameters, constants and what is made of them."""
        found: list[bool] = []
        for index, node in enumerate(self.nodes):
            found.append(node.op != "placeholder" and all(found[source] for source in self.inputs[index]))
        return found

    def _written(self, index: int) -> Any:
        """What a write that returns nothing (`x[0] = y`) leaves behind."""
        node = self.nodes[index]
        sources = node.all_input_nodes
        return self.program.values.get(sources[0].name) if sources and writes(node, self.module_at) else None

    def _reads(self) -> list[tuple[int, ...]]:
        latest: dict[int, int] = {}
        inputs = []
        for index, node in enumerate(self.nodes):
            sources = [self.number[source] for source in node.all_input_nodes]
            inputs.append(tuple(dict.fromkeys(_resolved(source, latest) for source in sources)))
            if sources and writes(node, self.module_at):
                latest[_resolved(sources[0], latest)] = index
        return inputs

    def _flowing(self, index: int) -> tuple[int, ...]:
        if not self.floating[index]:
            return ()
        followed = self.differentiable[index]
        sources = (source for source in self.inputs[index] if self.floating[source])
        return tuple(source for source in sources if followed or not self.differentiable[source])


def _values(value: Any) -> list[Value]:
    if isinstance(value, tuple):
        return [inner for item in value for inner in _values(item)]
    return [value] if isinstance(value, Value) else []


def _resolved(source: int, latest: dict[int, int]) -> int:
    """What a value has become by the writes so far."""
    passed = []
    while source in latest:
        passed.append(source)
        source = latest[source]
    latest.update(dict.fromkeys(passed, source))
    return source


def _turned(inputs: list[tuple[int, ...]]) -> list[list[int]]:
    readers: list[list[int]] = [[] for _ in inputs]
    for index, sources in enumerate(inputs):
        for source in sources:
            readers[source].append(index)
    return readers
