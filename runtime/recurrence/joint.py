"""One step of a recurrence and its vjp, as one graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from rewriter.runtime.errors import RewriteError

# What a node depends on: weights alone; the time step too; the running cotangent, which only the loop knows.
STATIC, VARYING, RUNNING = range(3)

Tensors = tuple[Tensor, ...]
Cell = Callable[[Tensors, Tensors, Tensors], Tensors]


@dataclass
class Joint:
    """A step (inputs, states, weights) -> results, and the gradients of its sources from cotangents of the results.

    results: the next states, then the step's outputs; kinds: STATIC, VARYING or RUNNING for every node. Gradients that
    nobody needs are None.
    """

    root: fx.GraphModule
    inputs: list[fx.Node]
    states: list[fx.Node]
    weights: list[fx.Node]
    state_cotangents: list[fx.Node]
    output_cotangents: list[fx.Node]
    results: list[fx.Node]
    input_gradients: list[fx.Node | None]
    state_gradients: list[fx.Node]
    weight_gradients: list[fx.Node | None]
    kinds: dict[fx.Node, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.root.graph.nodes:
            self.kinds[node] = self._kind(node)

    def add(self, before: fx.Node, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        """A new node in front of another one; like: a node whose shape and dtype it has."""
        with self.root.graph.inserting_before(before):
            node = self.root.graph.call_function(target, args, kwargs)
        if like is not None:
            node.meta["val"] = like.meta["val"]
        self.kinds[node] = self._kind(node)
        return node

    def _kind(self, node: fx.Node) -> int:
        if node in self.state_cotangents:
            return RUNNING
        if node.op == "placeholder":
            return STATIC if node in self.weights else VARYING
        return max((self.kinds[source] for source in node.all_input_nodes), default=STATIC)


def shape(node: fx.Node) -> tuple[int, ...] | None:
    """Of one step's value; None where it is not a tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def cone(wanted: Sequence[fx.Node], known: Sequence[fx.Node] | set[fx.Node]) -> set[fx.Node]:
    """The nodes that must be evaluated for the wanted ones, those known left out."""
    known = set(known)
    found: set[fx.Node] = set()
    stack = [node for node in wanted if node not in known]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(source for source in node.all_input_nodes if source not in known)
    return found


def trace(cell: Cell, inputs: Tensors, states: Tensors, weights: Tensors, needed: Sequence[bool]) -> Joint:
    """Traces `cell(inputs, states, weights) -> (*next states, *outputs)` and its vjp for tensors of these shapes.

    needed: per input and then per weight, whether its gradient is wanted. Raises RewriteError for a cell that draws
    random numbers or writes into what it is given.
    """
    sources = (*inputs, *states, *weights)
    wanted = [*needed[: len(inputs)], *(True for _ in states), *needed[len(inputs) :]]
    first, last = len(inputs), len(inputs) + len(states)

    def step(*given: Tensor) -> Tensors:
        return tuple(cell(given[:first], given[first:last], given[last:]))

    results = _tried(step, sources, _name(cell))

    def joint(*given: Tensor) -> Tensors:
        values, cotangents = list(given[: len(sources)]), given[len(sources) :]
        places = [index for index, want in enumerate(wanted) if want]

        def of_wanted(*chosen: Tensor) -> Tensors:
            for index, value in zip(places, chosen, strict=True):
                values[index] = value
            return step(*values)

        pair: Any = torch.func.vjp(of_wanted, *(values[index] for index in places))
        found, pull = pair
        return (*found, *pull(tuple(cotangents)))

    functional = torch.func.functionalize(joint)
    root = make_fx(functional, tracing_mode="fake")(*sources, *results)
    root.graph.eliminate_dead_code()
    _check(root.graph, _name(cell))
    return _described(root, first, last, len(sources), len(results), wanted)


def _described(
    root: fx.GraphModule, first: int, last: int, sources: int, results: int, wanted: Sequence[bool]
) -> Joint:
    given = [node for node in root.graph.nodes if node.op == "placeholder"]
    returned = list(root.graph.output_node().args[0])  # type: ignore[arg-type]
    found = iter(returned[results:])
    gradients = [next(found) if want else None for want in wanted]
    cotangents = given[sources:]
    states = last - first
    return Joint(
        root,
        inputs=given[:first],
        states=given[first:last],
        weights=given[last:sources],
        state_cotangents=cotangents[:states],
        output_cotangents=cotangents[states:],
        results=returned[:results],
        input_gradients=gradients[:first],
        state_gradients=[node for node in gradients[first:last] if node is not None],
        weight_gradients=gradients[last:],
    )


def _name(cell: Cell) -> str:
    return getattr(cell, "__name__", type(cell).__name__)


def _tried(step: Callable[..., Tensors], sources: Tensors, cell: str) -> Tensors:
    copies = [source.detach().clone() for source in sources]
    with torch.no_grad():
        results = step(*copies)
    if any(copy._version for copy in copies):
        raise RewriteError(
            "a recurrent cell writes into a tensor it was given",
            where=cell,
            why="steps are evaluated again, all at once",
            remedy="return the new value instead",
        )
    return results


def _check(graph: fx.Graph, cell: str) -> None:
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            raise RewriteError(
                "a recurrent cell draws random numbers",
                where=f"{cell}: {node.target}",
                why="steps are evaluated again, all at once, and would draw others",
                remedy="take the entry off this part, or apply dropout outside the cell",
            )
