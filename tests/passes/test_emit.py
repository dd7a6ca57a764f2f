"""The emitted code: golden text, what it reads by name at each call, what it frees."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from exact_entry import Exact, Wrong
from torch import nn

from rewriter import BlackBox, CallableBox, Plan, rewrite
from rewriter.passes.emit import emit
from rewriter.passes.program import Program
from rewriter.runtime.ledger import Ledger
from rewriter.runtime.region import Clock

X = torch.linspace(-1, 1, 15).reshape(5, 3)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.part = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.scale = nn.Parameter(torch.full((3,), 1.5))
        self.register_buffer("offset", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x):
        return self.part(self.fc(x) * self.scale) + self.offset + torch.tensor([0.5, 0.0, 0.0])


def test_emitted_source():
    sources = rewrite(Net(), Exact("part"), example=(X,)).latest.emitted.sources
    assert list(sources) == ["step", "exact_0", "part", "exact_1"]
    assert sources["step"] == (
        "def forward(self, x):\n"
        "    exact_0 = self.exact_0(x);  x = None\n"
        "    part = self.part(exact_0);  exact_0 = None\n"
        "    exact_1 = self.exact_1(part);  part = None\n"
        "    return (exact_1,)\n"
    )
    assert sources["exact_0"] == (
        "def forward(self, x):\n"
        "    fc = self.fc(x);  x = None\n"
        "    scale = self.scale\n"
        "    mul = fc * scale;  fc = scale = None\n"
        "    return mul\n"
    )
    assert sources["exact_1"] == (
        "def forward(self, part):\n"
        "    offset = self.offset\n"
        "    add = part + offset;  part = offset = None\n"
        "    _constants_0 = self._constants_0\n"
        "    add_1 = add + _constants_0;  add = _constants_0 = None\n"
        "    return add_1\n"
    )


@pytest.mark.parametrize("plan", [[], [Exact("part")], [Exact("fc"), Exact("part")]], ids=len)
def test_what_was_swapped_after_capture_is_used(plan):
    torch.manual_seed(0)
    model = Net()
    step = rewrite(model, plan, example=(X,))
    before = step(X)
    for owner, name in ((model.fc, "weight"), (model.part[0], "bias"), (model, "scale")):
        setattr(owner, name, nn.Parameter(torch.randn_like(getattr(owner, name))))
    model.offset = torch.tensor([3.0, 2.0, 1.0])
    after = step(X)
    assert not torch.equal(before, after)
    assert torch.equal(after, model(X))
    ours = torch.autograd.grad(after.sum(), list(step.parameters()))
    theirs = torch.autograd.grad(model(X).sum(), list(model.parameters()))
    assert all(map(torch.equal, ours, theirs))
    assert len(step._variants) == 1


def test_an_assigned_checkpoint_is_used():
    torch.manual_seed(0)
    model, other = Net(), Net()
    step = rewrite(model, Exact("part"), example=(X,))
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(step(X), other(X))


def test_moving_to_another_dtype_captures_anew():
    step = rewrite(Net(), Exact("part"), example=(X,))
    step.double()
    assert step(X.double()).dtype == torch.float64


@pytest.mark.parametrize("plan", [[], [Exact("between")]], ids=["inside a segment", "between segments"])
def test_a_value_is_freed_after_its_last_reader(plan):
    """`first` hands out a value that no tape keeps; when `last` runs, it must be gone."""
    held, gone = [], []

    class Frees(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.between, self.last = nn.Linear(3, 3), Shift(), nn.Linear(3, 3)

        def forward(self, x):
            return self.last(self.between(self.first(x)))

    model = Frees()
    model.first.register_forward_hook(lambda module, inputs, output: held.append(weakref.ref(output)))
    model.last.register_forward_pre_hook(lambda module, inputs: gone.append(held[-1]() is None))
    step = rewrite(model, plan, example=(X,))
    gone.clear()
    step(X)
    assert gone == [True]


class Shift(nn.Module):
    def forward(self, x):
        return x + 1


def test_a_step_leaves_no_cycle_behind():
    """Everything a step made goes with its loss, without the garbage collector."""
    step = rewrite(Net(), Plan([Exact("part")]), loss=F.mse_loss, example=(X,))
    gc.collect()
    gc.disable()
    try:
        taken = []
        rule = step.latest.emitted.regions["part"].rule
        forward = rule.forward
        rule.forward = lambda *args: taken.append(forward(*args)) or taken[-1]
        loss = step(X, target=X)
        tape = weakref.ref(taken.pop().memory)
        loss.backward(retain_graph=True)
        assert tape() is not None
        loss.backward()
        assert tape() is None
        again = weakref.ref(step(X, target=X))
        taken.clear()
        assert again() is None
    finally:
        gc.enable()


class Switches(nn.Module):
    """A part whose code depends on a flag: two captures of one region."""

    def __init__(self):
        super().__init__()
        self.part = Gate()
        self.head = nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.part(x))


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.squared = False

    def forward(self, x):
        y = self.linear(x)
        return y * y if self.squared else torch.tanh(y)


def test_each_capture_runs_its_own_code():
    torch.manual_seed(0)
    model = Switches()
    step = rewrite(copy.deepcopy(model), Exact("part"), example=(X,))
    for squared in (False, True, False):
        model.part.squared = step.model.part.squared = squared
        found = []
        for call in (model, step):
            output = call(X)
            found.append((output, *torch.autograd.grad(output.sum(), list(call.parameters()))))
        assert all(map(torch.equal, *found))
    assert len(step._variants) == 1


def test_captures_share_what_a_rule_has_learnt():
    class Boxed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.box, self.flag = nn.Linear(3, 3), CallableBox(lambda x: x**2), False

        def forward(self, x):
            y = self.linear(x)
            return self.box(y * 2 if self.flag else y)

    torch.manual_seed(0)
    step = rewrite(Boxed(), BlackBox("box"), example=(X,))
    step(X).sum().backward()
    learnt = step.state_dict()["rewriter._extra_state"]
    (first,) = step.latest.emitted.regions.values()
    step.model.flag = True
    step(X)
    (second,) = step.latest.emitted.regions.values()
    assert second is not first
    assert str(second.rule.get_state()) == str(first.rule.get_state())
    step(X).sum().backward()
    assert not torch.equal(learnt, step.state_dict()["rewriter._extra_state"])
    assert str(second.rule.get_state()) == str(first.rule.get_state()) == str(step._rules["box"].get_state())


def test_tracebacks_show_emitted_lines():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x, table):
            return self.linear(x) + table

    step = rewrite(Fails(), example=(X, torch.zeros(1, 3)))
    with pytest.raises(RuntimeError) as caught:
        step(X, torch.zeros(1, 7))
    assert any("linear + table" in str(entry.statement) for entry in caught.traceback)


def test_an_unpartitioned_program_is_refused():
    model = Net()
    program = Program(model, rewrite(model, example=(X,)).latest.program.graph)
    with pytest.raises(ValueError, match="partitioned"):
        emit(program, Clock(0), Ledger(), {})


def test_the_negative_control():
    """The comparisons above notice a region whose gradient is off by a factor."""
    torch.manual_seed(0)
    model = Net()
    step = rewrite(model, Wrong("part", factor=0.999), example=(X,))
    ours = torch.autograd.grad(step(X).sum(), list(step.parameters()))
    theirs = torch.autograd.grad(model(X).sum(), list(model.parameters()))
    assert not all(map(torch.equal, ours, theirs))
