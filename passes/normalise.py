"""A clean graph: no identities, attributes read next to their use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from .base import Pass
from .program import Program


@dataclass(frozen=True)
class Normalise(Pass):
    """Drops `nn.Identity` (they hide residual adds) and reads each attribute right before the node that uses it.

    One read per user lets a partition keep its parameters inside. Anything that may draw random numbers, change a
    buffer or fail stays, used or not.
    """

    name: ClassVar[str] = "normalise"

    def apply(self, program: Program) -> Program:
        graph = program.edit()
        for node in list(graph.nodes):
            if _identity(node, program):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        for node in list(graph.nodes):
            if node.op == "get_attr":
                _localise(graph, node)
        same = [node.name for node in graph.nodes] == [node.name for node in program.graph.nodes]
        return program if same else program.with_(graph=graph)


def _localise(graph: fx.Graph, read: fx.Node) -> None:
    users = [user for user in read.users if user.op != "output"]
    for user in users[1:] if len(users) == len(read.users) else users:
        with graph.inserting_before(user):
            own = graph.get_attr(str(read.target))
        own.meta = {**read.meta, "block": user.meta.get("block", ())}
        user.replace_input_with(read, own)
    if not read.users:
        graph.erase_node(read)
    elif len(users) == len(read.users):
        users[0].prepend(read)


def _identity(node: fx.Node, program: Program) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return False
    module = program.module(str(node.target))
    return type(module) is nn.Identity and not (module._forward_hooks or module._forward_pre_hooks)
