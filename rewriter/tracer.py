"""The fx front end: runs the user's forward once on stand-ins and notices what a graph would silently lose."""

from __future__ import annotations

import math
import sys
import threading
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Proxy, TraceError, TracerBase

from .leaves import LeafPredicate, why_leaf, why_not_root
from .proxies import Held, HeldParameter, Input, Value, is_surely_tensor
from .signature import Tree, flatten
from .traced import Traced, UnfitError, describe, is_outside, names_of_tensors, place_of
from .untouched import DRAWS, Attributes, RandomState
from .watch import Watch, modes, watched_isinstance, writes

# Called with a stand-in among their sizes, these become nodes; fx alone would fail on them.
_FACTORIES = tuple(
    getattr(torch, name)
    for name in (
        "arange", "empty", "eye", "full", "linspace", "normal", "ones", "rand", "randint", "randn", "randperm",
        "tril_indices", "triu_indices", "zeros",
    )
)  # fmt: skip


class CaptureTracer(fx.Tracer):
    """Traces a model into one flat graph over its own names.

    A submodule that cannot be traced, or that does what a graph would lose, is rolled back and stays one call, with
    the reason in `opaque`. Nodes carry meta["block"]: ((qualified name, call index), ...), outermost first, the root
    left out; and meta["source"]: "file.py:line in function" of the user's code.
    """

    def __init__(self, model: nn.Module, leaves: LeafPredicate, fix_sizes: bool = False) -> None:
        super().__init__(autowrap_modules=(math,), autowrap_functions=_FACTORIES)
        self._autowrap_search.append(torch)
        self.fix_sizes = fix_sizes
        self.fixed_inputs: set[fx.Node] = set()
        self.fixed_lengths: set[tuple[fx.Node, int]] = set()
        self.surely_tensors: set[fx.Node] = set()
        self.opaque: dict[str, str] = {}
        self.failed: set[str] = set()
        self.inlined: dict[str, nn.Module] = {"": model}
        self.constants: dict[str, Tensor] = {}
        self._leaves = leaves
        self._thread = threading.get_ident()
        self._paths = {module: name for name, module in model.named_modules()}
        self._held = names_of_tensors(model)
        self._constant_names: dict[int, str] = {}
        self._placeholders: dict[fx.Node, Tensor] = {}
        self._calls: Counter[str] = Counter()
        self._block: tuple[tuple[str, int], ...] = ()
        self._modes = modes()

    def capture(self, model: nn.Module, tree: Tree, tensors: list[Tensor], names: list[str]) -> Traced:
        """Traces model(*args, **kwargs), where tree.rebuild(tensors) is (args, kwargs). Raises UnfitError."""
        self._call = (tree, tensors, names)
        reason = why_not_root(model)
        if reason:
            raise UnfitError(reason)
        try:
            with watched_isinstance(), Watch(self._held):
                graph = self.trace(model)
        except Exception as error:
            raise UnfitError(describe(error)) from error
        _drop_unused(graph)
        for node in graph.nodes:
            # fx would otherwise write `torch.fx.wrap(...)` into the code it makes, and break the next trace.
            node.meta.pop("is_wrapped", None)
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        fixed = {
            index: tuple(tensors[index].shape) for index, node in enumerate(placeholders) if node in self.fixed_inputs
        }
        lengths = tuple(
            f"s[{index}][{dimension}] == {tensors[index].shape[dimension]}"
            for index, node in enumerate(placeholders)
            for dimension in range(tensors[index].ndim)
            if (node, dimension) in self.fixed_lengths
        )
        failed = frozenset(self.failed)
        return Traced(graph, self._outputs, self.constants, self.inlined, self.opaque, failed, fixed, lengths)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        tree, tensors, names = self._call

        def run() -> tuple[Any, ...]:
            stand_ins = [
                Input(self.create_node("placeholder", name, (), {}), self, tensor)
                for name, tensor in zip(names, tensors, strict=True)
            ]
            self._placeholders.update({each.node: each.value for each in stand_ins})
            args, kwargs = tree.rebuild(stand_ins)
            result = self._inline(self.root, "", self.root.forward, args, kwargs)
            leaves, self._outputs = flatten(result, lambda value: isinstance(value, (Proxy, Tensor)))
            return tuple(leaves)

        return run, []

    def length_of(self, value: Value) -> int | None:
        """How many items iteration over an argument, or over `unbind` of it, gives; None where only a run can tell.

        The graph then holds for that length, whatever the other sizes are.
        """
        node, dimension = value.node, 0
        if node.target in (torch.unbind, "unbind"):
            given = dict(zip(("input", "dim"), node.args, strict=False)) | node.kwargs
            node, dimension = given.get("input"), given.get("dim", 0)  # type: ignore[assignment]
        if not isinstance(node, fx.Node) or node.op != "placeholder":
            return None
        shape = self._placeholders[node].shape
        if not isinstance(dimension, int) or not -len(shape) <= dimension < len(shape):
            return None
        self.fixed_lengths.add((node, dimension % len(shape)))
        return shape[dimension]

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)  # fx patches every module of the process; this one is somebody else's
        if m not in self._paths and not len(list(m.parameters())) and not len(list(m.buffers())):
            return forward(*args, **kwargs)  # made on the way, as in nn.Softmax(dim=-1)(x)
        name = self._name_of(m)
        index, outer = self._calls[name], self._block
        self._calls[name] = index + 1
        self._block = (*outer, (name, index))
        try:
            reason = self.opaque.get(name) or why_leaf(m, name, self._leaves)
            if reason is None:
                return self._inline_or_keep(m, name, forward, args, kwargs)
            if reason:
                self.opaque[name] = reason
            return self.create_proxy("call_module", name, args, kwargs)
        finally:
            self._block = outer

    def _inline_or_keep(self, m: nn.Module, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        mark = next(reversed(self.graph.nodes), None)
        before = (self._calls.copy(), dict(self.opaque), dict(self.inlined), set(self.failed))
        fixed = set(self.fixed_inputs), set(self.fixed_lengths)
        self.inlined[name] = m
        try:
            return self._inline(m, name, forward, args, kwargs)
        except Exception as error:
            for node in reversed(self.graph.nodes):
                if node is mark:
                    break
                self.graph.erase_node(node)
            self._calls, self.opaque, self.inlined, self.failed = before
            self.fixed_inputs, self.fixed_lengths = fixed
            self.opaque[name] = describe(error)
            self.failed.add(name)
        return self.create_proxy("call_module", name, args, kwargs)

    def _inline(self, m: nn.Module, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs a forward on stand-ins; raises TraceError where it changes attributes or draws random numbers."""
        watched = {child: Attributes(module) for child, module in m.named_modules()}
        random = RandomState()
        stand_ins: dict[str, object] = {
            key: Held(self, f"{name}.{key}" if name else key, value)
            for key, value in vars(m).items()
            if isinstance(value, Tensor)
        }
        for key, stand_in in stand_ins.items():
            watched[""].put(key, stand_in)
        try:
            result = forward(*args, **kwargs)
            for child, attributes in watched.items():
                changed = attributes.changed({} if child else stand_ins)
                if changed:
                    raise TraceError(f"changes its attribute `{child and child + '.'}{changed}` while it runs")
            moved = random.moved()
            if moved:
                raise TraceError(f"{DRAWS} {moved} outside the graph")
            return result
        finally:
            for attributes in watched.values():
                attributes.restore()
            random.restore()

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        if isinstance(attr_val, Tensor) and threading.get_ident() == self._thread:
            name = self._held.get(id(attr_val))
            if name is not None:
                kind = HeldParameter if isinstance(attr_val, nn.Parameter) else Held
                return kind(self, name, attr_val)
        return attr_val

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> fx.Node:
        if kind not in ("placeholder", "output", "get_attr"):
            self._refuse_modes()
            self._refuse_writes(kind, target, args, kwargs)
        node = self.graph.create_node(kind, target, args, kwargs, name)
        leaf = self.root.get_submodule(target) if kind == "call_module" else None
        if is_surely_tensor(kind, target, args, self.surely_tensors, leaf):
            self.surely_tensors.add(node)
        node.meta["block"] = self._block
        node.meta["source"] = "" if kind in ("placeholder", "output") else _source()
        return node

    def proxy(self, node: fx.Node) -> Value:
        return Value(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Proxy):
            return a.node
        if isinstance(a, Tensor):
            return self.create_node("get_attr", self._name_of_tensor(a), (), {})
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self._name_of(a), (), {})
        if isinstance(a, tuple) and hasattr(a, "_fields"):
            return self.create_node("call_function", type(a), tuple(self.create_arg(part) for part in a), {})
        return TracerBase.create_arg(self, a)

    def _name_of(self, module: nn.Module) -> str:
        name: str | None = self._paths.get(module)
        if name is None:
            raise TraceError(f"calls a {type(module).__name__} that is not registered in the model")
        return name

    def _name_of_tensor(self, tensor: Tensor) -> str:
        name = self._held.get(id(tensor)) or self._constant_names.get(id(tensor))
        if name is None:
            if tensor.grad_fn is not None:
                raise TraceError("uses a tensor that was computed with a tape outside the graph")
            name = f"_constants.{len(self.constants)}"
            self.constants[name] = tensor
            self._constant_names[id(tensor)] = name
        return name

    def _refuse_modes(self) -> None:
        now = modes()
        if now != self._modes:
            grad, hooks, *_ = now
            if grad != self._modes[0]:
                raise TraceError("switches gradients on or off (no_grad, inference mode or an autograd.Function)")
            if hooks != self._modes[1]:
                raise TraceError("runs under saved-tensor hooks (checkpoint, save_on_cpu)")
            raise TraceError("switches autocast on or off")

    def _refuse_writes(self, kind: str, target: Any, args: Any, kwargs: Any) -> None:
        """A constant made while tracing lives as long as the graph: a write would add up from call to call."""
        written = kwargs.get("out") if kwargs else None
        if args and writes(kind, target, kwargs):
            written = args[0]
        if isinstance(written, fx.Node) and written.op == "get_attr" and str(written.target) in self.constants:
            raise TraceError("writes into a tensor that was made while tracing")


def _drop_unused(graph: fx.Graph) -> None:
    """Erases reads nobody uses. Calls stay: fx cannot tell which of them only look pure."""
    for node in reversed(graph.nodes):
        reads = node.op == "get_attr" or node.target is getattr or (node.op, node.target) == ("call_method", "size")
        if reads and not node.users:
            graph.erase_node(node)


def _source() -> str:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and is_outside(frame):
        if frame.f_code is CaptureTracer.capture.__code__:
            return ""
        frame = frame.f_back
    return place_of(frame, frame.f_lineno) if frame is not None else ""
