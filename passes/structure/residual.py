"""Residual adds: where a value meets what was computed from it."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from .operations import is_copy, is_difference, is_product, is_sum, kind_of
from .stream import Stream


@dataclass(frozen=True)
class Link:
    """A sum that holds its block's input again: `start` is the input, `skip_nodes` what it goes through on the way."""

    start: int
    add: int
    skip: str
    skip_nodes: tuple[int, ...]


@dataclass(frozen=True)
class _Term:
    """One term of a sum. sums: the sums it goes through before the last one; plus: whether it is added."""

    value: int
    sums: tuple[int, ...]
    plus: bool


def residual(stream: Stream, start: int, end: int, between: AbstractSet[int]) -> Link | None:
    """The link from one cut to the next where `end` is a residual add of `start`, else None.

    A sum of several terms counts as one. The skip is the input itself, or else the shortest straight way from the
    input to a term: no activation on it, shorter than every other one. The branch has to use parameters, or a
    differentiable side input: `x + x ** 3` is an activation.
    """
    if not (is_sum(stream.nodes[end]) and stream.differentiable[end]):
        return None
    terms = _terms(stream, start, end, between)
    if len(terms) < 2 or not _does_work(stream, start, end, between):
        return None
    ways = [(way, term) for term in terms if (way := _way(stream, start, term.value, between)) is not None]
    ways.sort(key=lambda each: len(each[0]))
    if not ways or (len(ways) > 1 and len(ways[0][0]) == len(ways[1][0])):
        return None
    way, term = ways[0]
    kind = _kind(stream, way, between)
    return Link(start, end, kind, tuple(sorted((*way, *term.sums)))) if kind and term.plus else None


def _terms(stream: Stream, start: int, end: int, between: AbstractSet[int]) -> list[_Term]:
    """The terms of a sum, through sums that nothing else reads."""
    terms: list[_Term] = []
    stack: list[tuple[int, tuple[int, ...], bool]] = [(end, (), True)]
    while stack:
        index, sums, added = stack.pop()
        node = stream.nodes[index]
        for position, source in enumerate(stream.flows[index]):
            if source not in between:
                continue
            plus = added and not (is_difference(node) and position > 0)
            alone = sum(reader in between for reader in stream.readers[source]) == 1
            if alone and source != start and is_sum(stream.nodes[source]):
                stack.append((source, (*sums, source), plus))
            else:
                terms.append(_Term(source, sums, plus))
    return terms


def _way(stream: Stream, start: int, term: int, between: AbstractSet[int]) -> list[int] | None:
    """The straight way from `start` to `term`, last node first; a product of `start` with anything is one."""
    way: list[int] = []
    index = term
    while index != start:
        way.append(index)
        sources = [source for source in stream.flows[index] if source in between]
        if len(way) == 1 and len(sources) == 2 and start in sources and is_product(stream.nodes[index]):
            return way
        if len(sources) != 1:
            return None
        index = sources[0]
    return way


def _kind(stream: Stream, way: list[int], between: AbstractSet[int]) -> str:
    """What a skip along this way is; "" where there is an activation on it."""
    if way and sum(source in between for source in stream.flows[way[0]]) == 2:
        return "gate"
    if all(is_copy(stream.nodes[index]) for index in way):
        return "identity"
    kinds = (kind_of(stream.nodes[index], stream.module_at) for index in way)
    return "" if "activation" in kinds else "projection"


def _does_work(stream: Stream, start: int, end: int, between: AbstractSet[int]) -> bool:
    """Whether parameters or differentiable side inputs go into what lies between."""
    inside = [index for index in range(start + 1, end + 1) if index in between]
    sides = (source for index in inside for source in stream.inputs[index] if source not in between)
    return any(stream.differentiable[source] for source in sides) or any(map(stream.parameters, inside))
