"""What `explain()` says of a smooth box, a forest-like one, and a part for which something simpler would do."""

import re

import numpy as np
import pytest
import torch
from exact_entry import Exact
from torch import nn

from rewriter import BlackBox, CallableBox, rewrite


class Net(nn.Module):
    def __init__(self, part):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.part, self.after = nn.Linear(3, 8), part, nn.Linear(8, 2)

    def forward(self, x):
        return self.after(self.part(self.before(x)))


X = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))


def forest(x):
    """Sums of axis-aligned splits: piecewise constant, fine enough for a step to see."""
    splits = np.linspace(-2, 2, 41)
    return (x[:, :, None] > splits).sum(2) / 10.0


def explained(part, backwards=3, **options):
    step = rewrite(Net(part), BlackBox("part", **options), example=(X,))
    for _ in range(backwards):
        step(X).pow(2).sum().backward()
    return step, step.explain()


def test_before_the_first_backward():
    _, text = explained(CallableBox(np.sin), backwards=0, probes=2)
    assert text.splitlines() == [
        "Net, captured by fx",
        "part: black-box (BlackBox('part', probes=2))",
        "  inputs: float32[64, 8] rows dim 0",
        "  2 orthogonal probe(s) per row of width 8, forward difference",
        "  step size: not measured yet; the first backward that asks for its gradient does",
        "  simpler: probes=8 would be exact up to the step's bias, at 4.0 x the queries",
        "  spent so far: 0 queries in 0 calls, 0 failed",
        text.splitlines()[-1],
    ]
    assert re.fullmatch(
        r"everything else: exact, on the ordinary tape, 2 segment\(s\), [\d.]+ MFLOP forward, [\d.]+ MiB kept for "
        r"backward",
        text.splitlines()[-1],
    )


def test_a_smooth_box():
    step, text = explained(CallableBox(np.sin), probes=2)
    assert "the box looks smooth" in text
    assert "row cosine: predicted 0.5" in text
    assert "step bias at" in text
    assert re.search(r"error of the step: \d+e-\d+ of a directional derivative; noise of the outputs \d+e-\d+ of", text)
    assert re.search(r"grows with power [12]\.\d of larger steps", text)
    assert "cost: 128 queries per backward" in text
    assert f"spent so far: {step.ledger['part'].queries:,} queries in {step.ledger['part'].calls:,} calls" in text


def test_a_forest():
    _, text = explained(CallableBox(forest), probes=1)
    assert "the box looks piecewise-constant" in text
    assert "smoothing over step" in text
    assert "error of the step" not in text
    assert "simpler" not in text


def test_all_coordinates_leave_nothing_simpler():
    _, text = explained(CallableBox(np.sin), probes=8)
    assert "predicted 1.00" in text
    assert "simpler" not in text


def test_an_ordinary_module():
    with pytest.warns(UserWarning, match="ordinary module"):
        _, text = explained(nn.Tanh())
    assert "simpler: this is an ordinary module; without the entry its gradient is exact and costs no probes" in text


def test_other_rules_and_parts_that_stay_whole_are_named():
    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x) if torch.rand(()) < 2 else x

    model = Net(nn.Tanh())
    text = rewrite(model, Exact("part"), example=(X,)).explain()
    assert "part: exact (Exact('part'))" in text
    assert "stays whole" not in text
    model.after = Branching(8, 2)
    assert "  after stays whole: " in rewrite(model, Exact("part"), example=(X,)).explain()


def test_after_a_checkpoint_before_the_first_backward():
    step, text = explained(CallableBox(np.sin), probes=2)
    other = rewrite(Net(CallableBox(np.sin)), BlackBox("part", probes=2), example=(X,))
    other.load_state_dict(step.state_dict())
    again = other.explain()
    for line in text.splitlines():
        if "step size" in line or "row cosine" in line:
            assert line in again
    assert "spent so far: 0 queries" in again


def test_text_is_one_of_the_latest_capture():
    step, _ = explained(CallableBox(np.sin), probes=2)
    step(X[:7])
    assert "float32[64, 8]" in step.explain()
    step.double()
    step(X.double())
    assert "float64[64, 8]" in step.explain()


def test_the_cost_is_that_of_rows_and_shared_inputs_together():
    class Calibrated(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.rates = nn.Linear(3, 3), nn.Parameter(torch.ones(3))
            self.box = CallableBox(lambda x, rates: np.exp(-x * rates), shared=[1])

        def forward(self, x):
            return self.box(self.before(x).sigmoid(), self.rates)

    step = rewrite(Calibrated(), BlackBox("box", probes=2), example=(X,))
    for _ in range(2):
        before = step.ledger["box"].probes
        step(X).sum().backward()
    assert f"cost: {step.ledger['box'].probes - before:,} queries per backward" in step.explain()
    assert step.ledger["box"].probes - before == 2 * 2 * 64
