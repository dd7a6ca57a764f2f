"""A recurrent layer forward: torch's own kernel, or the cell step by step where its results are worth keeping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from .direction import hidden
from .joint import Tensors
from .recurrence import Recurrence

Forward = tuple[Tensor, list[Tensors], tuple[Tensors, ...]]

_KERNELS: dict[str, Callable[..., Any]] = {
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
    "GRU": torch.gru,
    "LSTM": torch.lstm,
}
# FLOP of one step's product with W_hh from which on evaluating it again costs more than running the steps one by one;
# less for an LSTM, whose cell states torch does not return.
_LARGE = {"RNN_TANH": 2_000_000, "RNN_RELU": 2_000_000, "GRU": 2_000_000, "LSTM": 250_000}

# Whether the steps one by one gave torch's own results bit for bit, the first time.
_equal: WeakKeyDictionary[Recurrence, bool] = WeakKeyDictionary()


def forward_of(
    mode: str,
    bias: bool,
    x: Tensor,
    states: Tensors,
    weights: Sequence[Tensors],
    recurrences: Sequence[Recurrence],
) -> Forward:
    """Output, states after the last step and what backward finds kept, per direction; torch's own numbers.

    x: (steps, batch, width); states: (directions, batch, size). With much to compute in a step, the cell's intermediate
    results are kept, provided that the first call with these shapes gave the numbers of torch's kernel bit for bit;
    otherwise nothing is kept. The kernel runs as in inference, for which the fused float32 LSTM alone rounds otherwise.
    """
    rows, work = states[0].shape[1], weights[0][1].numel()
    proven = [_equal.get(each) for each in recurrences]
    if 2 * rows * work < _LARGE[mode] or False in proven:
        return _by_kernel(mode, bias, x, states, weights)
    stepped = _by_steps(x, states, weights, recurrences)
    if None not in proven:
        return stepped
    kernel = _by_kernel(mode, bias, x, states, weights)
    same = torch.equal(stepped[0], kernel[0])
    _equal.update(dict.fromkeys(recurrences, same))
    return stepped if same else kernel


def _by_kernel(mode: str, bias: bool, x: Tensor, states: Tensors, weights: Sequence[Tensors]) -> Forward:
    flat = [weight for each in weights for weight in each]
    first: Any = states if len(states) == 2 else states[0]
    output, *last = _KERNELS[mode](x, first, flat, bias, 1, 0.0, False, len(weights) == 2, False)
    return output, list(zip(*(each.unbind(0) for each in last), strict=True)), ()


def _by_steps(x: Tensor, states: Tensors, weights: Sequence[Tensors], recurrences: Sequence[Recurrence]) -> Forward:
    outputs, last, kept = [], [], []
    before = zip(*(each.unbind(0) for each in states), strict=True)
    for side, (first, own, recurrence) in enumerate(zip(before, weights, recurrences, strict=True)):
        projected = F.linear(x, own[0], *own[2:3])
        ran = recurrence.run((projected.flip(0) if side else projected,), first, hidden(own), True)
        outputs.append(ran.states[0].flip(0) if side else ran.states[0])
        last.append(tuple([each[-1] for each in ran.states]))
        others = (torch.cat([s.unsqueeze(0), each[:-1]]) for s, each in zip(first[1:], ran.states[1:], strict=True))
        kept.append((*others, *ran.kept))
    return torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0], last, tuple(kept)
