"""Nodes of a step's graph, evaluated for all time steps at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from .joint import STATIC, Joint, cone

Values = dict[fx.Node, Tensor]


def function_of(joint: Joint, sources: Sequence[fx.Node], wanted: Sequence[fx.Node]) -> fx.GraphModule:
    """The wanted nodes as a function of the sources."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in sources}
    inside = cone(wanted, sources)
    for node in joint.root.graph.nodes:
        if node in inside:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple([copies[node] for node in wanted]))
    return fx.GraphModule(joint.root, graph)


class Statics:
    """The nodes that other ones read and that depend on weights alone: evaluated once, not once a step."""

    def __init__(self, joint: Joint, wanted: Sequence[fx.Node]) -> None:
        self.nodes = [node for node in wanted if node not in joint.weights]
        self.weights = joint.weights
        self._function = function_of(joint, joint.weights, self.nodes) if self.nodes else None

    def __call__(self, values: Values) -> None:
        if self._function is not None:
            found = self._function(*[values[node] for node in self.weights])
            values.update(zip(self.nodes, found, strict=True))


class AllSteps:
    """Adds the wanted nodes' values to a dictionary that holds those of `known`, time in dimension 0.

    Values that depend on weights alone have no dimension of time. One vmap over time: what is read from the graph of
    one step, whatever its layout, holds for all of them.
    """

    def __init__(self, joint: Joint, known: Sequence[fx.Node], wanted: Sequence[fx.Node]) -> None:
        fixed = [node for node in joint.root.graph.nodes if joint.kinds[node] == STATIC]
        wanted = list(dict.fromkeys(node for node in wanted if node not in set(known)))
        self.wanted = [node for node in wanted if joint.kinds[node] != STATIC]
        inside = cone(self.wanted, {*known, *fixed})
        read = {source for node in inside for source in node.all_input_nodes} - inside
        self.known = [node for node in known if node in read]
        self.fixed = [node for node in fixed if node in read]
        self.statics = Statics(joint, [*self.fixed, *(node for node in fixed if node in set(wanted) - set(self.fixed))])
        self._function = function_of(joint, [*self.known, *self.fixed], self.wanted) if self.wanted else None

    def __call__(self, values: Values) -> None:
        self.statics(values)
        if self._function is None:
            return
        along = (*(0 for _ in self.known), *(None for _ in self.fixed))
        sources = [values[node] for node in (*self.known, *self.fixed)]
        values.update(zip(self.wanted, torch.vmap(self._function, in_dims=along)(*sources), strict=True))
