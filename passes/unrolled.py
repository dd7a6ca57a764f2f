"""A cell called in a Python loop: its calls as one region, and one call as a segment of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from rewriter.runtime.segment import Segment
from rewriter.runtime.unrolled import Roles

from .base import Entry, Refused
from .emit import emit_segment, graph_of
from .order import together
from .program import Program, Region, Value, reach
from .regions import inputs_of, outputs_of, regions_at
from .targets import Place


@dataclass(frozen=True)
class Unrolled:
    """One call of the cell, by the names of its nodes.

    step: a graph (*inputs, *states, *shared) -> (*next states, *other results), its nodes those of the second call;
    roles: what the region's inputs and outputs are to it.
    """

    step: fx.Graph
    roles: Roles


def gathered(entry: Entry, place: Place, program: Program) -> tuple[Program, Region] | Refused:
    """The program with all calls of the cell next to each other, and the region they make.

    What stands between two calls goes before the first one, or behind the last one where it reads a call.
    """
    calls = regions_at(entry, place, program)
    if isinstance(calls, Refused):
        return calls
    where = place.module
    if place.call is not None or len(calls) < 2:
        count = "one call of it is named" if place.call is not None else "it is called once"
        return Refused(where, f"{count}, and there is no loop to differentiate", "name a cell that a loop calls")
    owned = [name for call in calls for name in call.owned]
    inside = set(owned)
    behind = {node.name for node in reach([program.node(name) for name in owned])}
    between = [node for node in program.graph.nodes if node.name in behind - inside]
    changed = [node.name for node in between if any(user.name in inside for user in node.users)]
    if changed:
        return Refused(
            f"{where}: {changed[0]}",
            "what a call returns is changed outside the cell before the next call takes it",
            "make that part of the cell's own forward",
        )
    moved = together(owned, program, where)
    return moved if isinstance(moved, Refused) else (moved, Region(where, entry, where, tuple(owned)))


def read(region: Region, program: Program) -> Unrolled | Refused:
    """One call of the region's cell and the roles of what crosses the region's border. Needs `gathered`."""
    calls = _calls(region, program)
    for node in (node for call in calls for node in call):
        refused = _unsuitable(node, region, program)
        if refused is not None:
            return refused
    if any(_shape_of(call) != _shape_of(calls[0]) for call in calls):
        return Refused(
            region.name,
            "its calls do not do the same (or the first one is given no state)",
            "pass the initial state to the first call, and keep what depends on the step outside the cell",
        )
    return _roles(region, program, calls)


def _calls(region: Region, program: Program) -> list[list[fx.Node]]:
    found: dict[int, list[fx.Node]] = {}
    for name in region.owned:
        node = program.node(name)
        index = next(index for module, index in node.meta["block"] if module == region.target)
        found.setdefault(index, []).append(node)
    return [found[index] for index in sorted(found)]


def _unsuitable(node: fx.Node, region: Region, program: Program) -> Refused | None:
    where = f"{region.name}: {node.name}"
    if node.op == "call_module" and any(True for _ in program.module(str(node.target)).buffers()):
        return Refused(where, "it holds buffers, which one call could change for the next", "keep such parts outside")
    value = program.values.get(node.name)
    crosses = any(user.name not in region.owned for user in node.users)
    if crosses and not isinstance(value, Value):
        return Refused(where, "a tuple or a number crosses the border of the loop", "take tuples apart in the cell")
    return None


def _sources(calls: Sequence[Sequence[fx.Node]]) -> list[tuple[fx.Node, ...]]:
    """What the calls read: one tuple per source, a node for each call."""
    reads = []
    for call in calls:
        own: list[fx.Node] = []
        for node in call:
            fx.node.map_arg((node.args, node.kwargs), own.append)
        reads.append([source for source in own if source not in call])
    return list(dict.fromkeys(zip(*reads, strict=True)))


def _shape_of(call: Sequence[fx.Node]) -> tuple[Any, ...]:
    """Operations and arguments with nodes replaced by their places: equal for calls that do the same."""
    places = {node: index for index, node in enumerate(call)}

    def numbered(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return _Place(places.get(argument))
        if isinstance(argument, tuple | list):  # fx keeps lists in a class of its own
            return tuple(map(numbered, argument))
        return {key: numbered(value) for key, value in argument.items()} if isinstance(argument, dict) else argument

    return tuple((n.op, str(n.target), repr(numbered(n.args)), repr(numbered(n.kwargs))) for n in call)


@dataclass(frozen=True)
class _Place:
    """Stands for a node: its place in the call, None outside."""

    index: int | None


def _roles(region: Region, program: Program, calls: list[list[fx.Node]]) -> Unrolled | Refused:
    sources = _sources(calls)
    states = [own for own in sources if own[1] in calls[0]]
    refused = _no_chain(region, program, calls, sources, states)
    if refused is not None:
        return refused
    others = [own for own in sources if own not in states]
    shared = [own for own in others if len(set(own)) == 1]
    stepwise = [own for own in others if own not in shared]
    results = [calls[0].index(own[1]) for own in states]  # places in a call
    outputs: list[tuple[int, int]] = []
    where = {node: (number, place) for number, call in enumerate(calls) for place, node in enumerate(call)}
    for node in outputs_of(program, region):
        number, place = where[node]
        if place not in results:
            results.append(place)
        outputs.append((results.index(place), number))
    given = {node: position for position, node in enumerate(inputs_of(program, region))}
    step = graph_of(calls[1], [own[1] for own in (*stepwise, *states, *shared)], [calls[1][place] for place in results])
    roles = Roles(
        steps=len(calls),
        inputs=tuple(tuple([given[node] for node in own]) for own in stepwise),
        states=tuple([given[own[0]] for own in states]),
        shared=tuple([given[own[0]] for own in shared]),
        outputs=tuple(outputs),
        flops=sum(program.costs[node.name].flops for node in calls[1] if node.name in program.costs),
    )
    return Unrolled(step, roles)


def _no_chain(
    region: Region,
    program: Program,
    calls: list[list[fx.Node]],
    sources: list[tuple[fx.Node, ...]],
    states: list[tuple[fx.Node, ...]],
) -> Refused | None:
    """Why the calls do not hand states from one to the next."""
    inside = {node for call in calls for node in call}
    odd = [
        n.name for own in sources for n in own if not isinstance(program.values.get(n.name), Value) and n not in inside
    ]
    if odd:
        return Refused(
            f"{region.name}: {odd[0]}",
            "a call reads something that is not a tensor",
            "take tuples apart before the loop, and compute sizes inside the cell",
        )
    if not states:
        return Refused(region.name, "no call reads what another returned", "leave it to automatic differentiation")
    for own in states:
        place = calls[0].index(own[1])
        if not isinstance(program.values.get(own[1].name), Value):
            return Refused(
                f"{region.name}: {own[1].name}",
                "its states are passed on as one tuple",
                "take the tuple apart where it is returned: `h, c = cell(x, (h, c))`",
            )
        if own[0] in inside or any(own[n + 1] is not call[place] for n, call in enumerate(calls[:-1])):
            return _other_than_left(region)
    others = [own for own in sources if own not in states]
    if any(node in inside for own in others for node in own) or len({own[1] for own in sources}) < len(sources):
        return _other_than_left(region)
    return None


def _other_than_left(region: Region) -> Refused:
    return Refused(
        region.name,
        "a call reads something other than what the call before it left",
        "let the cell return all that its next call takes",
    )


def emitted(unrolled: Unrolled, region: Region, program: Program) -> Segment:
    """One call as code that reads the user's own modules and parameters."""
    return emit_segment(f"{region.name} step", unrolled.step, program)
