"""Which modules and parameters are used more than once, each time on what came of the time before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from .repeats import operation
from .stream import Stream


@dataclass(frozen=True)
class Calls:
    """Several calls of one cell. name: its modules or parameters; calls: the nodes of each, in graph order."""

    name: str
    calls: tuple[tuple[int, ...], ...]


def repeated_calls(stream: Stream) -> list[Calls]:
    """Cells that are called at least twice, each call on what came of the one before.

    A cell is the outermost module that is called again, or a parameter that a loop in a forward reads itself. Cells
    that wait for each other (the gates of one step, written apart) count as one.
    """
    groups = _modules(stream)
    groups += _parameters(stream, {index for group in groups for call in group.calls for index in call})
    groups = [group for group in groups if alike(stream, group.calls[-1], group.calls[-2])]
    waits = _dependences(stream, groups)
    merged: list[Calls] = []
    seen: set[int] = set()
    for number, group in enumerate(groups):
        if number in seen or not waits[number] >> number & 1:
            continue
        mutual = [
            other
            for other, each in enumerate(groups)
            if len(each.calls) == len(group.calls) and waits[number] >> other & waits[other] >> number & 1
        ]
        seen.update(mutual)
        names = ", ".join(groups[other].name for other in mutual)
        merged.append(Calls(names, _joined(groups[other].calls for other in mutual)))
    return merged


def _modules(stream: Stream) -> list[Calls]:
    """Modules with parameters that are called more than once, outermost ones only."""
    found: dict[str, dict[int, list[int]]] = {}
    for index, node in enumerate(stream.nodes):
        if node.op in ("placeholder", "get_attr"):
            continue
        for path, call in node.meta.get("block", ()):
            found.setdefault(path, {}).setdefault(call, []).append(index)
    several = {
        path: calls
        for path, calls in found.items()
        if len(calls) > 1 and next(stream.module_at(path).parameters(), None) is not None
    }
    outermost = [path for path in several if not any(path.startswith(f"{other}.") for other in several)]
    return [Calls(path, tuple(tuple(several[path][call]) for call in sorted(several[path]))) for path in outermost]


def _parameters(stream: Stream, known: set[int]) -> list[Calls]:
    """Parameters that are read more than once outside the modules found: each read is a call."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for index, node in enumerate(stream.nodes):
        if node.op != "get_attr" or not stream.parameters(index):
            continue
        for reader in _using(stream, index):
            if reader not in known:
                found.setdefault(str(node.target), []).append((reader,))
    return [Calls(name, tuple(sorted(calls))) for name, calls in found.items() if len(calls) > 1]


def _using(stream: Stream, read: int) -> list[int]:
    """Who uses a parameter, through what is made of it alone (`weight.t()`)."""
    users: list[int] = []
    stack = list(stream.readers[read])
    while stack:
        index = stack.pop()
        if stream.fixed[index]:
            stack.extend(stream.readers[index])
        else:
            users.append(index)
    return sorted(set(users))


def alike(stream: Stream, call: Sequence[int], earlier: Sequence[int]) -> dict[int, int] | None:
    """Each node of a call -> the one in its place in an earlier call that does the same; None where they differ.

    The earlier call may do more: what nobody reads of the last call is not in the graph.
    """
    rest, inside, before = iter(earlier), set(call), set(earlier)
    found: dict[int, int] = {}
    for index in call:
        doing = _doing(stream, index, inside)
        twin = next((other for other in rest if _doing(stream, other, before) == doing), None)
        if twin is None:
            return None
        found[index] = twin
    return found


def _doing(stream: Stream, index: int, call: AbstractSet[int]) -> tuple[Any, ...]:
    """An operation, and what was made of parameters for it: a weight and its transpose are not used alike."""
    made = (source for source in stream.inputs[index] if stream.fixed[source] and source not in call)
    return (operation(stream, index), *(operation(stream, source) for source in made if stream.parameters(source)))


def _dependences(stream: Stream, groups: list[Calls]) -> list[int]:
    """For each group, as bits: the groups whose calls go into its last one; itself where its own earlier calls do."""
    own: dict[int, int] = {}
    last: dict[int, list[int]] = {}
    for number, group in enumerate(groups):
        for call in group.calls:
            for index in call:
                own[index] = own.get(index, 0) | 1 << number
        for index in group.calls[-1]:
            last.setdefault(index, []).append(number)
    inside = [set(group.calls[-1]) for group in groups]
    waits = [0] * len(groups)
    reached = [0] * len(stream)
    for index, sources in enumerate(stream.flows):
        for source in sources:
            reached[index] |= reached[source]
        for number in last.get(index, ()):
            for source in sources:
                if source not in inside[number]:
                    waits[number] |= reached[source]
        reached[index] |= own.get(index, 0)
    return waits


def _joined(groups: Iterable[tuple[tuple[int, ...], ...]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(sorted({i for call in calls for i in call})) for calls in zip(*groups, strict=True))
