"""Noise in weights, one draw for each copy of each row: unbiased, with the variance that theory gives it."""

import math

import cuts
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewriter import UlrCut, rewrite
from rewriter.runtime import ulr_cut
from rewriter.runtime.estimators import copies as copies_of_rows
from rewriter.runtime.row_weights import RowWeights

GENERATOR = torch.Generator().manual_seed(5)
IMAGES = torch.randn(8, 2, 5, 5, generator=GENERATOR, dtype=torch.float64)
ROWS = torch.randn(8, 3, generator=GENERATOR, dtype=torch.float64)


class Single(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer.double()

    def forward(self, x):
        return self.layer(x)


def linear():
    torch.manual_seed(0)
    return Single(nn.Linear(3, 2)), ROWS


def convolution():
    torch.manual_seed(0)
    return Single(nn.Conv2d(2, 2, 3, stride=2, padding=1)), IMAGES


def sloped(output, target):
    """Linear in the output, a number for each row."""
    return (output * target).flatten(1).sum(1)


def quadratic(output, target):
    return (output - target).square().flatten(1).mean(1)


def samples(make, loss, repeats, **options):
    """Gradients of all parameters side by side, (repeats, numbers), and the true one."""
    net, x = make()
    target = torch.randn(net(x).shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = rewrite(net, UlrCut("**", noise="weight", **options), loss=loss, example=(x,))
    parameters = list(net.parameters())

    def flat(total):
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)])

    true = flat(loss(net(x), target).sum())
    return torch.stack([flat(step(x, target=target).sum()) for _ in range(repeats)]), true


def scores(found, true):
    return (found.mean(0) - true) / (found.std(0) / math.sqrt(len(found)))


CASES = [
    ("linear, slope", linear, sloped, {"directions": "gaussian", "baseline": "clean"}),
    ("linear, curve", linear, quadratic, {}),
    ("convolution, slope", convolution, sloped, {"antithetic": True}),
    ("convolution, curve", convolution, quadratic, {"baseline": "leave-one-out"}),
]


@pytest.mark.parametrize(("make", "loss", "options"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_unbiased(make, loss, options):
    found, true = samples(make, loss, 90, copies=32, sigma=0.3, **options)
    z = scores(found, true)
    assert z.abs().max() < 4.5
    assert 0.35 < z.square().mean() < 1.95
    assert scores(found, 1.5 * true).abs().max() > 4.5  # negative control


def test_weights_of_a_neighbour_are_not_unbiased(monkeypatch):
    run = RowWeights.run
    monkeypatch.setattr(ulr_cut, "prove", lambda *_: None)  # which would not let it pass
    monkeypatch.setattr(
        RowWeights, "run", lambda self, inputs, weights: run(self, inputs, [w.roll(1, 0) for w in weights])
    )
    found, true = samples(linear, quadratic, 120, copies=32, sigma=0.3)
    assert scores(found, true).abs().max() > 4.5


def test_variance_is_that_of_as_many_directions_as_weights(monkeypatch):
    """(P + 1) / K of each row's squared gradient, rows independent: equal rows average out."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    x = ROWS[:1].repeat(8, 1)

    def spread(repeats):
        weight = torch.randn(1, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        net = Single(layer)
        loss = lambda output, target: (output * weight).sum(1) + 0 * target  # noqa: E731
        entry = UlrCut("**", noise="weight", copies=4, sigma=0.1, directions="gaussian", baseline="clean")
        step = rewrite(net, entry, loss=loss, example=(x,))
        target = torch.zeros(8, dtype=torch.float64)
        parameters = list(net.parameters())
        true = torch.cat([g.flatten() for g in torch.autograd.grad(loss(net(x), target).sum(), parameters)])
        errors = []
        for _ in range(repeats):
            found = torch.autograd.grad(step(x, target=target).sum(), parameters)
            errors.append((torch.cat([g.flatten() for g in found]) - true).square().sum())
        return float(torch.stack(errors).mean() / true.square().sum()) * 8

    expected = (8 + 1) / 4
    assert abs(spread(300) / expected - 1) < 0.08
    draw = copies_of_rows.draw_noise

    def shared(kind, key, rows, copies, width, **options):
        return draw(kind, key, 1, copies, width, **{**options, "first_row": 0}).repeat(rows, 0)

    monkeypatch.setattr(copies_of_rows, "draw_noise", shared)  # negative control: one draw for all rows
    assert spread(60) / expected > 5


def test_with_many_copies_it_is_the_gradient():
    """Many copies, small noise: every layer's estimate is its gradient."""
    net = cuts.Net()
    _, expected = cuts.gradients(net, cuts.X, cuts.Y)
    for noise in ("weight", "activation"):
        step = rewrite(net, UlrCut("**", noise=noise, copies=800, sigma=1e-3), loss=F.cross_entropy, example=(cuts.X,))
        assert cuts.error(cuts.gradients(step, cuts.X, cuts.Y)[1], expected) < 0.2
