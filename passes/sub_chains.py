"""A chain in sub-chains: which of its links hand on a value that is to be cut, and who reads it onward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx, nn

from .base import Entry, Refused
from .pieces import in_pieces
from .program import Program, Region
from .regions import calls_at
from .targets import Place


@dataclass(frozen=True)
class Link:
    """The call whose result is cut; onward: names of the nodes of, or on the way to, the next call: only they are cut
    off from it, where there is one."""

    call: Region
    onward: frozenset[str] | None = None


def links(entry: Entry, place: Place, every: int, program: Program) -> tuple[Program, list[Link]] | Refused:
    """The ends of sub-chains of `every` links each; the last sub-chain, which the loss follows, has none.

    A link is a call of a module in a loop, a child of a list of blocks, or a step of an `nn.RNN`, `nn.GRU` or
    `nn.LSTM`, whose call is written as one per sub-chain.
    """
    module = program.module(place.module)
    if place.call is not None:
        return Refused(place.module, "every= counts all calls of a module", f"write the target as `{place.module}`")
    if isinstance(module, nn.RNNBase):
        changed = in_pieces(place, every, program)
        if isinstance(changed, Refused):
            return changed
        program, every = changed, 1
    calls = _calls(entry, place, module, program)
    if isinstance(calls, Refused):
        return calls
    ends = range(every - 1, len(calls) - 1, every)
    if not ends:
        return Refused(place.module, f"a chain of {len(calls)} has no sub-chains of {every} to cut", "a smaller every=")
    return program, [Link(calls[end], _leading_to(calls[end + 1], program)) for end in ends]


def _calls(entry: Entry, place: Place, module: nn.Module, program: Program) -> list[Region] | Refused:
    children = [f"{place.module}.{name}" for name, _ in module.named_children()]
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return calls_at(entry, place, program)
    found: list[Region] = []
    for name in children:
        calls = calls_at(entry, Place(name), program)
        if isinstance(calls, Refused):
            return calls
        found += calls
    order = {node.name: number for number, node in enumerate(program.graph.nodes)}
    return sorted(found, key=lambda call: order[call.owned[0]])


def _leading_to(call: Region, program: Program) -> frozenset[str]:
    found = set(call.owned)
    stack: list[fx.Node] = [program.node(name) for name in call.owned]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source.name not in found:
                found.add(source.name)
                stack.append(source)
    return frozenset(found)


def read_onward(node: fx.Node, inside: Sequence[str], onward: frozenset[str] | None) -> list[fx.Node]:
    """Who reads a call's result outside it, on the way to the next call where there is one."""
    outside = [user for user in node.users if user.name not in inside]
    return outside if onward is None else [user for user in outside if user.name in onward]
