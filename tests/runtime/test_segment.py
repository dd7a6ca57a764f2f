"""Segments: emitted code over places in the user's own dictionaries."""

import torch
from torch import nn

from rewriter.runtime.segment import Place, Segment


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.full((3,), 2.0))
        self.register_buffer("offset", torch.ones(3))


def forward(self, x):
    return self.linear(x) * self.scale + self.offset


def segment_of(model, function=forward, extra=()):
    places = (
        Place("linear", model._modules, "linear", "linear"),
        Place("scale", model._parameters, "scale", "scale"),
        Place("offset", model._buffers, "offset", "offset"),
        *extra,
    )
    return Segment("part", "source", function, places)


X = torch.linspace(-1, 1, 6).reshape(2, 3)


def test_places_are_read_at_each_call():
    model = Net()
    segment = segment_of(model)
    assert torch.equal(segment(X), model.linear(X) * 2 + 1)
    model.scale = nn.Parameter(torch.full((3,), 5.0))
    model.offset = torch.zeros(3)
    model.linear = nn.Linear(3, 3)
    assert torch.equal(segment(X), model.linear(X) * 5)


def test_run_returns_a_tuple():
    model = Net()
    assert isinstance(segment_of(model).run((X,)), tuple)
    both = segment_of(model, lambda self, x: (x, self.scale)).run((X,))
    assert both[0] is X
    assert both[1] is model.scale


def test_parameters_by_name_each_once():
    model = Net()
    tied = Place("again", model.linear._parameters, "weight", "linear.weight")
    segment = segment_of(model, extra=(tied,))
    assert list(segment.parameters()) == ["linear.weight", "linear.bias", "scale"]
    assert [id(p) for p in segment.trainable()] == [id(model.linear.weight), id(model.linear.bias), id(model.scale)]
    model.linear.weight.requires_grad_(False)
    assert [id(p) for p in segment.trainable()] == [id(model.linear.bias), id(model.scale)]
    model.linear.bias = None
    assert list(segment.parameters()) == ["linear.weight", "scale"]
    assert segment_of(Net(), extra=()).trainable() != ()
    assert Segment("none", "", forward, ()).trainable() == ()


def test_run_replaces_parameters_inside_modules_and_out():
    model = Net()
    segment = segment_of(model)
    replaced = {
        id(model.linear.weight): torch.eye(3).requires_grad_(),
        id(model.linear.bias): torch.zeros(3),
        id(model.scale): torch.full((3,), 7.0),
    }
    (output,) = segment.run((X,), replaced)
    assert torch.allclose(output, X * 7 + 1)
    output.sum().backward()
    assert replaced[id(model.linear.weight)].grad is not None
    assert model.linear.weight.grad is None
    assert torch.equal(segment(X), model.linear(X) * 2 + 1)


def test_run_replaces_ties_together():
    model = nn.Module()
    model.one, model.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    model.two.weight = model.one.weight
    places = tuple(Place(name, model._modules, name, name) for name in ("one", "two"))
    segment = Segment("tied", "", lambda self, x: self.two(self.one(x)), places)
    assert list(segment.parameters()) == ["one.weight"]
    (output,) = segment.run((X,), {id(model.one.weight): 2 * torch.eye(3)})
    assert torch.equal(output, 4 * X)


def test_run_leaves_other_modules_alone():
    model = Net()
    seen = []
    model.linear.register_forward_hook(lambda module, inputs, output: seen.append(module))
    segment_of(model).run((X,), {id(nn.Parameter(torch.zeros(1))): torch.zeros(1)})
    assert seen == [model.linear]
