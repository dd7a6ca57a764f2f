"""A small net with optional arguments and flags, rewritten beside its eager twin, and their comparison bit by bit."""

import copy

import torch
from exact_entry import Exact
from torch import nn

from rewriter import rewrite


class Net(nn.Module):
    """Optional and keyword arguments, a flag, dropout, BatchNorm; any batch size and sequence length."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.part = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Tanh())
        self.last = nn.Linear(6, 3)
        self.squared = False

    def forward(self, x, mask=None, *, factor=1.0):
        y = self.norm(self.first(x).flatten(0, -2)).unflatten(0, x.shape[:-1])
        y = self.last(self.part(y)) * factor
        if mask is not None:
            y = y * mask.unsqueeze(-1)
        return y * y if self.squared else y


def batch(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pair(plan=None, loss=None, **options):
    plan = Exact("part") if plan is None else plan
    torch.manual_seed(0)
    eager = Net()
    return eager, rewrite(copy.deepcopy(eager), plan, loss=loss, **options)


def outcome(call, model, seed=3):
    """Output, gradients and buffers after one forward and backward from a fixed random state."""
    torch.manual_seed(seed)
    output = call()
    gradients = torch.autograd.grad(output.sum(), list(model.parameters()), allow_unused=True)
    return [output, *gradients, *model.buffers(), torch.rand(1)]


def same(left, right):
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(left, right, strict=True))


def agrees(eager, step, *args, **kwargs):
    first = outcome(lambda: eager(*args, **kwargs), eager)
    return same(first, outcome(lambda: step(*args, **kwargs), step))
