"""From cuts to pieces of the graph: which nodes lie between two cuts, and what they read from elsewhere."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .operations import is_indexing
from .stream import Block, Stream


@dataclass(frozen=True)
class Part:
    """What lies between two neighbouring cuts.

    nodes: in graph order, the second cut among them; flowing: those of them that lie on the way from cut to cut, the
    rest being sizes and reads of parameters; sides: what they read beside the first cut; elsewhere: those of them,
    or the second cut, that are also read by what is in no part, or returned.
    """

    nodes: tuple[int, ...]
    flowing: tuple[int, ...]
    sides: tuple[int, ...]
    elsewhere: tuple[int, ...]


def parts(stream: Stream, cuts: Sequence[int], between: Iterable[int]) -> list[Part]:
    """The parts between `cuts`, one fewer than these. between: the nodes on the way from the first to the last."""
    place = _placed(stream, cuts)
    place[cuts[0]] = 0
    add_helpers(stream, place, _blocks(stream, place, len(cuts) - 1))
    del place[cuts[0]]
    members: list[list[int]] = [[] for _ in cuts]
    for index in sorted(place):
        members[place[index]].append(index)
    on_the_way = frozenset(between)
    return [
        _part(stream, place, members[number], on_the_way, cuts[number - 1], number) for number in range(1, len(cuts))
    ]


def _placed(stream: Stream, cuts: Sequence[int]) -> dict[int, int]:
    """Each node that descends from the first cut and is needed for a later one -> the number of its part, from 1."""
    number = {cut: position for position, cut in enumerate(cuts)}
    found: dict[int, int] = {}
    for index in range(cuts[0] + 1, cuts[-1] + 1):
        latest = 0
        for source in stream.inputs[index]:
            latest = max(latest, number[source] + 1 if source in number else found.get(source, 0))
        if latest:
            found[index] = latest
    needed = set(cuts[1:])
    for index in range(cuts[-1], cuts[0], -1):
        if index in needed:
            needed.update(source for source in stream.inputs[index] if source in found)
    return {index: position for index, position in found.items() if index in needed}


def add_helpers(stream: Stream, place: dict[int, int], blocks: Sequence[Block]) -> None:
    """Gives a part what it alone reads: what depends on no input (parameters, and what is made of them), and what its
    own module makes of a side input (keys and values of an encoder's memory). Time steps of a sequence stay outside:
    to take them one by one inside the parts would cost a gradient of the whole sequence each.

    place: the nodes of the parts -> their part's number; added to. blocks: by number, the modules that a part is in.
    """
    waiting = [-source for index in place for source in stream.inputs[index] if source not in place]
    heapq.heapify(waiting)
    while waiting:
        index = -heapq.heappop(waiting)
        if index in place or index in stream.returned or stream.nodes[index].op == "placeholder":
            continue
        wanted = {place.get(reader, 0) for reader in stream.readers[index]}
        if len(wanted) != 1 or wanted == {0}:
            continue
        part = wanted.pop()
        block = blocks[part]
        its_own = block and stream.blocks(index)[: len(block)] == block and not is_indexing(stream.nodes[index])
        if stream.fixed[index] or its_own:
            place[index] = part
            for source in stream.inputs[index]:
                heapq.heappush(waiting, -source)


def _blocks(stream: Stream, place: dict[int, int], count: int) -> list[Block]:
    """For each part, the modules that all of its nodes are in, outermost first."""
    found: list[Block | None] = [None] * (count + 1)
    for index, part in place.items():
        if stream.floating[index]:
            known, own = found[part], stream.blocks(index)
            found[part] = own if known is None else tuple(a for a, b in zip(known, own, strict=False) if a == b)
    return [block or () for block in found]


def _part(
    stream: Stream, place: dict[int, int], nodes: list[int], on_the_way: frozenset[int], start: int, number: int
) -> Part:
    sides: dict[int, None] = {}
    for index in nodes:
        for source in stream.inputs[index]:
            if source != start and place.get(source) != number:
                sides[source] = None
    elsewhere = [
        index
        for index in nodes
        if index in stream.returned or any(reader not in place for reader in stream.readers[index])
    ]
    flowing = [index for index in nodes if index in on_the_way]
    return Part(tuple(nodes), tuple(flowing), tuple(sides), tuple(elsewhere))
