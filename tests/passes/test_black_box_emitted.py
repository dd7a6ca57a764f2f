"""What a BlackBox entry emits is the box's own pullback: against a differentiable twin, however it is called."""

import copy

import numpy as np
import pytest
import torch
from around_a_part import Net
from torch import nn

from rewriter import BlackBox, Box, BoxError, CallableBox, RewriteWarning, rewrite

X = torch.linspace(-1, 1, 15).reshape(5, 3)
EXACT = {"probes": 4, "step_size": 1e-4, "input_scale": 1.0, "clip": None, "difference": "central"}


class Sine(nn.Module):
    """A differentiable twin of `CallableBox(numpy.sin)`."""

    def forward(self, x):
        return torch.sin(x)


def gradients(call, model, x=X):
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    found = torch.autograd.grad(call(x).pow(2).sum(), parameters)
    return dict(zip(names, found, strict=True))


def compare(model, twin, plan, x=X, tolerance=1e-6):
    """Gradients of a rewritten float64 model against those of its differentiable twin, by autograd."""
    model, twin = model.double(), twin.double()
    twin.load_state_dict(model.state_dict())
    step = rewrite(model, plan, example=(x.double(),))
    ours, theirs = gradients(step, step, x.double()), gradients(twin, twin, x.double())
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m)
    return step


def test_a_box_equals_its_twin():
    step = compare(Net(CallableBox(np.sin)), Net(Sine()), BlackBox("part", **EXACT))
    assert isinstance(step.part, Box)
    assert step.ledger["part"].probes == 5 * 4 * 2


def test_the_comparison_notices_a_wrong_box():
    with pytest.raises(AssertionError):
        compare(Net(CallableBox(lambda x: 1.001 * np.sin(x))), Net(Sine()), BlackBox("part", **EXACT))


def test_an_ordinary_module_equals_autograd():
    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).requires_grad_(False)
    with pytest.warns(RewriteWarning, match="ordinary module"):
        compare(Net(part), Net(copy.deepcopy(part)), BlackBox("part", **EXACT))


class Pairs(nn.Module):
    """A box of two inputs (in one of several ways) and two outputs (read in one of several ways)."""

    def __init__(self, box, call, read):
        super().__init__()
        self.before, self.other = nn.Linear(3, 4), nn.Linear(3, 4)
        self.box, self.call, self.read = box, call, read

    def forward(self, x):
        return self.read(self.call(self.box, self.before(x), self.other(x)))


class TwoIn(nn.Module):
    def forward(self, a, b):
        return torch.sin(a) * b, torch.cos(a + 2 * b)


def two_in(a, b):
    return np.sin(a) * b, np.cos(a + 2 * b)


CALLS = {
    "in order": lambda box, a, b: box(a, b),
    "swapped": lambda box, a, b: box(b, a),
    "twice the same": lambda box, a, b: box(a, a),
    "one without gradient": lambda box, a, b: box(a, b.detach()),
}
READS = {
    "both": lambda y: y[0] + y[1],
    "both, late": lambda y: torch.tanh(y[0]) * 2 + y[1],
    "the first": lambda y: y[0],
    "the second": lambda y: y[1],
    "the last": lambda y: y[-1],
    "one of them twice": lambda y: y[1] * y[1] + torch.tanh(y[1]),
    "a part of one": lambda y: y[0][:, :2],
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("call", CALLS)
def test_inputs_and_outputs_in_every_way(call, read):
    torch.manual_seed(0)
    box, twin = (Pairs(part, CALLS[call], READS[read]) for part in (CallableBox(two_in), TwoIn()))
    if call in ("twice the same", "one without gradient"):
        box.other.requires_grad_(False)
        twin.other.requires_grad_(False)
    compare(box, twin, BlackBox("box", **{**EXACT, "probes": 8}))


def test_the_same_tensor_twice_doubles_the_gradient():
    """f(a, b) = a + b at a = b: 2, where one of the two perturbed alone would give 1."""
    model = Pairs(CallableBox(np.add), CALLS["twice the same"], lambda y: y).double()
    step = rewrite(model, BlackBox("box", **EXACT), example=(X.double(),))
    (gradient,) = torch.autograd.grad(step(X.double()).sum(), model.before.bias)
    torch.testing.assert_close(gradient, torch.full((4,), 10.0, dtype=torch.float64), rtol=1e-9, atol=0)


class Ids(nn.Module):
    def __init__(self, box):
        super().__init__()
        self.before, self.box = nn.Linear(3, 4), box

    def forward(self, x, ids):
        return self.box(ids, self.before(x))


def test_an_integer_side_input():
    class Picks(nn.Module):
        def forward(self, ids, x):
            return torch.sin(x) * (ids[:, None] + 1)

    torch.manual_seed(0)
    model = Ids(CallableBox(lambda ids, x: np.sin(x) * (ids[:, None] + 1))).double()
    twin = Ids(Picks()).double()
    twin.load_state_dict(model.state_dict())
    ids = torch.arange(5)
    step = rewrite(model, BlackBox("box", **EXACT), example=(X.double(), ids))
    ours = torch.autograd.grad(step(X.double(), ids).sum(), list(model.parameters()))
    theirs = torch.autograd.grad(twin(X.double(), ids).sum(), list(twin.parameters()))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


class Simulator(nn.Module):
    """A box with a trainable input that has no rows, which the tape reads too."""

    def __init__(self, box):
        super().__init__()
        self.before, self.box = nn.Linear(3, 4), box
        self.rates = nn.Parameter(torch.linspace(0.5, 1.5, 4))

    def forward(self, x):
        return self.box(self.before(x) * self.rates, self.rates) + self.rates


@pytest.mark.parametrize("per_row", [False, True])
def test_a_shared_trainable_input(per_row):
    class Rated(nn.Module):
        def forward(self, x, rates):
            return torch.sin(x * rates)

    torch.manual_seed(0)
    box = CallableBox(lambda x, rates: np.sin(x * rates), shared=[1], per_row=per_row)
    compare(Simulator(box), Simulator(Rated()), BlackBox("box", **EXACT | {"probes": 8}))


def test_a_constant_tensor_as_input():
    class Constant(nn.Module):
        def __init__(self, box):
            super().__init__()
            self.before, self.box = nn.Linear(3, 4), box

        def forward(self, x):
            return self.box(self.before(x), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=x.dtype))

    class Times(nn.Module):
        def forward(self, x, factors):
            return torch.sin(x) * factors

    box = CallableBox(lambda x, factors: np.sin(x) * factors, shared=[1])
    compare(Constant(box), Constant(Times()), BlackBox("box", **EXACT))


def test_a_number_as_input_is_refused_in_the_boxs_words():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.box = nn.Linear(3, 4), CallableBox(lambda x, n: x * n)

        def forward(self, x):
            return self.box(self.before(x), 3.0)

    for call in (lambda: Constant()(X), lambda: rewrite(Constant(), BlackBox("box"), example=(X,))):
        with pytest.raises(BoxError, match="was called with float"):
            call()


class Recurrent(nn.Module):
    def __init__(self, box):
        super().__init__()
        self.before, self.between, self.box = nn.Linear(3, 4), nn.Linear(4, 4), box

    def forward(self, x):
        return self.box(self.between(self.box(self.before(x))))


def test_a_box_called_twice_is_two_regions_both_trained():
    torch.manual_seed(0)
    step = compare(Recurrent(CallableBox(np.sin)), Recurrent(Sine()), BlackBox("box", **EXACT))
    assert [region.name for region in step.latest.program.regions] == ["box", "box@1"]
    assert step.ledger.regions() == ("box", "box@1")
    only = rewrite(step.model, [BlackBox("box@0", **EXACT), BlackBox("box@1", probes=2)], example=(X.double(),))
    assert [region.entry.probes for region in only.latest.program.regions] == [4, 2]


def test_rows_of_tokens():
    """(B, T, d) flattened to (B * T, d): each token is a row of its own."""

    class Tokens(nn.Module):
        def __init__(self, box):
            super().__init__()
            self.before, self.box = nn.Linear(3, 4), box

        def forward(self, x):
            return self.box(self.before(x).flatten(0, 1)).unflatten(0, x.shape[:2])

    torch.manual_seed(0)
    tokens = torch.randn(4, 3, 3)
    step = compare(Tokens(CallableBox(np.sin)), Tokens(Sine()), BlackBox("box", **EXACT), tokens)
    assert step.ledger["box"].forward == 12


def test_a_frozen_module_with_a_shared_trainable_input():
    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, rates):
            return torch.tanh(self.linear(x)) * rates

    torch.manual_seed(0)
    part = Scales().requires_grad_(False)
    with pytest.warns(RewriteWarning, match="ordinary module"):
        compare(Simulator(part), Simulator(copy.deepcopy(part)), BlackBox("box", **EXACT | {"probes": 8}))


# Through both front ends.


class Traced(nn.Module):
    def __init__(self, box, twice=False):
        super().__init__()
        self.inner = Recurrent(box) if twice else Net(box)

    def forward(self, x):
        return self.inner(x)


class Exported(Traced):
    """Asks for a value while it runs, so fx cannot follow the root; the answer does not change the result."""

    def forward(self, x):
        names = {str(size): size for size in x.shape}
        return self.inner(x) if all(size > 0 for size in names.values()) else x


@pytest.mark.parametrize("twice", [False, True])
def test_both_front_ends_give_the_same_gradients(twice):
    torch.manual_seed(0)
    box = CallableBox(np.sin)
    fx, export = Traced(box, twice), Exported(box, twice)
    export.load_state_dict(fx.state_dict())
    entry = BlackBox("inner.box" if twice else "inner.part", probes=2, step_size=1e-3, input_scale=1.0, clip=None)
    steps = [rewrite(model, entry, example=(X,)) for model in (fx, export)]
    assert [step.latest.captured.front_end for step in steps] == ["fx", "export"]
    assert steps[0].latest.program.regions[0].name == steps[1].latest.program.regions[0].name
    first, second = (gradients(step, step) for step in steps)
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name
    spent = [{name: vars(step.ledger[name]) | {"capture": 0} for name in step.ledger.regions()} for step in steps]
    assert spent[0] == spent[1]  # but for what capture itself evaluated
    other = rewrite(copy.deepcopy(fx), entry, example=(X,), seed=1)
    assert not all(torch.equal(gradient, gradients(other, other)[name]) for name, gradient in first.items())
