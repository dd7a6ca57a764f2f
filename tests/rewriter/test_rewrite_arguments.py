"""What `rewrite()` takes and refuses: examples, models, plans; and what needs a capture first."""

import copy

import pytest
import torch
from exact_entry import Exact
from torch import nn

from rewriter import Plan, RewriteError, rewrite


class Net(nn.Module):
    """Optional and keyword arguments, a flag, dropout, BatchNorm; any batch size and sequence length."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.part = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Tanh())
        self.last = nn.Linear(6, 3)
        self.squared = False

    def forward(self, x, mask=None, *, factor=1.0):
        y = self.norm(self.first(x).flatten(0, -2)).unflatten(0, x.shape[:-1])
        y = self.last(self.part(y)) * factor
        if mask is not None:
            y = y * mask.unsqueeze(-1)
        return y * y if self.squared else y


def batch(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pair(plan=None, loss=None, **options):
    plan = Exact("part") if plan is None else plan
    torch.manual_seed(0)
    eager = Net()
    return eager, rewrite(copy.deepcopy(eager), plan, loss=loss, **options)


def outcome(call, model, seed=3):
    """Output, gradients and buffers after one forward and backward from a fixed random state."""
    torch.manual_seed(seed)
    output = call()
    gradients = torch.autograd.grad(output.sum(), list(model.parameters()), allow_unused=True)
    return [output, *gradients, *model.buffers(), torch.rand(1)]


def same(left, right):
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(left, right, strict=True))


def agrees(eager, step, *args, **kwargs):
    first = outcome(lambda: eager(*args, **kwargs), eager)
    return same(first, outcome(lambda: step(*args, **kwargs), step))


# Examples, and what needs one.


@pytest.mark.parametrize(
    "example",
    [
        (batch(8),),
        {"x": batch(8), "factor": 2.0},
        ((batch(8),), {"mask": torch.ones(8)}),
        ((), {"x": batch(8)}),
        (batch(8), torch.ones(8)),
    ],
    ids=["positional", "keywords", "both", "both, no positional", "two positional"],
)
def test_forms_of_an_example(example):
    eager, step = pair(example=example)
    assert step.latest.captured.front_end == "fx"
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    if len(args) == 2 and isinstance(args[1], dict):
        args, kwargs = args
    assert agrees(eager, step, *args, **kwargs)
    assert sum(map(len, step._variants.values())) == 1


@pytest.mark.parametrize("example", [[batch(8)], batch(8), 3])
def test_an_example_that_is_none_of_these(example):
    with pytest.raises(RewriteError, match=r"example was not understood[\s\S]*tuple of positional"):
        pair(example=example)


def test_capturing_leaves_no_trace():
    torch.manual_seed(0)
    model = Net()
    state, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    torch.manual_seed(5)
    rewrite(model, Exact("part"), example=(batch(8),))
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("what", ["explain", "export", "history", "graph_module", "latest"])
def test_before_the_first_capture(what, tmp_path):
    _, step = pair()
    uses = {
        "explain": lambda: step.explain(),
        "export": lambda: step.export(tmp_path),
        "history": lambda: step.history,
        "graph_module": lambda: step.graph_module(),
        "latest": lambda: step.latest,
    }
    with pytest.raises(RewriteError, match=r"not captured yet[\s\S]*example="):
        uses[what]()
    assert list(tmp_path.iterdir()) == []
    step(batch(8))
    uses[what]()
    step.recapture()
    with pytest.raises(RewriteError, match="not captured yet"):
        uses[what]()


# Models and plans.


@pytest.mark.parametrize("kind", ["compiled", "ddp", "rewritten"])
def test_wrapped_models_are_refused(kind):
    model = Net()
    if kind == "compiled":
        wrapped, remedy = torch.compile(model), "rewrite the inner module"
    elif kind == "rewritten":
        wrapped, remedy = rewrite(model), "step.model"
    else:
        wrapped = type("DistributedDataParallel", (nn.Module,), {})()
        remedy = r"DistributedDataParallel\(rewrite\(model, plan\)\)"
    with pytest.raises(RewriteError, match=remedy):
        rewrite(wrapped)


def test_no_module_no_rewrite():
    with pytest.raises(RewriteError, match=r"takes an nn\.Module[\s\S]*function"):
        rewrite(lambda x: x)


def test_a_child_called_rewriter_is_refused():
    model = Net()
    model.rewriter = nn.Linear(1, 1)
    with pytest.raises(RewriteError, match=r"child called `rewriter`[\s\S]*rename"):
        rewrite(model)


@pytest.mark.parametrize(
    "plan",
    [Exact("part"), [Exact("part")], (Exact("part"),), Plan([Exact("part")]), iter([Exact("part")])],
    ids=["entry", "list", "tuple", "plan", "iterator"],
)
def test_forms_of_a_plan(plan):
    eager, step = pair(plan)
    assert step.plan == Plan([Exact("part")])
    assert agrees(eager, step, batch(8))


def test_no_plan_is_the_identity():
    torch.manual_seed(0)
    eager = Net()
    step = rewrite(copy.deepcopy(eager))
    assert agrees(eager, step, batch(8))
    assert [segment.name for segment in step.latest.program.segments] == ["exact_0"]


@pytest.mark.parametrize("when", ["example", "no example"])
def test_an_entry_that_names_nothing_is_refused_at_once(when):
    options = {"example": (batch(8),)} if when == "example" else {}
    with pytest.raises(RewriteError) as caught:
        pair([Exact("part"), Exact("prat.0")], **options)
    assert caught.value.where == "prat.0"
    assert caught.value.remedy.startswith("the nearest names are: part.0, ")
    assert caught.value.remedy.count(",") == 2


def test_a_plan_of_something_else_is_refused():
    for plan in (["part"], "part", [nn.Linear(1, 1)]):
        with pytest.raises(RewriteError, match=r"a plan holds entries[\s\S]*BlackBox"):
            rewrite(Net(), plan)
