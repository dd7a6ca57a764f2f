"""A chain as a region: where a target's blocks are, and each block as code of its own."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from torch import fx, nn

from rewriter.runtime.chain import Block, Chain
from rewriter.runtime.segment import Segment

from .base import Entry, Refused
from .emit import emit_segment
from .order import renamed, together
from .program import Program, Region, Value
from .regions import hooked, inputs_of, outputs_of, unseen
from .structure import ChainSegment, Span, Structure, analyse
from .structure.operations import writes
from .targets import Place, resolve

Pieces = tuple[Span, ...]


def residual_regions(entry: Entry, program: Program) -> tuple[Program, list[Region]] | Refused:
    """A region for every residual chain inside the entry's target; its parts are the chain's segments."""

    def pieces(structure: Structure, inside: frozenset[str], _: Sequence[Place]) -> Iterator[Pieces]:
        for chain in structure.chains:
            segments = [_trimmed(segment, inside) for segment in chain.segments]
            yield from _runs(segments, [_branch_inside(segment, inside, program) for segment in segments])

    return _regions(entry, program, pieces, "no residual chain of at least two segments")


def block_regions(entry: Entry, program: Program) -> tuple[Program, list[Region]] | Refused:
    """The region of the target's blocks, one tensor alive between each two.

    A block is a module: each that the target names, or each child of the list or sequence it names, with a residual sum
    around it. Where neither is the case, a block is whatever lies between two single-tensor cuts.
    """

    def pieces(structure: Structure, inside: frozenset[str], places: Sequence[Place]) -> Iterator[Pieces]:
        found = list(_runs(structure.spans, [_within(span, inside, program) for span in structure.spans]))
        for chain in structure.chains:
            segments = [_trimmed(segment, inside) for segment in chain.segments]
            found += _runs(segments, [_block_inside(segment, inside, program) for segment in segments])
        found = [_grouped(run, _units(places, program), program) for run in found]
        yield from sorted(found, key=len, reverse=True)[:1]

    return _regions(entry, program, pieces, "no two blocks with a single tensor alive between them")


def _regions(
    entry: Entry,
    program: Program,
    pieces: Callable[[Structure, frozenset[str], Sequence[Place]], Iterator[Pieces]],
    nothing: str,
) -> tuple[Program, list[Region]] | Refused:
    places = resolve(entry.target, program.model)
    for place in places:
        refused = _unsuitable(entry, place, program)
        if refused is not None:
            return refused
    program = renamed(program)
    inside = frozenset(_inside(program, places))
    if not inside:
        return unseen(places[0], program)
    structure = analyse(program)
    found = [tuple(_unpacked(p, program) for p in run) for run in pieces(structure, inside, places) if len(run) > 1]
    if not found:
        why = f": {structure.reason}" if structure.reason else ""
        return Refused(_shown(places), f"{nothing} lies in it{why}", "name the list of blocks, or leave it to the tape")
    refused = _left_out(entry, places, {name for run in found for piece in run for name in piece.nodes}, program)
    if refused is not None:
        return refused
    order = {node.name: number for number, node in enumerate(program.graph.nodes)}
    regions: list[Region] = []
    for run in found:
        owned = tuple(sorted({name for piece in run for name in piece.nodes}, key=order.__getitem__))
        taken = {region.name for region in (*program.regions, *regions)}
        name = _name([name for name in owned if name in inside], places, program, taken)
        moved = together(owned, program, name)
        if isinstance(moved, Refused):
            return moved
        program = moved
        region = Region(name, entry, name.partition("@")[0], owned, run)
        refused = _uncuttable(region, program)
        if refused is not None:
            return refused
        regions.append(region)
    return program.with_(notes=(*program.notes, *_kept(entry, places, regions, program))), regions


def _kept(entry: Entry, places: Sequence[Place], regions: Sequence[Region], program: Program) -> Iterator[str]:
    """A note for every block that is in no region, so that nobody counts on it."""
    owned = {name for region in regions for name in region.owned}
    for unit in _units(places, program):
        own = list(_inside(program, [Place(unit)]))
        if own and owned.isdisjoint(own):
            yield f"{entry}: {unit} stays on the ordinary tape: more than one value goes from it to the next block"


def _unsuitable(entry: Entry, place: Place, program: Program) -> Refused | None:
    if place.border:
        kind = type(entry).__name__
        return Refused(place.module, f"{kind} rules blocks, not the value at a border", f"write `{place.module}`")
    return hooked(place, program)


def _left_out(entry: Entry, places: Sequence[Place], owned: set[str], program: Program) -> Refused | None:
    """Why a place that the target names is in no region; a single operation, such as a last norm, may be in none."""
    for place in places:
        inside = list(_inside(program, [place]))
        if len(inside) > 1 and owned.isdisjoint(inside):
            return Refused(
                place.module,
                f"{type(entry).__name__} found blocks in other parts of the target, and none here",
                "leave it out of the target, or name the module whose forward adds up its blocks",
            )
    return None


def _inside(program: Program, places: Sequence[Place]) -> Iterator[str]:
    """Nodes of the places' modules, or of modules below them: a list of blocks is never called itself."""
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        for name, call in node.meta.get("block", ()):
            if any(
                name == place.module or name.startswith(f"{place.module}.")
                for place in places
                if place.call in (None, call)
            ):
                yield node.name
                break


def _runs(pieces: Sequence[Span], inside: Sequence[bool]) -> Iterator[Pieces]:
    """Neighbours that lie inside."""
    run: list[Span] = []
    for piece, within in zip(pieces, inside, strict=True):
        if within:
            run.append(piece)
            continue
        yield tuple(run)
        run = []
    yield tuple(run)


def _within(piece: Span, inside: frozenset[str], program: Program) -> bool:
    """Whether a piece lies inside; what it reads of the model around it (a table of positions) may be read anywhere."""
    return all(name in inside or program.node(name).op == "get_attr" for name in piece.nodes)


def _branch_inside(segment: ChainSegment, inside: frozenset[str], program: Program) -> bool:
    """Whether a segment lies inside but for its sum, and functions around it: `x = x + block(x)` in the loop itself."""
    if segment.add is None or _within(segment, inside, program):
        return _within(segment, inside, program)
    modules = [name for name in segment.nodes if program.node(name).op == "call_module"]
    return inside.issuperset(modules) and not inside.isdisjoint(segment.branch)


def _block_inside(segment: ChainSegment, inside: frozenset[str], program: Program) -> bool:
    """Whether a segment is a block with its sum, and functions between the two."""
    if segment.add is None or inside.isdisjoint(segment.branch):
        return _within(segment, inside, program)
    functions = {name for name in segment.branch if program.node(name).op != "call_module"}
    return _within(segment, inside | functions | {segment.add}, program)


def _trimmed(segment: ChainSegment, inside: frozenset[str]) -> ChainSegment:
    """Without what follows the sum, where that lies outside the target (a last norm)."""
    if segment.add is None or inside.issuperset(segment.after) or inside.isdisjoint(segment.nodes):
        return segment
    cut = segment.nodes.index(segment.add) + 1
    return replace(segment, nodes=segment.nodes[:cut], output=segment.add, after=())


def _unpacked(piece: Span, program: Program) -> Span:
    """With every item taken from a tuple that is made inside, so that no tuple crosses the border."""
    nodes = dict.fromkeys(piece.nodes)
    for name in piece.nodes:
        items = [user.name for user in program.node(name).users if user.target is operator.getitem]
        nodes.update(dict.fromkeys(items))
    return replace(piece, nodes=tuple(nodes))


def _units(places: Sequence[Place], program: Program) -> tuple[str, ...]:
    names = [place.module for place in places]
    if len(names) > 1:
        return tuple(names)
    whole = program.module(names[0])
    listed = isinstance(whole, nn.ModuleList | nn.Sequential)
    return tuple(f"{names[0]}.{child}" for child, _ in whole.named_children()) if listed else ()


def _grouped(run: Pieces, units: Sequence[str], program: Program) -> Pieces:
    """Neighbours that end in the same unit as one piece."""
    groups: list[tuple[object, list[Span]]] = []
    for number, piece in enumerate(run):
        block = program.node(piece.output).meta.get("block", ())
        key: object = next(((name, call) for name, call in block if name in units), number)
        if not groups or groups[-1][0] != key:
            groups.append((key, []))
        groups[-1][1].append(piece)
    return tuple(_joined(pieces) for _, pieces in groups)


def _joined(pieces: Sequence[Span]) -> Span:
    if len(pieces) == 1:
        return pieces[0]
    nodes = tuple(dict.fromkeys(name for piece in pieces for name in piece.nodes))
    inner = {*nodes, pieces[0].input}
    sides = dict.fromkeys(name for piece in pieces for name in piece.side_inputs if name not in inner)
    elsewhere = dict.fromkeys(name for piece in pieces for name in piece.read_elsewhere)
    return Span(pieces[0].input, pieces[-1].output, nodes, tuple(sides), tuple(elsewhere))


def _name(own: Sequence[str], places: Sequence[Place], program: Program, taken: set[str]) -> str:
    """The innermost module that all of these nodes are in."""
    blocks = [program.node(name).meta.get("block", ()) for name in own]
    paths = [block[-1][0].split(".") if block else [] for block in blocks]
    common = [own[0] for own in takewhile(lambda own: len(set(own)) == 1, zip(*paths, strict=False))]
    name = ".".join(common) or places[0].module
    count = sum(each.partition("@")[0] == name for each in taken)
    return f"{name}@{count}" if count else name


def _shown(places: Sequence[Place]) -> str:
    return places[0].module if len(places) == 1 else f"{places[0].module} and {len(places) - 1} more"


def _uncuttable(region: Region, program: Program) -> Refused | None:
    for node in outputs_of(program, region):
        if not isinstance(program.values.get(node.name), Value):
            return Refused(
                f"{region.name}: {node.name}",
                "a tuple or a number made inside a block is read outside",
                "take the tuple apart inside the block",
            )
    for piece in region.parts:
        own = set(piece.nodes)
        for name in piece.nodes:
            node = program.node(name)
            written = node.all_input_nodes[0].name if node.all_input_nodes and writes(node, program.module) else None
            if written is not None and written not in own and written != piece.input:
                return Refused(
                    f"{region.name}: {name}", f"it writes into {written}, which the block only reads", "copy it"
                )
            if written == piece.input and _read_elsewhere(piece.input, piece, program):
                return Refused(
                    f"{region.name}: {name}",
                    f"it writes into {written}, the value between two blocks, which something else reads too",
                    "make that operation not write in place",
                )
    return None


def _read_elsewhere(name: str, piece: Span, program: Program) -> bool:
    return any(user.name not in piece.nodes for user in program.node(name).users)


@dataclass(frozen=True)
class _Code:
    """A block's graph and the names of the values that it reads and writes, the stream's first."""

    graph: fx.Graph
    reads: tuple[str, ...]
    writes: tuple[str, ...]


def chain_of(program: Program, region: Region, segment: Segment, divided: bool) -> Chain:
    """What runs. divided: blocks with a skip read the stream twice (see `Block`); `segment`: the region's own code."""
    inputs = tuple(node.name for node in inputs_of(program, region))
    outputs = tuple(node.name for node in outputs_of(program, region))
    read = {name for piece in region.parts for name in piece.side_inputs} | set(outputs)
    blocks = tuple(_block(program, region, piece, read, divided) for piece in region.parts)
    return Chain(segment, blocks, inputs, outputs)


def _block(program: Program, region: Region, piece: Span, read: set[str], divided: bool) -> Block:
    residual = isinstance(piece, ChainSegment) and piece.add is not None
    split = divided and residual
    code = _code(program, piece, read, split)
    identity = split and isinstance(piece, ChainSegment) and _is_identity(piece, program)
    name = f"{region.name} {piece.output}"
    return Block(name, emit_segment(name, code.graph, program), code.reads, code.writes, split, identity)


def _is_identity(piece: ChainSegment, program: Program) -> bool:
    """Whether the block's input reaches its output as it is; a sum may also repeat it over rows or time (broadcast)."""
    given, left = (program.values[name] for name in (piece.input, piece.output))
    same = isinstance(given, Value) and isinstance(left, Value) and given.shape == left.shape
    sums = (program.node(name) for name in (piece.add, *piece.skip_nodes) if name)
    plain = all("alpha" not in node.kwargs for node in sums)  # torch.add(y, x, alpha=2)
    return same and plain and piece.skip == "identity" and not piece.after


def _code(program: Program, piece: Span, read: set[str], split: bool) -> _Code:
    order = {node.name: number for number, node in enumerate(program.graph.nodes)}
    nodes = [program.node(name) for name in sorted(piece.nodes, key=order.__getitem__)]
    own = set(piece.nodes)
    sources = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source.name not in own)
    sides = tuple(source.name for source in sources if source.name != piece.input)
    graph = fx.Graph()
    stream = program.node(piece.input)
    branch = graph.placeholder(f"{piece.input}_branch" if split else piece.input)
    skip = graph.placeholder(f"{piece.input}_skip") if split else branch
    copies = {program.node(name): graph.placeholder(name) for name in sides}
    if any(node.all_input_nodes[:1] == [stream] and writes(node, program.module) for node in nodes):
        # The stream's value belongs to the block before; a write in place goes to a copy.
        branch = graph.call_method("clone", (branch,))
        skip = graph.call_method("clone", (skip,)) if split else branch
    along = {*piece.skip_nodes, piece.add} if isinstance(piece, ChainSegment) and split else set()
    for node in nodes:
        copies[stream] = skip if node.name in along else branch
        copies[node] = graph.node_copy(node, copies.__getitem__)
    results = (piece.output, *(name for name in piece.nodes if name in read and name != piece.output))
    graph.output(tuple([copies[program.node(name)] for name in results]))
    return _Code(graph, (piece.input, *sides), results)
