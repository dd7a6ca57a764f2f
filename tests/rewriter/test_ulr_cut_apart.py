"""Sub-chains of a cut chain are differentiated each by itself: without a tape in forward, some of them as one."""

import gc

import cuts
import pytest
import torch
import torch.nn.functional as F
from cuts import SEQUENCES, Loop, Y
from live_memory import LiveMemory
from torch import nn

from rewriter import UlrCut, rewrite
from rewriter.runtime.sub_chains import SubChainsRule

LONG = torch.randn(16, 64, 6)
CLASSES = torch.randint(0, 4, (16,), generator=torch.Generator().manual_seed(0))


def apart(step):
    return next(r.rule for r in step.latest.emitted.regions.values() if isinstance(r.rule, SubChainsRule))


class Long(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = nn.GRUCell(6, 32), nn.Linear(32, 4)

    def forward(self, x):
        h = x.new_zeros(x.shape[0], 32)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h)


def peak(plan, x=LONG):
    net = Long()
    step = rewrite(net, plan, loss=F.cross_entropy, example=(x,))
    for _ in range(3):
        step(x, target=CLASSES).backward()
    net.zero_grad()
    gc.collect()
    with LiveMemory() as memory:
        step(x, target=CLASSES).backward()
        return memory.peak


def test_memory_is_that_of_one_sub_chain():
    """Beside one sub-chain's tape there are the states between them, and the copies' noise at them."""

    def most(every, at_once):
        return peak([UlrCut("cell", every=every, copies=2, at_once=at_once, max_rows=64)])

    whole, one = peak([]), peak([], LONG[:, :16])
    assert one < 0.3 * whole
    assert most(16, 1) < 1.2 * one
    assert most(16, 4) > 3 * one  # the tapes are what is counted
    assert most(8, 1) < 0.25 * whole


@pytest.mark.parametrize(("kind", "others"), [(nn.GRUCell, 1), (nn.LSTMCell, 2)])
def test_sub_chains_that_run_as_one_have_the_same_gradients(kind, others):
    """Three sub-chains of two steps and one of a single step; the LSTM's first one starts from one tensor, not two."""
    net = Loop(kind)
    _, expected = cuts.gradients(net, SEQUENCES, Y)
    forwards = {}
    for at_once in (1, 2, "auto"):
        step = cuts.cut(net, UlrCut("cell", copies=2, every=2, at_once=at_once), SEQUENCES)
        _, found = cuts.exactly(step, SEQUENCES, Y)
        assert cuts.error(found, expected) < 1e-12
        forwards[at_once] = step.ledger["cell sub-chains"].forwards
    assert forwards == {1: 4, 2: 3, "auto": 1 + others}


def test_a_second_backward_and_another_cotangent():
    step = cuts.cut(Loop(nn.GRUCell), UlrCut("cell", copies=2, every=2), SEQUENCES)
    loss = step(SEQUENCES, target=Y)
    parameters = list(step.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(3 * loss, parameters)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(3 * a, b, rtol=1e-12, atol=1e-15)


class Noisy(Loop):
    """Dropout within a step."""

    def __init__(self):
        super().__init__(nn.GRUCell)
        self.cell = Dropping()

    def forward(self, x):
        h = x.new_zeros(x.shape[0], 5)
        for t in range(7):
            h = self.cell(x[:, t], h)
        return self.head(h)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.GRUCell(6, 5).double()

    def forward(self, x, h):
        return F.dropout(self.inner(x, h), 0.3, self.training)


def test_dropout_draws_the_same_numbers_again():
    net = Noisy()
    loss, expected = cuts.gradients(net, SEQUENCES, Y)
    step = cuts.cut(net, UlrCut("cell", copies=2, every=2), SEQUENCES)
    assert apart(step).describe()["sub_chains"] == 4
    found_loss, found = cuts.exactly(step, SEQUENCES, Y)
    torch.testing.assert_close(found_loss, loss, rtol=1e-14, atol=0)
    assert cuts.error(found, expected) < 1e-12
    other = cuts.exactly(step, SEQUENCES, Y, seed=2)[1]
    assert cuts.error(other, expected) > 1e-3


class Beside(Loop):
    """What the cell had two steps before is read beside its last result."""

    def __init__(self):
        super().__init__(nn.GRUCell)
        self.mix = nn.Linear(10, 5).double()

    def forward(self, x):
        before = h = x.new_zeros(x.shape[0], 5)
        for t in range(7):
            before, h = h, self.cell(x[:, t], torch.tanh(self.mix(torch.cat((before, h), 1))))
        return self.head(h)


def test_what_goes_on_beside_the_cuts_keeps_the_tape():
    net = Beside()
    _, expected = cuts.gradients(net, SEQUENCES, Y)
    step = cuts.cut(net, UlrCut("cell", copies=2, every=2), SEQUENCES)
    assert len(step.latest.emitted.regions) == 1
    assert any("stay on the ordinary tape" in note and "beside" in note for note in step.latest.program.notes)
    _, found = cuts.exactly(step, SEQUENCES, Y)
    assert found.keys() == expected.keys()
