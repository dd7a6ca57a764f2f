"""`nn.RNN`, `nn.GRU` and `nn.LSTM`: layers and directions, each a recurrence behind one projection of its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .direction import Direction, Optional, traced
from .iterated import Highway
from .joint import Tensors
from .native import forward_of
from .recurrence import Recurrence


@dataclass(frozen=True)
class Kind:
    """Of a recurrent module. mode: RNN_TANH, RNN_RELU, GRU or LSTM; directions: 1 or 2."""

    mode: str
    layers: int
    directions: int
    bias: bool
    dropout: float

    @classmethod
    def of(cls, module: nn.RNNBase) -> Kind:
        directions = 2 if module.bidirectional else 1
        return cls(module.mode, module.num_layers, directions, module.bias, float(module.dropout))

    @property
    def states(self) -> int:
        """How many tensors it carries from step to step."""
        return 2 if self.mode == "LSTM" else 1

    def names(self) -> list[tuple[str, ...]]:
        """Names of the weights per layer and direction, in torch's order: W_ih, W_hh and, with bias, b_ih, b_hh."""
        parts = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if self.bias else ()))
        ends = [f"_l{layer}{end}" for layer in range(self.layers) for end in ("", "_reverse")[: self.directions]]
        return [tuple(f"{part}{end}" for part in parts) for end in ends]


class Layer(NamedTuple):
    """One layer's forward. input and output: (steps, batch, width); states: before the first step, per direction.

    noise: the dropout factors on the output, or None; kept: per direction, for backward, or empty.
    """

    input: Tensor
    output: Tensor
    noise: Optional
    states: tuple[Tensors, ...]
    kept: tuple[Tensors, ...]


class Gradients(NamedTuple):
    """input: None where nobody needs it; states, weights: per layer and direction."""

    input: Optional
    states: list[Tensors]
    weights: list[tuple[Optional, ...]]


class Stack:
    """The layers of a recurrent module. needed: per layer and direction, which weights want a gradient."""

    def __init__(self, kind: Kind, needed: Sequence[Sequence[bool]], input_needed: bool) -> None:
        self.kind, self.needed, self.input_needed = kind, needed, input_needed

    def forward(
        self, x: Tensor, states: Tensors, weights: Sequence[Tensors], training: bool
    ) -> tuple[list[Layer], list[Tensors]]:
        """The layers, and the states after the last step per layer and direction.

        x: (steps, batch, width); states: as the module takes them; weights: per layer and direction. Results and random
        numbers are those of the module itself.
        """
        kind = self.kind
        layers: list[Layer] = []
        finals: list[Tensors] = []
        for first in range(0, len(weights), kind.directions):
            own = slice(first, first + kind.directions)
            before = tuple(zip(*(each[own].unbind(0) for each in states), strict=True))
            traces = [self._traced(first + side, each, weights) for side, each in enumerate(before)]
            given = tuple(
                [each[own] for each in states]
            )  # views: products round by where their arguments lie in memory
            output, last, kept = forward_of(kind.mode, kind.bias, x, given, weights[own], traces)
            noise = None
            if kind.dropout and training and own.stop < len(weights):
                noise = torch.dropout(torch.ones_like(output), kind.dropout, True)
            layers.append(Layer(x, output, noise, before, kept))
            finals += last
            x = output if noise is None else output * noise
        return layers, finals

    def backward(
        self,
        layers: Sequence[Layer],
        weights: Sequence[Tensors],
        cotangent: Optional,
        finals: Sequence[Sequence[Optional]],
        highway: Highway | None = None,
    ) -> Gradients:
        """cotangent: of the last layer's output; finals: of the states after the last step, per layer and direction.

        Exact unless `highway` is given.
        """
        states: list[Tensors] = []
        gradients: list[tuple[Optional, ...]] = []
        for index in range(len(layers) - 1, -1, -1):
            layer, first = layers[index], index * self.kind.directions
            places = range(first, first + self.kind.directions)
            if layer.noise is not None and cotangent is not None:
                cotangent = cotangent * layer.noise
            found = [
                self._direction(layer, side, place, weights).pull(
                    self._columns(cotangent, side), finals[place], highway
                )
                for side, place in enumerate(places)
            ]
            states[:0] = [each.states for each in found]
            gradients[:0] = [each.weights for each in found]
            given = [each.input for each in found if each.input is not None]
            cotangent = sum(given[1:], given[0]) if given else None
        return Gradients(cotangent, states, gradients)

    def _onwards(self, place: int) -> bool:
        """Whether the gradient of that layer's input is wanted."""
        return place >= self.kind.directions or self.input_needed

    def _traced(self, place: int, states: Tensors, weights: Sequence[Tensors]) -> Recurrence:
        return traced(self.kind.mode, states, weights[place], self.needed[place], self._onwards(place))

    def _columns(self, tensor: Optional, side: int) -> Optional:
        """A direction's part of a layer's output, or of its cotangent."""
        return None if tensor is None else tensor.chunk(self.kind.directions, -1)[side]

    def _direction(self, layer: Layer, side: int, place: int, weights: Sequence[Tensors]) -> Direction:
        own, states, onwards = weights[place], layer.states[side], self._onwards(place)
        recurrence = self._traced(place, states, weights)
        output = layer.output.chunk(self.kind.directions, -1)[side]
        kept = layer.kept[side] if layer.kept else ()
        return Direction(recurrence, bool(side), layer.input, output, states, own, kept, self.needed[place], onwards)
