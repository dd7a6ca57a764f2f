"""The torch.export front end: for models whose own forward fx cannot follow."""

from __future__ import annotations

import io
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.export import Dim, ExportedProgram

from rewriter.runtime.boxes import Box

from .interpret import read
from .leaves import has_hooks, why_not_root
from .shadow import preserved
from .signature import Tree, flatten
from .tracer import Traced, UnfitError, describe
from .untouched import Attributes

_GRAD_REGION = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST_REGION = torch.ops.higher_order.wrap_with_autocast
_FRAME = re.compile(r'File "(.+?)", line (\d+), in (\S+)')
_TORCH_FOLDER = os.path.dirname(torch.__file__)
_ASSERTIONS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range")
_PREFIX = "model."


class _Seen:
    """What the trace saw. Not the module's own attribute: torch.export puts those back."""

    outputs: Tree


class _Flat(nn.Module):
    """The model as a function from tensors to a tuple of tensors; everything else is baked."""

    def __init__(self, model: nn.Module, tree: Tree) -> None:
        super().__init__()
        self.model = model
        self._tree = tree
        self.seen = _Seen()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self._tree.rebuild(tensors)
        before = [(name, module, Attributes(module)) for name, module in self.model.named_modules()]
        leaves, tree = flatten(self.model.forward(*args, **kwargs))
        self.seen.outputs = tree
        for name, module, attributes in before:
            changed = attributes.changed({})
            if changed not in (None, "_buffers") and not isinstance(module, Box):
                raise UnfitError(f"changes its attribute `{changed}` while it runs", name)
        if any(isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) for value in tree.baked_values()):
            raise UnfitError("returns a number computed from sizes; return it as a tensor")
        return tuple(leaves)


def export(model: nn.Module, tree: Tree, tensors: list[Tensor], names: list[str]) -> Traced:
    """Captures model(*args, **kwargs) with torch.export, every size dynamic that can be.

    tree.rebuild(tensors) is (args, kwargs). The graph is flat: regions without gradients become detached values, every
    get_attr stands next to its use and names the user's own tensor. Sizes torch.export fixed or related to each other
    come back as `conditions`. Raises UnfitError.
    """
    reason = why_not_root(model)
    if reason:
        raise UnfitError(reason)
    _refuse_modules(model)
    for dynamic in (range, lambda dimensions: range(min(dimensions, 1)), lambda dimensions: range(0)):
        flat = _Flat(model, tree)
        shapes = tuple(dict.fromkeys(dynamic(tensor.ndim), Dim.AUTO) for tensor in tensors)
        try:
            program = _run(flat, tensors, shapes)
            break
        except UnfitError:
            raise
        except Exception as error:
            failure = error
    else:
        raise UnfitError(describe(failure)) from failure
    module = program.module(check_guards=False)
    graph, constants = _clean(module, model, names)
    everything = dict(model.named_modules())
    return Traced(graph, flat.seen.outputs, constants, everything, conditions=_conditions(program, len(tensors)))


def _run(flat: _Flat, tensors: list[Tensor], shapes: tuple[dict[int, Any], ...]) -> ExportedProgram:
    watched = flat.model
    with preserved(watched) as world, _refuse_custom_backward(), _quiet():
        inputs = tuple(tensor.detach() for tensor in tensors)
        program = torch.export.export(flat, inputs, strict=False, dynamic_shapes={"tensors": shapes})
        moved = world.moved_generator()
        if moved:
            raise UnfitError(f"draws from {moved} outside the graph")
    return program


def _refuse_modules(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if name and has_hooks(module):
            raise UnfitError("has hooks, which torch.export would drop", name)
        if isinstance(module, torch.jit.ScriptModule):
            raise UnfitError("is a ScriptModule", name)


@contextmanager
def _refuse_custom_backward() -> Iterator[None]:
    """torch.export inlines checkpointed parts and the forward of an autograd.Function; both lose their backward."""
    enter, apply = saved_tensors_hooks.__enter__, Function.__dict__["apply"]

    def refuse_enter(self: Any) -> None:
        raise UnfitError("runs a part under saved-tensor hooks (checkpoint, save_on_cpu), which it would drop")

    def refuse_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__.startswith("torch.") and cls is not torch.utils.checkpoint.CheckpointFunction:
            return apply.__get__(None, cls)(*args, **kwargs)
        raise UnfitError(f"calls the autograd.Function {cls.__name__}, whose backward torch.export would drop")

    saved_tensors_hooks.__enter__ = refuse_enter  # type: ignore[method-assign]
    Function.apply = classmethod(refuse_apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        saved_tensors_hooks.__enter__ = enter  # type: ignore[method-assign]
        Function.apply = apply  # type: ignore[method-assign]


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export logs and prints its failures; a failed attempt is a reason here, not an event."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _clean(module: fx.GraphModule, model: nn.Module, names: list[str]) -> tuple[fx.Graph, dict[str, Tensor]]:
    """One flat graph over the user's names, from what torch.export made."""
    graph = fx.Graph()
    flattener = _Flattener(graph, module, model)
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

    def __init__(self, graph: fx.Graph, module: fx.GraphModule, model: nn.Module) -> None:
        self.graph, self.model, self.module = graph, model, module
        self.constants: dict[str, Tensor] = {}
        self._named: dict[int, str] = {}

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
        new = self.graph.get_attr(self._name(target.removeprefix(_PREFIX), value))
        new.meta = _meta(node)
        return new

    def _name(self, name: str, value: Tensor) -> str:
        try:
            if read(self.model, name) is value:
                return name
        except AttributeError:
            pass
        if id(value) not in self._named:
            self._named[id(value)] = f"_constants.{len(self.constants)}"
            self.constants[self._named[id(value)]] = value
        return self._named[id(value)]

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
        if path.startswith(_PREFIX):
            _, _, call = key.rpartition("@") if "@" in key else ("", "", "0")
            block.append((path.removeprefix(_PREFIX), int(call)))
    return tuple(block)


def _source(node: fx.Node) -> str:
    """The innermost line outside torch."""
    for path, line, function in reversed(_FRAME.findall(node.meta.get("stack_trace") or "")):
        if not path.startswith(_TORCH_FOLDER):
            return f"{os.path.basename(path)}:{line} in {function}"
    return ""


def _conditions(program: ExportedProgram, count: int) -> tuple[str, ...]:
    """What torch.export assumed about the sizes, as Python over `s`, the sizes of the tensors in order."""
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"][-count:] if count else []
    conditions: list[str] = []
    first: dict[str, str] = {}
    for index, value in enumerate(values):
        for dimension, size in enumerate(value.shape):
            place = f"s[{index}][{dimension}]"
            if isinstance(size, int):
                conditions.append(f"{place} == {size}")
            elif str(size) in first:
                conditions.append(f"{place} == {first[str(size)]}")
            else:
                first[str(size)] = place
                conditions.extend(_range(place, size, program))
    related = (re.sub(r"L\['tensors'\]\[(\d+)\]\.size\(\)", r"s[\1]", guard) for guard in program._guards_code)
    conditions.extend(guard for guard in related if "L[" not in guard and guard not in conditions)
    return tuple(conditions)


def _range(place: str, size: torch.SymInt, program: ExportedProgram) -> Iterator[str]:
    bounds = program.range_constraints.get(size.node.expr)
    if bounds is None:
        return
    if bounds.lower > 0:
        yield f"{place} >= {int(bounds.lower)}"
    if bounds.upper.is_Integer:
        yield f"{place} <= {int(bounds.upper)}"
