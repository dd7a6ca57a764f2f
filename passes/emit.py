"""Program -> the code that runs: a function per segment, regions bridged to the tape, a function that calls them."""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable, Mapping
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
    """Emit a partitioned program. `rules` holds the rules that run, by region name; missing ones are made and added, so
    that captures of other signatures share what a rule has learnt."""
    if program.partitioned is None:
        raise ValueError("emit needs a partitioned program")
    frame = _Frame()
    segments: dict[str, Segment] = {}
    regions: dict[str, Region] = {}
    by_name = {region.name: region for region in program.regions}
    for described in program.segments:
        graph = program.partitioned.get_submodule(described.name).graph
        segment = _segment(described.name, graph, program)  # type: ignore[arg-type]
        segments[described.name] = segment
        target: Any = segment
        if described.region is not None:
            region = by_name[described.region]
            if region.name not in rules:
                rules[region.name] = region.entry.rule(program, region, segment, ledger)
            target = Region(region.name, rules[region.name], clock, segment.trainable)
            regions[region.name] = target
        frame.__dict__[described.name] = target
    source, step = _compile("step", program.partitioned.graph)
    sources = {"step": source, **{name: segment.source for name, segment in segments.items()}}
    return Emitted(step.__get__(frame), segments, regions, sources)


def _segment(name: str, graph: fx.Graph, program: Program) -> Segment:
    """Emit one segment; every module, parameter and buffer is a flat name read from the user's own dictionaries."""
    flat = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    places: dict[str, Place] = {}
    for node in graph.nodes:
        mapping[node] = new = flat.node_copy(node, mapping.__getitem__)
        if node.op in ("call_module", "get_attr"):
            path = str(node.target)
            if path not in places:
                taken = {place.name for place in places.values()}
                places[path] = _place(path, taken, program)
            new.target = places[path].name
    source, function = _compile(name, flat)
    return Segment(name, source, function, tuple(places.values()))


def _place(path: str, taken: set[str], program: Program) -> Place:
    name = "".join(c if c.isalnum() else "_" for c in path).lstrip("_") or "value"
    name = f"_{name}" if name[0].isdigit() else name
    while name in taken:
        name += "_"
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
