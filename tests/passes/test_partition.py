"""Segments: runs of the graph's own order, one per region, named after it."""

import copy

import pytest
import torch
from exact_entry import Exact
from torch import nn

from rewriter import Plan, RewriteError, rewrite
from rewriter.passes.partition import Partition, readable
from rewriter.passes.program import Program

X = torch.linspace(-1, 1, 15).reshape(5, 3)


def program_of(model, *entries, x=X):
    return rewrite(model, Plan(entries), example=(x,)).latest.program


def shown(program):
    return [(segment.name, segment.region, segment.inputs, segment.outputs) for segment in program.segments]


def stack(depth=5):
    return nn.Sequential(*(nn.Linear(3, 3) for _ in range(depth)))


def test_no_plan_is_one_segment():
    assert shown(program_of(stack())) == [("exact_0", None, ("input_1",), ("_4",))]


def test_exact_parts_merge_between_regions():
    program = program_of(stack(), Exact("1"), Exact("2"))
    assert [(s.name, s.region, s.nodes) for s in program.segments] == [
        ("exact_0", None, ("_0",)),
        ("region_1", "1", ("_1",)),
        ("region_2", "2", ("_2",)),
        ("exact_1", None, ("_3", "_4")),
    ]


class Twice(nn.Module):
    """A part that returns two tensors, called twice, between parts that draw."""

    def __init__(self):
        super().__init__()
        self.before = nn.Dropout(0.5)
        self.part = Halves()
        self.between = nn.Dropout(0.5)

    def forward(self, x):
        a, b = self.part(self.before(x))
        c, d = self.part(self.between(a) + x)
        return c + d + b


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 6)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.linear(x)).chunk(2, -1)


def test_a_module_called_twice_is_two_regions():
    program = program_of(Twice(), Exact("part"))
    assert [(region.name, region.target) for region in program.regions] == [("part", "part"), ("part@1", "part")]
    assert shown(program) == [
        ("exact_0", None, ("x",), ("before",)),
        ("part", "part", ("before",), ("getitem", "getitem_1")),
        ("exact_1", None, ("getitem", "x"), ("add",)),
        ("part_1", "part@1", ("add",), ("getitem_2", "getitem_3")),
        ("exact_2", None, ("getitem_2", "getitem_3", "getitem_1"), ("add_2",)),
    ]


@pytest.mark.parametrize("target", ["part", "part@0", "part@1"])
def test_random_draws_keep_eagers_order(target):
    torch.manual_seed(0)
    model = Twice()
    step = rewrite(copy.deepcopy(model), Exact(target), example=(X,))
    found = []
    for call, parameters in ((model, model.parameters()), (step, step.parameters())):
        torch.manual_seed(1)
        output = call(X)
        found.append((output, torch.rand(1), *torch.autograd.grad(output.sum(), list(parameters))))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_one_call_of_several():
    assert [region.name for region in program_of(Twice(), Exact("part@1")).regions] == ["part@1"]
    with pytest.raises(RewriteError, match="called 2 times; there is no call 2"):
        program_of(Twice(), Exact("part@2"))


def test_names_that_are_no_names():
    """Keywords, digits, dots and what a GraphModule calls its own, as children and as regions."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("class", "graph", "meta", "code", "1x", "_", "self"):
                self.add_module(name, nn.Linear(3, 3))
            self.heads = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("a-b", "a_b", "in")})

        def forward(self, x):
            for module in (*list(self._modules.values())[:-1], *self.heads.values()):
                x = torch.tanh(module(x))
            return x

    torch.manual_seed(0)
    model = Odd()
    expected = model(X)
    entries = [Exact(name) for name in ("class", "graph", "meta", "1x", "heads.a-b", "heads.a_b", "heads.in")]
    step = rewrite(model, Plan(entries), example=(X,))
    assert [s.name for s in step.latest.program.segments if s.region] == [
        "class_", "graph_", "meta_", "region_1x", "heads_a_b", "heads_a_b_", "heads_in",
    ]  # fmt: skip
    output = step(X)
    assert torch.equal(output, expected)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_users_modules_are_not_touched():
    """A hooked part stays whole while the root reads its tensors: neither becomes a (persistent) buffer of it."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Linear(3, 3)
            self.part.register_buffer("cosines", torch.ones(3), persistent=False)
            self.part.plain = torch.full((3,), 2.0)
            self.part.register_forward_hook(lambda module, inputs, output: None)

        def forward(self, x):
            return self.part(x) * self.part.cosines * self.part.plain

    model = Reads()
    before = (list(model.state_dict()), set(model.part._buffers), set(model.part._non_persistent_buffers_set))
    rewrite(model, example=(X,))
    assert before == (list(model.state_dict()), set(model.part._buffers), set(model.part._non_persistent_buffers_set))


def test_regions_in_pieces_are_refused():
    """Nodes that are no run of the graph cannot become one submodule (Program.verify sees no overlap here)."""
    program = program_of(stack(3), Exact("0"))
    (region,) = program.regions
    graph = program.edit()
    first, second = (node for node in graph.nodes if node.name in ("_0", "_2"))
    second.replace_all_uses_with(first)
    broken = Program(program.model, program.graph, regions=(type(region)("0", region.entry, "0", ("_0", "_2")),))
    with pytest.raises(RewriteError, match="not next to each other"):
        Partition().apply(broken)


def test_a_readable_copy_runs_and_shares_nothing():
    torch.manual_seed(0)
    model = Twice()
    step = rewrite(model, Exact("part"), example=(X,))
    copied = step.graph_module()
    assert torch.equal(copied.eval()(X)[0], model.eval()(X))
    ids = {id(parameter) for parameter in model.parameters()}
    assert not any(id(parameter) in ids for parameter in copied.parameters())
    with pytest.raises(ValueError, match="not partitioned"):
        readable(Program(model, step.latest.program.graph))
