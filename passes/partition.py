"""Node sets -> submodules. The only file that touches torch's `fuse_by_partitions`."""

from __future__ import annotations

import copy
import keyword
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn
from torch.fx.passes.utils.fuser_utils import fuse_by_partitions

from rewriter.runtime.errors import RewriteError

from .base import Pass
from .program import Cost, Program, Segment

_PREFIX = "fused_"
_RESERVED = frozenset((*keyword.kwlist, *dir(fx.GraphModule(nn.Module(), fx.Graph()))))


@dataclass(frozen=True)
class Partition(Pass):
    """Cuts the graph into submodules: one per region, and the largest possible exact segments between them.

    Segments are runs of the graph's own order, so operations, and with them random draws and buffer updates, happen in
    eager's order. Modules, parameters and buffers get flat names that Python can spell; meta["path"] is the user's.
    """

    name: ClassVar[str] = "partition"

    def apply(self, program: Program) -> Program:
        segments = _segments(program)
        module = _graph_module(program)
        nodes = {node.name: node for node in module.graph.nodes}
        parts: list[dict[fx.Node, int | None]] = [dict.fromkeys(nodes[name] for name in s.nodes) for s in segments]
        described = [_describe(segment, part, program) for segment, part in zip(segments, parts, strict=True)]
        fused = fuse_by_partitions(module, parts, prefix=_PREFIX)
        _rename(fused, [segment.name for segment in described])
        return program.with_(segments=tuple(described), partitioned=fused)


def _segments(program: Program) -> list[Segment]:
    owner = {name: region.name for region in program.regions for name in region.owned}
    runs: list[tuple[str | None, list[str]]] = []
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        region = owner.get(node.name)
        if not runs or runs[-1][0] != region:
            runs.append((region, []))
        runs[-1][1].append(node.name)
    ruled = [region for region, _ in runs if region is not None]
    for region in ruled:
        if ruled.count(region) > 1:
            raise RewriteError("the nodes of a region are not next to each other in the graph", where=region)
    names = _unique(region or "exact" for region, _ in runs)
    return [Segment(name, tuple(nodes), region) for name, (region, nodes) in zip(names, runs, strict=True)]


def _unique(names: Iterable[str]) -> list[str]:
    """Attribute names: `exact_0`, `exact_1`, ... and the regions' own names with dots and @ made underscores."""
    found: list[str] = []
    count = 0
    for name in names:
        if name == "exact":
            candidate, count = f"exact_{count}", count + 1
        else:
            candidate = _spelled(name, "region_", found)
        found.append(candidate)
    return found


def _graph_module(program: Program) -> fx.GraphModule:
    """The program as a GraphModule on the user's own modules, parameters and buffers.

    Flat names: fx would hang a dotted one into the user's own modules, and cannot spell one that is a Python keyword.
    """
    graph = program.edit()
    root: dict[str, object] = {}
    flat: dict[str, str] = {}
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        path = str(node.target)
        if path not in flat:
            flat[path] = name = _spelled(path, "_", root)
            root[name] = program.module(path) if node.op == "call_module" else program.attribute(path)
        node.target, node.meta["path"] = flat[path], path
    return fx.GraphModule(root, graph, class_name="Program")


def _spelled(path: str, prefix: str, taken: Iterable[str]) -> str:
    """A free attribute name for a path: letters, digits and underscores; `prefix` where it would start with a digit."""
    name = "".join(c if c.isascii() and c.isalnum() else "_" for c in path)
    name = f"{prefix}{name}" if name[0].isdecimal() else name
    while name in taken or name in _RESERVED:
        name += "_"
    return name


def _describe(segment: Segment, part: dict[fx.Node, int | None], program: Program) -> Segment:
    inputs = dict.fromkeys(source.name for node in part for source in node.all_input_nodes if source not in part)
    outputs = [node.name for node in part if any(user not in part for user in node.users)]
    cost = sum((program.costs.get(node.name, Cost()) for node in part), Cost())
    return Segment(segment.name, segment.nodes, segment.region, tuple(inputs), tuple(outputs), cost)


def _rename(module: fx.GraphModule, names: list[str]) -> None:
    for index, name in enumerate(names):
        part = getattr(module, f"{_PREFIX}{index}")
        delattr(module, f"{_PREFIX}{index}")
        module.add_module(name, part)
        for node in part.graph.find_nodes(op="placeholder"):
            node.target = _renamed(str(node.target), names)
            node._rename(node.target)
        part.recompile()
    for node in module.graph.nodes:
        if node.op == "call_module":
            node.target = _renamed(str(node.target), names)
            node._rename(node.target)
    module.graph.lint()
    module.recompile()


def _renamed(target: str, names: list[str]) -> str:
    index = target.removeprefix(_PREFIX)
    return names[int(index)] if index != target and index.isdecimal() else target


def readable(program: Program) -> fx.GraphModule:
    """A copy of the partitioned program to read, run and change; it shares nothing with the user's model."""
    if program.partitioned is None:
        raise ValueError("the program is not partitioned yet")
    return copy.deepcopy(program.partitioned)
