"""Whole models trained by `UlrCut("**")` alone: nothing is differentiated across layers."""

import torch
from digits import train
from torch import nn

from rewriter import UlrCut


def convolutional():
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10)),
    )


class Spiking(nn.Module):
    """Two layers of leaky units with true threshold spikes; rates of spikes are read out."""

    def __init__(self, width=32, steps=4):
        super().__init__()
        self.first, self.second, self.readout = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, 10)
        self.steps = steps

    def forward(self, x):
        current = self.first(x)
        early = late = fired = answered = torch.zeros_like(current)
        rates = torch.zeros_like(current)
        for _ in range(self.steps):
            early = 0.8 * early * (1 - fired) + current
            fired = (early > 1).float()
            late = 0.8 * late * (1 - answered) + self.second(fired)
            answered = (late > 1).float()
            rates = rates + answered / self.steps
        return self.readout(rates)


def test_digits_by_a_convolutional_net():
    found, step = train(convolutional, UlrCut("**", copies=8, noise="auto"), epochs=4, rate=1e-2)
    assert found >= 0.8
    noises = [layer["noise"] for layer in step.latest.emitted.regions["**"].rule.describe()["layers"]]
    assert noises == ["weight", "activation", "activation"]
    assert step.ledger["**"].probes == 4 * 1400 * 8 * 3


def test_digits_through_two_layers_of_true_spikes():
    found, step = train(Spiking, UlrCut("**", copies=8, sigma=0.2), epochs=6, rate=1e-2)
    assert found >= 0.8
    assert [cut.name for cut in step.latest.program.regions[0].parts] == [
        *("first", "second", "second@1", "second@2", "second@3", "readout"),
    ]
    found, _ = train(Spiking, [], epochs=6, rate=1e-2)  # control: back-propagation reaches the readout alone
    assert found < 0.5
