"""A segment: straight-line code over tensors that reads modules, parameters and buffers by name at each call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Place:
    """Where a name of the emitted code is read: `mapping[key]`; `path` is its qualified name in the user's model.

    The mapping is a dictionary of the user's own module (`_modules`, `_parameters`, `_buffers` or `__dict__`), so a
    parameter that was swapped (`functional_call`, `load_state_dict(assign=True)`) is seen at the next call.
    """

    name: str
    mapping: Mapping[str, Any]
    key: str
    path: str


class _Frame:
    """`self` of one call of the emitted code."""


class Segment:
    """Emitted code and the places it reads. `segment(*inputs)` returns what the code returns.

    `source` is the code as text.
    """

    def __init__(self, name: str, source: str, function: Callable[..., Any], places: tuple[Place, ...]) -> None:
        self.name, self.source, self.function, self.places = name, source, function, places
        self._read = tuple((place.name, place.mapping, place.key) for place in places)
        self._parameters = tuple(found for place in places for found in _parameter_places(place))

    def __call__(self, *inputs: Any) -> Any:
        frame = _Frame()
        values = frame.__dict__
        for name, mapping, key in self._read:
            values[name] = mapping[key]
        return self.function(frame, *inputs)

    def run(self, inputs: tuple[Any, ...], replaced: Mapping[int, Tensor] | None = None) -> tuple[Any, ...]:
        """Outputs as a tuple; `replaced` maps the id of a parameter to the tensor used in its place (ties included)."""
        frame = _Frame()
        for place in self.places:
            value = place.mapping[place.key]
            frame.__dict__[place.name] = _replace(value, replaced) if replaced else value
        outputs = self.function(frame, *inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def parameters(self) -> dict[str, Tensor]:
        """Qualified name -> parameter, each parameter once, in the order the code reads them."""
        found: dict[int, tuple[str, Tensor]] = {}
        for path, mapping, key in self._parameters:
            parameter = mapping[key]
            if parameter is not None:
                found.setdefault(id(parameter), (path, parameter))
        return dict(found.values())

    def trainable(self) -> tuple[Tensor, ...]:
        """The parameters that require gradients, in the order of `parameters()`."""
        if not self._parameters:
            return ()
        return tuple(parameter for parameter in self.parameters().values() if parameter.requires_grad)


def _parameter_places(place: Place) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    value = place.mapping[place.key]
    if isinstance(value, nn.Module):
        for name, module in value.named_modules(prefix=place.path):
            for key in module._parameters:
                yield f"{name}.{key}", module._parameters, key
    elif isinstance(value, nn.Parameter):
        yield place.path, place.mapping, place.key


def _replace(value: Any, replaced: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return replaced.get(id(value), value)
    if not isinstance(value, nn.Module):
        return value
    named = value.named_parameters(remove_duplicate=False)
    own = {name: replaced[id(parameter)] for name, parameter in named if id(parameter) in replaced}
    if not own:
        return value

    def call(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(value, own, args, kwargs)

    return call
