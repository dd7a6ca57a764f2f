"""Runs a captured graph node by node, reading parameters, buffers and modules of the user's model by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn


def interpret(model: nn.Module, graph: fx.Graph, constants: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> Any:
    """The first argument of the output node, with values for nodes. Slow and plain: for proofs, not for training."""
    values: dict[fx.Node, Any] = {}
    remaining = iter(tensors)
    last_use = _last_uses(graph)
    for node in graph.nodes:
        if node.op == "output":
            return fx.map_arg(node.args[0], lambda used: values[used])
        values[node] = next(remaining) if node.op == "placeholder" else _run(node, model, constants, values)
        for used in last_use.get(node, ()):
            del values[used]
    raise AssertionError("a graph ends with its output node")


def _run(node: fx.Node, model: nn.Module, constants: Mapping[str, Tensor], values: Mapping[fx.Node, Any]) -> Any:
    target: Any = node.target
    args = fx.map_arg(node.args, lambda used: values[used])
    kwargs = fx.map_arg(node.kwargs, lambda used: values[used])
    if node.op == "get_attr":
        return constants[target] if target in constants else read(model, target)
    if node.op == "call_function":
        return target(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    return model.get_submodule(target)(*args, **kwargs)


def read(model: nn.Module, name: str) -> Any:
    """The attribute of a model under a qualified name."""
    path, _, last = name.rpartition(".")
    return getattr(model.get_submodule(path), last)


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for used in node.all_input_nodes:
            last[used] = node
    freed: dict[fx.Node, list[fx.Node]] = {}
    for used, user in last.items():
        freed.setdefault(user, []).append(used)
    return freed
