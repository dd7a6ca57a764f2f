"""A segment: straight-line code over tensors that reads modules, parameters and buffers by name at each call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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
        """Outputs as a tuple; `replaced` maps the id of a parameter to the tensor used in its place (ties included).

        The modules hold those tensors for as long as the code runs.
        """
        own = [(mapping, key, mapping[key]) for _, mapping, key in self._parameters] if replaced else []
        try:
            for mapping, key, parameter in own:
                mapping[key] = replaced.get(id(parameter), parameter)  # type: ignore[union-attr, index]
            outputs = self(*inputs)
        finally:
            for mapping, key, parameter in own:
                mapping[key] = parameter  # type: ignore[index]
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def parameters(self) -> dict[str, Tensor]:
        """Qualified name -> parameter, each parameter once, in the order the code reads them."""
        found: dict[int, tuple[str, Tensor]] = {}
        for path, mapping, key in self._parameters:
            parameter = mapping[key]
            if parameter is not None:
                found.setdefault(id(parameter), (path, parameter))
        return dict(found.values())

    def among(self, given: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Those of `given`, by the id of a parameter, that the code reads."""
        own = [id(mapping[key]) for _, mapping, key in self._parameters]
        return {key: given[key] for key in own if key in given}

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
