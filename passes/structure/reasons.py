"""Why there is no residual chain, in words."""

from __future__ import annotations

from .chains import Found
from .lines import Line
from .operations import is_sum, kind_of, name_of
from .stream import Stream

_SHOWN = 3  # opaque parts named in one reason


def why_none(stream: Stream, found: Found) -> str:
    """What stands against a chain, then a value that stays alive between two cuts, then the parts that stay whole."""
    if found.main is None:
        return "nothing in this graph is differentiable, or it has not been annotated"
    told = [_about_links(stream, found)]
    alive = _longest_alive(stream, found.main, {link.add for link in found.links})
    if alive:
        told.append(alive)
    whole = _whole(stream)
    if whole:
        shown = ", ".join(whole[:_SHOWN]) + (" and more" if len(whole) > _SHOWN else "")
        told.append(f"what is inside {shown} is not seen, as {'they stay' if len(whole) > 1 else 'it stays'} whole")
    return "; ".join(told)


def _whole(stream: Stream) -> list[str]:
    """Modules with modules inside that are one node."""
    modules = ((str(stream.nodes[index].target), stream.module(index)) for index in range(len(stream)))
    return sorted(
        {name for name, module in modules if module is not None and next(module.children(), None) is not None}
    )


def _about_links(stream: Stream, found: Found) -> str:
    if found.links:
        shown = ", ".join(_place(stream, link.add) for link in found.links[:_SHOWN])
        count = len(found.links)
        if count == 1:
            return f"one residual add only ({shown}), and a chain takes two that follow each other"
        return f"{count} residual adds ({shown}{' ...' if count > _SHOWN else ''}), no two of which follow each other"
    inside = [index for index in range(len(stream)) if is_sum(stream.nodes[index]) and _adds_its_own(stream, index)]
    if inside:
        place = _place(stream, inside[0])
        return f"{place} adds a value to what was computed from it, but there is no cut at both of its ends"
    return "no node adds a value to what was computed from that value"


def _adds_its_own(stream: Stream, index: int) -> bool:
    """Whether one term of a sum is directly computed from a value that another term is or was computed from."""
    terms = [s for s in stream.flows[index] if stream.differentiable[s] and not stream.fixed[s]]
    if len(terms) < 2 or kind_of(stream.nodes[index], stream.module_at) == "norm":
        return False
    early = min(terms)
    readers = [r for r in stream.readers[early] if early in stream.flows[r] and r != index]
    return any(reader < index for reader in readers)


def _longest_alive(stream: Stream, main: Line, adds: set[int]) -> str:
    """The widest gap between two cuts that is no residual add's, and the value that is read again across it."""
    cuts, between = main.cuts, main.between
    widest, where = 1, -1
    for position in range(1, len(cuts)):
        start, end = cuts[position - 1], cuts[position]
        if end - start > widest and end not in adds and sum(i in between for i in range(start + 1, end)) > 1:
            widest, where = end - start, position
    if where < 0:
        return ""
    start, end = cuts[where - 1], cuts[where]
    reads = ((s, r) for r in range(start + 1, end + 1) if r in between for s in stream.flows[r] if s in between)
    value, reader = max(
        (read for read in reads if stream.differentiable[read[0]]),
        key=lambda read: read[1] - read[0],
        default=(start, end),
    )
    name = name_of(stream.nodes[reader], stream.module_at)
    return (
        f"no cut lies between {_place(stream, start)} and {_place(stream, end)}: "
        f"{_place(stream, value)} is read again {reader - value} nodes later, by {name} ({_place(stream, reader)})"
    )


def _place(stream: Stream, index: int) -> str:
    block = stream.block(index)
    name = f"`{stream.nodes[index].name}`"
    return f"{name} in {block}" if block else name
