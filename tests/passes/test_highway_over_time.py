"""`Highway` on recurrences, and on one block that a model calls several times."""

import pytest
import torch
from chains import Chained, PreNorm, Small, compared
from torch import nn

from rewriter import Highway
from rewriter.runtime.deferred import DeferredRule
from rewriter.runtime.highway import HighwayRule
from rewriter.runtime.unrolled import UnrolledRule


class Again(nn.Module):
    """One block, four times."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        for _ in range(4):
            x = self.block(x)
        return x


class Cell(nn.Module):
    """A gated unit of one's own."""

    def __init__(self, width):
        super().__init__()
        self.gate, self.new = nn.Linear(2 * width, width), nn.Linear(2 * width, width)

    def forward(self, x, h):
        both = torch.cat([x, h], 1)
        return h + torch.sigmoid(self.gate(both)) * (torch.tanh(self.new(both)) - h)


class Loop(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x, h):
        states = []
        for given in x.unbind(1):
            h = self.cell(given, h)
            states.append(h)
        return torch.stack(states, 1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.GRU(5, 5, batch_first=True)

    def forward(self, x):
        return self.part(x)[0]


def entry(target, iterations=1000):
    return Highway(target, iterations, segments=None, tape="never")


@pytest.mark.parametrize("iterations", [1, 1000])
def test_recurrences_go_through_time(iterations):
    x, h = torch.randn(3, 8, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    cases = (
        (Recurrent(), (x,), "part", DeferredRule),
        (Loop(Cell(5)), (x, h), "cell", UnrolledRule),
        (Loop(nn.GRUCell(5, 5)), (x, h), "cell", UnrolledRule),
    )
    for model, given, target, rule in cases:
        error, step = compared(model.double(), given, entry(target, iterations))
        assert type(step.latest.emitted.regions[target].rule) is rule
        assert (error <= 1e-12) == (iterations == 1000)


@pytest.mark.parametrize("block", [Small, PreNorm])
def test_one_block_called_several_times_is_a_chain(block):
    x = torch.randn(3, 4, 12, dtype=torch.float64)
    error, step = compared(Again(block()).double(), (x,), entry("block"))
    assert error <= 1e-12
    assert type(step.latest.emitted.regions["block"].rule) is HighwayRule
    assert compared(Again(block()).double(), (x,), entry("block", 0))[0] > 1e-6


def test_the_same_module_in_a_list_twice():
    block = Small()
    x = torch.randn(3, 12, dtype=torch.float64)
    error, step = compared(Chained([block, Small(), block]).double(), (x,), entry("blocks"))
    assert error <= 1e-12
    assert type(step.latest.emitted.regions["blocks"].rule) is HighwayRule
