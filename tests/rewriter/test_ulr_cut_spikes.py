"""A spiking network with true threshold spikes trains through a cut, without a surrogate gradient."""

import torch
import torch.nn.functional as F
from digits import digits
from torch import nn

from rewriter import UlrCut, rewrite


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
    torch.manual_seed(0)
    (x, y), (unseen, truth) = digits()
    model = Spiking()
    step = rewrite(model, plan, loss=F.cross_entropy, example=(x[:50],))
    before = model.current.weight.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(50):
            loss = step(x[rows], target=y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        found = float((model(unseen).argmax(1) == truth).float().mean())
        return found, float((model.current.weight - before).norm() / before.norm()), step


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
