"""Models with a value to cut, and a stand-in that supplies the true gradient there."""

import torch
import torch.nn.functional as F
from torch import nn

from rewriter import rewrite
from rewriter.rewritten import Rewritten
from rewriter.runtime.ulr_cut import UlrCutRule
from rewriter.standins import StandIn, standing_in

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(12, 6, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(0, 4, (12,), generator=GENERATOR)
SEQUENCES = torch.randn(12, 7, 6, generator=GENERATOR, dtype=torch.float64)


class Net(nn.Module):
    """encoder, then anything, in float64."""

    def __init__(self, tail=None, encoder=None):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = encoder or nn.Sequential(nn.Linear(6, 5), nn.Tanh())
        self.tail = tail or nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
        self.double()

    def forward(self, x):
        return self.tail(self.encoder(x))


class Around(Net):
    """The encoder's value is not the only way to the loss; what passes it is used with its shape, too."""

    def __init__(self):
        super().__init__()
        self.skip = nn.Linear(6, 5).double()

    def forward(self, x):
        seen = self.skip(x)
        value = self.encoder(x)
        late = torch.sigmoid(seen).view(x.shape[0], 5)
        return self.tail(value * late + seen)


class Folded(Net):
    """Positions folded into the rows at the cut, then positions in front."""

    def forward(self, x):
        batch, time = x.shape[0], x.shape[1]
        value = self.encoder(x.reshape(batch * time, 6)).view(batch, time, 5)
        return self.tail(value.transpose(0, 1).mean(0))


class PositionsFirst(Net):
    def forward(self, x):
        return self.tail(self.encoder(x.transpose(0, 1)).mean(0))


class Loop(nn.Module):
    """A cell in a Python loop: what it returns at a step is cut."""

    def __init__(self, cell):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = cell(6, 5), nn.Linear(5, 4)
        self.double()

    def forward(self, x):
        h = c = x.new_zeros(x.shape[0], 5)
        for t in range(7):
            if isinstance(self.cell, nn.LSTMCell):
                h, c = self.cell(x[:, t], (h, c))
            else:
                h = self.cell(x[:, t], h)
        return self.head(h)


def gradients(step, x, y, seed=1, factor=1.0):
    """Loss and gradients by name; a plain module is differentiated by autograd, with cross-entropy."""
    torch.manual_seed(seed)
    loss = step(x, target=y) if isinstance(step, Rewritten) else F.cross_entropy(step(x), y)
    names, parameters = zip(*((n, p) for n, p in step.named_parameters() if p.requires_grad), strict=True)
    found = torch.autograd.grad(factor * loss, parameters, allow_unused=True)
    return loss.detach(), {name.removeprefix("model."): g for name, g in zip(names, found, strict=True)}


class Truth(StandIn):
    """Supplies the true gradient at the cut."""

    def backward(self, call, taken, cotangents, needed):
        return self.rule.exact(call, taken, cotangents, needed)


def exactly(step, x, y, seed=1):
    """Loss and gradients with the true gradient at every cut."""
    with standing_in(step, step.latest, lambda _, rule: Truth(rule) if isinstance(rule, UlrCutRule) else rule):
        return gradients(step, x, y, seed)


def cut(net, entry, x=X, loss=F.cross_entropy):
    return rewrite(net, entry, loss=loss, example=(x,))


def error(found, expected):
    """Largest relative difference of gradients by name; None and zero are as wrong as can be."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, gradient in expected.items():
        if found[name] is None:
            return 1.0
        worst = max(worst, float((found[name] - gradient).norm() / gradient.norm()))
    return worst


def region_of(step):
    """The region of the step's only cut or chain of cuts; sub-chains have one of their own."""
    (region,) = [each for each in step.latest.emitted.regions.values() if isinstance(each.rule, UlrCutRule)]
    return region
