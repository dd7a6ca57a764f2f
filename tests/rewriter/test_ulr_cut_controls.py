"""`UlrCut(control=...)`: surrogate gradients take variance away, and nothing else."""

import copy
import math
from dataclasses import replace

import cuts
import numpy as np
import pytest
import steps
import torch
import torch.nn.functional as F
from cuts import Net, X, Y
from steps import INPUTS, TARGETS, Recurrence, Walk, entropy, weighed
from torch import nn

from rewriter import CallableBox, RewriteError, UlrCut, rewrite
from rewriter.runtime.controls import Controls, next_slopes
from rewriter.runtime.ulr_cut import UlrCutRule
from rewriter.standins import StandIn, standing_in

LEARNT = ("last", "truncated", "distilled")


def recurrent(control, **options):
    """A chain with a loss at every step, noise so small that smoothing is not seen."""
    entry = UlrCut("cell", **{"every": 2, "copies": 4, "sigma": 1e-4, "control": control, **options})
    return rewrite(Recurrence(), entry, loss=entropy, example=(INPUTS,))


def sampled(step, repeats, warm=8):
    """(repeats, parameters): the cell's gradient once the controls know something."""
    parameters = list(step.model.cell.parameters())
    found = [torch.autograd.grad(step(INPUTS, target=TARGETS), parameters) for _ in range(warm + repeats)][warm:]
    return torch.stack([torch.cat([g.flatten() for g in each]) for each in found])


def exact():
    net = Recurrence()
    found = torch.autograd.grad(entropy(net(INPUTS), TARGETS), list(net.cell.parameters()))
    return torch.cat([g.flatten() for g in found])


def largest_z(found, expected):
    error = found - expected
    spread = error.std(0) / math.sqrt(len(error))
    return float((error.mean(0).abs() / spread.clamp(min=1e-9 * expected.abs().max())).max())


def facts(step):
    region = cuts.region_of(step)
    return region.rule.describe()


@pytest.mark.parametrize("control", LEARNT)
def test_unbiased(control):
    step = recurrent(control)
    found = sampled(step, 40)
    assert facts(step)["controlled"] > 0
    assert largest_z(found, exact()) < 4.8
    assert largest_z(1.5 * found, exact()) > 4.8


def test_a_control_that_knows_the_noise_is_biased(monkeypatch):
    """Negative control: the estimate from this step's own noise as its surrogate, (1 + (D + 1) / K) g too little."""
    step = recurrent("last")
    prepare = Controls.prepare

    def cheating(self, region, tail, settings, number):
        prepare(self, region, tail, settings, number)
        own = cuts.region_of(step)
        call = cheating.call
        plain = [replace(each, surrogate=None, control=None) for each in settings]
        found = own.rule._estimates(call, tail, plain, "", "probes")
        settings[:] = [replace(s, control=each.gradient) for s, each in zip(settings, found, strict=True)]

    monkeypatch.setattr(Controls, "prepare", cheating)
    region = cuts.region_of(step)
    settle = region.rule._settle

    def settled(call, tail, learnt):
        cheating.call = call
        return settle(call, tail, learnt)

    monkeypatch.setattr(region.rule, "_settle", settled)
    assert largest_z(sampled(step, 40), exact()) > 4.8


def test_a_chain_with_losses_at_every_step():
    """What a surrogate is worth at one and the same point, in variance of the parameters' gradient."""
    spread = {control: float(sampled(recurrent(control), 40).var(0).sum()) for control in ("none", *LEARNT)}
    ratios = {control: spread[control] / spread["none"] for control in LEARNT}
    assert ratios["truncated"] < 0.4
    assert ratios["distilled"] < 0.3
    assert 0.7 < ratios["last"] < 1.3  # rows have hardly anything in common here


@pytest.mark.parametrize("rho", [0.5, 0.9])
def test_variance_falls_to_one_less_the_squared_correlation(rho):
    """Two linear losses behind the first cut at an angle: the truncated gradient is the first, g the sum of both."""
    weights = torch.zeros(3, steps.WIDTH, dtype=torch.float64)
    weights[1, 0], weights[2, 1] = rho, math.sqrt(1 - rho**2)
    x = torch.randn(300, 3, steps.WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_()
    target, expected = torch.ones(300, 3, dtype=torch.float64), weights[1] + weights[2]
    spread = {}
    for control in ("none", "truncated"):
        entry = UlrCut("cell", every=1, copies=32, sigma=0.1, directions="gaussian", baseline="clean", control=control)
        step = rewrite(Walk(weights=weights), entry, loss=weighed, example=(x,))
        found = [torch.autograd.grad(step(x, target=target), x)[0][:, 0] for _ in range(14)][4:]
        assert largest_z(torch.cat(found), expected) < 4.8
        spread[control] = float((torch.cat(found) - expected).square().sum(1).mean())
    assert spread["none"] == pytest.approx((steps.WIDTH + 1) / 32, rel=0.05)
    assert spread["truncated"] / spread["none"] == pytest.approx(1 - rho**2, rel=0.05)
    region = cuts.region_of(step)
    assert region.rule.cuts[0].control.correlation == pytest.approx(rho, abs=0.02)
    assert region.rule.cuts[1].control.correlation == pytest.approx(1)  # the last sub-chain is all that follows


def behind(tail, control, net=Net, **options):
    torch.manual_seed(1)
    model = net(tail)
    model.tail.requires_grad_(False)
    entry = UlrCut("encoder", **{"copies": 4, "control": control, "sigma": 0.2, **options})
    return rewrite(model, entry, loss=F.cross_entropy, example=(X,))


def spread_behind(step, repeats=50, warm=15):
    parameters = list(step.model.encoder.parameters())
    found = [torch.autograd.grad(step(X, target=Y), parameters) for _ in range(warm + repeats)][warm:]
    return float(sum(torch.stack(each).var(0).sum() for each in zip(*found, strict=True)))


class Rounded(nn.Module):
    """A box in numpy, with steps of a twentieth: no derivative anywhere."""

    def __init__(self):
        super().__init__()
        weight = np.random.default_rng(0).standard_normal((5, 4))
        self.box = CallableBox(lambda a: np.round(20 * np.tanh(a @ weight)) / 20)

    def forward(self, z):
        return self.box(z)


TAILS = {
    "frozen": (lambda: nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4)), 0.2),
    "box": (Rounded, 0.6),
}


@pytest.mark.parametrize("case", TAILS)
def test_a_linear_map_stands_for_a_frozen_tail_or_a_box(case):
    make, limit = TAILS[case]
    torch.manual_seed(3)
    tail = make()
    spread = {control: spread_behind(behind(copy.deepcopy(tail), control)) for control in ("none", "distilled")}
    assert spread["distilled"] < limit * spread["none"]


def test_what_rows_have_in_common_is_known_from_earlier_steps():
    """The last estimate pays where rows agree: here all have the same gradient."""

    def common(output, target):
        return output[:, 0].sum() + 0 * target.sum()

    spread = {}
    for control in ("none", "last"):
        model = Net(nn.Linear(5, 4))
        model.tail.requires_grad_(False)
        entry = UlrCut("encoder", copies=4, sigma=0.1, control=control)
        step = rewrite(model, entry, loss=common, example=(X,))
        spread[control] = spread_behind(step, warm=40)
    assert spread["last"] < 0.1 * spread["none"]


def test_a_surrogate_that_says_nothing_is_left_out():
    """Gradients of rows cancel, so that their mean is noise: the numbers are those without a control."""
    sign = torch.where(torch.arange(len(X)) % 2 == 0, 1.0, -1.0).double()
    rows = X[::2].repeat_interleave(2, 0)  # each twice, once with either sign

    def opposed(output, target):
        return (output[:, 0] * target).sum()

    found = {}
    for control in ("none", "last"):
        model = Net(nn.Linear(5, 4))
        model.tail.requires_grad_(False)
        step = rewrite(model, UlrCut("encoder", copies=64, control=control), loss=opposed, example=(rows,))
        for _ in range(4):
            found[control] = torch.autograd.grad(step(rows, target=sign), list(model.encoder.parameters()))
    assert facts(step)["controlled"] == 0
    assert all(map(torch.equal, found["none"], found["last"]))


def test_a_derivative_that_does_not_pay_is_hardly_taken(monkeypatch):
    """One at the first backward, then one every fifty."""
    monkeypatch.setattr(Controls, "_cost", lambda *_: 1e9)
    step = recurrent("truncated")
    sampled(step, 20, warm=0)
    assert facts(step)["controlled"] == 0
    assert step.ledger["cell"].vjps == 1
    monkeypatch.undo()
    step = recurrent("truncated")
    sampled(step, 20, warm=0)
    assert step.ledger["cell"].vjps == 20


class Next(StandIn):
    """Supplies what `next_slopes` finds."""

    def backward(self, call, taken, cotangents, needed):
        rule = self.rule
        tail = rule._tail(call, taken)
        slopes = next_slopes(tail, range(len(rule.cuts)))
        return rule._divided(taken, tail, slopes, needed)


@pytest.mark.parametrize("every", [1, 3])
def test_the_truncated_gradient_is_exactly_that(every):
    step = recurrent("truncated", every=every)
    parameters = list(step.model.cell.parameters())
    with standing_in(step, step.latest, lambda _, rule: Next(rule) if isinstance(rule, UlrCutRule) else rule):
        found = torch.autograd.grad(step(INPUTS, target=TARGETS), parameters)
    for reach, same in ((1, True), (0, False), (2, False)):
        expected = steps.truncated(step.model, every, reach)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
        assert (max(errors) < 1e-12) == same


@pytest.mark.parametrize("control", LEARNT)
def test_repeatable_linear_and_kept(control):
    step = recurrent(control, copies="auto", sigma="auto")
    parameters = list(step.model.cell.parameters())
    for _ in range(3):
        step(INPUTS, target=TARGETS).backward()
    state = copy.deepcopy(step.state_dict())
    loss = step(INPUTS, target=TARGETS)
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, parameters)))
    other = recurrent(control, copies="auto", sigma="auto")
    other.load_state_dict(state)
    again = torch.autograd.grad(7 * other(INPUTS, target=TARGETS), list(other.model.cell.parameters()))
    for a, b in zip(again, first, strict=True):
        torch.testing.assert_close(a, 7 * b, rtol=1e-10, atol=1e-14)
    fresh = recurrent(control, copies="auto", sigma="auto")  # negative control: without what was learnt
    plain = torch.autograd.grad(fresh(INPUTS, target=TARGETS), list(fresh.model.cell.parameters()))
    assert not torch.allclose(plain[0], first[0])
    assert f"control variate {control}: correlation" in step.explain()


@pytest.mark.parametrize("control", LEARNT)
def test_with_a_pilot_and_a_window(control):
    step = recurrent(control, copies=12, allocation="norm", window=2, max_rows=50)
    found = sampled(step, 30)
    expected = torch.cat([g.flatten() for g in steps.truncated(step.model, 2, 2)])
    assert largest_z(found, expected) < 4.8


def test_what_cannot_be_had_is_refused():
    with pytest.raises(RewriteError, match="needs a chain"):
        UlrCut("encoder", control="truncated")
    with pytest.raises(RewriteError, match="is not an option"):
        UlrCut("encoder", control="best")
    with pytest.raises(RewriteError, match="nothing of any sub-chain but the last"):
        cuts.cut(cuts.Loop(nn.GRUCell), UlrCut("cell", every=2, control="truncated"), cuts.SEQUENCES)

    class Ending(nn.Module):
        """Blocks, and an end without a derivative."""

        def __init__(self, end):
            super().__init__()
            self.start = nn.Linear(6, 5)
            self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
            self.blocks[2].requires_grad_(False)
            self.end = end
            self.double()

        def forward(self, x):
            value = self.start(x)
            for block in self.blocks:
                value = block(value)
            return self.end(value)

    entry = UlrCut("blocks", every=1, control="truncated")
    for end, message in ((torch.round, "without a derivative"), (CallableBox(np.tanh), "that holds a box")):
        with pytest.raises(RewriteError, match=message):
            rewrite(Ending(end), entry, loss=F.mse_loss, example=(X,))

    def accuracy(output, target):
        return (output.argmax(1) == target).double().mean()

    step = cuts.cut(cuts.Net(), UlrCut("encoder", control="distilled", sigma=1.0), loss=accuracy)
    with pytest.raises(RewriteError, match="no derivative there"):
        step(X, target=Y).backward()
    wide = Net(nn.Linear(2000, 600), nn.Linear(6, 2000))
    step = cuts.cut(wide, UlrCut("encoder", control="distilled", copies=2))
    with pytest.raises(RewriteError, match="2000 x 600 numbers"):
        step(X, target=Y).backward()
