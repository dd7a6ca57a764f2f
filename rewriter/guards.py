"""What a captured graph took for granted, checked at every call at C speed."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .leaves import HOOKS

_SCALARS = frozenset((type(None), bool, int, float, str))
_NOT_READ_IN_FORWARD = frozenset(
    (
        "__init__",
        "__repr__",
        "extra_repr",
        "reset_parameters",
        "_reset_parameters",
        "__setstate__",
        "_load_from_state_dict",
    )
)


class Guards:
    """Whether a captured graph still says what the user's model does.

    names:      the modules whose flags, children and hooks are part of the graph (the inlined ones, or all)
    conditions: Python expressions over `s`, the sizes of the call's tensors: "s[0][1] == 64"
    quiet:      modules that may not get hooks, and may change otherwise: what the graph drops or a region runs
    """

    def __init__(
        self, model: nn.Module, names: Iterable[str], conditions: Sequence[str] = (), quiet: Iterable[str] = ()
    ) -> None:
        self.names, self.conditions, self.quiet = tuple(names), tuple(conditions), tuple(quiet)
        modules = {name: model.get_submodule(name) for name in self.names}
        self._expected = {name: _flags(module) for name, module in modules.items()}
        first = next(model.parameters(), None)
        self._kind = None if first is None else (first.dtype, first.device)
        self._bind(model)

    def add(self, conditions: Sequence[str]) -> None:
        """Further conditions on sizes."""
        self.conditions = (*self.conditions, *conditions)
        self._sizes = _compile(self.conditions)

    def reason(self, model: nn.Module, tensors: Sequence[Tensor]) -> str | None:
        """None where the graph holds for this call, else what changed: module and attribute, or the size."""
        if model is not self._model:
            self._bind(model)
        try:
            for read, attributes, values in self._flags:
                if list(map(read, attributes)) != values:
                    return self._changed_flag(model)
        except KeyError:
            return self._changed_flag(model)
        if self._children != self._expected_children:
            return self._changed_child()
        if any(self._hooks):
            return self._new_hook()
        if self._first is not None and (self._first.dtype, self._first.device) != self._kind:
            return f"the parameters are {self._first.dtype} on {self._first.device} and were {self._kind}"
        if self._sizes is not None and not self._sizes([tensor.shape for tensor in tensors]):
            return self._failed_condition(tensors)
        return None

    def __getstate__(self) -> dict[str, Any]:
        """Bound to no model: a copy or an unpickled one binds to the model it is first asked about."""
        kept = ("names", "conditions", "quiet", "_expected", "_kind")
        return {name: vars(self)[name] for name in kept} | {"_model": None}

    def _bind(self, model: nn.Module) -> None:
        modules = {name: model.get_submodule(name) for name in self.names}
        groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for name, flags in self._expected.items():
            if flags:
                groups[tuple(flags)].append(name)
        self._model: nn.Module | None = model
        self._flags = [
            (
                operator.itemgetter(*keys),
                [vars(modules[name]) for name in names],
                [_picked(self._expected[name], keys) for name in names],
            )
            for keys, names in groups.items()
        ]
        self._children = [module._modules for module in modules.values()]
        self._expected_children = [dict(children) for children in self._children]
        # The root's own hooks run around the graph.
        self._hooked = [name for name in (*self.names, *self.quiet) if name]
        self._hooks = [getattr(model.get_submodule(name), hook) for name in self._hooked for hook in HOOKS]
        self._first = next(model.parameters(), None)  # stands for all: .to() and .half() move them together
        self._sizes = _compile(self.conditions)

    def _changed_flag(self, model: nn.Module) -> str:
        for name, flags in self._expected.items():
            module = model.get_submodule(name)
            for key, value in flags.items():
                now = vars(module).get(key, "(gone)")
                if now is not value and now != value:
                    return f"`{key}` of {_called(name)} is {now!r} and was {value!r} when the graph was captured"
        return "an attribute changed while it was being checked"

    def _changed_child(self) -> str:
        for name, now, then in zip(self.names, self._children, self._expected_children, strict=True):
            for key in now.keys() | then.keys():
                if now.get(key) is not then.get(key):
                    return f"the child `{key}` of {_called(name)} is another module than when the graph was captured"
        return "a child module changed while it was being checked"

    def _new_hook(self) -> str:
        position = next(index for index, hooks in enumerate(self._hooks) if hooks)
        return f"{_called(self._hooked[position // len(HOOKS)])} has a hook now, which would not run inside the graph"

    def _failed_condition(self, tensors: Sequence[Tensor]) -> str:
        sizes = [tuple(tensor.shape) for tensor in tensors]
        failed = next((text for text in self.conditions if not _holds(text, sizes)), "")
        return f"the sizes {sizes} do not meet `{failed}`, for which the graph was captured"


def _called(name: str) -> str:
    return f"`{name}`" if name else "the model"


def _picked(flags: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return tuple(flags[key] for key in keys) if len(keys) > 1 else flags[keys[0]]


def _flags(module: nn.Module) -> dict[str, Any]:
    """The scalar attributes a forward may read. Of torch's own modules only those their methods name."""
    kind: Any = type(module)
    read = _names_read(kind) if kind.__module__.startswith("torch.nn.") else None
    return {
        key: value
        for key, value in vars(module).items()
        if type(value) in _SCALARS and not key.startswith("_") and (read is None or key in read)
    }


@cache
def _names_read(kind: type) -> frozenset[str]:
    """Names that appear in the code of a class's methods, construction and printing apart."""
    names: set[str] = set()
    for parent in kind.__mro__:
        if parent in (nn.Module, object):
            continue
        for key, value in vars(parent).items():
            function = getattr(value, "__wrapped__", value)
            if isinstance(function, FunctionType) and key not in _NOT_READ_IN_FORWARD:
                names.update(_names_in(function.__code__))
    return frozenset(names)


def _names_in(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names_in(constant)
    return names


def _compile(conditions: tuple[str, ...]) -> Callable[[Sequence[Any]], bool] | None:
    if not conditions:
        return None
    text = " and ".join(f"({condition})" for condition in conditions)
    function: Callable[[Sequence[Any]], bool] = eval(f"lambda s: {text}", {"torch": torch, "math": math})
    return function


def _holds(condition: str, sizes: Sequence[Any]) -> bool:
    check = _compile((condition,))
    return check is None or bool(check(sizes))
