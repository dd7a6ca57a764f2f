"""A box that gradients must cross needs an entry; one they need not cross does not."""

import numpy as np
import pytest
import torch
from torch import nn

from rewriter import BlackBox, BoxError, CallableBox, RewriteError, rewrite

X = torch.linspace(-1, 1, 15).reshape(5, 3)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(3, 3), nn.Linear(3, 2)
        self.inner = nn.Sequential(CallableBox(np.sin))

    def forward(self, x):
        return self.after(self.inner(self.before(x)))


def test_an_uncovered_box_names_the_entry_to_add():
    with pytest.raises(RewriteError) as caught:
        rewrite(Net(), example=(X,))
    assert caught.value.what == "a box has no source of its gradient"
    assert caught.value.where == "inner.0"
    assert 'add BlackBox("inner.0") to the plan' in caught.value.remedy
    entry = caught.value.remedy.split("add ")[1].split(" to the plan")[0]
    rewrite(Net(), eval(entry, {"BlackBox": BlackBox}), example=(X,))


def test_at_the_first_call_too():
    with pytest.raises(RewriteError, match="no source of its gradient"):
        rewrite(Net())(X)


def test_the_second_call_of_a_box_needs_one_too():
    class Twice(Net):
        def forward(self, x):
            return self.after(self.inner(self.inner(self.before(x))))

    with pytest.raises(RewriteError, match="no source of its gradient"):
        rewrite(Twice(), BlackBox("inner.0@0"), example=(X,))
    rewrite(Twice(), BlackBox("inner.0"), example=(X,))


class Detached(Net):
    def forward(self, x):
        return self.after(self.inner(self.before(x).detach()))


class First(Net):
    """The box sees the data itself."""

    def forward(self, x):
        return self.after(self.inner(x))


class Integers(nn.Module):
    """Only whole numbers go in: they carry no gradient."""

    def __init__(self):
        super().__init__()
        self.before, self.box = nn.Linear(3, 3), CallableBox(lambda ids: ids * 0.5)

    def forward(self, x):
        y = self.before(x)
        return y + self.box(y.argmax(1)).float().unsqueeze(1)


@pytest.mark.parametrize("kind", [Detached, First, Integers])
def test_off_the_differentiable_path_none_is_needed(kind):
    torch.manual_seed(0)
    model = kind()
    step = rewrite(model, example=(X,))
    for one, two in zip(
        torch.autograd.grad(step(X).sum(), list(model.parameters()), allow_unused=True),
        torch.autograd.grad(model(X).sum(), list(model.parameters()), allow_unused=True),
        strict=True,
    ):
        assert (one is None and two is None) or torch.equal(one, two)


def test_frozen_before_the_box_none_is_needed_and_thawed_one_is():
    model = Net()
    model.before.requires_grad_(False)
    step = rewrite(model, example=(X,))
    step(X).sum().backward()
    model.before.requires_grad_(True)
    with pytest.raises((RewriteError, BoxError), match=r"no source of its gradient|has no gradient"):
        step(X).sum().backward()


def test_outside_a_rewritten_model_backward_says_the_same():
    with pytest.raises(BoxError, match=r"Plan\(\[BlackBox"):
        Net()(X).sum().backward()
