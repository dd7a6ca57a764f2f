"""Letters that decide lie before the first cut of a GRU: what the cuts gain over truncation, and that zero is seen.

A small stand-in for benchmarks/ulr_text.py: letters drawn with frequencies of their class, then with everyone's.
"""

import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewriter import UlrCut, rewrite
from rewriter.runtime.ulr_cut import UlrCutRule
from rewriter.standins import StandIn, standing_in

LETTERS, CLASSES, LENGTH, QUARTER, WIDTH, ROWS, STEPS = 12, 3, 20, 5, 16, 32, 110
SEEDS = (0, 1, 2)
LEAST = 5  # points
SURE = 4.303  # t distribution, two degrees of freedom: 97.5 % lie below


class Sorter(nn.Module):
    """The head reads the last state; truncated: the state is detached every quarter."""

    def __init__(self, truncated):
        super().__init__()
        self.embed = nn.Embedding(LETTERS, 8)
        self.rnn = nn.GRU(8, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.truncated = truncated
        with torch.no_grad():  # the update gates start with long memories
            self.rnn.bias_ih_l0[WIDTH : 2 * WIDTH] = torch.linspace(0, 3, WIDTH)

    def forward(self, letters):
        embedded = self.embed(letters)
        if not self.truncated:
            return self.head(self.rnn(embedded)[1][-1])
        last = embedded.new_zeros(1, len(letters), WIDTH)
        for quarter in embedded.split(QUARTER, 1):
            _, last = self.rnn(quarter, last.detach())
        return self.head(last[-1])


class Zero(StandIn):
    """What a cut must not do in silence."""

    def backward(self, call, taken, cotangents, needed):
        return tuple(torch.zeros_like(v) if need else None for v, need in zip(taken.tensors, needed, strict=True))


def windows(rows, generator):
    label = torch.randint(CLASSES, (rows,), generator=generator)
    likely = torch.ones(CLASSES, LETTERS)
    for own in range(CLASSES):
        likely[own, own::CLASSES] = 5
    evidence = torch.multinomial(likely[label], QUARTER, replacement=True, generator=generator)
    neutral = torch.randint(LETTERS, (rows, LENGTH - QUARTER), generator=generator)
    return torch.cat((evidence, neutral), 1), label


def accuracy(kind, seed):
    """Of "cut", "truncated" or "zero", percent; weights and letters are the seed's."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = Sorter(kind == "truncated")
    plan = [] if kind == "truncated" else [UlrCut("rnn", every=QUARTER, copies=8)]
    step = rewrite(net, plan, loss=F.cross_entropy, example=(windows(ROWS, generator)[0],))
    optimizer = torch.optim.Adam(net.parameters(), 2e-2)

    def train():
        for _ in range(STEPS):
            letters, label = windows(ROWS, generator)
            optimizer.zero_grad()
            step(letters, target=label).backward()
            optimizer.step()

    if kind == "zero":
        with standing_in(step, step.latest, lambda _, rule: Zero(rule) if isinstance(rule, UlrCutRule) else rule):
            train()
    else:
        train()
    letters, label = windows(2000, generator)
    with torch.no_grad():
        return 100 * float((net(letters).argmax(1) == label).float().mean())


@pytest.fixture(scope="module")
def truncated():
    return [accuracy("truncated", seed) for seed in SEEDS]


def least_gain(kind, truncated):
    """Lower end of the 95 % interval of the paired difference to truncation, points."""
    gains = [accuracy(kind, seed) - own for seed, own in zip(SEEDS, truncated, strict=True)]
    return statistics.mean(gains) - SURE * statistics.stdev(gains) / len(gains) ** 0.5


def test_the_cut_learns_what_truncation_cannot(truncated):
    assert least_gain("cut", truncated) >= LEAST


def test_a_cut_that_passes_zero_fails_the_same_bound(truncated):
    """Negative control: it is truncation, which gains nothing over itself."""
    found = least_gain("zero", truncated)
    assert found < LEAST
    assert abs(found) < 1
