"""`step.measure`: the parameter cosine it predicts against the true one, on boxes whose gradient is known."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewriter import BlackBox, CallableBox, Plan, RewriteError, rewrite

RANDOM = np.random.default_rng(0)
A, B = RANDOM.standard_normal((12, 24)) / 4, RANDOM.standard_normal((24, 8)) / 4


def mlp(x):
    return np.tanh(x @ A) @ B


def products(x):
    return np.concatenate((x * np.roll(x, 1, 1), np.sin(3 * x)), 1)


def linear(x):
    return x @ (A[:, :10] * 2)


class Mlp(nn.Module):
    def forward(self, x):
        return torch.tanh(x @ torch.from_numpy(A).to(x)) @ torch.from_numpy(B).to(x)


class Products(nn.Module):
    def forward(self, x):
        return torch.cat((x * x.roll(1, 1), torch.sin(3 * x)), 1)


class Linear(nn.Module):
    def forward(self, x):
        return x @ (torch.from_numpy(A[:, :10]).to(x) * 2)


class Net(nn.Module):
    def __init__(self, box, width):
        super().__init__()
        self.before = nn.Sequential(nn.Linear(20, 12), nn.Tanh())
        self.box = box
        self.after = nn.Linear(width, 3)

    def forward(self, x):
        return self.after(self.box(self.before(x)))


BOXES = {"mlp": (mlp, Mlp, 8), "products": (products, Products, 24), "linear": (linear, Linear, 10)}


def gradients(module):
    return torch.cat([p.grad.flatten() for p in module.parameters()])


def pair(name, **options):
    """A rewritten model with the box, and its differentiable twin with the same parameters."""
    function, twin, width = BOXES[name]
    torch.manual_seed(0)
    net = Net(CallableBox(function), width)
    exact = copy.deepcopy(net)
    exact.box = twin()
    return rewrite(net, Plan([BlackBox("box", **options)]), loss=F.mse_loss), exact


def train(step, exact, rows=32, steps=50):
    """Predicted and true parameter cosine of every step of a training."""
    optimizer = torch.optim.Adam(step.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    predicted, true = [], []
    for _ in range(steps):
        x = torch.randn(rows, 20, generator=generator)
        y = torch.tanh(x[:, :3] * x[:, 3:6])
        predicted.append(step.measure(x, target=y).cosine)
        exact.load_state_dict(step.model.state_dict())
        exact.zero_grad()
        F.mse_loss(exact(x), y).backward()
        optimizer.zero_grad()
        step(x, target=y).backward()
        true.append(float(F.cosine_similarity(gradients(step), gradients(exact), dim=0)))
        optimizer.step()
    return np.array(predicted), np.array(true)


@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("name", list(BOXES))
def test_predicted_parameter_cosine(name, probes):
    step, exact = pair(name, probes=probes)
    predicted, true = train(step, exact)
    assert predicted.mean() == pytest.approx(true.mean(), abs=0.05)
    assert step.quality["box"].parameter_cosine == pytest.approx(true[-20:].mean(), abs=0.1)
    row = step.quality["box"].predicted_cosine
    assert abs(row - true.mean()) > 0.1  # negative control: the row cosine is another number


def test_everything_is_as_before():
    step, _ = pair("mlp")
    x, y = torch.randn(32, 20), torch.randn(32, 3)
    step(x, target=y).backward()
    before = {key: value.clone() for key, value in step.state_dict().items()}
    random, grad = torch.get_rng_state(), [p.grad.clone() for p in step.parameters()]
    spent = step.ledger["box"].queries
    step.measure(x, target=y)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p.grad, g) for p, g in zip(step.parameters(), grad, strict=True))
    after = step.state_dict()
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed == ["rewriter._extra_state"]  # the running parameter cosine, and nothing else:
    assert '"forward": 0' in bytes(after["rewriter._extra_state"].tolist()).decode()
    assert step.ledger["box"].queries == spent + 3 * 32


def test_two_regions_apart():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.first = nn.Linear(6, 12), CallableBox(mlp)
            self.b, self.second, self.c = nn.Linear(8, 12), CallableBox(linear), nn.Linear(10, 1)

        def forward(self, x):
            return self.c(self.second(torch.tanh(self.b(self.first(self.a(x))))))

    torch.manual_seed(0)
    step = rewrite(Two(), Plan([BlackBox("first", probes=12), BlackBox("second", probes=2)]))
    measured = [step.measure(torch.randn(64, 6)) for _ in range(10)]
    assert all(m.regions["first"] > 0.999 for m in measured)  # every direction
    assert np.mean([m.regions["second"] for m in measured]) < 0.97
    assert all(abs(m.cosine - m.regions["second"]) < 1e-3 for m in measured)
    assert "second alone" in str(measured[0])


def test_history_and_slope():
    step, _ = pair("linear", probes=3)
    for index in range(101):
        step(torch.randn(64, 20), target=torch.zeros(64, 3)).backward()
        if index == 70:
            step.measure(torch.randn(64, 20), target=torch.zeros(64, 3))
    history = step.quality_history["box"]
    assert [forward for forward, _ in history] == [0, 50, 71, 100]
    assert [quality.parameter_cosine is None for _, quality in history] == [True, True, False, False]
    assert history[-1][1] == step.quality["box"]
    assert step.quality["box"].slope == pytest.approx(1.0, abs=0.25)
    assert "parameter cosine" in step.explain()


def test_what_measures_nothing_is_an_error():
    step, _ = pair("mlp")
    with pytest.raises(RewriteError, match="training mode"):
        step.eval().measure(torch.randn(4, 20), target=torch.zeros(4, 3))
    step.train()
    for parameter in step.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(RewriteError, match="nothing to differentiate"):
        step.measure(torch.randn(4, 20), target=torch.zeros(4, 3))


def test_a_loss_that_is_not_finite_is_refused_and_forgotten():
    step, _ = pair("mlp")
    x, y = torch.randn(8, 20), torch.zeros(8, 3)
    step(x, target=y).backward()
    measured = step.measure(x, target=y).cosine
    with pytest.raises(RewriteError, match="not finite"):
        step.measure(x, target=y * float("nan"))
    assert step.quality["box"].parameter_cosine == pytest.approx(measured)


def test_all_captures_share_the_running_parameter_cosine():
    class Optional(Net):
        def forward(self, x, factor=None):
            y = super().forward(x)
            return y if factor is None else y * factor

    step = rewrite(Optional(CallableBox(mlp), 8), Plan([BlackBox("box")]))
    x, factor = torch.randn(8, 20), torch.ones(3)
    step(x).sum().backward()
    step(x, factor).sum().backward()
    first = step.measure(x).cosine
    step(x).sum().backward()
    second = step.measure(2 * x, factor).cosine
    assert first != second
    between = sorted((first, second))
    assert between[0] < step.quality["box"].parameter_cosine < between[1]
