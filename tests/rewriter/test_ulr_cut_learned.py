"""`UlrCut(sigma="learned")`: the noise is the user's optimizer's, beside the weights."""

import copy
import math

import cuts
import pytest
import torch
import torch.nn.functional as F
from cuts import SEQUENCES, Loop, Net, X, Y
from torch import nn

from rewriter import RewriteError, UlrCut, rewrite
from rewriter.runtime.estimators.noise_size import NoiseSize

ROWS, WIDTH = 400, 4
CURVES = torch.tensor([0.5, 2.0, 0.0, -1.0], dtype=torch.float64)


class Bowl(nn.Module):
    """An encoder, then CURVES / 2 of its squares and a slope: a quadratic in the value, per row."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(6, WIDTH).double()

    def forward(self, x):
        z = self.encoder(x)
        return (z.square() * CURVES / 2 + 0.3 * z).sum(1)


def mean(output, target):
    return (output + 0 * target).mean()


def bowl(rows=ROWS, **options):
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    entry = UlrCut("encoder", sigma="learned", **options)
    return rewrite(Bowl(), entry, loss=mean, example=(x,)), x, torch.zeros(rows, dtype=torch.float64)


def log_sigma(step):
    (found,) = [p for name, p in step.named_parameters() if name == "rewriter.noise.encoder.0.log_sigma"]
    return found


def largest_z(found, true):
    error = torch.stack(found) - true
    return float((error.mean(0) / (error.std(0) / math.sqrt(len(error)))).abs().max())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"directions": "laplace", "baseline": "clean"},
        {"allocation": "norm", "antithetic": True},
        {"allocation": "doubt", "directions": "gaussian"},
    ],
    ids=lambda options: options.get("allocation", options.get("directions", "plain")),
)
def test_the_gradient_of_the_smoothed_loss(options):
    """dF / d log sigma_j = sigma_j^2 H_jj, of a mean loss, times the loss's cotangent."""
    step, x, y = bowl(copies=16, **options)
    parameter = log_sigma(step)
    with torch.no_grad():
        parameter += torch.tensor([0.3, 0.0, 1.0, -0.5])
    found = [torch.autograd.grad(3 * step(x, target=y), parameter)[0] for _ in range(40)]
    (cut,) = step.latest.emitted.regions["encoder"].rule.cuts
    sigma = cut.size.bounded(parameter.detach())[0]
    true = 3 * sigma.square() * CURVES
    assert largest_z(found, true) < 4
    assert largest_z(found, true / 3) > 4.5  # negative controls: the cotangent, and sigma itself in place of its log
    assert largest_z(found, true / sigma) > 4.5


def test_learning_lowers_the_noise_where_the_loss_curves_up():
    step, x, y = bowl(rows=100, copies=8)
    parameter = log_sigma(step)
    optimizer = torch.optim.SGD([parameter], 5.0)
    for _ in range(200):
        optimizer.zero_grad()
        step(x, target=y).backward()
        optimizer.step()
    assert parameter[1] < parameter[0] < -0.1
    assert parameter[3] > 0.1
    assert "sigma learned" in step.explain()


def test_training_with_everything_else_ends_with_less_noise():
    net = Net()
    step = cuts.cut(net, UlrCut("encoder", sigma="learned", copies=16))
    optimizer = torch.optim.Adam(step.parameters(), 0.02)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = step(X, target=Y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    assert float(log_sigma(step).detach().mean()) < -0.1


def test_what_is_learnt_is_kept():
    step = cuts.cut(Net(), UlrCut("encoder", sigma="learned", copies=8))
    assert dict(step.named_parameters()).keys() > {"rewriter.noise.encoder.0.log_sigma", "encoder.0.weight"}
    optimizer = torch.optim.SGD(step.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        step(X, target=Y).backward()
        optimizer.step()
    assert log_sigma(step).any()
    other = cuts.cut(Net(), UlrCut("encoder", sigma="learned", copies=8))
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    copied = copy.deepcopy(step)
    _, expected = cuts.gradients(step, X, Y)
    for again in (other, copied):
        assert torch.equal(log_sigma(again), log_sigma(step))
        assert log_sigma(again) is not log_sigma(step)
        _, found = cuts.gradients(again, X, Y)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    fresh = cuts.cut(Net(), UlrCut("encoder", sigma="learned", copies=8))
    assert not torch.equal(cuts.gradients(fresh, X, Y)[1]["encoder.0.weight"], expected["encoder.0.weight"])
    fresh.load_state_dict(Net().state_dict())  # a plain checkpoint has no noise and misses nothing


def test_captures_share_it():
    step = cuts.cut(Net(), UlrCut("encoder", sigma="learned", copies=8))
    parameter = log_sigma(step)
    step.recapture()
    step(X, target=Y).backward()
    first = parameter.grad.clone()
    step(X.clone().requires_grad_(), target=Y).backward()  # another signature
    assert log_sigma(step) is parameter
    assert not torch.equal(first, parameter.grad)
    loop = cuts.cut(Loop(nn.GRUCell), UlrCut("cell", every=2, sigma="learned", copies=4), SEQUENCES)
    names = [name for name, _ in loop.named_parameters() if name.startswith("rewriter.noise")]
    assert names == [f"rewriter.noise.cell.{number}.log_sigma" for number in range(3)]
    loop(SEQUENCES, target=Y).backward()
    assert all(dict(loop.named_parameters())[name].grad is not None for name in names)


def test_a_channel_of_a_feature_map_has_one():
    net = Net(
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 4, 4)),
        nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2, padding=(1, 0)), nn.MaxPool2d((1, 1))),
    )
    net.tail = nn.Sequential(nn.Flatten(), nn.LazyLinear(4)).double()
    net(X)
    step = cuts.cut(net, UlrCut("encoder", sigma="learned", copies=8))
    assert log_sigma(step).shape == (3,)
    step(X, target=Y).backward()
    assert log_sigma(step).grad.shape == (3,)
    assert log_sigma(step).grad.all()


def test_it_can_be_held_and_is_checked():
    step = cuts.cut(Net(), UlrCut("encoder", sigma="learned", copies=64))
    before = copy.deepcopy(step.state_dict())
    report = step.check(X, target=Y)
    assert report.regions[0].inputs.cosine > 0.9
    assert abs(report.regions[0].inputs.slope - 1) < 0.2
    assert all(torch.equal(before[name], value) for name, value in step.state_dict().items())
    assert 0.9 < step.measure(X, target=Y).cosine <= 1
    log_sigma(step).requires_grad_(False)
    step(X, target=Y).backward()
    assert log_sigma(step).grad is None
    assert step.model.encoder[0].weight.grad.any()


def test_the_same_numbers_twice_and_a_step_in_between_is_noticed():
    step = cuts.cut(Net(), UlrCut("encoder", sigma="learned", copies=8))
    parameter = log_sigma(step)
    loss = step(X, target=Y)
    first = torch.autograd.grad(loss, parameter, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, parameter)[0])
    loss = step(X, target=Y)
    with torch.no_grad():
        parameter += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_it_needs_an_example():
    with pytest.raises(RewriteError, match="parameters of its own"):
        rewrite(Net(), UlrCut("encoder", sigma="learned"), loss=F.cross_entropy)


def test_a_diverged_batch_leaves_it_alone():
    step = cuts.cut(Net(), UlrCut("encoder", sigma="learned", copies=8))
    step(X, target=Y).backward()
    log_sigma(step).grad = None
    x = X.clone()
    x[3] = torch.nan
    step(x, target=Y).backward()
    assert not log_sigma(step).grad.isnan().any()
    assert step.model.encoder[0].weight.grad.isnan().any()


class Coarse(nn.Module):
    """A classifier in bfloat16."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, z):
        return self.inner(z.bfloat16())


@pytest.mark.parametrize("guarded", [True, False])
def test_noise_stays_as_large_as_the_losses_resolve(guarded, monkeypatch):
    net = Net(Coarse())
    net.tail.inner.bfloat16()
    with torch.no_grad():
        net.tail.inner[2].weight *= 8
    step = cuts.cut(net, UlrCut("encoder", sigma="learned", copies=16))
    if not guarded:  # negative control
        monkeypatch.setattr(NoiseSize, "grow", lambda _: False)
    with torch.no_grad():
        log_sigma(step).fill_(-6)
    if not guarded:
        with pytest.raises(RewriteError, match="no more than their rounding"):
            step(X, target=Y).backward()
        return
    step(X, target=Y).backward()
    (cut,) = step.latest.emitted.regions["encoder"].rule.cuts
    assert cut.size.factor > 0.01
    assert not (log_sigma(step).grad > 0).any()  # no step further down
    log_sigma(step).grad = None
    (-step(X, target=Y)).backward()
    assert (log_sigma(step).grad < 0).any()  # the way up is open
