"""Rows, shapes, dtypes, differentiability and costs of every value, as the example shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .base import Pass
from .program import CONSTANTS, Cost, Program, Rows, Value, is_box_call


@dataclass(frozen=True)
class Annotate(Pass):
    """Runs the graph on the example and on a second batch size.

    Where the row index lives in a value is read off the dimension that moved in proportion to the batch (`Rows`); a
    value none of whose dimensions moved has no rows. Without a second batch size (the model takes one only) the first
    dimension of the first example's size is taken for the rows. FLOPs are those torch's counter knows; saved bytes are
    distinct storages that the tape of one forward keeps, parameters and buffers left out.
    A node that draws from torch's generators, changes a tensor or evaluates a box has an effect: it keeps its place.
    The caller preserves buffers, attributes and random state.
    """

    name: ClassVar[str] = "annotate"
    first: tuple[Tensor, ...] = field(repr=False)
    second: tuple[Tensor, ...] | None = field(default=None, repr=False)
    batches: tuple[int, int] | None = None  # rows of the first and the second example

    def apply(self, program: Program) -> Program:
        observer = _Observer(program, costs=True)
        observer.observe(self.first)
        other = None
        if self.second is not None:
            other = _Observer(program, costs=False)
            other.observe(self.second)
        values = {
            name: _value(seen, other.seen.get(name) if other else None, self.batches)
            for name, seen in observer.seen.items()
        }
        return program.with_(values=values, costs=observer.costs, effects=frozenset(observer.effects))


@dataclass(frozen=True)
class _Seen:
    shape: tuple[int, ...]
    dtype: torch.dtype
    differentiable: bool


def _value(seen: Any, other: Any, batches: tuple[int, int] | None) -> Any:
    if isinstance(seen, tuple):
        others = other if isinstance(other, tuple) and len(other) == len(seen) else (None,) * len(seen)
        return tuple(_value(a, b, batches) for a, b in zip(seen, others, strict=True))
    if seen is None:
        return None
    return Value(
        seen.shape, seen.dtype, _rows(seen.shape, other.shape if other else None, batches), seen.differentiable
    )


def _rows(shape: tuple[int, ...], other: tuple[int, ...] | None, batches: tuple[int, int] | None) -> Rows | None:
    if batches is None:
        return None
    size, size2 = batches
    if other is None or len(other) != len(shape):
        return Rows(shape.index(size)) if size in shape else None
    moved = [
        dimension
        for dimension, (a, b) in enumerate(zip(shape, other, strict=True))
        if a != b and a * size2 == b * size and a % size == 0
    ]
    return Rows(moved[0], shape[moved[0]] // size) if len(moved) == 1 else None


class Runner(fx.Interpreter):
    """Runs a graph over a program's model and constants: the program's own, or one made of its nodes."""

    def __init__(self, program: Program, graph: fx.Graph) -> None:
        super().__init__(program.model, graph=graph)
        self.extra_traceback = False  # errors of the user's own code stay as they are
        self.program = program

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return (
            self.program.constants[target] if target.startswith(CONSTANTS) else super().get_attr(target, args, kwargs)
        )


class _Observer(Runner):
    """Runs the graph node by node and notes what it sees."""

    def __init__(self, program: Program, costs: bool) -> None:
        super().__init__(program, program.graph)
        self.seen: dict[str, Any] = {}
        self.costs: dict[str, Cost] = {}
        self.effects: set[str] = set()
        self._flops = FlopCounterMode(display=False) if costs else None
        self._saved = _Saved(program)

    def observe(self, inputs: Sequence[Tensor]) -> None:
        if self._flops is None:
            self.run(*inputs)
            return
        with self._flops, torch.autograd.graph.saved_tensors_hooks(self._saved.pack, lambda kept: kept):
            self.run(*inputs)

    def run_node(self, n: fx.Node) -> Any:
        flops = self._flops.get_total_flops() if self._flops else 0
        self._saved.bytes = 0
        before = self._state(n) if self._flops else None
        result = super().run_node(n)
        self.seen[n.name] = _look(result)
        if self._flops:
            hidden = "batch_norm" in str(n.target)  # writes its running statistics without saying so
            if hidden or is_box_call(n, self.program) or self._state(n) != before:
                self.effects.add(n.name)
            self.costs[n.name] = Cost(
                self._flops.get_total_flops() - flops, self._saved.bytes, self._queries(n, result)
            )
        return result

    def _state(self, n: fx.Node) -> Any:
        """What a node without effects leaves as it was: random states, and the tensors it reads."""
        if n.op in ("placeholder", "get_attr", "output"):
            return None
        tensors = [value for source in n.all_input_nodes for value in tree_leaves(self.env[source])]
        if n.op == "call_module":
            module = self.program.module(str(n.target))
            tensors += [*module.parameters(), *module.buffers()]
        random = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])  # type: ignore[no-untyped-call]
        versions = tuple(value._version for value in tensors if isinstance(value, Tensor))
        return versions, [state.numpy().tobytes() for state in random]

    def _queries(self, n: fx.Node, result: Any) -> int:
        if not is_box_call(n, self.program):
            return 0
        first = result[0] if isinstance(result, tuple | list) else result
        return int(first.shape[0])


class _Saved:
    """Bytes that a tape keeps. It is held by that tape, so it must not hold anything on it, as the observer does."""

    def __init__(self, program: Program) -> None:
        self.bytes = 0
        self._known = {_storage(t) for t in (*program.model.parameters(), *program.model.buffers())}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in self._known:
            self._known.add(storage)
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor.detach()  # an output kept as it is would keep its own node alive for good


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _look(result: Any) -> Any:
    if isinstance(result, Tensor):
        return _Seen(tuple(result.shape), result.dtype, result.requires_grad)
    if isinstance(result, tuple | list):
        return tuple(_look(item) for item in result)
    return None
