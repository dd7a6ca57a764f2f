"""Torch's recurrent cells as functions of (inputs, states, weights), after the projection of the input.

The operations and their order are those of `torch.nn.GRU` and its kin, so results are equal bit for bit wherever torch
runs its plain kernels. inputs: the projected input W_ih x + b_ih, gates side by side; weights: W_hh and, with bias,
b_hh.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .joint import Tensors


def _tanh(inputs: Tensors, states: Tensors, weights: Tensors) -> Tensors:
    return (torch.tanh(F.linear(states[0], *weights) + inputs[0]),)


def _relu(inputs: Tensors, states: Tensors, weights: Tensors) -> Tensors:
    return (torch.relu(F.linear(states[0], *weights) + inputs[0]),)


def _gru(inputs: Tensors, states: Tensors, weights: Tensors) -> Tensors:
    """h' = (h - n) z + n with r, z = sigmoid(.), n = tanh(x_n + r h_n)."""
    h, size = states[0], states[0].shape[1]
    x_rz, x_n = torch.split(inputs[0], [2 * size, size], 1)
    h_rz, h_n = torch.split(F.linear(h, *weights), [2 * size, size], 1)
    r, z = torch.sigmoid(h_rz + x_rz).chunk(2, 1)
    n = torch.tanh(x_n + h_n * r)
    return ((h - n) * z + n,)


def _lstm(inputs: Tensors, states: Tensors, weights: Tensors) -> Tensors:
    """c' = f c + i g, h' = o tanh(c')."""
    h, c = states
    gates = F.linear(h, *weights) + inputs[0]
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c = f * c + i * g
    return o * torch.tanh(c), c


CELLS: dict[str, Callable[[Tensors, Tensors, Tensors], Tensors]] = {
    "RNN_TANH": _tanh,
    "RNN_RELU": _relu,
    "GRU": _gru,
    "LSTM": _lstm,
}


def recovered(projected: Tensor, hidden: Tensor, cell: Tensor, weights: Tensors) -> Tensor:
    """An LSTM's cell states before every step, which torch does not return, from its hidden ones.

    projected: (steps, batch, 4 width); hidden: before every step; cell: before the first.
    """
    gates = F.linear(hidden, *weights) + projected
    i, f, g, _ = gates.chunk(4, -1)
    added, share = torch.sigmoid(i) * torch.tanh(g), torch.sigmoid(f)
    cells = torch.empty_like(hidden)
    cells[0] = cell
    steps = zip(added.unbind(0), share.unbind(0), cells.unbind(0), cells[1:].unbind(0), strict=False)
    for plus, kept, before, after in steps:
        torch.addcmul(plus, kept, before, out=after)
    return cells
