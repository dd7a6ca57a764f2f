"""Items of tuples: read once, next to the call, whoever reads them and however late."""

import torch
from exact_entry import Exact
from torch import nn

from rewriter import rewrite

X = torch.linspace(-1, 1, 15).reshape(5, 3)


class Late(nn.Module):
    """The second item is read after other operations, the first one twice."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 2)
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        found = self.rnn(x)
        y = self.head(found[0]) + found[0]
        return y + found[1][0][-1]


def test_items_move_to_their_call():
    step = rewrite(Late(), Exact("rnn"), example=(X,))
    assert [node.name for node in step.latest.program.graph.nodes] == [
        "x", "rnn", "getitem", "getitem_2", "getitem_3", "head", "add", "getitem_4", "add_1", "output",
    ]  # fmt: skip
    (region,) = step.latest.program.regions
    assert region.owned == ("rnn", "getitem", "getitem_2", "getitem_3")


def test_the_region_is_exact():
    torch.manual_seed(0)
    model = Late()
    expected = torch.autograd.grad(model(X).sum(), list(model.parameters()))
    step = rewrite(model, Exact("rnn"), example=(X,))
    for one, two in zip(expected, torch.autograd.grad(step(X).sum(), list(model.parameters())), strict=True):
        assert torch.equal(one, two)
    assert step.ledger["rnn"].vjps == 1


def test_tensors_are_not_taken_apart():
    class Indexes(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            y = self.linear(x)
            return torch.tanh(x) * y[0]

    step = rewrite(Indexes(), Exact("linear"), example=(X,))
    assert step.latest.program.regions[0].owned == ("linear",)
    assert [line.changed for line in step.history if line.name == "unpack"] == [False]
