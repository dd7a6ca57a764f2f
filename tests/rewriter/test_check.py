"""`check()`: what it finds on a smooth box, a forest, a module and a wrong rule, and that it leaves no trace."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exact_entry import Exact, Wrong
from torch import nn

from rewriter import BlackBox, CallableBox, Domain, RewriteError, rewrite
from rewriter.runtime.black_box import BlackBoxRule


class Net(nn.Module):
    def __init__(self, part, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(dropout))
        self.part, self.after = part, nn.Linear(8, 2)

    def forward(self, x):
        return self.after(self.part(self.before(x)))


X = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 2, (64,), generator=torch.Generator().manual_seed(1))


def forest(x):
    splits = np.linspace(-2, 2, 41)
    return (x[:, :, None] > splits).sum(2) / 10.0


def step_of(part, dropout=0.0, entry=None, **options):
    return rewrite(Net(part, dropout), entry or BlackBox("part", **options), loss=F.cross_entropy, example=(X,))


def test_a_smooth_box_with_all_its_coordinates():
    report = step_of(CallableBox(np.sin), probes=8).check(X, target=Y)
    (region,) = report.regions
    assert region.reference == "every coordinate"
    assert region.inputs.cosine > 0.999
    assert abs(region.inputs.slope - 1) < 0.01
    assert region.order > 1.5
    assert "the reference is the derivative of the box" in region.verdict
    assert report.parameters.cosine > 0.999
    assert str(report).splitlines() == [
        f"part: gradient of its inputs  {region.inputs}  (reference: every coordinate)",
        f"  {region.verdict}",
        f"parameters of the model:  {report.parameters}",
    ]


def test_few_probes_are_seen_as_few():
    few = step_of(CallableBox(np.sin), probes=1).check(X, target=Y).regions[0].inputs
    assert 0.15 < few.cosine < 0.6
    assert 0.5 < few.slope < 1.6


def test_a_forest():
    report = step_of(CallableBox(forest), probes=8, difference="central").check(X, target=Y)
    (region,) = report.regions
    assert "looks piecewise-constant" in region.verdict
    assert "smoothed over the step" in region.verdict
    assert region.inputs.cosine > 0.8


def test_a_noisy_box_is_told():
    generator = np.random.default_rng(0)
    report = step_of(
        CallableBox(lambda x: np.sin(x) + 0.1 * generator.standard_normal(x.shape)),
        probes=8,
        step_size=1e-3,
        input_scale=1.0,
    ).check(X, target=Y)
    assert "NOT the derivative" in report.regions[0].verdict or "looks rough" in report.regions[0].verdict


def test_a_box_declared_noisy_is_not_blamed_for_it():
    generator = np.random.default_rng(0)
    box = CallableBox(lambda x: np.sin(x) + 0.01 * generator.standard_normal(x.shape), noisy=True)
    (region,) = step_of(box, probes=8).check(X, target=Y).regions
    assert region.inputs.cosine > 0.9
    assert "the box is noisy" in region.verdict


def test_an_ordinary_module_is_compared_with_autograd():
    with pytest.warns(UserWarning, match="ordinary module"):
        step = step_of(nn.Tanh(), probes=8)
    (region,) = step.check(X, target=Y).regions
    assert (region.reference, region.order) == ("autograd", None)
    assert region.inputs.cosine > 0.999


def test_a_module_around_a_box_is_compared_with_every_coordinate():
    step = step_of(nn.Sequential(CallableBox(np.sin), nn.Tanh()), probes=8)
    (region,) = step.check(X, target=Y).regions
    assert region.reference == "every coordinate"
    assert region.inputs.cosine > 0.999


def test_rules_that_are_exact_or_wrong():
    exact = step_of(nn.Linear(8, 8), entry=Exact("part")).check(X, target=Y)
    assert exact.regions[0].inputs.cosine == pytest.approx(1)
    assert exact.regions[0].inputs.slope == pytest.approx(1)
    wrong = step_of(nn.Linear(8, 8), entry=Wrong("part", factor=0.5)).check(X, target=Y)
    assert wrong.regions[0].inputs.slope == pytest.approx(0.5)
    assert wrong.parameters.slope < 0.9


def test_without_a_loss_and_with_several_outputs():
    class Two(Net):
        def forward(self, x):
            y = super().forward(x)
            return {"a": y, "b": (y.exp(), 3)}

    step = rewrite(Two(CallableBox(np.sin)), BlackBox("part", probes=8), example=(X,))
    assert step.check(X).regions[0].inputs.cosine > 0.999


def test_several_regions():
    class Twice(Net):
        def forward(self, x):
            return self.after(self.part(self.part(self.before(x))))

    step = rewrite(Twice(CallableBox(np.sin)), BlackBox("part", probes=8), example=(X,))
    report = step.check(X)
    assert [region.region for region in report.regions] == ["part", "part@1"]
    assert all(region.inputs.cosine > 0.999 for region in report.regions)


@pytest.mark.parametrize("when", ["before training", "in training"])
@pytest.mark.parametrize("function", [np.sin, forest])
def test_it_leaves_no_trace(when, function):
    """A run with a check in it is bit-equal to one without, the ledger's column for checks aside."""

    def train(step, checked):
        torch.manual_seed(7)
        optimizer = torch.optim.Adam(step.parameters(), 1e-2)
        for number in range(6):
            if checked and number == (0 if when == "before training" else 3):
                step.check(X, target=Y)
            optimizer.zero_grad()
            step(X, target=Y).backward()
            optimizer.step()
        return step

    one = train(step_of(CallableBox(function), dropout=0.3, probes=2), False)
    two = train(step_of(CallableBox(function), dropout=0.3, probes=2), True)
    for (name, left), right in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(left, right), name
    assert one._clock.forward == two._clock.forward == 5
    assert one.ledger["part"].check == 0
    assert two.ledger["part"].check > 0


class Decay(nn.Module):
    """Rows and the box's own parameters, either of which may be trained."""

    def __init__(self, trained, **options):
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(3, 3).requires_grad_(trained)
        self.rates = nn.Parameter(torch.tensor([0.5, 1.0, 2.0]))
        self.box = CallableBox(decay, shared=[1], **options)

    def forward(self, x):
        return self.box(self.before(x).sigmoid(), self.rates)


def decay(x, rates):
    return np.exp(-x * rates)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_the_parameters_of_a_simulator(trained, per_row):
    step = rewrite(Decay(trained, per_row=per_row), BlackBox("box", probes=6), loss=F.cross_entropy)
    report = step.check(X, target=Y)
    assert report.regions[0].inputs.cosine > 0.999
    assert report.regions[0].order > 1.5
    assert report.parameters.slope == pytest.approx(1, abs=0.01)


def test_a_wrong_gradient_of_a_shared_input_is_seen(monkeypatch):
    exact = BlackBoxRule.exact
    monkeypatch.setattr(BlackBoxRule, "exact", lambda *given: tuple(g if g is None else 1.5 * g for g in exact(*given)))
    report = rewrite(Decay(False), BlackBox("box", probes=3), loss=F.cross_entropy).check(X, target=Y)
    assert "NOT the derivative" in report.regions[0].verdict


def test_whole_numbers_beside_others_are_not_asked_for_a_derivative():
    class Counted(Net):
        def forward(self, x):
            y = self.before(x)
            return self.after(self.part(y[:, :4], y[:, 4:] * 3))

    def part(x, n):
        return np.concatenate((np.sin(x) * n, n), 1)

    report = rewrite(
        Counted(CallableBox(part, domains={1: Domain(integer=True)})), BlackBox("part", probes=8), loss=F.cross_entropy
    ).check(X, target=Y)
    assert report.regions[0].inputs.cosine > 0.999
    assert report.regions[0].order > 1.5


@pytest.mark.parametrize("trained", [False, True])
def test_rows_that_fail_do_not_disturb_the_verdict(trained):
    def failing(x, rates):
        y = decay(x, rates)
        y[x[:, 0] == lost] = np.nan
        return y

    model = Decay(trained, nonfinite="zero")
    model.box.function = failing
    model.box._employ()
    lost = model.before(X)[3].sigmoid()[0].item()
    report = rewrite(model, BlackBox("box", probes=3), loss=F.cross_entropy).check(X, target=Y)
    assert report.regions[0].order > 1.5


def test_a_model_that_takes_the_target_itself():
    class Own(Net):
        def forward(self, x, target):
            return {"loss": F.cross_entropy(super().forward(x), target)}

    step = rewrite(Own(CallableBox(np.sin)), BlackBox("part", probes=8), loss=lambda output: output["loss"])
    assert step.check(X, target=Y).regions[0].inputs.cosine > 0.999
    assert step.measure(X, target=Y).regions["part"] > 0.999


def test_gradients_random_state_and_flags_are_left_alone():
    step = step_of(CallableBox(np.sin), dropout=0.3, probes=2)
    state = copy.deepcopy(step.state_dict())
    torch.manual_seed(3)
    step.check(X, target=Y)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert all(parameter.grad is None for parameter in step.parameters())
    assert all(torch.equal(value, state[key]) for key, value in step.state_dict().items())
    with torch.no_grad():
        assert step.check(X, target=Y).regions
    assert step.training


def test_an_error_inside_leaves_no_trace():
    step = step_of(CallableBox(np.sin), probes=2)
    state = copy.deepcopy(step.state_dict())
    rules = [region.rule for region in step.latest.emitted.regions.values()]
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        step.check(X, target=Y[:3])
    assert all(torch.equal(value, state[key]) for key, value in step.state_dict().items())
    assert [region.rule for region in step.latest.emitted.regions.values()] == rules
    step(X, target=Y).backward()


def test_what_cannot_be_checked_is_refused():
    step = step_of(CallableBox(np.sin))
    step.eval()
    with pytest.raises(RewriteError, match=r"training mode[\s\S]*step\.train\(\)"):
        step.check(X, target=Y)
    step.train()
    with pytest.raises(RewriteError, match="a batch without rows"):
        step.check(X[:0], target=Y[:0])
    step.requires_grad_(False)
    with pytest.raises(RewriteError, match="nothing to differentiate"):
        step.check(X, target=Y)
