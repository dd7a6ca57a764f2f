"""Chains with a loss at every step, whose gradients at the cuts are known."""

import torch
import torch.nn.functional as F
from torch import nn

LENGTH, WIDTH = 16, 4
WEIGHT = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Sum(nn.Module):
    """Adds a step's input to the state; a state of several parts forgets the oldest."""

    def __init__(self, parts):
        super().__init__()
        self.parts, self.gain = parts, nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))

    def forward(self, x, h):
        new = (self.gain * x)[:, None]
        return h + new if self.parts == 1 else torch.cat((h[:, 1:], new), 1)


class Walk(nn.Module):
    """Each output reads the sum of all inputs so far, or of the latest `parts`: every loss is linear in the state."""

    def __init__(self, parts=1, weights=None):
        super().__init__()
        self.cell = Sum(parts)
        self.weights = WEIGHT.repeat(LENGTH, 1) if weights is None else weights
        self.length = len(self.weights)

    def forward(self, x):
        h = x.new_zeros(x.shape[0], self.cell.parts, WIDTH)
        outputs = []
        for t in range(self.length):
            h = self.cell(x[:, t], h)
            outputs.append((h.sum(1) * self.weights[t]).sum(1))
        return torch.stack(outputs, 1)


class Recurrence(nn.Module):
    """A tanh cell, read out at every step; `size` scales an orthogonal recurrent matrix."""

    def __init__(self, size=0.9, length=8, cell=nn.RNNCell):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head, self.length = cell(6, 5), nn.Linear(5, 4), length
        if cell is nn.RNNCell:
            nn.init.orthogonal_(self.cell.weight_hh, size)
        self.double()

    def forward(self, x):
        h = x.new_zeros(x.shape[0], 5)
        outputs = []
        for t in range(self.length):
            h = self.cell(x[:, t], h)
            outputs.append(self.head(h))
        return torch.stack(outputs, 1)


def weighed(output, target):
    """Sum of outputs, each times its target."""
    return (output * target).sum()


def entropy(output, target):
    return F.cross_entropy(output.transpose(1, 2), target)


_numbers = torch.Generator().manual_seed(8)
INPUTS = torch.randn(12, 8, 6, generator=_numbers, dtype=torch.float64)
TARGETS = torch.randint(0, 4, (12, 8), generator=_numbers)


def truncated(net, every, reach, x=INPUTS, y=TARGETS):
    """Gradients of the cell where each sub-chain sees only the losses of the next `reach` sub-chains beside its own."""
    with torch.no_grad():
        states = [x.new_zeros(len(x), 5)]
        for t in range(net.length):
            states.append(net.cell(x[:, t], states[-1]))

    def run(start, h, steps):
        loss, last = 0.0, min(net.length, start + steps)
        for t in range(start, last):
            h = net.cell(x[:, t], h)
            loss = loss + F.cross_entropy(net.head(h), y[:, t]) / net.length
        return loss, h

    total = [torch.zeros_like(p) for p in net.cell.parameters()]
    for start in range(0, net.length, every):
        loss, end = run(start, states[start], every)
        handed = end.detach().requires_grad_()
        ahead, _ = run(start + every, handed, reach * every)
        if isinstance(ahead, torch.Tensor) and reach:
            (slope,) = torch.autograd.grad(ahead, handed)
            loss = loss + (end * slope).sum()
        for sum_, each in zip(total, torch.autograd.grad(loss, list(net.cell.parameters())), strict=True):
            sum_ += each
    return total
