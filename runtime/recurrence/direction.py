"""One direction of one recurrent layer, backward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import CELLS, recovered
from .iterated import Highway
from .joint import Tensors
from .recurrence import Recurrence

Optional = Tensor | None


def hidden(weights: Tensors) -> Tensors:
    """W_hh and b_hh of (W_ih, W_hh, b_ih, b_hh), the biases where there are any."""
    return (weights[1], *weights[3:])


def traced(mode: str, states: Tensors, weights: Tensors, needed: Sequence[bool], onwards: bool) -> Recurrence:
    """The recurrence behind the projection of the input; traced once for shapes, dtype and wanted gradients.

    needed: which weights want a gradient; onwards: whether the layer's input does.
    """
    projects = onwards or needed[0] or any(needed[2:3])
    shapes = tuple(tuple(tuple(each.shape) for each in given) for given in (states, hidden(weights)))
    return _traced(mode, shapes, weights[0].dtype, weights[0].device, (projects, needed[1], *needed[3:]))


@lru_cache(maxsize=32)
def _traced(mode: str, shapes: Any, dtype: torch.dtype, device: torch.device, needed: tuple[bool, ...]) -> Recurrence:
    states, weights = (tuple(torch.zeros(s, dtype=dtype, device=device) for s in each) for each in shapes)
    projected = states[0].new_zeros((states[0].shape[0], weights[0].shape[0]))
    return Recurrence(CELLS[mode], (projected,), states, weights, needed)


class SideGradients(NamedTuple):
    """Gradients. input: of the layer's, as far as this direction goes; states: before the first step."""

    input: Optional
    states: Tensors
    weights: tuple[Optional, ...]


class Direction(NamedTuple):
    """What a direction's forward left. reverse: it runs from the last step to the first.

    input, output: of the layer, (steps, batch, width), output in this direction's columns only; states: it started
    from; kept: the other states before every step, then what the recurrence kept, or nothing.
    """

    recurrence: Recurrence
    reverse: bool
    input: Tensor
    output: Tensor
    states: Tensors
    weights: Tensors
    kept: Tensors
    needed: Sequence[bool]
    onwards: bool

    def pull(self, cotangent: Optional, finals: Sequence[Optional], highway: Highway | None = None) -> SideGradients:
        """cotangent: of `output`; finals: of the states after the last step; exact unless `highway` is given."""
        recurrence, others = self.recurrence, len(self.states) - 1
        before: Tensors = (torch.cat([self.states[0].unsqueeze(0), self._ordered(self.output)[:-1]]),)
        x, projected = self._ordered(self.input), None
        if recurrence.reads_inputs(bool(self.kept)):
            projected = F.linear(x, self.weights[0], *self.weights[2:3])
        if self.kept:
            before += self.kept[:others]
        elif others:
            assert projected is not None
            before += (recovered(projected, before[0], self.states[1], hidden(self.weights)),)
        outside = [None if cotangent is None else self._ordered(cotangent), *[None] * others]
        buffers = [_buffer(state, len(x), *given) for state, *given in zip(self.states, outside, finals, strict=True)]
        kept = self.kept[others:]
        pulled = recurrence.pull((projected,), before, hidden(self.weights), kept, buffers, highway=highway)
        dx, dw_ih, db_ih = self._projection(x, pulled.inputs[0])
        dw_hh, *db_hh = pulled.weights
        gradients = (dw_ih, dw_hh, db_ih, *db_hh) if db_hh else (dw_ih, dw_hh)
        return SideGradients(None if dx is None else self._ordered(dx), pulled.states, gradients)

    def _ordered(self, tensor: Tensor) -> Tensor:
        return tensor.flip(0) if self.reverse else tensor

    def _projection(self, x: Tensor, gradient: Optional) -> tuple[Optional, Optional, Optional]:
        """Gradients of the layer's input, of W_ih and of b_ih from that of the projected input."""
        if gradient is None:
            return None, None, None
        rows = gradient.flatten(0, 1)
        dx = torch.unflatten(rows @ self.weights[0], 0, gradient.shape[:2]) if self.onwards else None
        dw = rows.t() @ x.flatten(0, 1) if self.needed[0] else None
        return dx, dw, rows.sum(0) if any(self.needed[2:3]) else None


def _buffer(state: Tensor, steps: int, cotangent: Optional, final: Optional) -> Tensor:
    """What `Recurrence.pull` takes as the cotangents of one state."""
    buffer = state.new_zeros((steps + 1, *state.shape))
    if cotangent is not None:
        buffer[1:] = cotangent
    if final is not None:
        buffer[steps] += final
    return buffer
