"""The form of one call: what is a tensor, what is baked into the graph, and how a result is put together again."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout)
_SCALAR_TYPES = frozenset(SCALARS)
_WHOLE = (nn.Module, type, torch.Generator)
_DEPTH = 5


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


class Same:
    """An argument known by identity. Holds it, so that its address cannot be taken by another object."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


@dataclasses.dataclass(frozen=True)
class Tree:
    """How a nested value is put together from its leaves.

    A leaf; or what `build` makes of the children (`kind` names it); or, with neither, the `baked` value itself.
    """

    build: Callable[[list[Any]], Any] | None = None
    children: tuple[Tree, ...] = ()
    baked: Any = None
    leaf: bool = False
    kind: str = ""

    def rebuild(self, leaves: Sequence[Any]) -> Any:
        """The nested value with `leaves` (in the order `flatten` gave them) in place."""
        if self.leaf:
            return leaves[0]
        return self._rebuild(iter(leaves))

    def _rebuild(self, leaves: Iterator[Any]) -> Any:
        if self.leaf:
            return next(leaves)
        if self.build is None:
            return self.baked
        return self.build([child._rebuild(leaves) for child in self.children])

    def grafted(self, trees: Sequence[Tree]) -> Tree:
        """This tree with one tree in place of each leaf."""
        return self._grafted(iter(trees))

    def _grafted(self, trees: Iterator[Tree]) -> Tree:
        if self.leaf:
            return next(trees)
        return dataclasses.replace(self, children=tuple(child._grafted(trees) for child in self.children))

    def outline(self) -> Any:
        """Leaves as "*", baked scalars as themselves, other baked objects as their type: to compare two trees."""
        if self.leaf:
            return "*"
        if self.build is None:
            return self.baked if type(self.baked) in _SCALAR_TYPES else type(self.baked).__name__
        return (self.kind, tuple(child.outline() for child in self.children))

    def baked_values(self) -> list[Any]:
        """Everything that is neither a leaf nor a container, in order."""
        if self.leaf or self.build is None:
            return [] if self.leaf else [self.baked]
        return [value for child in self.children for value in child.baked_values()]


LEAF = Tree(leaf=True)


def flatten(value: Any, is_leaf: Callable[[object], bool] = _is_tensor) -> tuple[list[Any], Tree]:
    """The leaves of a nested value in order, and the tree that puts it together again.

    Follows tuples, lists, dicts, named tuples, dataclasses, model outputs, what torch's pytree knows, and objects that
    hold tensors in their attributes. Everything else is baked.
    """
    leaves: list[Any] = []
    return leaves, _flatten(value, is_leaf, leaves)


def _flatten(value: Any, is_leaf: Callable[[object], bool], leaves: list[Any]) -> Tree:
    if is_leaf(value):
        leaves.append(value)
        return LEAF
    parts = _parts(value, is_leaf)
    if parts is None:
        return Tree(baked=value)
    values, build, shape = parts
    children = tuple(_flatten(child, is_leaf, leaves) for child in values)
    return Tree(build, children, kind=f"{type(value).__name__}{shape}")


Parts = tuple[Sequence[Any], Callable[[list[Any]], Any], Hashable]


def _parts(value: Any, is_leaf: Callable[[object], bool]) -> Parts | None:
    """Children, builder and what else belongs to the structure; None for what is baked."""
    kind = type(value)
    if kind in _SCALAR_TYPES:
        return None
    if kind is tuple or kind is list:
        return value, kind, len(value)
    if kind is dict or kind is OrderedDict:
        return _mapping(value, kind)
    if isinstance(value, tuple):
        return value, (lambda children: kind(*children)) if hasattr(value, "_fields") else kind, len(value)
    return _parts_of_object(value, kind, is_leaf)


def _mapping(value: Mapping[Any, Any], kind: Any) -> Parts:
    keys = tuple(value)
    return list(value.values()), lambda children: kind(zip(keys, children, strict=True)), keys


def _parts_of_object(value: Any, kind: Any, is_leaf: Callable[[object], bool]) -> Parts | None:
    if isinstance(value, (*_WHOLE, *SCALARS)):
        return None
    if dataclasses.is_dataclass(value) and isinstance(value, Mapping):  # transformers' ModelOutput
        keys = tuple(value)
        return list(value.values()), lambda children: kind(**dict(zip(keys, children, strict=True))), keys
    if dataclasses.is_dataclass(value):
        return _attributes(value, kind, tuple(field.name for field in dataclasses.fields(value)))
    if kind in pytree.SUPPORTED_NODES:
        node = pytree.SUPPORTED_NODES[kind]
        children, context = node.flatten_fn(value)
        return children, lambda parts: node.unflatten_fn(parts, context), _hashable(context)
    if isinstance(value, MutableMapping):
        return _mapping(value, lambda pairs: kind(dict(pairs)))
    if hasattr(value, "__dict__") and _holds_leaf(vars(value), is_leaf, _DEPTH):
        return _attributes(value, kind, tuple(vars(value)))
    return None


def _attributes(value: Any, kind: Any, names: tuple[str, ...]) -> Parts:
    def build(children: list[Any]) -> Any:
        new = kind.__new__(kind)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(new, name, child)
        return new

    present = tuple(name for name in names if hasattr(value, name))
    names = present
    return [getattr(value, name) for name in present], build, present


def _holds_leaf(value: Any, is_leaf: Callable[[object], bool], depth: int) -> bool:
    """Whether a tensor is reachable through containers and attributes, `depth` steps at most."""
    if is_leaf(value):
        return True
    if depth == 0 or isinstance(value, (*_WHOLE, *SCALARS)):
        return False
    if isinstance(value, Mapping):
        inner: Any = value.values()
    elif isinstance(value, (list, tuple, set)):
        inner = value
    else:
        inner = getattr(value, "__dict__", {}).values()
    return any(_holds_leaf(child, is_leaf, depth - 1) for child in inner)


def _hashable(context: Any) -> Hashable:
    try:
        hash(context)
    except TypeError:
        return tuple(map(_hashable, context)) if isinstance(context, (list, tuple)) else Same(context)
    return cast(Hashable, context)


def signature(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Hashable, list[Tensor]]:
    """The key of a call and its tensors, in the order of a captured graph's placeholders.

    The key holds the tree, per tensor (dtype, dimensions, device), per other argument its type and value (or its
    identity), and autocast where it is on. Sizes are the guards' business.
    """
    if kwargs:
        return _read_slowly(args, kwargs)
    described = []
    for value in args:
        if type(value) is not Tensor:
            return _read_slowly(args, kwargs)
        described.append((value.dtype, value.dim(), value.device))
    return (autocast_state(), *described), list(args)


def _read_slowly(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Hashable, list[Tensor]]:
    tensors: list[Tensor] = []
    described = [_describe(value, tensors) for value in args]
    names = tuple(sorted(kwargs)) if kwargs else ()
    described.extend([_describe(kwargs[name], tensors) for name in names])
    return (autocast_state(), len(args), names, *described) if names else (autocast_state(), *described), tensors


def _describe(value: Any, tensors: list[Tensor]) -> Hashable:
    kind = type(value)
    if kind is Tensor:
        tensors.append(value)
        return value.dtype, value.dim(), value.device
    if kind in _SCALAR_TYPES:
        return kind, value
    if isinstance(value, Tensor):
        tensors.append(value)
        return (
            (value.dtype, value.dim(), value.device)
            if kind is nn.Parameter
            else (kind, value.dtype, value.dim(), value.device)
        )
    if isinstance(value, SCALARS):
        return kind, value
    parts = _parts(value, _is_tensor)
    if parts is None:
        return Same(value)
    children, _, shape = parts
    return kind, shape, tuple([_describe(child, tensors) for child in children])


def tree_of_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], Tree]:
    """Tensors of a call as `signature` orders them, and the tree of (args, kwargs)."""
    return flatten((args, {name: kwargs[name] for name in sorted(kwargs)}))


def autocast_state() -> Hashable:
    """None where autocast is off; else which devices cast, to what."""
    cpu, cuda = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    if not (cpu or cuda):
        return None
    return (cpu and torch.get_autocast_dtype("cpu"), cuda and torch.get_autocast_dtype("cuda"))
