"""The sub-chains of a cut chain as a region, in which each is differentiated by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import add
from typing import Any, ClassVar

from torch import fx

from rewriter.runtime.ledger import Ledger
from rewriter.runtime.rule import Rule
from rewriter.runtime.segment import Segment
from rewriter.runtime.sub_chains import SubChain, SubChains, SubChainsRule

from .base import Entry, Refused
from .behind import CUT
from .checkpoint import runs_once
from .emit import emit_segment, graph_of
from .order import together
from .program import Cost, Program, Region, Value, is_box_call, reach
from .regions import inputs_of, outputs_of
from .targets import Target


@dataclass(frozen=True)
class Apart(Entry):
    """Runs the sub-chains of a chain that is cut already without tapes, and differentiates each alone.

    target: the chain's module; starts, ends: per sub-chain, names of the nodes that take over the cuts' values (of the
    first one none), and of the nodes of its links; at_once: how many to differentiate as one. Leaves the program as it
    is, with a note, where something beside the cuts' values goes from one sub-chain to the next.
    """

    name: ClassVar[str] = "apart"

    target: Target
    starts: tuple[tuple[str, ...], ...] = ()
    ends: tuple[tuple[str, ...], ...] = ()
    at_once: int | None = None

    def apply(self, program: Program) -> Program | Refused:
        # A dropout is no longer the node that it was; what hands on to a cut is.
        there = {node.name: node for node in program.graph.nodes}
        borders = [[there[name] for name in names if name in there] for names in map(add, self.starts, self.ends)]
        makers = {node: number for number, own in enumerate(borders) for node in own}
        for cut in [node for own in borders for node in own if node.meta.get(CUT)]:
            origin = cut.all_input_nodes[0]
            borders[_maker(origin, makers)].append(origin)
        pieces = [_between(program, own) for own in borders]
        reason = _against(program, pieces)
        if reason is not None:
            note = f"the sub-chains of {self.target} stay on the ordinary tape: {reason}"
            return program.with_(notes=(*program.notes, note))
        inside = {node for piece in pieces for node in piece}
        owned = tuple([node.name for node in program.graph.nodes if node in inside])
        name = f"{self.target} sub-chains"
        moved = together(owned, program, name)
        region = Region(name, self, str(self.target), owned, tuple([tuple(n.name for n in piece) for piece in pieces]))
        refused = moved if isinstance(moved, Refused) else runs_once(moved, region)
        if isinstance(refused, Refused) or isinstance(moved, Refused):
            why = refused.reason if refused is not None else ""
            return program.with_(notes=(*program.notes, f"{name} stay on the ordinary tape: {why}"))
        order = {node.name: number for number, node in enumerate(moved.graph.nodes)}
        return moved.with_(regions=(*moved.regions, _sorted(region, order)))

    def rule(self, program: Program, region: Region, segment: Segment, ledger: Ledger, known: Rule | None) -> Rule:
        return SubChainsRule(_chains(program, region), segment, ledger, self.at_once)

    def __str__(self) -> str:
        return f"the sub-chains of {self.target}"


def _sorted(region: Region, order: Mapping[str, int]) -> Region:
    owned = tuple(sorted(region.owned, key=order.__getitem__))
    parts = tuple([tuple(sorted(names, key=order.__getitem__)) for names in region.parts])
    return Region(region.name, region.entry, region.target, owned, parts)


def _between(program: Program, own: Sequence[fx.Node]) -> list[fx.Node]:
    """These nodes, and those on ways from one of them to another."""
    before = _ancestors(own)
    inside = {*own, *(node for node in reach(list(own)) if node in before)}
    return [node for node in program.graph.nodes if node in inside]


def _maker(node: fx.Node, makers: Mapping[fx.Node, int]) -> int:
    """The number of the sub-chain that a value comes from."""
    stack = [node]
    while stack:
        source = stack.pop()
        if source in makers:
            return makers[source]
        stack.extend(source.all_input_nodes)
    raise AssertionError(f"{node.name} is cut and comes from no sub-chain")


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [source for node in nodes for source in node.all_input_nodes]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _against(program: Program, pieces: Sequence[Sequence[fx.Node]]) -> str | None:
    """Why the sub-chains cannot be differentiated apart."""
    inside = {node for piece in pieces for node in piece}
    owned = {name for region in program.regions for name in region.owned}
    for node in inside:
        if node.name in owned:
            return f"another entry rules {node.name}"
        if is_box_call(node, program):
            return f"{node.name} evaluates a box, which backward would do again"
        if any(user not in inside for user in node.users) and not isinstance(program.values.get(node.name), Value):
            return f"{node.name}, a tuple or a number, is read outside"
    after, before = set(reach(list(inside))), _ancestors(list(inside))
    around = next((node for node in after if node in before and node not in inside), None)
    if around is not None:
        return f"{around.name} lies on a way from one to another"
    for piece in pieces:
        own = set(piece)
        for node in piece:
            for source in node.all_input_nodes:
                if source in inside and source not in own and not node.meta.get(CUT):
                    return f"{source.name} goes from one to another beside what is cut"
    return None


def _chains(program: Program, region: Region) -> SubChains:
    outputs = tuple(node.name for node in outputs_of(program, region))
    parts = [[program.node(name) for name in names] for names in region.parts]
    cuts = {node.name: node.all_input_nodes[0].name for nodes in parts for node in nodes if _takes_over(node, nodes)}
    written = {*cuts.values(), *outputs}
    found: dict[Any, list[int]] = {}
    pieces: list[SubChain] = []
    for number, nodes in enumerate(parts):
        code = [node for node in nodes if node.name not in cuts]
        own = set(code)
        given = list(dict.fromkeys(source for node in code for source in node.all_input_nodes if source not in own))
        writes = [node for node in nodes if node.name in written]
        alike = found.setdefault(_key(program, code, given, writes), [])
        name = f"{region.name} {number}"
        segment = pieces[alike[0]].segment if alike else emit_segment(name, graph_of(code, given, writes), program)
        alike.append(number)
        pieces.append(SubChain(segment, _names(given), _names(writes)))
    named = {name for piece in pieces for name in (*piece.reads, *piece.writes)}
    rows = {name: value.rows.dimension for name in named if (value := _value(program, name)) and value.rows}
    inputs = _names(inputs_of(program, region))
    groups = tuple(tuple(group) for group in found.values())
    return SubChains(tuple(pieces), inputs, outputs, cuts, rows, groups, _saved(program, region))


def _takes_over(node: fx.Node, nodes: Sequence[fx.Node]) -> bool:
    return bool(node.meta.get(CUT)) and node.all_input_nodes[0] not in nodes


def _key(program: Program, nodes: Sequence[fx.Node], given: Sequence[fx.Node], writes: Sequence[fx.Node]) -> Any:
    """Equal for pieces with the same code on values of the same kind: those that may run as one."""
    numbers = {node: f"%{number}" for number, node in enumerate((*given, *nodes))}

    def shown(argument: Any) -> str:
        return str(fx.node.map_arg(argument, numbers.__getitem__))

    code = tuple((node.op, node.target, shown(node.args), shown(node.kwargs)) for node in nodes)
    kinds = tuple(_kind(program, node) for node in (*given, *writes))
    return code, kinds, tuple(numbers[node] for node in writes)


def _kind(program: Program, node: fx.Node) -> Any:
    """A value with rows may lie beside another; anything else only stands for itself."""
    value = _value(program, node.name)
    return (value.shape, value.dtype, value.rows) if value is not None and value.rows else node.name


def _value(program: Program, name: str) -> Value | None:
    value = program.values.get(name)
    return value if isinstance(value, Value) else None


def _saved(program: Program, region: Region) -> float:
    """Bytes for each row that the tape of the largest piece keeps."""
    most = max(sum((program.costs.get(name, Cost()) for name in names), Cost()).saved for names in region.parts)
    values = [value for name in region.owned if (value := _value(program, name)) and value.rows]
    rows = [v.shape[v.rows.dimension] // v.rows.multiplicity for v in values if v.rows is not None]
    return most / max(1, min(rows, default=1))


def _names(nodes: Sequence[fx.Node]) -> tuple[str, ...]:
    return tuple([node.name for node in nodes])
