"""What follows the cuts of a chain, as stages of code from each cut to the next and from the last to the outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from rewriter.runtime.noisy_tail import Course, Stage
from rewriter.runtime.stacking import Layout

from .base import Refused
from .behind import CUT, behind_all
from .emit import emit_segment
from .program import Program, Value

Cuts = Sequence[Sequence[fx.Node]]


@dataclass(frozen=True)
class Outline:
    """nodes: of each stage; reads: tensors from outside each stage; live: what copies that join at a cut need of what
    earlier stages made; sides: all that is read of the clean pass, beside the cuts' values and the outputs."""

    nodes: tuple[tuple[fx.Node, ...], ...]
    reads: tuple[tuple[fx.Node, ...], ...]
    live: tuple[tuple[fx.Node, ...], ...]
    sides: tuple[fx.Node, ...]


def outline_of(program: Program, cuts: Cuts, beside: Sequence[fx.Node] = ()) -> Outline | Refused:
    """Each node in the first stage that has what it reads; cuts: the values behind each cut, in the graph's order;
    beside: further tensors of the clean pass that are needed."""
    tail = behind_all(program, cuts)
    if isinstance(tail, Refused):
        return tail
    order = {node: number for number, node in enumerate(program.graph.nodes)}
    handed = {node for cut in cuts for passed in cut for node in handing(passed)}
    stages: list[list[fx.Node]] = [[] for _ in cuts]
    first = {node: number for number, cut in enumerate(cuts) for node in cut}
    for node in tail.nodes:
        if node not in handed and not _plain(node, program):
            first[node] = max([first.get(source, 0) for source in _sources(node.all_input_nodes, program)], default=0)
            stages[first[node]].append(node)
    made = {node: number for number, nodes in enumerate(stages) for node in nodes}
    made |= {node: number - 1 for number, cut in enumerate(cuts) for node in cut}
    following = [*cuts[1:], ()]
    reads = [
        tuple(read_by(program, nodes, [origin_of(passed) for passed in after]))
        for nodes, after in zip(stages, following, strict=True)
    ]
    outputs = program.graph.output_node().all_input_nodes
    live = []
    for number, cut in enumerate(cuts):
        later = dict.fromkeys([*(node for read in reads[number:] for node in read), *outputs])
        live.append(tuple([n for n in later if made.get(n, number) < number and n not in cut]))
    passed = {node for cut in cuts for node in cut}
    crossing = [node for nodes in live for node in nodes]
    for node in crossing:
        value = program.values.get(node.name)
        if not isinstance(value, Value) or value.rows is None:
            return Refused(
                node.name, "it crosses a cut beside the value there, and has no rows", "compute it where it is used"
            )
    clean = dict.fromkeys([*crossing, *(node for read in reads for node in read if node not in made), *beside])
    sides = tuple(sorted((node for node in clean if node not in passed), key=order.__getitem__))
    return Outline(tuple(map(tuple, stages)), tuple(reads), tuple(live), sides)


def course_of(program: Program, cuts: Cuts, outline: Outline, places: Mapping[str, int], label: str) -> Course:
    """The stages as code. places: of the clean values among the region's inputs, by name."""
    results = [node for node in program.graph.output_node().args[0] if isinstance(node, fx.Node)]  # type: ignore[union-attr]
    needed = {node for nodes in (*outline.reads, results) for node in nodes}
    stages = []
    for number, nodes in enumerate(outline.nodes):
        following = [(passed.name, origin_of(passed)) for passed in cuts[number + 1]] if number + 1 < len(cuts) else []
        writes = [(node.name, node) for node in nodes if node in needed] + following
        graph = code_of(program, nodes, outline.reads[number], [node for _, node in writes])
        segment = emit_segment(f"{label} stage {number}", graph, program)
        stages.append(Stage(segment, _names(outline.reads[number]), tuple([name for name, _ in writes])))
    named = {node for group in (*outline.reads, *outline.live, *cuts, results) for node in group}
    widths = [_width(program, node) for nodes in outline.nodes for node in nodes]
    return Course(
        cuts=tuple(map(_names, cuts)),
        stages=tuple(stages),
        live=tuple(map(_names, outline.live)),
        outputs=_names(results),
        places=places,
        layouts={node.name: layout_of(program, node) for node in named},
        widest=max([*widths, *(_width(program, node) for node in named)], default=1),
    )


def _plain(node: fx.Node, program: Program) -> bool:
    """Numbers, shapes and parameters: made again in every stage that reads them."""
    value = program.values.get(node.name)
    if isinstance(value, tuple):
        return all(item is None for item in value)
    return value is None or node.op == "get_attr"


def handing(passed: fx.Node) -> list[fx.Node]:
    """The nodes between a value and the copy of it that is read behind a cut."""
    source = passed.all_input_nodes[0]
    return [passed] if passed.meta.get(CUT) else [passed, source]


def origin_of(passed: fx.Node) -> fx.Node:
    """The value itself, of what is read behind a cut."""
    return handing(passed)[-1].all_input_nodes[0]


def _sources(nodes: Sequence[fx.Node], program: Program) -> Iterator[fx.Node]:
    """The tensors that nodes read, through numbers and shapes made from them."""
    for node in nodes:
        if _plain(node, program):
            yield from _sources(node.all_input_nodes, program)
        else:
            yield node


def read_by(program: Program, nodes: Sequence[fx.Node], handed: Sequence[fx.Node] = ()) -> list[fx.Node]:
    """Tensors that nodes take from outside, through numbers and shapes made from them, also to hand them on."""
    own = set(nodes)
    wanted = [*(source for node in nodes for source in node.all_input_nodes), *handed]
    return list(dict.fromkeys(node for node in _sources(wanted, program) if node not in own))


def code_of(
    program: Program, nodes: Sequence[fx.Node], reads: Sequence[fx.Node], writes: Sequence[fx.Node]
) -> fx.Graph:
    """Copies of nodes as a function from `reads` to `writes`."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in reads}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            for source in node.all_input_nodes:
                copied(source)
            copies[node] = graph.node_copy(node, copies.__getitem__)
        return copies[node]

    for node in nodes:
        if node.meta.get(CUT):  # another entry's: it just hands its value on
            copies[node] = copied(node.all_input_nodes[0])
        else:
            copied(node)
    graph.output(tuple([copies[node] for node in writes]))
    return graph


def _names(nodes: Sequence[fx.Node]) -> tuple[str, ...]:
    return tuple([node.name for node in nodes])


def layout_of(program: Program, node: fx.Node) -> Layout | None:
    """Where the rows of a tensor lie; None where it has none."""
    value = program.values[node.name]
    assert isinstance(value, Value)
    return None if value.rows is None else Layout(value.rows.dimension, value.rows.multiplicity)


def _width(program: Program, node: fx.Node) -> int:
    value = program.values.get(node.name)
    return value.width if isinstance(value, Value) and value.rows is not None else 1
