"""A chain in sub-chains: which of its links hand on a value that is to be cut, and who reads it onward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx, nn

from .base import Entry, Refused
from .chain import block_regions
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


@dataclass(frozen=True)
class Links:
    """chains: the links of each chain, in order, that the calls of one module make; size: links of a sub-chain."""

    program: Program
    chains: tuple[tuple[Region, ...], ...]
    size: int

    def ends(self) -> list[Link]:
        """What is cut, in the graph's order: the last sub-chain, which the loss follows, has no end."""
        order = {node.name: number for number, node in enumerate(self.program.graph.nodes)}
        places = [
            (chain[place], chain[place + 1])
            for chain in self.chains
            for place in range(self.size - 1, len(chain) - 1, self.size)
        ]
        places.sort(key=lambda pair: order[pair[0].owned[0]])
        return [Link(call, _leading_to(following, self.program)) for call, following in places]

    def groups(self) -> list[tuple[str | None, tuple[str, ...]]]:
        """For each sub-chain the name of the link before it, and the names of the nodes of its own."""
        return [
            (
                chain[start - 1].name if start else None,
                tuple(n for c in chain[start : start + self.size] for n in c.owned),
            )
            for chain in self.chains
            for start in range(0, len(chain), self.size)
        ]


def links(entry: Entry, place: Place, every: int, program: Program) -> Links | Refused:
    """A chain in sub-chains of `every` links.

    A link is a call of a module in a loop, a child of a list of blocks with what lies between it and the next one, or
    a step of an `nn.RNN`, `nn.GRU` or `nn.LSTM`, whose call is written as one per sub-chain.
    """
    module = program.module(place.module)
    if place.call is not None:
        return Refused(place.module, "every= counts all calls of a module", f"write the target as `{place.module}`")
    if isinstance(module, nn.RNNBase):
        changed = in_pieces(place, every, program)
        if isinstance(changed, Refused):
            return changed
        program, every = changed, 1
    calls: Sequence[Region] | Refused
    if isinstance(module, nn.ModuleList | nn.Sequential):
        program, calls = _blocks(entry, place, module, program)
    else:
        calls = calls_at(entry, place, program)
    if isinstance(calls, Refused):
        return calls
    chains = _chains(calls, program)
    longest = max(map(len, chains))
    if longest <= every:
        return Refused(place.module, f"a chain of {longest} has no sub-chains of {every} to cut", "a smaller every=")
    return Links(program, chains, every)


def _chains(calls: Sequence[Region], program: Program) -> tuple[tuple[Region, ...], ...]:
    """The calls, each behind the latest one whose result it reads; one that two others read goes on in the first."""
    owners = {name: number for number, call in enumerate(calls) for name in call.owned}
    chains: list[list[int]] = []
    for number, call in enumerate(calls):
        found: set[int] = set()
        seen: set[fx.Node] = set()
        stack = [program.node(name) for name in call.owned]
        while stack:
            for source in stack.pop().all_input_nodes:
                owner = owners.get(source.name, number)
                if owner != number:
                    found.add(owner)
                elif source not in seen and source.name not in call.owned:
                    seen.add(source)
                    stack.append(source)
        chain = next((chain for chain in chains if found and chain[-1] == max(found)), None)
        if chain is None:
            chains.append(chain := [])
        chain.append(number)
    return tuple(tuple(calls[number] for number in chain) for chain in chains)


def _blocks(
    entry: Entry, place: Place, module: nn.Module, program: Program
) -> tuple[Program, Sequence[Region] | Refused]:
    """Each child's part of the chain: up to the next single tensor, a residual sum included, where there is such."""
    found = block_regions(entry, program)
    if not isinstance(found, Refused) and len(found[1]) == 1:
        changed, (region,) = found
        return changed, [Region(piece.output, entry, region.target, piece.nodes) for piece in region.parts]
    calls: list[Region] = []
    for name, _ in module.named_children():
        own = calls_at(entry, Place(f"{place.module}.{name}"), program)
        if isinstance(own, Refused):
            return program, own
        calls += own
    order = {node.name: number for number, node in enumerate(program.graph.nodes)}
    return program, sorted(calls, key=lambda call: order[call.owned[0]])


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
