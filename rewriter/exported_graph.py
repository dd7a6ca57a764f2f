"""Makes torch.export's graph flat and puts it in the user's names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from .interpret import read
from .traced import UnfitError, names_of_tensors

PREFIX = "model."  # the wrapper under which a model is exported
_GRAD_REGION = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST_REGION = torch.ops.higher_order.wrap_with_autocast
_FRAME = re.compile(r'File "(.+?)", line (\d+), in (\S+)')
_TORCH_FOLDER = os.path.dirname(torch.__file__)
_ASSERTIONS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range")


def clean(module: fx.GraphModule, model: nn.Module, names: list[str]) -> tuple[fx.Graph, dict[str, Tensor]]:
    """One flat graph over the user's names, from what torch.export made."""
    graph = fx.Graph()
    flattener = _Flattener(graph, model)
    placeholders = iter(names)
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = graph.placeholder(next(placeholders))
            values[node].meta = {"block": (), "source": ""}
        elif node.op == "output":
            graph.output(fx.map_arg(tuple(node.args[0]), values.__getitem__)).meta = {"block": (), "source": ""}
        else:
            values[node] = flattener.copy(node, module, values)
    _drop_dead(graph)
    _one_read_per_use(graph)
    return graph, flattener.constants


class _Flattener:
    """Copies nodes of an exported module and of its regions into one flat graph."""

    def __init__(self, graph: fx.Graph, model: nn.Module) -> None:
        self.graph = graph
        self.constants: dict[str, Tensor] = {}
        self._names = names_of_tensors(model)

    def copy(self, node: fx.Node, owner: fx.GraphModule, values: Mapping[fx.Node, Any], detached: bool = False) -> Any:
        if node.target in (_GRAD_REGION, _AUTOCAST_REGION):
            return self._region(node, owner, values, detached)
        if node.op == "get_attr":
            return self._read(node, owner)
        if node.op == "call_function" and node.target.__name__ == "getitem" and isinstance(values[node.args[0]], tuple):  # type: ignore[index, union-attr]
            return values[node.args[0]][node.args[1]]  # type: ignore[index]
        new = self.graph.node_copy(node, values.__getitem__)
        new.meta = _meta(node)
        if detached and isinstance(node.meta.get("val"), Tensor):
            new = self.graph.call_function(torch.ops.aten.detach.default, (new,))
            new.meta = _meta(node)
        return new

    def _read(self, node: fx.Node, owner: fx.GraphModule) -> Any:
        target = str(node.target)
        value = read(owner, target)
        if isinstance(value, fx.GraphModule):
            return value
        new = self.graph.get_attr(self._name(value))
        new.meta = _meta(node)
        return new

    def _name(self, value: Tensor) -> str:
        if id(value) not in self._names:
            self._names[id(value)] = f"_constants.{len(self.constants)}"
            self.constants[self._names[id(value)]] = value
        return self._names[id(value)]

    def _region(
        self, node: fx.Node, owner: fx.GraphModule, values: Mapping[fx.Node, Any], detached: bool
    ) -> tuple[Any, ...]:
        """Inlines a region; in one without gradients every value is detached, which is the same gradient: none."""
        if node.target is _GRAD_REGION:
            enabled, body, *rest = node.args
            detached = not enabled
        else:
            device, dtype, enabled, _, body, *rest = node.args
            now = torch.is_autocast_enabled(str(device))
            if now != enabled or (now and dtype not in (None, torch.get_autocast_dtype(str(device)))):
                raise UnfitError(f"switches autocast inside one forward ({_source(node) or 'unknown line'})")
        inner: Any = values[body]  # type: ignore[index]
        inside: dict[fx.Node, Any] = {}
        outer = iter(rest)
        for part in inner.graph.nodes:
            if part.op == "placeholder":
                inside[part] = values[next(outer)]  # type: ignore[index]
            elif part.op == "output":
                results = part.args[0] if isinstance(part.args[0], (tuple, list)) else (part.args[0],)
                return tuple(inside[result] if isinstance(result, fx.Node) else result for result in results)
            else:
                inside[part] = self.copy(part, inner, inside, detached)
        raise AssertionError("a graph ends with its output node")


def _drop_dead(graph: fx.Graph) -> None:
    """Erases assertions torch.export added, and pure nodes nobody uses; what writes or draws stays."""
    for node in reversed(graph.nodes):
        if not node.users and (node.op == "get_attr" or _is_assertion(node) or _is_pure(node)):
            graph.erase_node(node)


def _is_assertion(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "").startswith(_ASSERTIONS)


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    if isinstance(target, OpOverload):
        return (
            target.namespace == "aten"
            and not target._schema.is_mutable
            and torch.Tag.nondeterministic_seeded not in target.tags
        )
    return getattr(target, "__module__", "") in ("_operator", "math", "torch.fx.experimental.symbolic_shapes")


def _one_read_per_use(graph: fx.Graph) -> None:
    """One get_attr per use, inside the block that uses it."""
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        for user in list(node.users):
            with graph.inserting_before(user):
                own = graph.get_attr(str(node.target))
            own.meta = {**node.meta, "block": user.meta.get("block", ()), "source": user.meta.get("source", "")}
            user.replace_input_with(node, own)
        graph.erase_node(node)


def _meta(node: fx.Node) -> dict[str, Any]:
    return {"block": _block(node), "source": _source(node)}


def _block(node: fx.Node) -> tuple[tuple[str, int], ...]:
    """Qualified names and call indices from torch's module stack, without the root and our wrapper."""
    block = []
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        if path.startswith(PREFIX):
            _, _, call = key.rpartition("@") if "@" in key else ("", "", "0")
            block.append((path.removeprefix(PREFIX), int(call)))
    return tuple(block)


def _source(node: fx.Node) -> str:
    """The innermost line outside torch."""
    for path, line, function in reversed(_FRAME.findall(node.meta.get("stack_trace") or "")):
        if not path.startswith(_TORCH_FOLDER):
            return f"{os.path.basename(path)}:{line} in {function}"
    return ""
