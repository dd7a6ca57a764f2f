"""A spiking network with true threshold spikes trains through a cut, without a surrogate gradient."""

import torch
from digits import digits, train
from torch import nn

from rewriter import UlrCut


class Spiking(nn.Module):
    """A current into leaky units that spike at 1 and are reset; rates of spikes are read out."""

    def __init__(self, width=48, steps=8):
        super().__init__()
        self.current, self.readout, self.steps = nn.Linear(64, width), nn.Linear(width, 10), steps

    def forward(self, x):
        current = self.current(x)
        potential = spikes = rates = torch.zeros_like(current)
        for _ in range(self.steps):
            potential = 0.8 * potential * (1 - spikes) + current
            spikes = (potential > 1).float()
            rates = rates + spikes / self.steps
        return self.readout(rates)


def accuracy(plan, epochs):
    """Also how far the weights before the spikes moved, relative to where they started."""
    torch.manual_seed(0)
    before = Spiking().current.weight.detach()
    found, step = train(Spiking, plan, epochs, 5e-3)
    after = step.model.current.weight.detach()
    return found, float((after - before).norm() / before.norm()), step


def test_digits_through_true_spikes():
    batch = [each[:50] for each in digits()[0]]
    found, moved, step = accuracy(UlrCut("current", copies=12, sigma=0.2), epochs=10)
    assert found >= 0.9
    assert moved > 0.2
    counts = step.ledger["current"]
    assert counts.probes == 10 * 1400 * 12
    assert "the ordinary tape would give zero" in step.explain()
    assert "times the copies" in str(step.check(*batch[:1], target=batch[1]))
    # Negative control: without the cut the layer before the spikes gets no gradient at all.
    _, moved, _ = accuracy([], epochs=1)
    assert moved == 0
