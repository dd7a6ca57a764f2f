"""Forms of arguments and results, front ends, state and refusals of capture()."""

import copy
import pickle
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from oracle import compare, equal, run_captured
from torch import nn

from rewriter import RewriteError
from rewriter.capture import capture
from rewriter.runtime.boxes import CallableBox
from rewriter.shadow import examples, preserved


@dataclass
class Batch:
    tokens: torch.Tensor
    weights: torch.Tensor


Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Result:
    logits: torch.Tensor
    extra: dict
    note: str = ""


class Forms(nn.Module):
    """Takes and returns every form."""

    def __init__(self, form):
        super().__init__()
        self.linear, self.form = nn.Linear(4, 4), form

    def forward(self, x, *rest, scale=1.0, mask=None, batch=None, **more):
        y = self.linear(x) * scale
        for other in rest:
            y = y + other
        if mask is not None:
            y = y * mask
        if batch is not None:
            y = y + batch.weights
        for name in sorted(more):
            y = y + more[name]["inner"][0]
        return {
            "tensor": lambda: y,
            "tuple": lambda: (y, None, y.sum()),
            "list": lambda: [y, 3],
            "dict": lambda: {"y": y, "nested": (y * 2, "text")},
            "namedtuple": lambda: Pair(y, [y]),
            "dataclass": lambda: Result(y, {"mean": y.mean()}, "done"),
            "input": lambda: (x, self.linear.bias, y),
        }[self.form]()


FORMS = ["tensor", "tuple", "list", "dict", "namedtuple", "dataclass", "input"]
X = torch.arange(20.0).reshape(5, 4) / 10
CALLS = {
    "positional": ((X,), {}),
    "keyword": ((), {"x": X}),
    "many": ((X, X * 2, X * 3), {}),
    "flag": ((X,), {"scale": 2.5}),
    "mask": ((X,), {"mask": X > 1}),
    "dataclass": ((X,), {"batch": Batch(X, X + 1)}),
    "nested": ((X,), {"b": {"inner": [X]}, "a": {"inner": (X * 2,)}}),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_results(form):
    model = Forms(form)
    captured = capture(model, (X,), {})
    assert captured.front_end == "fx"
    assert type(run_captured(model, captured, (X,), {})) is type(model(X))
    assert compare(model, captured, (X,), {}) is None


@pytest.mark.parametrize("call", CALLS)
def test_forms_of_arguments(call):
    args, kwargs = CALLS[call]
    model = Forms("tensor")
    captured = capture(model, args, kwargs)
    assert captured.front_end == "fx"
    placeholders = [node.name for node in captured.graph.nodes if node.op == "placeholder"]
    assert placeholders[0].startswith("x")
    assert compare(model, captured, args, kwargs) is None


class Exported(Forms):
    """The same where fx cannot follow."""

    def forward(self, x, *rest, **more):
        y = torch.stack(list(x.unbind(1)), 1) if x.shape[1] > 2 else x
        for row in x.unbind(1)[:2]:
            y = y + row.mean()
        return super().forward(y, *rest, **more)


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_results_exported(form):
    model = Exported(form)
    captured = capture(model, (X,), {})
    assert captured.front_end == "export"
    assert compare(model, captured, (X,), {}) is None
    assert compare(model, captured, (torch.randn(7, 4),), {}) is None


@pytest.mark.parametrize("call", [call for call in CALLS if call != "keyword"])
def test_forms_of_arguments_exported(call):
    args, kwargs = CALLS[call]
    captured = capture(Exported("dict"), args, kwargs)
    assert captured.front_end == "export"
    assert compare(Exported("dict"), captured, args, kwargs) is None


def test_exported_nodes_know_their_block_and_line():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.norm = Exported("tensor"), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.part(self.part(sum(list(x.unbind(0))) + x)))

    captured = capture(Root(), (X,), {})
    assert captured.front_end == "export"
    linear = [node for node in captured.graph.nodes if "linear" in node.name and node.op == "call_function"]
    assert [node.meta["block"] for node in linear] == [
        (("part", 0), ("part.linear", 0)),
        (("part", 1), ("part.linear", 1)),
    ]
    assert linear[0].meta["source"].startswith("test_capture_arguments.py:")
    for node in captured.graph.nodes:
        assert isinstance(node.meta["block"], tuple)
        assert isinstance(node.meta["source"], str)
        if node.op == "get_attr":
            (user,) = node.users
            assert node.meta["block"] == user.meta["block"]
            assert node.next is user or node.next.op == "get_attr"
    assert not any("assert" in node.name for node in captured.graph.nodes)


class Recurrent(nn.Module):
    """A loop over the length of the input."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(3, 6)

    def forward(self, x):
        h = torch.zeros(x.shape[0], 6)
        for step in range(x.shape[1]):
            h = self.cell(x[:, step], h)
        return h


def test_a_loop_over_the_length_fixes_the_length_not_the_rows():
    model = Recurrent()
    captured = capture(model, (torch.randn(4, 9, 3),), {})
    assert captured.front_end == "fx"
    assert sum(node.target == "cell" for node in captured.graph.nodes) == 9
    assert compare(model, captured, (torch.randn(2, 9, 3),), {}) is None
    reason = captured.guards.reason(model, [torch.randn(4, 8, 3)])
    assert "s[0][1] == 9" in reason


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.plain = torch.ones(4)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.steps.add_(1)
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), 0.1)
        return self.linear(x) * self.plain[: x.shape[1]] + self.steps - self.mean


class Iterates(nn.Module):
    """A cell in a loop over the items of an argument, however they are come by."""

    def __init__(self, items):
        super().__init__()
        self.cell, self.items = nn.GRUCell(3, 4), items

    def forward(self, x):
        h = x.new_zeros(6, 4)
        for item in self.items(x):
            h = self.cell(item, h)
        return h


@pytest.mark.parametrize("items", [lambda x: x, lambda x: x.unbind(0), lambda x: torch.unbind(x)])
def test_a_loop_over_items_fixes_their_number(items):
    model, x = Iterates(items), torch.randn(5, 6, 3)
    found = capture(model, (x,), {})
    assert found.front_end == "fx"
    assert compare(model, found, (x,), {}) is None
    assert found.guards.reason(model, [x]) is None
    assert "s[0][0] == 5" in found.guards.reason(model, [torch.randn(7, 6, 3)])


def test_a_loop_over_columns_leaves_the_rows_open():
    model, x = Iterates(lambda x: x.unbind(dim=-2)), torch.randn(6, 5, 3)
    found = capture(model, (x,), {})
    assert found.front_end == "fx"
    assert compare(model, found, (x,), {}) is None
    assert found.guards.reason(model, [torch.randn(9, 5, 3)]) is None
    assert "s[0][1] == 5" in found.guards.reason(model, [torch.randn(6, 7, 3)])


@pytest.mark.parametrize("front_end", ["fx", "export"])
def test_buffers_and_plain_tensors_are_read_and_written_live(front_end):
    model = Holder() if front_end == "export" else nn.Sequential(Holder(), nn.Linear(4, 2))
    captured = capture(model, (X,), {})
    assert captured.front_end == front_end
    assert compare(model, captured, (X,), {}, steps=3) is None
    holder = model if front_end == "export" else model[0]
    before = run_captured(copy.deepcopy(model), captured, (X,), {})
    holder.plain = torch.full((4,), 5.0)
    assert compare(model, captured, (X,), {}) is None
    assert not equal(before, run_captured(copy.deepcopy(model), captured, (X,), {}))


class Whole(nn.Module):
    """Branches on values: cannot be traced."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else self.linear(-x)


def test_leaves_are_kept_without_remark():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2))
    captured = capture(model, (X,), {}, leaves=lambda module, name: name == "0")
    assert [node.target for node in captured.graph.nodes if node.op == "call_module"] == ["0", "1"]
    assert captured.opaque == {}
    assert compare(model, captured, (X,), {}) is None


def test_an_opaque_part_may_return_anything():
    class Rich(Whole):
        def forward(self, x):
            return {"y": super().forward(x), "more": (x * 2, [x * 3], None)}

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), Rich())
    captured = capture(model, (X,), {})
    assert list(captured.opaque) == ["3"]
    assert "branches on a value" in captured.opaque["3"]
    assert compare(model, captured, (X,), {}) is None


def test_a_model_that_cannot_be_captured_names_both_reasons():
    with pytest.raises(RewriteError) as refusal:
        capture(Whole(), (X,), {})
    assert "fx: branches on a value" in refusal.value.why
    assert "export: " in refusal.value.why
    assert "data-dependent" in refusal.value.why


def test_a_hook_in_an_exported_model_is_named():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.inner.register_forward_hook(lambda module, args, output: output * 2)

        def forward(self, x):
            return sum(self.inner(row) for row in x.unbind(1)[0][None])

    with pytest.raises(RewriteError) as refusal:
        capture(Root(), (X,), {})
    assert refusal.value.where == "`inner`"
    assert "has hooks" in refusal.value.why


def test_the_models_own_error_is_passed_on():
    with pytest.raises(RewriteError, match="the graph does not run"):
        capture(nn.Linear(3, 3), (X,), {})


def test_global_hooks_are_refused():
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        with pytest.raises(RewriteError, match="global module hooks"):
            capture(nn.Linear(4, 4), (X,), {})
    finally:
        handle.remove()


def test_lazy_parameters_are_refused():
    with pytest.raises(RewriteError, match="no shape yet"):
        capture(nn.Sequential(nn.LazyLinear(3)), (X,), {})


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x):
        return x @ self.weight


def test_wrapped_parametrized_and_compiled_parts_stay_whole():
    parametrized = nn.utils.parametrizations.weight_norm(Scaled(), "weight")
    compiled = torch.compile(Scaled(), backend="eager")
    in_place = Scaled()
    in_place.compile(backend="eager")
    model = nn.Sequential(nn.Linear(4, 4), parametrized, compiled, in_place, nn.DataParallel(Scaled()))
    captured = capture(model, (X,), {})
    targets = [node.target for node in captured.graph.nodes if node.op == "call_module"]
    assert targets == ["0", "1", "2", "3", "4"]
    assert captured.opaque == {
        "1": "is parametrized",
        "2": "is wrapped (OptimizedModule)",
        "3": "is compiled",
        "4": "is wrapped (DataParallel)",
    }


def test_what_is_mostly_opaque_goes_to_export_where_that_helps():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return sum(self.linear(row) for row in list(x.unbind(1)[0][None]))

    captured = capture(nn.Sequential(Sums()), (torch.randn(4, 4),), {})
    assert captured.front_end == "export"
    assert captured.opaque == {}
    captured = capture(nn.Sequential(Whole()), (X,), {})
    assert captured.front_end == "fx"
    assert list(captured.opaque) == ["0"]
    assert compare(nn.Sequential(Whole()), captured, (X,), {}) is None


def test_modules_made_on_the_way_are_inlined():
    class Losing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, target):
            return nn.CrossEntropyLoss(label_smoothing=0.1)(self.linear(x), target)

    model, target = Losing(), torch.tensor([0, 1, 2, 3, 0])
    captured = capture(model, (X, target), {})
    assert captured.front_end == "fx"
    assert any(node.target is F.cross_entropy for node in captured.graph.nodes)
    assert compare(model, captured, (X, target), {}) is None


def test_boxes_are_one_call_and_their_wiring_is_proven():
    calls = []

    def price(x):
        calls.append(len(x))
        return x * 2

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.box, self.head = nn.Linear(4, 4), CallableBox(price), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.box(self.encoder(x)).to(x.dtype))

    captured = capture(Model(), (X,), {})
    assert [node.target for node in captured.graph.nodes if node.op == "call_module"] == ["encoder", "box", "head"]
    assert captured.opaque == {}
    assert captured.notes == ()
    assert len(calls) <= 5  # the run for the structure, both random states from memory, the other batch size


def test_grad_less_models_are_captured():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).requires_grad_(False)
    captured = capture(model, (torch.arange(20).reshape(5, 4).float(),), {})
    assert compare(model, captured, (X,), {}) is None


def test_autocast_around_the_call_is_captured_for_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured = capture(model, (X,), {})
        assert compare(model, captured, (X,), {}) is None
        assert run_captured(model, captured, (X,), {}).dtype == model(X).dtype


def test_examples_give_two_batch_sizes():
    first, second, rows = examples(nn.Linear(4, 4), (X,), {})
    assert (len(first[0]), len(second[0])) == rows == (5, 4)
    _, second, rows = examples(nn.Linear(4, 4), (X[:1],), {})
    assert (len(second[0]), rows) == (2, (1, 2))

    class OneSize(nn.Module):
        def forward(self, x):
            return x.view(5, 4)

    assert examples(OneSize(), (X,), {})[1] is None


def test_preserved_puts_everything_back():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with preserved(model):
        model(X)
        model.eval()
        model[0].weird = 1
        model[0].running_mean = torch.full((4,), 9.0)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert not hasattr(model[0], "weird")
    assert model[0].num_batches_tracked == 0
    assert torch.equal(model[0].running_mean, torch.zeros(4))


def test_guards_survive_pickling_and_copying():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)))
    guards = capture(model, (X,), {}).guards
    for other in (pickle.loads(pickle.dumps(guards)), copy.deepcopy(guards)):
        own = copy.deepcopy(model)
        assert other.reason(own, [X]) is None
        own[0].append(nn.ReLU())
        assert other.reason(own, [X]) is not None
