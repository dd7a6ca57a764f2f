"""`UlrCut` in whole models: what stays exact, what is estimated, and that neither is silently zero."""

import copy
import math
import warnings

import cuts
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cuts import Around, Folded, Loop, Net, PositionsFirst, X, Y
from torch import nn

from rewriter import BlackBox, CallableBox, Plan, RewriteError, RewriteWarning, UlrCut, rewrite
from rewriter.runtime import ulr_cut
from rewriter.runtime.stacking import Layout

DROPPED = nn.Sequential(
    nn.Dropout(0.4), nn.Linear(5, 8), nn.Tanh(), nn.Dropout1d(0.3), nn.LayerNorm(8), nn.Linear(8, 4)
)


def frozen(net, *parts):
    for part in parts:
        net.get_submodule(part).requires_grad_(False)
    return net


MODELS = {
    "mlp": (Net, "encoder", X),
    "dropout behind": (lambda: Net(copy.deepcopy(DROPPED)), "encoder:out", X),
    "frozen tail": (lambda: frozen(Net(), "tail"), "encoder", X),
    "around the cut": (Around, "encoder", X),
    "folded rows": (Folded, "encoder", cuts.SEQUENCES),
    "rows in dimension 1": (PositionsFirst, "encoder", cuts.SEQUENCES),
    "rnn": (lambda: Loop(nn.RNNCell), "cell@3", cuts.SEQUENCES),
    "gru": (lambda: Loop(nn.GRUCell), "cell@0", cuts.SEQUENCES),
    "lstm": (lambda: Loop(nn.LSTMCell), "cell@5", cuts.SEQUENCES),
    "every step": (lambda: Loop(nn.GRUCell), "cell", cuts.SEQUENCES),
}


@pytest.mark.parametrize("case", MODELS)
def test_with_the_true_gradient_at_the_cut_all_are_exact(case):
    make, target, x = MODELS[case]
    net = make()
    loss, expected = cuts.gradients(net, x, Y)
    step = cuts.cut(net, UlrCut(target, copies=2), x)
    found_loss, found = cuts.exactly(step, x, Y)
    assert torch.equal(loss, found_loss)
    assert cuts.error(found, expected) < 1e-12


@pytest.mark.parametrize("case", ["mlp", "dropout behind", "around the cut"])
def test_parameters_behind_the_cut_are_exact(case):
    make, target, x = MODELS[case]
    net = make()
    _, expected = cuts.gradients(net, x, Y)
    _, found = cuts.gradients(cuts.cut(net, UlrCut(target, copies=2), x), x, Y)
    for name in expected:
        if not name.startswith("encoder"):
            assert torch.equal(found[name], expected[name]), name
            assert found[name].any()
    before = {name: gradient for name, gradient in expected.items() if name.startswith("encoder")}
    estimated = {name: found[name] for name in before}
    assert cuts.error(estimated, before) > 1e-3  # these are estimates
    assert cuts.error(dict.fromkeys(before), before) == 1  # negative controls: nothing, and zero
    assert cuts.error({name: torch.zeros_like(g) for name, g in before.items()}, before) == 1


def largest_z(step, x, expected, repeats=100):
    found = [cuts.gradients(step, x, Y)[1] for _ in range(repeats)]
    worst = 0.0
    for name, true in expected.items():
        errors = torch.stack([each[name] for each in found]) - true
        spread = errors.std(0) / math.sqrt(repeats)
        worst = max(worst, float((errors.mean(0) / spread.clamp(min=1e-12 * true.abs().max())).abs().max()))
    return worst


@pytest.mark.parametrize("case", ["mlp", "dropout behind", "around the cut", "folded rows", "lstm"])
def test_parameters_before_the_cut_are_unbiased(case):
    """Noise so small that smoothing is not seen; the dropout masks are those of one clean pass throughout."""
    make, target, x = MODELS[case]
    net = make()
    _, expected = cuts.gradients(net, x, Y)
    part = target.split("@")[0].removesuffix(":out")
    expected = {name: gradient for name, gradient in expected.items() if name.startswith(part)}
    step = cuts.cut(net, UlrCut(target, copies=4, sigma=1e-4), x)
    assert largest_z(step, x, expected) < 4.8
    scaled = {name: 1.5 * gradient for name, gradient in expected.items()}  # negative control
    assert largest_z(step, x, scaled) > 4.8


def test_masks_of_other_rows_are_seen(monkeypatch):
    net = Net(copy.deepcopy(DROPPED))
    _, expected = cuts.gradients(net, X, Y)
    expected = {name: gradient for name, gradient in expected.items() if name.startswith("encoder")}
    step = cuts.cut(net, UlrCut("encoder", copies=4, sigma=1e-4, baseline="leave-one-out"))
    assert largest_z(step, X, expected, 60) < 4.8
    step = cuts.cut(net, UlrCut("encoder", copies=4, sigma=1e-4, baseline="leave-one-out"))
    take = Layout.take
    monkeypatch.setattr(Layout, "take", lambda self, value, source: take(self, value.roll(1, 0), source))
    with pytest.raises(RewriteError, match="cannot be evaluated on copies"):
        cuts.gradients(step, X, Y)
    monkeypatch.setattr(ulr_cut, "prove", lambda *_: None)
    assert largest_z(step, X, expected, 60) > 4.8


def test_linear_in_the_loss_and_repeatable():
    step = cuts.cut(Net(), UlrCut("encoder", copies=4))
    _, once = cuts.gradients(step, X, Y)
    step._clock.forward -= 1
    _, thrice = cuts.gradients(step, X, Y, factor=3.0)
    for name, gradient in once.items():
        torch.testing.assert_close(thrice[name], 3 * gradient, rtol=1e-12, atol=0)
    loss = step(X, target=Y)
    parameters = list(step.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, first, second))
    with pytest.raises((RewriteError, RuntimeError), match="second time"):
        torch.autograd.grad(loss, parameters)


def test_losses_of_rows_are_weighed_row_by_row():
    """A loss that returns its rows, and a cotangent that differs between them."""
    net = Net()
    weight = torch.linspace(0, 2, len(X), dtype=torch.float64)
    none = lambda output, target: F.cross_entropy(output, target, reduction="none")  # noqa: E731
    expected = torch.autograd.grad(none(net(X), Y), list(net.parameters()), weight)
    step = cuts.cut(net, UlrCut("encoder", copies=400, sigma=1e-4), loss=none)
    found = torch.autograd.grad(step(X, target=Y), list(net.parameters()), weight)
    for a, b in zip(found[2:], expected[2:], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(found[:2], expected[:2], strict=True):
        assert float((a - b).norm() / b.norm()) < 0.1
    shuffled = torch.autograd.grad(none(net(X), Y), list(net.parameters()), weight.flip(0))
    assert float((found[0] - shuffled[0]).norm() / shuffled[0].norm()) > 0.2  # negative control


def test_chunks_change_no_number():
    found = []
    for max_rows in (None, 7, 1):
        step = cuts.cut(Net(), UlrCut("encoder", copies=6, max_rows=max_rows))
        found.append(cuts.gradients(step, X, Y)[1])
        assert step.ledger["encoder"].probes == 6 * len(X)
    assert cuts.error(found[1], found[0]) < 1e-9
    assert cuts.error(found[2], found[0]) < 1e-9


def test_what_is_kept_does_not_grow_with_copies():
    kept = {}
    for copies in (2, 64):
        step = cuts.cut(frozen(Net(), "tail"), UlrCut("encoder", copies=copies))
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            step(X, target=Y)
        kept[copies] = sum(sizes)
    assert kept[2] == kept[64]
    assert kept[64] <= X.numel() + 2 * 5 * len(X) + 4 * len(X) + 6 * 5 + 5 + 1  # input, tanh, cut, logits, weights


@pytest.mark.parametrize(
    ("allocation", "antithetic"),
    [("doubt", False), ("norm", True), ("running", False), ("running", True), ("gaussian", False), ("bernoulli", True)],
)
def test_allocations_spend_the_same_and_stay_unbiased(allocation, antithetic):
    net = Net()
    with torch.no_grad():
        net.tail[2].weight *= 6  # rows that differ
    _, expected = cuts.gradients(net, X, Y)
    expected = {name: gradient for name, gradient in expected.items() if name.startswith("encoder")}
    entry = UlrCut("encoder", copies=16, sigma=1e-4, allocation=allocation, antithetic=antithetic)
    step = cuts.cut(net, entry)
    assert largest_z(step, X, expected, 100) < 4.8
    assert step.ledger["encoder"].probes == 100 * 16 * len(X)


@pytest.mark.parametrize("allocation", ["running", "gaussian", "bernoulli"])
def test_what_is_learnt_of_rows_is_learnt_once_a_forward_and_continues(allocation):
    def made():
        return cuts.cut(Net(), UlrCut("encoder", copies=8, allocation=allocation))

    step = made()
    rule = step.latest.emitted.regions["encoder"].rule
    for _ in range(3):
        cuts.gradients(step, X, Y)
    parameters = [p for name, p in step.named_parameters() if name.startswith("encoder")]
    before = rule.cuts[0].allocator.parameters
    loss = step(X, target=Y)
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    learnt = rule.cuts[0].allocator.parameters
    assert not np.array_equal(learnt, before, equal_nan=True)
    for a, b in zip(first, torch.autograd.grad(loss, parameters), strict=True):
        assert torch.equal(a, b)
    assert rule.cuts[0].allocator.parameters is learnt
    resumed = made()
    resumed.load_state_dict(step.state_dict())
    for _ in range(2):
        found = [cuts.gradients(each, X, Y)[1] for each in (step, resumed)]
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    fresh = cuts.gradients(made(), X, Y)[1]
    assert not all(torch.equal(fresh[name], found[0][name]) for name in fresh)  # negative control


class Argmax(nn.Module):
    """A box without any derivative: in numpy, and constant almost everywhere."""

    def __init__(self):
        super().__init__()
        weight = np.random.default_rng(0).standard_normal((5, 4))
        self.box = CallableBox(lambda a: np.eye(4)[(a @ weight).argmax(1)] * 3)

    def forward(self, z):
        return self.box(z)


def test_a_box_behind_the_cut():
    """The smoothed gradient, by many copies in the test itself; one tensor is kept, the tape stops at the cut."""
    net = Net(Argmax())
    entry = UlrCut("encoder", copies=600, sigma=0.5, directions="gaussian", baseline="leave-one-out")
    step = cuts.cut(net, entry)
    _, found = cuts.gradients(step, X, Y)
    z = net.encoder(X)
    noise = torch.randn(20000, *z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        outputs = net.tail((z + 0.5 * noise).flatten(0, 1))
        losses = F.cross_entropy(outputs, Y.repeat(20000), reduction="none").view(20000, -1) / len(X)
        gradient = ((losses - losses.mean(0))[:, :, None] * noise).mean(0) / 0.5
    expected = torch.autograd.grad(z, list(net.encoder.parameters()), gradient)
    for name, true in zip(("encoder.0.weight", "encoder.0.bias"), expected, strict=True):
        assert float((found[name] - true).norm() / true.norm()) < 0.2, name
    report = step.check(X, target=Y)
    assert "times the copies" in str(report)
    assert report.regions[0].inputs.cosine > 0.9
    assert abs(report.regions[0].inputs.slope - 1) < 0.2


def test_other_regions_behind_the_cut():
    """A box that is probed for what is trained before it, itself behind a cut."""

    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.adapter, self.box = nn.Linear(5, 4).double(), CallableBox(np.tanh)

        def forward(self, z):
            return self.box(self.adapter(z))

    net = Net(Between())
    plan = Plan([UlrCut("encoder", copies=500, sigma=1e-3), BlackBox("tail.box", probes=4, step_size=1e-5)])
    step = cuts.cut(net, plan)
    _, found = cuts.gradients(step, X, Y)
    with torch.enable_grad():
        out = torch.tanh(net.tail.adapter(net.encoder(X)))
        loss = F.cross_entropy(out, Y)
    names, parameters = zip(*net.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    assert cuts.error(found, expected) < 0.1
    with pytest.raises(RewriteError, match=r'BlackBox\("tail.box"\)'):
        cuts.cut(net, UlrCut("encoder"))


def test_two_cuts_in_a_row():
    net = Net(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4)))
    _, expected = cuts.gradients(net, X, Y)
    for plan in (["encoder", "tail.1"], ["tail.1", "encoder"]):
        step = cuts.cut(net, Plan([UlrCut(target, copies=1000, sigma=1e-3) for target in plan]))
        _, found = cuts.gradients(step, X, Y)
        assert cuts.error(found, expected) < 0.15
        _, exact = cuts.exactly(step, X, Y)
        assert cuts.error(exact, expected) < 1e-12


def test_without_a_loss_nothing_is_silently_zero():
    step = cuts.cut(Net(), UlrCut("encoder"))
    with pytest.raises(RewriteError, match="a cut needs the loss"):
        step(X)
    assert step.eval()(X).shape == (12, 4)
    with torch.no_grad():
        assert step.train()(X).shape == (12, 4)
    with pytest.raises(RewriteError, match="a cut needs the loss"):
        rewrite(Net(), UlrCut("encoder"), example=(X,))(X)


def test_a_loss_computed_by_the_model_is_refused():
    step = cuts.cut(Net(), UlrCut("encoder", copies=2), loss=lambda output: output.square().mean())
    with pytest.raises(RewriteError, match="no contributions of rows"):
        step(X).backward()


def test_rows_that_are_coupled_by_the_code_are_refused():
    class Coupled(nn.Module):
        def forward(self, z):
            return (z - z.mean(0))[:, :4]

    step = cuts.cut(Net(Coupled()), UlrCut("encoder", copies=2))
    with pytest.raises(RewriteError, match=r"copies of rows|couples the rows"):
        step(X, target=Y).backward()


def test_a_value_nothing_depends_on_warns_and_then_raises():
    class Deaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, z):
            return (z > 1e6).double()[:, :4] + self.bias

    step = cuts.cut(Net(Deaf()), UlrCut("encoder", copies=2))
    with pytest.warns(RewriteWarning, match="no noisy copy changed the loss"):
        step(X, target=Y).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(18):
            step(X, target=Y).backward()
    with pytest.raises(RewriteError, match="20 consecutive"):
        step(X, target=Y).backward()


def test_low_precision_tails():
    """Differences that bfloat16 rounds away are refused; with sigma="auto" the noise grows until they are not."""

    class Low(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).bfloat16()

        def forward(self, z):
            return self.inner(z.bfloat16())

    def net():
        made = Net(Low())
        made.tail.inner.bfloat16()
        return made

    with pytest.raises(RewriteError, match="no more than their rounding"):
        cuts.cut(net(), UlrCut("encoder", copies=4, sigma=1e-3))(X, target=Y).backward()
    model = net()
    step = cuts.cut(model, UlrCut("encoder", copies=16))
    step(X, target=Y).backward()
    assert model.encoder[0].weight.grad.any()
    assert step.latest.emitted.regions["encoder"].rule.cuts[0].size.factor > 1


def test_failed_copies_are_masked_and_counted():
    limit = float(Net().encoder(X).detach().max()) + 0.1

    class Narrow(nn.Module):
        def forward(self, z):
            return torch.where(z[:, :4] > limit, torch.nan, z[:, :4])

    step = cuts.cut(Net(Narrow()), UlrCut("encoder", copies=20, sigma=0.2))
    step(X, target=Y).backward()
    counts = step.ledger["encoder"]
    assert 0 < counts.failed < 0.5 * counts.probes
    assert step.model.encoder[0].weight.grad.isfinite().all()
    strict = cuts.cut(Net(Narrow()), UlrCut("encoder", copies=20, sigma=0.2, max_failed=0.0))
    with pytest.raises(RewriteError, match="have no finite loss"):
        strict(X, target=Y).backward()


def test_copies_follow_noise_and_cost_and_are_kept():
    step = cuts.cut(Net(), UlrCut("encoder"))
    (cut,) = step.latest.emitted.regions["encoder"].rule.cuts
    assert cut.copies == 8
    for _ in range(3):
        step(X, target=Y).backward()
    ratio = cut.halves.noise / cut.halves.signal * cut.ratio
    assert max(4, round(math.sqrt(ratio)) // 2 * 2) == 4
    assert cut.copies == 5  # a whole frame of directions, which has (5 + 2) / 5 - 1 of |g|^2 left in place of .75
    assert "copies per row" in step.explain()
    assert "without the entry the gradient is exact" in step.explain()
    state = copy.deepcopy(step.state_dict())
    _, expected = cuts.gradients(step, X, Y)
    other = cuts.cut(Net(), UlrCut("encoder"))
    other.load_state_dict(state)
    _, found = cuts.gradients(other, X, Y)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_check_and_measure():
    step = cuts.cut(Net(), UlrCut("encoder", copies=64, sigma=1e-3))
    report = step.check(X, target=Y)
    (region,) = report.regions
    assert region.reference == "autograd of the clean loss"
    assert region.inputs.cosine > 0.9
    assert abs(region.inputs.slope - 1) < 0.15
    assert report.parameters.cosine > 0.98
    measured = step.measure(X, target=Y)
    assert 0.95 < measured.cosine <= 1
    few = cuts.cut(Net(), UlrCut("encoder", copies=2, sigma=1e-3))
    assert few.measure(X, target=Y).cosine < measured.cosine
    assert few.measure(X, target=Y).regions.keys() == {"encoder"}
