"""What is the same twice: structural signatures of pieces of a graph, and tandem repeats among them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from .operations import is_copy, is_indexing, name_of
from .parts import Part
from .result import Repeat
from .stream import Stream

_LONGEST_PERIOD = 64  # segments in one unit of a repeat


def signature(stream: Stream, nodes: Sequence[int], start: int | None = None) -> tuple[Any, ...]:
    """Equal for two pieces that do the same to values of the same shapes, whatever parameters they hold.

    Per node: the operation with its constants, the shapes of the parameters, who reads whom inside the piece, and the
    shape of the value. Where a value from elsewhere was taken from (`x[:, t]`) does not count, only its shape; casts
    and copies that change nothing do not count at all.
    """
    local: dict[int, Any] = {} if start is None else {start: "start"}
    found: list[tuple[Any, ...]] = []
    for index in nodes:
        sources = tuple(local.get(source, _shape(stream, source)) for source in stream.inputs[index])
        if is_copy(stream.nodes[index]) and _shape(stream, index) == _shape(stream, stream.inputs[index][0]):
            local[index] = sources[0]
            continue
        local[index] = len(found)
        found.append((operation(stream, index), sources, _shape(stream, index)))
    return tuple(found)


def operation(stream: Stream, index: int) -> tuple[Any, ...]:
    """What a node does: its operation and constants; a module's class, options and the shapes of its parameters."""
    node = stream.nodes[index]
    name = name_of(node, stream.module_at)
    module = stream.module(index)
    if module is not None:
        return (name, module.extra_repr(), tuple(tuple(p.shape) for p in module.parameters()))
    if node.op in ("get_attr", "placeholder"):
        return (node.op,)
    picks = is_indexing(node) and not isinstance(stream.program.values.get(node.all_input_nodes[0].name), tuple)
    return (name, str(node.target)) if picks else (name, str(node.target), _constants(node))


def _constants(node: fx.Node) -> str:
    return repr(fx.map_arg((node.args, node.kwargs), lambda _: None))


def _shape(stream: Stream, index: int) -> str:
    return str(stream.program.values.get(stream.nodes[index].name))


def repeats(stream: Stream, cuts: Sequence[int], pieces: Sequence[Part]) -> tuple[Repeat, ...]:
    """Tandem repeats among the pieces between neighbouring cuts, the longest first."""
    known: dict[Any, int] = {}
    codes = [
        known.setdefault(signature(stream, part.nodes, start), len(known))
        for start, part in zip(cuts, pieces, strict=False)
    ]
    return tuple(
        Repeat(start, period, count, _shared(stream, pieces[start : start + period * count], period))
        for start, period, count in tandem(codes)
    )


def tandem(codes: Sequence[int]) -> list[tuple[int, int, int]]:
    """(start, period, count) of runs of equal neighbouring units, disjoint, the longest first, then shorter periods."""
    found: list[tuple[int, int, int]] = []
    for period in range(1, min(_LONGEST_PERIOD, len(codes) // 2) + 1):
        start = 0
        for position in range(period, len(codes) + 1):
            if position < len(codes) and codes[position] == codes[position - period]:
                continue
            count = (position - start) // period
            if count > 1:
                found.append((start, period, count))
            start = position - period + 1
    found.sort(key=lambda run: (-run[1] * run[2], run[1], run[0]))
    taken = [False] * len(codes)
    kept = []
    for start, period, count in found:
        places = range(start, start + period * count)
        if not any(taken[place] for place in places):
            kept.append((start, period, count))
            for place in places:
                taken[place] = True
    return kept


def _shared(stream: Stream, pieces: Sequence[Part], period: int) -> bool:
    units = [_parameters(stream, pieces[start : start + period]) for start in range(0, len(pieces), period)]
    return bool(units[0]) and all(unit == units[0] for unit in units)


def _parameters(stream: Stream, pieces: Iterable[Part]) -> list[int]:
    """The parameters that pieces use, by identity, in the order of their use."""
    return [id(value) for part in pieces for index in part.nodes for value in stream.parameters(index).values()]
