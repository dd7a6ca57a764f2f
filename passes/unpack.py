"""The items of a tuple stand next to the call that returned it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from .base import Pass
from .program import Program


@dataclass(frozen=True)
class Unpack(Pass):
    """Reads each item of a returned tuple once, right after the call, as part of the call's block.

    What flows between segments is then tensors, and a region that returns several stays in one piece however late the
    model reads the last of them. Needs `annotate`: only values seen as tuples are taken apart, tensors are not.
    """

    name: ClassVar[str] = "unpack"

    def apply(self, program: Program) -> Program:
        graph = program.edit()
        items: dict[tuple[fx.Node, int], fx.Node] = {}
        last: dict[fx.Node, fx.Node] = {}
        for node in list(graph.nodes):
            if not _is_item(node, program):
                continue
            source, index = node.args
            known = items.setdefault((source, index), node)
            if known is not node:
                node.replace_all_uses_with(known)
                graph.erase_node(node)
                continue
            last.get(source, source).append(node)
            last[source] = node
            node.meta["block"] = source.meta.get("block", ())
        return program.edited(graph)


def _is_item(node: fx.Node, program: Program) -> bool:
    return (
        node.op == "call_function"
        and node.target is operator.getitem
        and isinstance(node.args[0], fx.Node)
        and isinstance(node.args[1], int)
        and isinstance(program.values.get(node.args[0].name), tuple)
    )
