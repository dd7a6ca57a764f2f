"""The torch.export front end: for models whose own forward fx cannot follow."""

from __future__ import annotations

import io
import logging
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.export import Dim, ExportedProgram

from rewriter.runtime.boxes import Box

from .exported_graph import clean
from .leaves import has_hooks, why_not_root
from .shadow import preserved
from .signature import Tree, flatten
from .traced import Traced, UnfitError, describe
from .untouched import DRAWS, Attributes

Sizes = Literal["rows", "all"]
# How many leading dimensions are left open, one attempt after the other.
_TRIED: dict[Sizes, tuple[int | None, ...]] = {"rows": (1, 0), "all": (None, 1, 0)}


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
            own = type(module).__module__.startswith("torch.") or isinstance(module, Box)
            changed = None if own else attributes.changed({})
            if changed not in (None, "_buffers"):
                raise UnfitError(f"changes its attribute `{changed}` while it runs", name)
        if any(isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) for value in tree.baked_values()):
            raise UnfitError("returns a number computed from sizes; return it as a tensor")
        return tuple(leaves)


def export(model: nn.Module, tree: Tree, tensors: list[Tensor], names: list[str], sizes: Sizes) -> Traced:
    """Captures model(*args, **kwargs) with torch.export; tree.rebuild(tensors) is (args, kwargs).

    sizes: which may change from call to call: the first dimension of every tensor, or each that can.
    The graph is flat: regions without gradients become detached values, every get_attr stands next to its use and
    names the user's own tensor. Sizes torch.export fixed or related to each other come back as `conditions`.
    Raises UnfitError.
    """
    reason = why_not_root(model)
    if reason:
        raise UnfitError(reason)
    _refuse_modules(model)
    for dimensions in _TRIED[sizes]:
        flat = _Flat(model, tree)
        shapes = tuple(dict.fromkeys(range(tensor.ndim)[:dimensions], Dim.AUTO) for tensor in tensors)
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
    graph, constants = clean(module, model, names)
    everything = dict(model.named_modules())
    return Traced(graph, flat.seen.outputs, constants, everything, conditions=_conditions(program, len(tensors)))


def _run(flat: _Flat, tensors: list[Tensor], shapes: tuple[dict[int, Any], ...]) -> ExportedProgram:
    watched = flat.model
    with preserved(watched) as world, _refuse_custom_backward(), _quiet():
        inputs = tuple(tensor.detach() for tensor in tensors)
        program = torch.export.export(flat, inputs, strict=False, dynamic_shapes={"tensors": shapes})
        moved = world.moved_generator()
        if moved:
            raise UnfitError(f"{DRAWS} {moved} outside the graph")
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
    owner = threading.get_ident()

    def refuse_enter(self: Any) -> None:
        if threading.get_ident() != owner:
            return enter(self)
        raise UnfitError("runs a part under saved-tensor hooks (checkpoint, save_on_cpu), which it would drop")

    def refuse_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        known = cls.__module__.startswith(("torch.", "rewriter.runtime.boxes."))  # a box is one operator in the graph
        if threading.get_ident() != owner or (known and cls is not torch.utils.checkpoint.CheckpointFunction):
            return apply.__get__(None, cls)(*args, **kwargs)
        raise UnfitError(f"calls the autograd.Function {cls.__name__}, whose backward torch.export would drop")

    saved_tensors_hooks.__enter__ = refuse_enter  # type: ignore[method-assign]
    Function.apply = classmethod(refuse_apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        saved_tensors_hooks.__enter__ = enter  # type: ignore[method-assign]
        Function.apply = apply  # type: ignore[method-assign]


class _Muted(io.StringIO):
    """Swallows what this thread writes, and passes on what others do."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export logs and prints its failures; a failed attempt is a reason here, not an event."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(_Muted(sys.stderr)):
            yield
    finally:
        logger.setLevel(level)


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
