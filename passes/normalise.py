"""A clean graph: no identities, attributes read where they are used."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from .base import Pass
from .program import Program

Block = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Normalise(Pass):
    """Drops `nn.Identity` (they hide residual adds) and reads each attribute where it is used.

    A module reads what it holds right before the node that uses it, so a partition keeps its parameters inside. What is
    passed to a module that does not hold it is read before that module's call, and so is an input of it. Anything that
    may draw random numbers, change a buffer or fail stays, used or not.
    """

    name: ClassVar[str] = "normalise"

    def apply(self, program: Program) -> Program:
        graph = program.edit()
        for node in list(graph.nodes):
            if _identity(node, program):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        places = _Places(program, graph)
        for reads in _reads(graph):
            _localise(graph, reads, places)
        return program.edited(graph)


class _Places:
    """Where an attribute is to be read."""

    def __init__(self, program: Program, graph: fx.Graph) -> None:
        self._program = program
        self._holders = _holders(program.model)
        self._first: dict[Block, fx.Node] = {}
        for node in graph.nodes:
            if node.op not in ("get_attr", "placeholder", "output"):
                block = _block(node)
                for depth in range(1, len(block) + 1):
                    self._first.setdefault(block[:depth], node)

    def before(self, read: fx.Node, user: fx.Node) -> tuple[fx.Node, Block]:
        """The node before which `user`'s read goes, and the block it then belongs to."""
        block = _block(user)
        value = self._program.attribute(str(read.target))
        if not isinstance(value, Tensor):
            return user, block
        holders = self._holders.get(id(value), ())
        depth = len(block)
        while depth and not _within(block[depth - 1][0], holders):
            depth -= 1
        return (user if depth == len(block) else self._first[block[: depth + 1]]), block[:depth]


def _reads(graph: fx.Graph) -> list[list[fx.Node]]:
    """The reads of each attribute."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.find_nodes(op="get_attr"):
        found.setdefault(str(node.target), []).append(node)
    return list(found.values())


def _localise(graph: fx.Graph, reads: list[fx.Node], places: _Places) -> None:
    """One read for each place that wants one; a read that is an output of the model stays where it is."""
    wanted: dict[tuple[fx.Node, Block], list[tuple[fx.Node, fx.Node]]] = {}
    for read in reads:
        for user in read.users:
            if user.op != "output":
                wanted.setdefault(places.before(read, user), []).append((user, read))
    free = [read for read in reads if all(user.op != "output" for user in read.users)]
    for (anchor, block), uses in wanted.items():
        if free:
            own = free.pop(0)
        else:
            own = graph.get_attr(str(reads[0].target))
            own.meta = dict(reads[0].meta)
        anchor.prepend(own)
        own.meta["block"] = block
        for user, read in uses:
            user.replace_input_with(read, own)
    for read in reads:
        if not read.users:
            graph.erase_node(read)


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter, buffer or tensor attribute -> the names of all modules that hold it."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        tensors: Iterable[Any] = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                found.setdefault(id(tensor), []).append(name)
    return found


def _within(module: str, holders: Iterable[str]) -> bool:
    return any(holder == module or holder.startswith(f"{module}.") for holder in holders)


def _block(node: fx.Node) -> Block:
    block: Block = node.meta.get("block", ())
    return block


def _identity(node: fx.Node, program: Program) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return False
    module = program.module(str(node.target))
    return type(module) is nn.Identity and not (module._forward_hooks or module._forward_pre_hooks)
