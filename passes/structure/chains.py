"""Chains: residual segments that follow one another on a line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, zip_longest

from .lines import Line, line, lines
from .operations import kind_of
from .parts import Part, parts
from .repeats import repeats
from .residual import Link, residual
from .result import Chain, ChainSegment
from .stream import Stream

_FOLDED = frozenset(("norm", "activation", "dropout", "pointwise", "layout"))
_WRITTEN_OUT = (frozenset(("norm",)), frozenset(("activation", "pointwise")))  # of several nodes each
_NESTING = 3  # how deep chains are looked for inside the branch of a single residual add


@dataclass(frozen=True)
class Found:
    """The chains of a graph; main: its main line, None where nothing is differentiable; links: every residual add."""

    chains: tuple[Chain, ...]
    main: Line | None
    links: tuple[Link, ...]


def find(stream: Stream) -> Found:
    """Chains of at least two residual segments, on every line of the graph and inside single residual branches."""
    used: set[int] = set()
    chains: list[Chain] = []
    links: dict[int, Link] = {}
    main: Line | None = None
    for each in lines(stream, used):
        main = main or each
        chains += _on(stream, each, used, links, _NESTING)
    return Found(tuple(chains), main, tuple(links[add] for add in sorted(links)))


def _on(stream: Stream, each: Line, used: set[int], links: dict[int, Link], nesting: int) -> Iterator[Chain]:
    for run in _Runs(stream, each).runs():
        links.update((link.add, link) for link in run.links)
        if any(link.add in used for link in run.links):
            continue
        if len(run.links) > 1:
            used.update(index for index in each.between if run.cuts[0] < index <= run.cuts[-1])
            yield _chain(stream, run, each)
        elif nesting:
            inner = _inside(stream, run.links[0], each)
            if inner is not None:
                yield from _on(stream, inner, used, links, nesting - 1)


def _inside(stream: Stream, link: Link, each: Line) -> Line | None:
    """The line through the branch of a single residual add."""
    terms = (source for source in stream.flows[link.add] if source in each.between and source not in link.skip_nodes)
    last = max(terms, default=link.start)
    return line(stream, link.start, last) if last != link.start else None


@dataclass
class _Run:
    """Residual segments that follow one another. cuts: one more than there are segments; links: None where straight."""

    cuts: list[int]
    segments: list[Link | None]

    @property
    def links(self) -> list[Link]:
        return [link for link in self.segments if link is not None]


class _Runs:
    """Cuts a line at its residual adds, and joins what can be joined."""

    def __init__(self, stream: Stream, each: Line) -> None:
        self._stream, self._line = stream, each
        cuts, inner = each.cuts, _inner(each)
        self._direct = [False, *(not inner[position] for position in range(1, len(cuts)))]
        self._kinds = [frozenset[str](), *(self._kind(inner[p], cuts[p]) for p in range(1, len(cuts)))]
        self._links = {
            position: link
            for position in range(1, len(cuts))
            if inner[position] and (link := residual(stream, cuts[position - 1], cuts[position], each.between))
        }
        self._usual = self._usual_fold()

    def runs(self) -> Iterator[_Run]:
        run: _Run | None = None
        cuts = self._line.cuts
        for position, after in zip_longest(self._links, list(self._links)[1:]):
            following = None if after is None else after - 1
            if run is None:
                run = _Run([cuts[position - 1]], [])
            fold = self._fold(position, following)
            run.cuts.append(cuts[fold])
            run.segments.append(self._links[position])
            if following is None or not (fold == following or self._straight(fold, following)):
                yield run
                run = None
            elif fold != following:
                run.cuts.append(cuts[following])
                run.segments.append(None)

    def _kind(self, inner: list[int], cut: int) -> frozenset[str]:
        return frozenset(kind_of(self._stream.nodes[index], self._stream.module_at) for index in (*inner, cut))

    def _folds(self, position: int) -> bool:
        """Whether the step to this cut is one that a segment takes along after its sum."""
        kinds = self._kinds[position]
        return kinds <= _FOLDED and (self._direct[position] or any(kinds <= one for one in _WRITTEN_OUT))

    def _usual_fold(self) -> tuple[frozenset[str], ...]:
        """What most sums of this line are followed by until the next segment starts."""
        ways: Counter[tuple[frozenset[str], ...]] = Counter()
        for position, following in pairwise(self._links):
            if all(map(self._folds, range(position + 1, following))):
                ways[tuple(self._kinds[position + 1 : following])] += 1
        return max(ways, key=lambda way: ways[way]) if ways else ()

    def _fold(self, position: int, following: int | None) -> int:
        """Up to which position a segment's sum is followed by what belongs to the segment."""
        if following is not None and all(map(self._folds, range(position + 1, following + 1))):
            return following
        end = position + len(self._usual)
        fits = end < len(self._line.cuts) and (following is None or end <= following)
        same = fits and tuple(self._kinds[position + 1 : end + 1]) == self._usual
        return end if same and all(map(self._folds, range(position + 1, end + 1))) else position

    def _straight(self, position: int, following: int) -> bool:
        return all(self._direct[position + 1 : following + 1])


def _inner(each: Line) -> list[list[int]]:
    """For every position of a line, the nodes on the way from the cut before it, in graph order."""
    place = {cut: position for position, cut in enumerate(each.cuts)}
    found: list[list[int]] = [[] for _ in each.cuts]
    position = 0
    for index in sorted(each.between):
        if index in place:
            position = place[index]
        else:
            found[position + 1].append(index)
    return found


def _chain(stream: Stream, run: _Run, each: Line) -> Chain:
    pieces = parts(stream, run.cuts, each.between)
    segments = tuple(
        _segment(stream, start, end, piece, link)
        for start, end, piece, link in zip(run.cuts, run.cuts[1:], pieces, run.segments, strict=False)
    )
    return Chain(segments, repeats(stream, run.cuts, pieces))


def _segment(stream: Stream, start: int, end: int, part: Part, link: Link | None) -> ChainSegment:
    folded = [index for index in part.flowing if link and index > link.add]
    apart = {*folded, *((link.add, *link.skip_nodes) if link else ())}
    return ChainSegment(
        input=stream.nodes[start].name,
        output=stream.nodes[end].name,
        nodes=stream.names(part.nodes),
        side_inputs=stream.names(part.sides),
        read_elsewhere=stream.names(part.elsewhere),
        skip=link.skip if link else "none",
        skip_nodes=stream.names(link.skip_nodes) if link else (),
        branch=stream.names(index for index in part.flowing if index not in apart),
        add=stream.nodes[link.add].name if link else None,
        after=stream.names(folded),
        block=stream.block(link.add if link else end),
    )
