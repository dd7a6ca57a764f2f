"""Values that are linear in the running cotangents, as sums of coefficients times what the loop holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .joint import shape


@dataclass(frozen=True)
class Form:
    """constant + sum over bases of coefficient * base + sum of u @ W.

    terms: base -> coefficient, None for one; a base narrower than its coefficient is repeated along the last dimension.
    products: pairs (u, W), W static. constant: a node that does not depend on the running cotangents.
    """

    terms: dict[fx.Node, fx.Node | None] = field(default_factory=dict)
    constant: fx.Node | None = None
    products: tuple[tuple[fx.Node, fx.Node], ...] = ()

    @property
    def size(self) -> int:
        return len(self.terms) + (self.constant is not None) + len(self.products)


@dataclass(frozen=True)
class Fill:
    """Write forms into a buffer that holds `node` for all steps. pieces: (first column, last + 1, form)."""

    node: fx.Node
    pieces: tuple[tuple[int, int, Form], ...]


@dataclass(frozen=True)
class Apply:
    """Carry out a node as it stands."""

    node: fx.Node


def width(node: fx.Node) -> int:
    """Elements along the last dimension of one step's value."""
    found = shape(node)
    return found[-1] if found else 1


def is_last(dimension: Any, node: fx.Node) -> bool:
    """Whether a dimension of the node is its last one."""
    found = shape(node)
    return bool(found) and dimension in (-1, len(found or ()) - 1)


def fits(base: fx.Node, node: fx.Node, borders: Sequence[int]) -> bool:
    """Whether the base, repeated along the last dimension, fills the node between these columns."""
    narrow, wide = shape(base), shape(node)
    same = bool(narrow) and wide is not None and narrow is not None and narrow[:-1] == wide[:-1]
    return same and width(base) > 0 and all(border % width(base) == 0 for border in borders)


def keeps_dtype(node: fx.Node, running: Sequence[fx.Node]) -> bool:
    """Whether a node and its arguments are tensors of one dtype."""
    found = [each.meta.get("val") for each in (node, *running)]
    values = [value for value in found if isinstance(value, torch.Tensor)]
    return len(values) == len(found) and len({value.dtype for value in values}) == 1
