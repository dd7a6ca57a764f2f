"""model -> one flat graph over the user's own names, proven against the model before it is used."""

from __future__ import annotations

import inspect
import logging
import operator
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from rewriter.runtime.boxes import Box
from rewriter.runtime.errors import BoxError, RewriteError

from .guards import Guards
from .interpret import interpret
from .leaves import LeafPredicate, has_hooks, never
from .shadow import MismatchError, preserved, trial_run
from .shadow import prove as prove_graph
from .signature import Tree, flatten, tree_of_call
from .traced import Traced, UnfitError, describe
from .tracer import CaptureTracer
from .untouched import DRAWS

if TYPE_CHECKING:
    from .exporter import Sizes

log = logging.getLogger("rewriter")

_MOSTLY = 0.5
_WRONG = "its graph was wrong"
_FX, _FX_FIXED, _EXPORT = "fx", "fx with fixed sizes", "export"


@dataclass
class Capture:
    """One model for one call signature.

    graph:     flat; one placeholder per tensor of (args, kwargs) in `signature` order; call_module and get_attr targets
               are qualified names in the user's model, `_constants.<n>` names an entry of `constants`; the output
               node's first argument is the flat tuple of output tensors. Every node carries meta["block"] and
               meta["source"] (see CaptureTracer).
    inputs:    tree of (args, kwargs);  outputs: tree of what the model returns
    guards:    what must hold for a call to use this graph
    front_end: "fx" or "export";  opaque: submodule -> why it stays one call;  notes: what the proof could not cover
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    inputs: Tree
    outputs: Tree
    guards: Guards
    front_end: str
    opaque: dict[str, str]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """The model's own output structure around the tensors of the output node."""
        return self.outputs.rebuild(tensors)


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    leaves: LeafPredicate = never,
    sizes: Sizes = "rows",
    prove: bool = True,
) -> Capture:
    """Capture the training forward of `model` for the signature of this call.

    leaves: (module, qualified name) -> whether to keep the module as one call.
    sizes:  what torch.export leaves open: "rows" (the first dimension of every tensor) or "all", which takes about
            twice as long; worth it from the second length on. fx leaves open whatever Python does not ask for.
    prove:  compare the graph with the model (see `shadow.prove`); a front end whose graph differs is passed over.

    Tried in order: fx; fx with the sizes of the arguments fixed, but for their first dimension; torch.export. A graph
    of which the larger part is opaque is used only where torch.export has nothing better. The model, its state and
    the random states are left as they were. Raises RewriteError naming the submodule and every front end's reason.
    """
    start = time.perf_counter()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user's forward warns again when it runs for real
        found = _undisturbed(lambda: _Attempt(model, args, kwargs, leaves, sizes, prove))
    found.seconds = time.perf_counter() - start
    return found


def _undisturbed(attempt: Callable[[], _Attempt]) -> Capture:
    """The first attempt during which nobody moved the random states, or the last of several.

    They belong to the process: a thread that draws while another captures looks like a model that draws.
    """
    for last in (False, False, True):
        trying = attempt()
        alone = last or threading.active_count() == 1
        try:
            found = trying.first_that_holds()
        except RewriteError:
            if alone or not trying.disturbed(()):
                raise
        else:
            if alone or not trying.disturbed(found.opaque.values()):
                break
        log.debug("the random states moved during capture, and other threads run: once more")
    return found


class _Attempt:
    """One capture: tries the front ends and collects why each was passed over."""

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        leaves: LeafPredicate,
        sizes: Sizes,
        prove: bool,
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.leaves, self.sizes, self.prove = leaves, sizes, prove
        self.tensors, self.tree = tree_of_call(args, kwargs)
        self.names = _argument_names(model, args, kwargs)
        self.reasons: dict[str, tuple[str, str]] = {}

    def first_that_holds(self) -> Capture:
        traced = self._trace()
        if traced is not None and not _mostly_opaque(traced, self.model):
            found = self._finish(traced, _FX)
            if found is not None:
                return found
            traced = None
        exported = self._export()
        found = self._finish(exported, _EXPORT) if exported is not None else None
        if found is None and traced is not None:
            found = self._finish(traced, _FX)
        if found is None:
            raise self._refusal()
        return found

    def _trace(self) -> Traced | None:
        for front_end in (_FX, _FX_FIXED):
            tracer = CaptureTracer(self.model, self.leaves, fix_sizes=front_end == _FX_FIXED)
            try:
                traced = tracer.capture(self.model, self.tree, self.tensors, self.names)
            except UnfitError as unfit:
                self._note(front_end, unfit)
                continue
            try:
                return self._expand(traced)
            except UnfitError as unfit:
                self._note(front_end, unfit)
                return None
        return None

    def _export(self) -> Traced | None:
        from .exporter import export  # brings in much of torch that most models never need

        try:
            return export(self.model, self.tree, self.tensors, self.names, self.sizes)
        except UnfitError as unfit:
            self._note(_EXPORT, unfit)
            return None

    def _note(self, front_end: str, unfit: UnfitError) -> None:
        log.debug("%s cannot capture %s: %s", front_end, type(self.model).__name__, unfit.reason)
        self.reasons[front_end] = (unfit.where, unfit.reason)

    def disturbed(self, reasons: Iterable[str]) -> bool:
        """Whether one of these reasons, or of those a front end was passed over for, is one a thread can cause."""
        everything = (*reasons, *(reason for _, reason in self.reasons.values()))
        return any(DRAWS in reason or _WRONG in reason for reason in everything)

    def _expand(self, traced: Traced) -> Traced:
        """Finds out by one run what each output is, and takes nested results apart into tensors."""
        with preserved(self.model), trial_run(), torch.enable_grad():
            try:
                values = interpret(
                    self.model, traced.graph, traced.constants, [t.detach().clone() for t in self.tensors]
                )
            except BoxError:
                raise  # the box failed, not the graph
            except Exception as error:
                raise UnfitError(f"the graph does not run: {describe(error)}") from error
        output = traced.graph.output_node()
        trees: list[Tree] = []
        nodes: list[fx.Node] = []
        with traced.graph.inserting_before(output):
            for node, value in zip(output.args[0], values, strict=True):  # type: ignore[arg-type]
                trees.append(_taken_apart(traced.graph, node, value, nodes))
        output.args = (tuple(nodes),)
        traced.outputs = traced.outputs.grafted(trees)
        return traced

    def _finish(self, traced: Traced, front_end: str) -> Capture | None:
        """Guards, and the proof. None where the graph differs from the model."""
        fixed = (
            f"s[{index}][{dimension}] == {shape[dimension]}"
            for index, shape in traced.fixed.items()
            for dimension in range(1, len(shape))
        )
        guards = Guards(self.model, traced.inlined, (*traced.conditions, *fixed), self._quiet(traced))
        found = Capture(
            traced.graph, traced.constants, self.tree, traced.outputs, guards, front_end, dict(traced.opaque)
        )
        if self.prove:
            try:
                found.notes = prove_graph(self.model, self._runner(found), self.args, self.kwargs, guards)
            except MismatchError as mismatch:
                log.debug("%s captured %s wrongly: %s", front_end, type(self.model).__name__, mismatch)
                self.reasons[front_end] = ("", f"{_WRONG}: {mismatch}")
                return None
        return found

    def _quiet(self, traced: Traced) -> list[str]:
        """Parts whose hooks would not run: identities are dropped from the graph, regions run boxes and whole parts."""
        called = {str(node.target): None for node in traced.graph.find_nodes(op="call_module")}
        parts = {name: self.model.get_submodule(name) for name in called}
        ruled = {
            name: part
            for name, part in parts.items()
            if type(part) is nn.Identity or isinstance(part, Box) or self.leaves(part, name)
        }
        return [name for name, part in ruled.items() if not has_hooks(part)]

    def _runner(self, found: Capture) -> Any:
        def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            tensors, _ = tree_of_call(args, kwargs)
            return found.rebuild(interpret(self.model, found.graph, found.constants, tensors))

        return run

    def _refusal(self) -> RewriteError:
        where = next((where for where, _ in self.reasons.values() if where), "")
        lines = [
            f"{front_end}: {f'`{place}` ' if place else ''}{reason}"
            for front_end, (place, reason) in self.reasons.items()
        ]
        return RewriteError(
            f"{type(self.model).__name__} cannot be captured",
            where=f"`{where}`" if where else "the model's own forward",
            why="; ".join(lines),
            remedy="move the lines named above into a submodule of their own, which then stays one call; "
            "or change what they do",
        )


def _taken_apart(graph: fx.Graph, node: fx.Node, value: Any, nodes: list[fx.Node]) -> Tree:
    """The tree below one output value; its tensors, picked out of it by index, are added to `nodes`."""
    if isinstance(value, Tensor):
        nodes.append(node)
        return Tree(leaf=True)
    if value is None:
        return Tree()
    if not isinstance(value, (tuple, list, dict)):
        raise UnfitError(f"returns a {type(value).__name__} known only when the model runs; return a tensor")
    keys = list(value) if isinstance(value, dict) else range(len(value))
    children = []
    for key in keys:
        item = graph.call_function(operator.getitem, (node, key))
        item.meta = {"block": node.meta["block"], "source": node.meta["source"]}
        children.append(_taken_apart(graph, item, value[key], nodes))
    _, shape = flatten(value)
    return Tree(shape.build, tuple(children), kind=shape.kind)


def _mostly_opaque(traced: Traced, model: nn.Module) -> bool:
    """Whether more than half of the parameters, or of the modules where there are none, lie in untraceable parts."""
    if not traced.failed:
        return False
    inside = [module for name in traced.failed for module in model.get_submodule(name).modules()]
    return len({id(module) for module in inside}) > _MOSTLY * sum(1 for _ in model.modules())


def _argument_names(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """A readable placeholder name per tensor: the parameter's, numbered where an argument holds several."""
    try:
        parameters = [
            name
            for name, parameter in inspect.signature(model.forward).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        parameters = []
    names: list[str] = []
    given = [(parameters[i] if i < len(parameters) else f"input_{i}", value) for i, value in enumerate(args)]
    for name, value in (*given, *sorted(kwargs.items())):
        tensors, _ = flatten(value)
        clean = re.sub(r"\W", "_", name)
        names.extend([clean] if len(tensors) == 1 else [f"{clean}_{k}" for k in range(len(tensors))])
    return names
