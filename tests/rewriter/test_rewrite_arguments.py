"""What `rewrite()` takes and refuses: examples, models, plans; and what needs a capture first."""

import copy

import pytest
import torch
from exact_entry import Exact
from stepped import Net, agrees, batch, pair
from torch import nn

from rewriter import Plan, RewriteError, rewrite

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
