"""The step in training: measured again when the box changes, within its rows; growth and its end; state."""

import json

import numpy as np
import pytest
import torch
from array_box import ArrayBox, gradient, relative_error

from rewriter.runtime.black_box import BlackBoxRule
from rewriter.runtime.estimators.step_size import StepSize

pytestmark = pytest.mark.filterwarnings("ignore:no probe changed any output")  # right after a box has changed

MATRIX = np.random.default_rng(0).standard_normal((8, 6)) / 3
X = torch.from_numpy(np.random.default_rng(1).standard_normal((16, 8)))
V = torch.ones(16, 6)
CHANGE, END = 150, 320
MEASURED, REVIEWED = 108, 12  # rows


def net(a):
    return np.tanh(a @ MATRIX)


def trained(after, **options):
    """A rule after END backwards through `net`, from CHANGE on through `after`; rows spent on the step by backward."""
    box = ArrayBox(net)
    rule = BlackBoxRule(box, **options)
    spent = []
    for step in range(END):
        if step == CHANGE:
            box.function = after
        gradient(rule, X, v=V, step=step)
        spent.append(rule.ledger.total("step_size"))
    assert rule.ledger.total("queries") == box.rows
    return rule, np.diff([0, *spent])


def test_a_box_that_stays_is_only_reviewed():
    _, spent = trained(net)
    assert spent[0] == MEASURED
    assert spent.nonzero()[0].tolist() == [0, 100, 200, 300]
    assert set(spent[1:]) == {0, REVIEWED}


@pytest.mark.parametrize("decimals", [3, 5])
def test_outputs_that_become_rounded_are_measured_again(decimals):
    def rounded(a):
        return np.round(net(a), decimals)

    rule, spent = trained(rounded, difference="central")
    again = (spent == MEASURED).nonzero()[0]
    assert again[0] == 0
    assert CHANGE <= again[1] <= CHANGE + 101
    assert len(again) == 2
    assert rule.describe()["step_size"] > 1e-3
    leaf = X.clone().requires_grad_()
    (true,) = torch.autograd.grad(torch.tanh(leaf @ torch.from_numpy(MATRIX)).sum(), leaf)
    exact, stale = (
        BlackBoxRule(ArrayBox(rounded), probes=8, difference="central", step_size=step, input_scale=1.0, clip=None)
        for step in (rule.describe()["absolute_step"], 1e-6)
    )
    assert relative_error(gradient(exact, X, v=V)[0], true) < 0.03**2
    # negative control: the step that was right before is now useless
    assert relative_error(gradient(stale, X, v=V)[0], true) > 0.5


def test_a_box_that_becomes_piecewise_constant_is_noticed():
    rule, spent = trained(lambda a: np.floor(4 * (a @ MATRIX)))
    assert (spent == MEASURED).sum() >= 2
    assert rule.describe()["kind"] == "piecewise-constant"
    assert rule.describe()["absolute_step"] > 0.05


def test_a_box_that_becomes_smooth_is_noticed():
    """The threshold falls ever further, as all probes change an output, until that alone is reason to measure."""
    step = StepSize(None, needs_kind=False)
    step.kind, step._stale = "piecewise-constant", False
    due = []
    for _ in range(100):
        step.follow(1.0, 8)
        due.append(step.due(1.0))
    assert not any(due[:10])
    assert due[-1]
    assert step.threshold < 1 / 20


def test_growth_ends_at_a_thousand_input_scales():
    step = StepSize(None, needs_kind=False)
    for _ in range(100):
        step.observe(0.0)
    assert step.value == 1e3
    assert max(step.grid.steps) == 1e3


@pytest.mark.parametrize("noisy", [False, True])
def test_no_measurement_takes_more_than_110_rows(noisy):
    grid = StepSize(None, needs_kind=False, noisy=noisy).grid
    assert grid.rows * (2 * len(grid.steps) + grid.repeats) <= 110


def test_state_continues_through_json():
    rule, _ = trained(lambda a: np.round(net(a), 4))
    step = rule._estimators["rows"].step
    other = StepSize(None, needs_kind=True)
    other.set_state(json.loads(json.dumps(step.get_state())))
    assert other.get_state() == step.get_state()
    assert step.get_state()["noise_floor"] == pytest.approx(3e-5, rel=1)
    assert 0 < step.get_state()["error"] < 0.05
