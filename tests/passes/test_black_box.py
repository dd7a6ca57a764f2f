"""BlackBox as a pass: what it claims, and what it refuses and why."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from around_a_part import Net
from torch import nn

from rewriter import BlackBox, CallableBox, Plan, RewriteError, RewriteWarning, rewrite

X = torch.linspace(-1, 1, 15).reshape(5, 3)


class Twice(nn.Module):
    def forward(self, x):
        return x * 2


class Writes(nn.Module):
    def forward(self, x):
        return x.mul_(2)


class Centres(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Draws(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


class Sums(nn.Module):
    def forward(self, x):
        return x.sum(0, keepdim=True)


def hooked():
    part = Twice()
    part.register_forward_hook(lambda module, inputs, output: output)
    return part


REFUSED = {
    "trainable": (nn.Linear(4, 4), "trainable parameters (weight, bias)", "requires_grad_(False)"),
    "batch norm": (nn.Sequential(nn.BatchNorm1d(4, affine=False)), "0 (BatchNorm1d) couples the rows", "eval()"),
    "dropout": (nn.Sequential(Twice(), nn.Dropout()), "1 (Dropout) draws random numbers", "eval()"),
    "functional dropout": (Draws(), "draws random numbers", "automatic differentiation"),
    "coupled rows": (Centres(), "couples the rows of a batch", "each row alone"),
    "in place": (Writes(), "writes into its input", "automatic differentiation"),
    "fewer rows": (Sums(), "it returns [1, 4] where its first input has 5 rows", "one row for each row"),
    "hooks": (hooked(), "it has hooks", "take the hooks off"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_modules_it_refuses(name):
    part, reason, remedy = REFUSED[name]
    with pytest.raises(RewriteError) as caught:
        rewrite(Net(part), BlackBox("part"), example=(X,))
    assert reason in caught.value.why
    assert remedy in caught.value.remedy
    assert caught.value.where.startswith("part")


def test_frozen_in_eval_or_hooked_outside_is_accepted():
    """The controls of the refusals above: the same parts with their remedy."""
    parts = (nn.Linear(4, 4).requires_grad_(False), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout()).eval(), Twice())
    for part in parts:
        part.requires_grad_(False)
        model = Net(part)
        model.after.register_forward_hook(lambda module, inputs, output: output)
        with pytest.warns(RewriteWarning, match="exact and needs no probes"):
            rewrite(model, BlackBox("part"), example=(X,))


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("part:out", "not the value at its border"),
        ("part@1", "called 1 times; there is no call 1"),
        ("unused", "does not call it on this example"),
        ("whole.box", "it lies inside after.0, which stays whole: has hooks"),
    ],
)
def test_places_it_refuses(target, reason):
    model = Net(CallableBox(np.sin))
    model.unused = CallableBox(np.cos)
    model.whole = nn.Sequential()
    model.whole.add_module("box", CallableBox(np.cos))
    model.whole.register_forward_hook(lambda module, inputs, output: output)
    model.after = nn.Sequential(model.whole, model.after)  # the same module under a second name
    with pytest.raises(RewriteError) as caught:
        rewrite(model, Plan([BlackBox(target), BlackBox("part")]), example=(X,))
    assert reason in caught.value.why


def test_hooks_on_a_box_are_refused():
    model = Net(CallableBox(np.sin))
    model.part.register_full_backward_hook(lambda module, inputs, outputs: None)
    with pytest.raises(RewriteError, match="it has hooks"):
        rewrite(model, BlackBox("part"), example=(X,))


def test_a_number_from_outside_is_refused():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.part = nn.Linear(3, 4), Divides()

        def forward(self, x):
            return self.part(self.before(x), x.size(0))

    class Divides(nn.Module):
        def forward(self, x, rows):
            return x / rows

    with pytest.raises(RewriteError, match=r"no tensor[\s\S]*compute sizes inside"):
        rewrite(Sized(), BlackBox("part"), example=(X,))


def test_the_same_part_twice_is_refused():
    for plan in ([BlackBox("part"), BlackBox("part")], [BlackBox("part"), BlackBox("**.part")]):
        with pytest.raises(RewriteError, match="names nothing" if plan[1].target == "**.part" else "two plan entries"):
            rewrite(Net(CallableBox(np.sin)), plan, example=(X,))


def test_a_part_of_a_part_is_refused():
    model = Net(nn.Sequential(CallableBox(np.sin)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RewriteError, match="another entry of the plan rules as a whole"):
            rewrite(model, [BlackBox("part"), BlackBox("part.0")], example=(X,))
        with pytest.raises(RewriteError):
            rewrite(model, [BlackBox("part.0"), BlackBox("part")], example=(X,))


@pytest.mark.parametrize(
    "options", [{"probes": 0}, {"directions": "sideways"}, {"difference": "backward"}, {"step_size": -1}, {"clip": 2}]
)
def test_options_are_checked_when_the_entry_is_made(options):
    with pytest.raises(RewriteError, match=next(iter(options))):
        BlackBox("part", **options)


def test_the_warning_names_entry_and_module():
    with pytest.warns(RewriteWarning, match=r"BlackBox\('part', probes=3\): part is an ordinary module"):
        rewrite(Net(Twice()), BlackBox("part", probes=3), example=(X,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewrite(Net(CallableBox(np.sin)), BlackBox("part"), example=(X,))
