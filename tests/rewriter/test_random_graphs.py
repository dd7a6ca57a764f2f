"""Random nets and random plans: with exact rules everything equals eager.

Outputs, buffers, random draws and None-ness of gradients bit for bit. Gradients to 1e-12 in float64: where a value has
three readers, eager adds their contributions one by one, while a region has added its own two first.
"""

import copy

import pytest
import torch
from exact_entry import Exact, Wrong
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from rewriter import Plan, rewrite

WIDTH = 4
KINDS = ("linear", "tanh", "add", "multiply", "join", "dropout", "norm", "block", "scale", "pair")


class Block(nn.Module):
    """A part with parts of its own, a residual path and a parameter that it is passed."""

    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)

    def forward(self, x, scale):
        return x + self.drop(torch.tanh(self.linear(x))) * scale


class Pair(nn.Module):
    """Two outputs."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.one(x), torch.sigmoid(self.two(x))


class Join(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, y):
        return self.linear(torch.cat((x, y), -1))


MODULES = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "tanh": nn.Tanh,
    "dropout": lambda: nn.Dropout(0.4),
    "norm": lambda: nn.BatchNorm1d(WIDTH),
    "block": Block,
    "pair": Pair,
    "join": Join,
}


class Random(nn.Module):
    """Operation i reads two earlier values and adds one; the sum of all values nobody read is the output."""

    def __init__(self, operations):
        super().__init__()
        self.operations = operations
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        for index, (kind, *_, reuse) in enumerate(operations):
            if kind in MODULES:
                made = getattr(self, f"part{reuse}", None) if reuse is not None else None
                fits = type(made) is type(MODULES[kind]())
                setattr(self, f"part{index}", made if fits else MODULES[kind]())

    def forward(self, x):
        values, unread = [x], []
        for index, (kind, first, second, _) in enumerate(self.operations):
            a, b = values[first % len(values)], values[second % len(values)]
            part = getattr(self, f"part{index}", None)
            if kind == "add":
                y = a + b
            elif kind == "multiply":
                y = a * torch.tanh(b)
            elif kind == "scale":
                y = a * self.scale
            elif kind == "join":
                y = part(a, b)
            elif kind == "block":
                y = part(a, self.scale)
            elif kind == "pair":
                y, z = part(a)
                values.append(z)
            else:
                y = part(a)
            unread = [value for value in unread if value is not a and value is not b]
            values.append(y)
            unread.append(y)
        total = unread[0]
        for value in unread[1:]:
            total = total + value
        return total


@st.composite
def cases(draw):
    """(operations, names of the parts in the plan); a part may be called again later, a plan may name calls of it."""
    count = draw(st.integers(2, 9))
    operations = []
    for index in range(count):
        kind = draw(st.sampled_from(KINDS))
        reuse = draw(st.none() | st.integers(0, index - 1)) if index else None
        operations.append((kind, draw(st.integers(0, index)), draw(st.integers(0, index)), reuse))
    parts = [f"part{index}" for index, (kind, *_) in enumerate(operations) if kind in MODULES]
    chosen = draw(st.lists(st.sampled_from(parts), unique=True, max_size=4)) if parts else []
    inner = draw(st.booleans())
    return operations, chosen, inner


def plan_of(model, chosen, inner, entry):
    """The chosen parts, or (inner) a part of theirs where they have parts; each module once."""
    targets = {}
    for name in chosen:
        module = getattr(model, name)
        children = list(module.named_children())
        target, module = (f"{name}.{children[0][0]}", children[0][1]) if inner and children else (name, module)
        targets.setdefault(id(module), target)
    return Plan([entry(target) for target in targets.values()])


def outcome(call, model, x):
    """What is equal bit for bit (output, buffers, the generator's next number); gradients of input and parameters."""
    torch.manual_seed(11)
    x = x.clone().requires_grad_()
    output = call(x)
    wanted = [x, *model.parameters()]
    gradients = torch.autograd.grad(output.square().sum(), wanted, allow_unused=True)
    return [output, *model.buffers(), torch.rand(1)], gradients


def same(left, right):
    """Bit for bit."""
    return all(map(torch.equal, left, right)) and len(left) == len(right)


def close(left, right):
    for one, two in zip(left, right, strict=True):
        if one is None or two is None:
            if one is not two:
                return False
        elif float((one - two).abs().max()) > 1e-12 * float(one.abs().max()):
            return False
    return True


def both(operations, chosen, inner, entry=Exact, rows=(5,)):
    """Eager's outcomes and the step's, one per batch."""
    torch.manual_seed(0)
    eager = Random(operations).double()
    other = copy.deepcopy(eager)
    step = rewrite(other, plan_of(other, chosen, inner, entry))
    batches = [torch.randn(count, WIDTH, dtype=torch.float64) for count in rows]
    ours = [outcome(step, step, x) for x in batches]
    return [outcome(eager, eager, x) for x in batches], ours, step


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_exact_rules_equal_eager(case):
    expected, found, step = both(*case, rows=(5, 3))
    for (exact, gradients), (own, mine) in zip(expected, found, strict=True):
        assert same(exact, own)
        assert close(gradients, mine)
    program = step.latest.program
    program.verify()
    order = [name for segment in program.segments for name in segment.nodes]
    graph = [node.name for node in program.graph.nodes if node.op not in ("placeholder", "output")]
    assert order == graph
    assert {region.name for region in program.regions} == {s.region for s in program.segments if s.region}


FIXED = ([("linear", 0, 0, None), ("block", 1, 0, None), ("norm", 2, 1, None), ("add", 3, 1, None)], ["part1"], False)


def test_the_comparison_notices_a_wrong_scale():
    ((exact, gradients),), ((own, mine),), _ = both(*FIXED)
    assert same(exact, own)
    assert close(gradients, mine)
    ((exact, gradients),), ((own, mine),), _ = both(*FIXED, entry=lambda target: Wrong(target, factor=1 + 1e-9))
    assert same(exact, own)
    assert not close(gradients, mine)


@pytest.mark.parametrize("target", ["part0", "part0@0", "part0@1"])
def test_a_part_called_again_is_another_region(target):
    """One linear layer called at two places, the plan naming one call or both."""
    operations = [("linear", 0, 0, None), ("tanh", 1, 0, None), ("linear", 2, 0, 0), ("add", 3, 1, None)]
    torch.manual_seed(0)
    eager = Random(operations)
    x = torch.randn(5, WIDTH)
    step = rewrite(copy.deepcopy(eager), Exact(target))
    (exact, gradients), (own, mine) = outcome(eager, eager, x), outcome(step, step, x)
    assert same(exact, own)
    assert same([g for g in gradients if g is not None], [g for g in mine if g is not None])
    names = {"part0": ("part0", "part0@1"), "part0@0": ("part0",), "part0@1": ("part0@1",)}
    assert step.ledger.regions() == names[target][::-1]  # backward meets the last call first


@pytest.mark.parametrize("train", [True, False])
def test_several_steps_of_training(train):
    """Thirty steps of SGD with momentum stay bit-equal, BatchNorm statistics and dropout masks included."""
    operations = [
        ("linear", 0, 0, None), ("norm", 1, 0, None), ("block", 2, 0, None), ("dropout", 3, 0, None),
        ("pair", 4, 0, None), ("join", 5, 6, None), ("block", 7, 0, 2), ("scale", 8, 0, None),
    ]  # fmt: skip
    torch.manual_seed(0)
    eager = Random(operations)
    other = copy.deepcopy(eager)
    step = rewrite(other, Plan([Exact("part2"), Exact("part4"), Exact("part5.linear")]))
    for module, call in ((eager, eager), (other, step)):
        call.train(train)
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(module.parameters(), 0.05, momentum=0.9)
        for number in range(30):
            x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(number))
            call(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(list(eager.state_dict().values()), list(other.state_dict().values()))
