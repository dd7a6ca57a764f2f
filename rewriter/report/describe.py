"""A rewritten module as plain data: the one source every report is made from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from rewriter.passes.program import Cost, Program, Segment, Value

if TYPE_CHECKING:
    from rewriter.rewritten import Rewritten

SCHEMA = "rewriter.program"
VERSION = 1


def describe(step: Rewritten) -> dict[str, Any]:
    """Nodes, segments, regions and plan of the latest capture, as JSON-able data in a fixed order.

    Nothing in it depends on time, on memory addresses or on the folder the code lies in, so the same model and plan
    give the same bytes. Learnt numbers (step sizes, quality) are not part of the program; `explain()` shows them.
    """
    variant = step.latest
    program = variant.program
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "model": type(step.model).__name__,
        "front_end": variant.captured.front_end,
        "plan": [str(entry) if isinstance(entry.target, str) else type(entry).__name__ for entry in step.plan],
        "opaque": dict(sorted(program.opaque.items())),
        "regions": [
            {
                "name": region.name,
                "rule": region.entry.name,
                "entry": str(region.entry) if isinstance(region.entry.target, str) else type(region.entry).__name__,
                "target": region.target,
                "owned": list(region.owned),
            }
            for region in program.regions
        ],
        "segments": [_segment(segment, program) for segment in program.segments],
        "nodes": [_node(node, program) for node in program.graph.nodes],
        "passes": [{"name": line.name, "nodes": line.nodes, "changed": line.changed} for line in variant.history],
    }


def _segment(segment: Segment, program: Program) -> dict[str, Any]:
    rules = {region.name: region.entry.name for region in program.regions}
    return {
        "name": segment.name,
        "region": segment.region,
        "rule": rules[segment.region] if segment.region else "exact",
        "device": segment.device,
        "inputs": list(segment.inputs),
        "outputs": list(segment.outputs),
        "nodes": list(segment.nodes),
        "cost": _cost(segment.cost),
    }


def _node(node: fx.Node, program: Program) -> dict[str, Any]:
    return {
        "name": node.name,
        "op": node.op,
        "target": _target(node),
        "module": type(program.module(str(node.target))).__name__ if node.op == "call_module" else None,
        "inputs": [source.name for source in node.all_input_nodes],
        "block": [name if call == 0 else f"{name}@{call}" for name, call in node.meta.get("block", ())],
        "source": node.meta.get("source", ""),
        "values": [_value(item) for item in _items(program.values.get(node.name))],
        "cost": _cost(program.costs.get(node.name, Cost())),
    }


def _items(value: Any) -> list[Value | None]:
    """A value, or the values inside a tuple, nested ones in order."""
    return [inner for item in value for inner in _items(item)] if isinstance(value, tuple) else [value]


def _value(value: Value | None) -> dict[str, Any] | None:
    if value is None:
        return None
    rows = value.rows
    return {
        "shape": list(value.shape),
        "dtype": str(value.dtype).removeprefix("torch."),
        "rows": None if rows is None else {"dimension": rows.dimension, "multiplicity": rows.multiplicity},
        "width": value.width,
        "differentiable": value.differentiable,
    }


def _cost(cost: Cost) -> dict[str, int]:
    return {"flops": cost.flops, "saved_bytes": cost.saved, "queries": cost.queries}


def _target(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    module = getattr(target, "__module__", "") or ""
    return f"{module}.{getattr(target, '__name__', str(target))}".lstrip(".")
