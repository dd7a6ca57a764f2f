"""Models around torch's recurrent modules and around cells in a loop, and what they are trained on."""

from __future__ import annotations

import torch
from torch import nn

STEPS, ROWS, WIDTH, SIZE = 7, 3, 4, 5


class Recurrent(nn.Module):
    """A recurrent module whose sequence and last states all count."""

    def __init__(self, kind, **options):
        super().__init__()
        self.part = kind(WIDTH, SIZE, **options)
        self.head = nn.Linear(SIZE * (2 if self.part.bidirectional else 1), 2)

    def forward(self, x, *states):
        if isinstance(self.part, nn.LSTM):
            sequence, (h, c) = self.part(x, states) if states else self.part(x)
            return self.head(sequence), h, c
        sequence, h = self.part(x, *states)
        return self.head(sequence), h


class OwnCell(nn.Module):
    """Two states, a learnt start of its own, a matrix that all calls share."""

    def __init__(self):
        super().__init__()
        self.inner, self.leak = nn.Linear(WIDTH + SIZE, SIZE), nn.Parameter(torch.zeros(SIZE))

    def forward(self, x, h, c, mixing):
        share = torch.sigmoid(self.leak)
        c = share * c + (1 - share) * torch.tanh(self.inner(torch.cat([x, h], 1)))
        return torch.tanh(c @ mixing), c


class Loop(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell, self.head = cell, nn.Linear(SIZE, 2)

    def forward(self, x, h, mixing):
        c, outputs = h.cos(), []
        for step in range(x.shape[1]):
            if isinstance(self.cell, OwnCell):
                h, c = self.cell(x[:, step], h, c, mixing)
            elif isinstance(self.cell, nn.LSTMCell):
                h, c = self.cell(x[:, step], (h, c))
            else:
                h = self.cell(x[:, step], h)
            outputs.append(self.head(h))
        return torch.stack(outputs, 1), h * c


def example(model, dtype=torch.float64, steps=STEPS, states=True):
    torch.manual_seed(0)
    if isinstance(model, Loop):
        shapes = [(ROWS, steps, WIDTH), (ROWS, SIZE), (SIZE, SIZE)]
    else:
        part = model.part
        count = part.num_layers * (2 if part.bidirectional else 1)
        kinds = 2 if isinstance(part, nn.LSTM) else 1
        shapes = [(ROWS, steps, WIDTH) if part.batch_first else (steps, ROWS, WIDTH)]
        shapes += [(count, ROWS, SIZE)] * kinds if states else []
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def train(call, model, given, seed=3, skip=()):
    """Outputs, and the gradients of inputs and parameters that require them; `skip`: outputs that do not count."""
    given = [each.clone().requires_grad_() for each in given]
    torch.manual_seed(seed)
    outputs = call(*given)
    torch.manual_seed(5)
    counted = [each for index, each in enumerate(outputs) if index not in skip]
    loss = sum((each * torch.randn_like(each)).sum() for each in counted)
    sources = [*given, *(each for each in model.parameters() if each.requires_grad)]
    return outputs, torch.autograd.grad(loss, sources, allow_unused=True)


def error(found, expected):
    assert [each is None for each in found] == [each is None for each in expected]
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)
