"""Gradients of weights: sums over time, taken as early as possible so that each is one matrix product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .all_steps import Values
from .joint import STATIC, Joint

aten: Any = torch.ops.aten

# Linear in their first argument and free of time: the sum over time may be taken before them.
_LINEAR = (
    aten.t.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.sum.dim_IntList,
    aten.neg.default,
    aten.detach.default,
    aten.clone.default,
)


@dataclass(frozen=True)
class TimeSum:
    """The sum of a node's value over all time steps; `reads` are the nodes whose values it needs."""

    reads: tuple[fx.Node, ...]
    compute: Callable[[Values, int], Tensor]


def time_sum(joint: Joint, node: fx.Node) -> TimeSum:
    """How to sum a node over time: products over (time, rows) at once, linear operations after the sum."""
    if joint.kinds[node] == STATIC:
        return TimeSum((node,), lambda values, steps: values[node] * steps)
    if node.target is aten.mm.default:
        return _product(joint, *node.args)  # type: ignore[arg-type]
    first, *rest = node.args or (None,)
    if node.target is aten.add.Tensor and not node.kwargs and _are_nodes(node):
        return _added(time_sum(joint, first), time_sum(joint, rest[0]))  # type: ignore[arg-type]
    if node.target in _LINEAR and not any(isinstance(each, fx.Node) for each in rest):
        inner = time_sum(joint, first)  # type: ignore[arg-type]
        target: Any = node.target
        return TimeSum(inner.reads, lambda v, steps: target(inner.compute(v, steps), *rest, **node.kwargs))
    return TimeSum((node,), lambda values, steps: values[node].sum(0))


def _are_nodes(node: fx.Node) -> bool:
    shapes = {tuple(arg.meta["val"].shape) for arg in node.args if isinstance(arg, fx.Node)}
    return len(shapes) == 1 and all(isinstance(arg, fx.Node) for arg in node.args)


def _added(left: TimeSum, right: TimeSum) -> TimeSum:
    return TimeSum((*left.reads, *right.reads), lambda v, steps: left.compute(v, steps) + right.compute(v, steps))


def _product(joint: Joint, left: fx.Node, right: fx.Node) -> TimeSum:
    if joint.kinds[right] == STATIC:
        inner = time_sum(joint, left)
        return TimeSum((*inner.reads, right), lambda v, steps: inner.compute(v, steps) @ v[right])
    if joint.kinds[left] == STATIC:
        inner = time_sum(joint, right)
        return TimeSum((*inner.reads, left), lambda v, steps: v[left] @ inner.compute(v, steps))
    return TimeSum((left, right), lambda v, steps: _contracted(v[left], v[right]))


def _contracted(left: Tensor, right: Tensor) -> Tensor:
    """sum_t left[t] @ right[t] as one product; (T, m, k) and (T, k, n) give (m, n)."""
    return left.transpose(0, 1).flatten(1) @ right.flatten(0, 1)
