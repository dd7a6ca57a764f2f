"""Nodes of a region next to each other, so that they can become one submodule."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import fx

from .base import Refused
from .program import Program, reach
from .structure.operations import writes


def together(names: Sequence[str], program: Program, where: str) -> Program | Refused:
    """The program with these nodes (a convex set, in graph order) next to each other.

    What stands between goes before the first one, or behind the last one where it depends on one of them; refused where
    it has effects (see `Annotate`). `where`: the part of the model, for the refusal.
    """
    graph = program.edit()
    nodes = {node.name: node for node in graph.nodes}
    inside = {nodes[name] for name in names}
    first, last = nodes[names[0]], nodes[names[-1]]
    order = list(graph.nodes)
    between = [node for node in order[order.index(first) : order.index(last)] if node not in inside]
    after = set(reach(list(inside)))
    for node in between:
        if node.name in program.effects:
            return Refused(
                f"{where}: {node.name}",
                f"it stands between nodes of {where}, and draws random numbers, changes a tensor or evaluates a box",
                "compute it before or after that part",
            )
    for node in between:
        if node in after:
            last.append(node)
            last = node
        else:
            first.prepend(node)
    return program.edited(graph)


def renamed(program: Program) -> Program:
    """The program with every read behind a write in place taken from the write's result, which is the same tensor.

    A cut through such a value then finds all its readers. Writes that return nothing (`x[0] = y`) stay as they are.
    """
    graph = program.edit()
    latest: dict[fx.Node, fx.Node] = {}

    def resolved(node: fx.Node) -> fx.Node:
        while node in latest:
            node = latest[node]
        return node

    for node in graph.nodes:
        node.args = fx.node.map_arg(node.args, resolved)
        node.kwargs = fx.node.map_arg(node.kwargs, resolved)
        if node.all_input_nodes and writes(node, program.module) and node.target is not operator.setitem:
            latest[node.all_input_nodes[0]] = node
    before = [node.args for node in program.graph.nodes]
    after = [node.args for node in graph.nodes]
    return program if str(before) == str(after) else program.with_(graph=graph)
