"""What plain symbolic tracing gets wrong in silence: each is noticed, and what is done instead trains as eager does.

Every trap is checked three ways: as a part (stays one call, with a reason), as the root (another front end or a
refusal), and against torch's own tracer, which must be wrong on it, or the trap would prove nothing.
"""

import builtins
import random

import numpy as np
import pytest
import torch
from oracle import compare, run_captured, snapshot, train
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from rewriter import RewriteError
from rewriter.capture import capture


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, mask=None):
        return self.linear(x) if mask is None else self.linear(x) * mask


class AsksType(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        if isinstance(x, torch.Tensor):
            x = x * 2
        return self.linear(x)


class AsksTypeOfUnknown(AsksType):
    def forward(self, x):
        return super().forward(torch.aminmax(x, dim=0)[0])


class FrozenNoise(nn.Module):
    def forward(self, x):
        return x + torch.rand(4)


class FrozenPythonNoise(nn.Module):
    def forward(self, x):
        return x * random.random()


class FrozenNumpyNoise(nn.Module):
    def forward(self, x):
        return x * float(np.random.rand())


class OwnGenerator(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x):
        return x + torch.rand(4, generator=self.generator)


class StochasticDepth(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x if torch.rand(()) < 0.5 else x + self.linear(x)


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.history = []
        self.last = None

    def forward(self, x):
        self.history.append(x.detach())
        self.last = x.detach()
        return x * len(self.history)


class ChangesChild(nn.Module):
    """Through a method of the child, not through its call."""

    def __init__(self):
        super().__init__()
        self.child = Counter()

    def forward(self, x):
        self.child.calls += 1
        return x * self.child.calls


class ChangesObject(nn.Module):
    def __init__(self):
        super().__init__()
        self.memory = type("Memory", (), {})()
        self.memory.last = 1.0

    def forward(self, x):
        y = x * self.memory.last
        self.memory.last = float(self.memory.last) + 1.0
        return y


class FillsConstant(nn.Module):
    def forward(self, x):
        total = torch.zeros(5, 4)
        total[0] = x.sum(0)
        return x + torch.relu_(total)


class NoGrad(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            weights = self.linear(x).softmax(-1)
        return x * weights


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.linear(x)
        return x + y


RECOMPUTED = []


def _counted(x):
    RECOMPUTED.append(1)
    return torch.tanh(x * x)


class Checkpointed(nn.Module):
    use_reentrant = False

    def forward(self, x):
        return checkpoint(_counted, x, use_reentrant=self.use_reentrant)


class CheckpointedReentrant(Checkpointed):
    use_reentrant = True


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class OwnBackward(nn.Module):
    def forward(self, x):
        return _StraightThrough.apply(x)


class WritesConstant(nn.Module):
    def forward(self, x):
        total = torch.zeros(4)
        total += x.sum(0)
        return x + total


class WritesInput(nn.Module):
    """Not a trap for us: an in-place sum stays in place, so what the alias sees is right."""

    def forward(self, x):
        kept = x
        x += torch.tanh(x)
        return x * kept


class ComputesWithParameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * sum(p.pow(2).sum() for p in self.linear.parameters())


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_forward_hook(lambda module, args, output: output * 3)

    def forward(self, x):
        return x + 1


PARTS = {
    AsksTypeOfUnknown: "asks for the type of a value",
    FrozenNoise: "draws random numbers outside the graph",
    FrozenPythonNoise: "draws from random outside the graph",
    FrozenNumpyNoise: "draws from numpy.random outside the graph",
    OwnGenerator: "draws random numbers outside the graph",
    StochasticDepth: "draws random numbers outside the graph",
    Counter: "changes its attribute `calls`",
    Remembers: "changes its attribute",
    ChangesChild: "changes its attribute `child.calls`",
    ChangesObject: "changes its attribute `memory`",
    NoGrad: "switches gradients on or off",
    Autocast: "switches autocast on or off",
    Checkpointed: "saved-tensor hooks",
    CheckpointedReentrant: "switches gradients on or off",
    OwnBackward: "switches gradients on or off",
    WritesConstant: "writes into a tensor that was made while tracing",
    FillsConstant: "writes into a tensor that was made while tracing",
    ComputesWithParameters: "outside the graph",
    Hooked: "has hooks",
}
# Inlined, these give the same numbers; what is lost is the saved memory, and a hook that changes later.
ALIKE = (Checkpointed, CheckpointedReentrant, Hooked)
# As the root they have no call to hide in: torch.export where it keeps them, else a refusal that says why.
EXPORTED = (AsksTypeOfUnknown, FrozenNoise, NoGrad, WritesConstant, ComputesWithParameters)
REFUSED = {
    FrozenPythonNoise: "draws from random",
    FrozenNumpyNoise: "draws from numpy.random",
    StochasticDepth: "data-dependent",
    Counter: "changes its attribute `calls`",
    Remembers: "changes its attribute",
    ChangesChild: "changes its attribute `calls`",
    ChangesObject: "changes its attribute `memory`",
    Autocast: "switches autocast inside one forward",
    Checkpointed: "saved-tensor hooks",
    CheckpointedReentrant: "CheckpointFunction",
    OwnBackward: "_StraightThrough",
}


class Around(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.first, self.part, self.last = nn.Linear(4, 4), part, nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.part(self.first(x)))


def _model(kind):
    torch.manual_seed(0)
    return Around(kind()), torch.randn(5, 4)


@pytest.mark.parametrize("kind", PARTS, ids=lambda kind: kind.__name__)
def test_as_a_part_it_stays_one_call(kind):
    model, x = _model(kind)
    before = snapshot(model)
    captured = capture(model, (x,), {})
    assert captured.front_end == "fx"
    assert list(captured.opaque) == ["part"]
    assert PARTS[kind] in captured.opaque["part"]
    assert repr(snapshot(model)) == repr(before)
    assert compare(model, captured, (x,), {}, steps=3) is None


@pytest.mark.parametrize("kind", [kind for kind in PARTS if kind not in ALIKE], ids=lambda kind: kind.__name__)
def test_torchs_own_tracer_is_wrong_on_it(kind):
    """Negative control: the oracle above tells a wrong graph from a right one."""
    assert _symbolic_trace_differs(*_model(kind))


def _symbolic_trace_differs(model, x, **kwargs):
    torch.manual_seed(0)
    eager = train(model, lambda a, k: model(*a, **k), (x,), kwargs, steps=3)
    torch.manual_seed(0)
    again = type(model)(type(model.part)()) if isinstance(model, Around) else type(model)()
    try:
        traced = fx.symbolic_trace(again)
        found = train(again, lambda a, k: traced(*a, **k), (x,), kwargs, steps=3)
    except Exception:
        return True
    return repr(eager) != repr(found)


def test_the_control_of_the_control():
    torch.manual_seed(0)
    assert not _symbolic_trace_differs(Around(nn.Tanh()), torch.randn(5, 4))


@pytest.mark.parametrize("kind", EXPORTED, ids=lambda kind: kind.__name__)
def test_as_the_root_it_is_exported(kind):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(5, 4)
    before = snapshot(model)
    captured = capture(model, (x,), {})
    assert captured.front_end == "export"
    assert repr(snapshot(model)) == repr(before)
    assert compare(model, captured, (x,), {}, steps=3) is None


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_as_the_root_it_is_refused_with_every_reason(kind):
    model = kind()
    before = snapshot(model)
    with pytest.raises(RewriteError) as refusal:
        capture(model, (torch.randn(5, 4),), {})
    assert "fx: " in refusal.value.why
    assert REFUSED[kind] in refusal.value.why.partition("export: ")[2]
    assert "submodule" in refusal.value.remedy
    assert repr(snapshot(model)) == repr(before)


@pytest.mark.parametrize("kind", [Checkpointed, CheckpointedReentrant], ids=lambda kind: kind.__name__)
def test_checkpoints_still_recompute(kind):
    model, x = _model(kind)
    captured = capture(model, (x,), {})
    RECOMPUTED.clear()
    output = run_captured(model, captured, (x,), {})
    assert len(RECOMPUTED) == 1
    output.sum().backward()
    assert len(RECOMPUTED) == 2
    inlined = fx.symbolic_trace(_model(Checkpointed)[0])
    RECOMPUTED.clear()
    inlined(x).sum().backward()
    assert RECOMPUTED == []


@pytest.mark.parametrize("mask", [None, torch.tensor([1.0, 0.0, 1.0, 0.0])], ids=["none", "given"])
def test_optional_arguments_take_the_branch_eager_takes(mask):
    torch.manual_seed(0)
    model, x = Optional(), torch.randn(5, 4)
    captured = capture(model, (x,), {"mask": mask})
    assert captured.front_end == "fx"
    assert captured.opaque == {}
    assert compare(model, captured, (x,), {"mask": mask}) is None
    assert (mask is None) == _symbolic_trace_differs(model, x, mask=mask)


def test_isinstance_is_answered_where_the_type_is_known():
    model, x = _model(AsksType)
    captured = capture(model, (x,), {})
    assert captured.opaque == {}
    assert compare(model, captured, (x,), {}) is None
    assert _symbolic_trace_differs(model, x)


def test_isinstance_is_itself_again():
    plain = isinstance
    model, x = _model(AsksTypeOfUnknown)
    capture(model, (x,), {})
    assert builtins.isinstance is plain


def test_writes_in_place_stay_in_place():
    model, x = _model(WritesInput)
    captured = capture(model, (x,), {})
    assert captured.opaque == {}
    assert compare(model, captured, (x,), {}) is None
    assert _symbolic_trace_differs(model, x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.outer = Around(Counter())
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(self.outer(x)) + self.outer(x)


def test_only_the_innermost_part_stays_whole():
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(5, 4)
    captured = capture(model, (x,), {})
    assert list(captured.opaque) == ["outer.part"]
    blocks = [node.meta["block"] for node in captured.graph.nodes if node.target == "outer.part"]
    assert [block[-1] for block in blocks] == [("outer.part", 0), ("outer.part", 1)]
    assert compare(model, captured, (x,), {}, steps=3) is None


class Unsteady(nn.Module):
    """Differs from itself: no graph can be proven against it."""

    def forward(self, x):
        return x + torch.rand(x.shape, generator=torch.Generator().manual_seed(torch.seed()))


def test_a_model_that_differs_from_itself_is_named_as_such():
    with pytest.raises(RewriteError, match="not reproducible"):
        capture(Around(Unsteady()), (torch.randn(5, 4),), {})
