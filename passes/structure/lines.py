"""Lines: from an entry to an end, the values that everything in between passes through one after the other."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .dominators import Tree, dominators
from .operations import is_sum
from .stream import Stream

_SWEEPS = 40  # how often all nodes of a graph may be looked at in search of lines

log = logging.getLogger("rewriter.passes")


@dataclass(frozen=True)
class Line:
    """A line of single-tensor cuts: every path from its first value to its last one meets all of them, in this order.

    What does not descend from the first value (masks, rotary tables, the memory of an encoder) is beside the line,
    and so is what never gets to the last one (values that are returned, the loss). between: every node on a path.
    """

    cuts: tuple[int, ...]
    between: frozenset[int]


def line(stream: Stream, entry: int, end: int) -> Line | None:
    """The line from `entry` to `end`; None where no gradient flows from one to the other."""
    reached = {entry}
    for index in range(entry + 1, end + 1):
        if any(source in reached for source in stream.flows[index]):
            reached.add(index)
    if end not in reached or end == entry:
        return None
    between = _ancestors(stream, end, reached)
    tree = dominators(sorted(between), stream.flows)
    return Line(tuple(reversed(tree.path(end))), frozenset(between))


def lines(stream: Stream, used: set[int]) -> Iterator[Line]:
    """Lines worth looking at, the main one first.

    used: nodes that the caller has made something of; it may add to them between two lines, and entries with fewer
    than two residual adds left on their way are passed over. Gives up, and logs it, after some forty sweeps over the
    graph: a model of more separate towers than that keeps some of them unseen.
    """
    first = True
    left = _SWEEPS * len(stream)
    for end in _ends(stream):
        search = _Search(stream, end)
        tried: set[int] = set()
        while (entry := search.best(used, tried, anything=first)) is not None:
            first = False
            tried.add(entry)
            left -= search.size
            if left < 0:
                break
            found = line(stream, entry, end)
            if found is not None:
                yield found
        left -= search.size
        if left < 0:
            log.info("stopped looking for chains: the graph has too many entries and ends")
            return


def _ends(stream: Stream) -> list[int]:
    """Values with rows from which nothing with rows is made (a loss has none), the deepest first."""
    marked = stream.rows if any(stream.rows) else [True] * len(stream)
    depth = [0] * len(stream)
    last = [marked[i] and stream.differentiable[i] for i in range(len(stream))]
    for index, sources in enumerate(stream.flows):
        for source in sources:
            depth[index] = max(depth[index], depth[source] + 1)
            if marked[index]:
                last[source] = False
    found = [index for index in range(len(stream)) if last[index]]
    return sorted(found, key=lambda index: -depth[index])


class _Key(NamedTuple):
    """How good an entry is; the better one is larger."""

    rows: bool
    sums: int
    length: int  # where there are no sums
    early: int


class _Search:
    """The entries from which one end is reached, compared by what their postdominators promise."""

    def __init__(self, stream: Stream, end: int) -> None:
        self._stream = stream
        ancestors = _ancestors(stream, end)
        self.size = len(ancestors)
        readers: dict[int, list[int]] = {index: [] for index in ancestors}
        for index in ancestors:
            for source in stream.flows[index]:
                readers[source].append(index)
        self._forks = {index for index, users in readers.items() if len(users) > 1}
        self._tree: Tree = dominators(sorted(ancestors, reverse=True), readers)
        self._entries = [index for index in sorted(ancestors) if index != end and self._may_enter(index)]

    def best(self, used: set[int], tried: set[int], anything: bool) -> int | None:
        """The entry with the most unused residual adds on its way; None with fewer than two, unless `anything`."""
        sums = self._sums(used)
        keys = {
            index: _Key(self._stream.rows[index], sums[index], 0 if sums[index] else self._tree.depth[index], -index)
            for index in self._entries
            if index not in tried and index not in used and (anything or sums[index] > 1)
        }
        return max(keys, key=keys.__getitem__) if keys else None

    def _sums(self, used: set[int]) -> dict[int, int]:
        """For each node, how often on its way to the end a value forks and next comes together in an unused sum."""
        nodes, parent = self._stream.nodes, self._tree.parent
        found: dict[int, int] = {}
        for index in parent:  # the root first
            above = parent[index]
            counts = index in self._forks and above not in used and is_sum(nodes[above])
            found[index] = found.get(above, 0) + counts
        return found

    def _may_enter(self, index: int) -> bool:
        """A value before the first differentiable ones, or one of these; made of more than parameters alone."""
        stream = self._stream
        if any(stream.differentiable[source] and not stream.fixed[source] for source in stream.flows[index]):
            return False
        return stream.rows[index] or not (stream.differentiable[index] and stream.fixed[index])


def _ancestors(stream: Stream, end: int, within: set[int] | None = None) -> set[int]:
    found = {end}
    stack = [end]
    while stack:
        for source in stream.flows[stack.pop()]:
            if source not in found and (within is None or source in within):
                found.add(source)
                stack.append(source)
    return found
