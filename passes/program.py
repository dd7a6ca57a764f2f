"""The program: one flat graph over the user's own modules, and what the passes have said of it so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.runtime.boxes import Box
from rewriter.runtime.boxes.box_call import is_box_operator
from rewriter.runtime.errors import RewriteError

CONSTANTS = "_constants."


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the row index lives in a value: dimension and multiplicity (entries of that dimension per row)."""

    dimension: int
    multiplicity: int = 1

    def __str__(self) -> str:
        return f"dim {self.dimension}" + (f" x{self.multiplicity}" if self.multiplicity != 1 else "")


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor as the example showed it. rows: None where it has no rows; differentiable: autograd followed it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Rows | None
    differentiable: bool

    @property
    def width(self) -> int:
        """Elements per row; all elements of a value without rows."""
        size = int(torch.Size(self.shape).numel())
        if self.rows is None:
            return size
        return size * self.rows.multiplicity // max(1, self.shape[self.rows.dimension])

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{kind}{list(self.shape)}" + (f" rows {self.rows}" if self.rows else "")


@dataclass(frozen=True, slots=True)
class Cost:
    """flops of one forward; saved: bytes its tape keeps; queries: box rows evaluated per forward."""

    flops: int = 0
    saved: int = 0
    queries: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.saved + other.saved, self.queries + other.queries)


@dataclass(frozen=True)
class Region:
    """The nodes (by name, in graph order) whose pullback one plan entry supplies. parts: what it cuts them into."""

    name: str
    entry: Any  # the plan entry, a rewriter.passes.base.Entry
    target: str
    owned: tuple[str, ...]
    parts: tuple[Any, ...] = ()  # of rewriter.passes.structure.Span


@dataclass(frozen=True)
class Segment:
    """A convex run of nodes that becomes one submodule. region: None where ordinary differentiation rules."""

    name: str
    nodes: tuple[str, ...]
    region: str | None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    cost: Cost = Cost()
    device: str = "cpu"


@dataclass(frozen=True)
class Program:
    """Immutable to callers: passes return a new one.

    model: the user's module, whose names the graph's targets are; graph: flat, one placeholder per tensor argument and
    one flat tuple of tensors as output; constants: tensors that capture found outside any module; values and costs (per
    node name) and effects (nodes that draw random numbers, change a tensor or evaluate a box): from `annotate`;
    conditions: what passes took for granted of the sizes of the call's tensors, as in `Guards`; regions: from plan
    entries; segments and partitioned: from `partition`.
    """

    model: nn.Module
    graph: fx.Graph
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Value | tuple[Value | None, ...]] = field(default_factory=dict)
    costs: Mapping[str, Cost] = field(default_factory=dict)
    effects: frozenset[str] = frozenset()
    opaque: Mapping[str, str] = field(default_factory=dict)
    conditions: tuple[str, ...] = ()
    regions: tuple[Region, ...] = ()
    segments: tuple[Segment, ...] = ()
    partitioned: fx.GraphModule | None = None
    notes: tuple[str, ...] = ()

    def with_(self, **changes: Any) -> Program:
        return replace(self, **changes)

    def edit(self) -> fx.Graph:
        """A copy of the graph with the same node names, to change and hand to `edited`."""
        copy = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            mapping[node] = new = copy.node_copy(node, mapping.__getitem__)
            if new.name != node.name:
                raise AssertionError(f"the copy of node {node.name} is called {new.name}")
        return copy

    def edited(self, graph: fx.Graph) -> Program:
        """With what became of a copy made by `edit()`; the same program where nodes, order and blocks are the same."""
        old, new = ([(node.name, node.meta.get("block")) for node in each.nodes] for each in (self.graph, graph))
        return self if old == new else self.with_(graph=graph)

    @cached_property
    def _nodes(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.graph.nodes}

    def node(self, name: str) -> fx.Node:
        """The node of that name. Raises KeyError."""
        return self._nodes[name]

    def module(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)

    def attribute(self, path: str) -> Any:
        """What a get_attr target names: a constant, or something in the user's model."""
        if path.startswith(CONSTANTS):
            return self.constants[path]
        parent, _, name = path.rpartition(".")
        return getattr(self.model.get_submodule(parent), name)

    def __str__(self) -> str:
        """Stable text: a line per node, then a line per region."""
        lines = [_line(node, self.values.get(node.name)) for node in self.graph.nodes]
        lines += [f"region {r.name}: {r.entry} owns {', '.join(r.owned)}" for r in self.regions]
        lines += [f"segment {s.name} [{s.region or 'exact'}]: {', '.join(s.nodes)}" for s in self.segments]
        return "\n".join(lines)

    def verify(self) -> None:
        """Raises RewriteError where the program breaks its contract: names resolve, regions are disjoint and convex,
        segments cover every node once."""
        self.graph.lint()
        names = self._nodes
        for node in names.values():
            if node.op in ("call_module", "get_attr"):
                self._resolves(node)
        owners: dict[str, Region] = {}
        for region in self.regions:
            for name in region.owned:
                if name not in names:
                    raise RewriteError("a region owns a node that is not in the graph", where=f"{region.name}: {name}")
                if owners.setdefault(name, region) is not region:
                    raise RewriteError(
                        "two plan entries rule the same part of the model",
                        where=f"{region.name} ({region.entry}) and {owners[name].name} ({owners[name].entry})",
                        why="every gradient has exactly one source",
                        remedy="take one of the two entries out of the plan, or narrow its target",
                    )
            _check_convex(region, [names[name] for name in region.owned])
        twice = [name for name, count in Counter(region.name for region in self.regions).items() if count > 1]
        if twice:
            raise RewriteError("two regions have the same name", where=", ".join(twice))
        self._segments_cover(names)

    def _resolves(self, node: fx.Node) -> None:
        path = str(node.target)
        try:
            _ = self.module(path) if node.op == "call_module" else self.attribute(path)
        except (AttributeError, KeyError) as error:
            raise RewriteError("a name in the graph is not in the model", where=path, why=str(error)) from error

    def _segments_cover(self, names: Mapping[str, fx.Node]) -> None:
        if not self.segments:
            return
        inner = [name for name, node in names.items() if node.op not in ("placeholder", "output")]
        covered = [name for segment in self.segments for name in segment.nodes]
        if sorted(covered) != sorted(inner):
            odd = sorted(set(covered) ^ set(inner)) or sorted(n for n in covered if covered.count(n) > 1)
            raise RewriteError("segments do not cover the graph exactly once", where=", ".join(odd[:5]))
        homeless = [segment.name for segment in self.segments if not segment.device]
        if homeless:
            raise RewriteError("a segment has no device", where=", ".join(homeless))


def _line(node: fx.Node, value: Any) -> str:
    shown = f" : {value}" if isinstance(value, Value) else ""
    inputs = ", ".join(n.name for n in node.all_input_nodes)
    target = "" if node.op in ("placeholder", "output") else f" {_target_text(node)}"
    return f"{node.name} = {node.op}{target}({inputs}){shown}"


def _target_text(node: fx.Node) -> str:
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def holds_box(module: nn.Module) -> bool:
    """Whether a module is a box or has one inside, so that autograd cannot cross it."""
    return any(isinstance(part, Box) for part in module.modules())


def is_box_call(node: fx.Node, program: Program) -> bool:
    """Whether a node evaluates a box: its module in an fx graph, its operator in an exported one."""
    if node.op == "call_module":
        return isinstance(program.module(str(node.target)), Box)
    return node.op == "call_function" and is_box_operator(node.target)


def reach(nodes: list[fx.Node]) -> Iterator[fx.Node]:
    """Every node outside `nodes` that depends on one of them."""
    inside = set(nodes)
    seen: set[fx.Node] = set()
    stack = [user for node in nodes for user in node.users if user not in inside]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            stack.extend(user for user in node.users)


def _check_convex(region: Region, nodes: list[fx.Node]) -> None:
    inside = set(nodes)
    for outside in reach(nodes):
        if outside in inside:
            raise RewriteError(
                "a region is not convex",
                where=region.name,
                why=f"a path leaves it and comes back at {outside.name}",
                remedy="name the enclosing module, so that what lies between belongs to the region too",
            )
