"""Program -> the code that runs: a function per segment, regions bridged to the tape, a function that calls them."""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from rewriter.runtime.ledger import Ledger
from rewriter.runtime.region import Clock, Region
from rewriter.runtime.rule import Rule
from rewriter.runtime.segment import Place, Segment

from .program import CONSTANTS, Program

_serial = itertools.count()


@dataclass(frozen=True)
class Emitted:
    """function(*tensors) -> flat tuple of tensors; `sources` holds the emitted code by segment, "step" on top."""

    function: Callable[..., tuple[Tensor, ...]]
    segments: Mapping[str, Segment]
    regions: Mapping[str, Region]
    sources: Mapping[str, str]


class _Frame:
    """`self` of the function that calls the segments."""


def emit(program: Program, clock: Clock, ledger: Ledger, rules: dict[str, Rule]) -> Emitted:
    """Emit a partitioned program.

    `rules` holds the first rule of each region name. A later capture has its own code, and so its own rule, which
    shares what the first has learnt.
    """
    if program.partitioned is None:
        raise ValueError("emit needs a partitioned program")
    frame = _Frame()
    segments: dict[str, Segment] = {}
    regions: dict[str, Region] = {}
    by_name = {region.name: region for region in program.regions}
    for described in program.segments:
        graph = program.partitioned.get_submodule(described.name).graph
        segment = _partitioned(described.name, graph, program)  # type: ignore[arg-type]
        segments[described.name] = segment
        target: Any = segment
        if described.region is not None:
            region = by_name[described.region]
            rule = region.entry.rule(program, region, segment, ledger, rules.get(region.name))
            if region.name not in rules:
                rules[region.name] = rule
            returned = region.entry.returned(program, region)
            trainable = region.entry.trainable(rule, segment)
            supplies = region.entry.supplies(program, region)
            target = Region(region.name, rule, clock, trainable, returned, supplies)
            regions[region.name] = target
        frame.__dict__[described.name] = target
    source, step = _compile("step", program.partitioned.graph)
    sources = {"step": source, **{name: segment.source for name, segment in segments.items()}}
    return Emitted(step.__get__(frame), segments, regions, sources)


def _partitioned(name: str, graph: fx.Graph, program: Program) -> Segment:
    """Emit one segment; the flat names of modules, parameters and buffers are read from the user's own dictionaries."""
    flat = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    places: dict[str, Place] = {}
    for node in graph.nodes:
        mapping[node] = flat.node_copy(node, mapping.__getitem__)
        if node.op in ("call_module", "get_attr"):
            path = str(node.meta["path"])
            places.setdefault(path, _place(str(node.target), path, program))
    source, function = _compile(name, flat)
    return Segment(name, source, function, tuple(places.values()))


def graph_of(nodes: Sequence[fx.Node], reads: Sequence[fx.Node], writes: Sequence[fx.Node]) -> fx.Graph:
    """Copies of nodes, in their order, as a function from `reads` to `writes`."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in reads}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple([copies[node] for node in writes]))
    return graph


def emit_segment(name: str, graph: fx.Graph, program: Program) -> Segment:
    """Emit a graph made of copies of the program's nodes."""
    names: dict[str, str] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            path = node.meta["path"] = str(node.target)
            node.target = names.setdefault(path, f"part_{len(names)}")
    return _partitioned(name, graph, program)


def _place(name: str, path: str, program: Program) -> Place:
    if path.startswith(CONSTANTS):
        return Place(name, program.constants, path, path)
    parent, _, key = path.rpartition(".")
    return Place(name, _dictionary(program.module(parent), key), key, path)


def _dictionary(module: nn.Module, key: str) -> Mapping[str, Any]:
    owners: tuple[Mapping[str, Any], ...] = (module._modules, module._parameters, module._buffers)
    for mapping in owners:
        if key in mapping:
            return mapping
    return module.__dict__


def _compile(name: str, graph: fx.Graph) -> tuple[str, Callable[..., Any]]:
    code = graph.python_code("self")
    filename = f"<rewriter {name} {next(_serial)}>"
    scope = dict(code.globals)
    exec(compile(code.src, filename, "exec"), scope)
    # Tracebacks through emitted code then show its lines.
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
    return code.src.strip() + "\n", scope["forward"]
