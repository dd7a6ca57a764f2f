"""Leaves the user's world as it was: attributes, buffers, generators and random states around a trial run."""

from __future__ import annotations

import operator
import random
import sys
from collections import OrderedDict, deque
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_SCALARS = frozenset((type(None), bool, int, float, str, tuple))
_CONTAINERS = (dict, OrderedDict, list, set, deque)


class Attributes:
    """A shallow copy of one module's attributes, one level into its containers and plain objects."""

    def __init__(self, module: nn.Module) -> None:
        self._live = vars(module)
        self._values = dict(self._live)
        self._containers = []
        for name, value in self._values.items():
            inner = value if type(value) in _CONTAINERS else _fields(value)
            if inner is not None:
                self._containers.append((name, inner, inner.copy()))

    def put(self, name: str, stand_in: object) -> None:
        """Let `stand_in` take the place of an attribute until `restore`, without counting as a change."""
        self._live[name] = stand_in

    def changed(self, stand_ins: dict[str, object]) -> str | None:
        """The first attribute that is not as it was (or as its stand-in), None where all are."""
        if self._live.keys() != self._values.keys():
            return str(sorted(self._live.keys() ^ self._values.keys())[0])
        for name, value in self._live.items():
            if value is not stand_ins.get(name, self._values[name]):
                return name
        for name, value, copy in self._containers:
            if not (_same_items(value, copy) or (value is not self._values[name] and _same_state(value, copy))):
                return name
        return None

    def restore(self) -> None:
        """Put everything back, in place."""
        for name in self._live.keys() - self._values.keys():
            del self._live[name]
        self._live.update(self._values)
        for _, value, copy in self._containers:
            if not _same_items(value, copy):
                _refill(value, copy)


def _fields(value: Any) -> dict[str, Any] | None:
    """The attributes of a plain object, None for what has none or is looked after otherwise."""
    if type(value) in _SCALARS or isinstance(value, (nn.Module, Tensor, type, FunctionType, MethodType, ModuleType)):
        return None
    return getattr(value, "__dict__", None)


def _same_items(value: Any, copy: Any) -> bool:
    if len(value) != len(copy):
        return False
    if isinstance(value, dict):
        return all(map(operator.is_, value.keys(), copy.keys())) and all(
            map(operator.is_, value.values(), copy.values())
        )
    return value == copy if isinstance(value, set) else all(map(operator.is_, value, copy))


def _same_state(value: dict[str, Any], copy: dict[str, Any]) -> bool:
    """Whether a plain object changed in settings alone (text, flags): configurations fill in what was left open."""
    changed = [key for key in value.keys() | copy.keys() if value.get(key) is not copy.get(key)]
    return all(type(value.get(key)) in (str, bool, type(None)) for key in changed)


def _refill(value: Any, copy: Any) -> None:
    value.clear()
    if isinstance(value, (dict, set)):
        value.update(copy)
    else:
        value.extend(copy)


DRAWS = "draws from"


class RandomState:
    """The global random states: torch (CPU, and CUDA where it runs), Python's, numpy's."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._bytes = self._torch.numpy().tobytes()  # to compare without an operation that a mode would see
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        self._python = random.getstate()
        numpy = sys.modules.get("numpy.random")
        self._numpy = numpy.get_state(legacy=True) if numpy is not None else None

    def moved(self) -> str | None:
        """Which generator has been drawn from since, None where none has, by whichever thread."""
        if self._bytes != torch.get_rng_state().numpy().tobytes():
            return "torch"
        if self._python != random.getstate():
            return "random"
        numpy = sys.modules.get("numpy.random")
        if numpy is not None and self._numpy is not None:
            now = numpy.get_state(legacy=True)
            if now[2] != self._numpy[2] or (now[1] != self._numpy[1]).any():
                return "numpy.random"
        return None

    def restore(self) -> None:
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy.random"].set_state(self._numpy)


def seed_everything(seed: int) -> None:
    """Sets torch's, Python's and numpy's global generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        numpy.seed(seed)


class World:
    """Everything a forward can change: attributes of every module, values of tensors held, generators, random states.

    Parameters are not copied: a forward that writes into parameters is outside what a trial run can undo.
    """

    def __init__(self, model: nn.Module) -> None:
        self._random = RandomState()
        modules = list(model.modules())
        self._attributes = [Attributes(module) for module in modules]
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in held_tensors(model)]
        self._generators = [
            (value, value.get_state())
            for module in modules
            for value in vars(module).values()
            if isinstance(value, torch.Generator)
        ]

    def moved_generator(self) -> str | None:
        return self._random.moved()

    def restore(self) -> None:
        for attributes in self._attributes:
            attributes.restore()
        for tensor, copy in self._tensors:
            tensor.data.copy_(copy)  # .data: a tape of the user's that saved this buffer stays valid
        for generator, state in self._generators:
            generator.set_state(state)
        self._random.restore()


def held_tensors(model: nn.Module) -> list[Tensor]:
    """Buffers and plain tensor attributes of a model, each once."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        for value in (*module._buffers.values(), *vars(module).values()):
            if isinstance(value, Tensor):
                found[id(value)] = value
    return list(found.values())
