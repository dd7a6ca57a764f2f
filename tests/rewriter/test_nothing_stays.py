"""What is dropped is freed: a rewritten step, its model, and what a forward kept that nobody differentiates."""

import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from rewriter import BlackBox, CallableBox, Checkpoint, Deferred, Highway, Horizon, Plan, rewrite


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.box, self.rnn, self.head = CallableBox(np.tanh), nn.GRU(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.rnn(self.box(self.blocks(x)).unsqueeze(0))[0].squeeze(0))


CHAINS = [
    None,
    Checkpoint("blocks"),
    Highway("blocks", iterations=1, tape="never"),
    Highway("rnn", iterations=1, tape="never"),
    Deferred("rnn", tape="never"),
]


def steps(entry):
    plan = Plan([BlackBox("box"), *([entry] if entry else [])])
    model = Model()
    return model, rewrite(model, plan, loss=F.cross_entropy)


@pytest.mark.parametrize("entry", CHAINS, ids=str)
@pytest.mark.parametrize("differentiated", [True, False])
@pytest.mark.parametrize("hooked", [True, False])
def test_a_dropped_step_is_freed(entry, differentiated, hooked):
    model, step = steps(entry)
    x, y = torch.randn(6, 4), torch.randint(0, 2, (6,))
    if hooked:
        with saved_tensors_hooks(torch.Tensor.detach, lambda kept: kept):
            loss = step(x, target=y)
    else:
        loss = step(x, target=y)
    if differentiated:
        loss.backward()
    seen = weakref.ref(step), weakref.ref(model), weakref.ref(model.blocks[0].inner.weight)
    del step, model, loss
    gc.collect()
    assert [each() for each in seen] == [None, None, None]


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("differentiated", [True, False])
def test_a_dropped_horizon_is_freed(when, differentiated):
    model = nn.Sequential(nn.Sequential(*(Block() for _ in range(4))), nn.Linear(4, 2))
    step = rewrite(model, Plan([Horizon("0", horizon=2, when=when)]), loss=F.cross_entropy)
    loss = step(torch.randn(6, 4), target=torch.randint(0, 2, (6,)))
    if differentiated:
        loss.backward()
    seen = weakref.ref(step), weakref.ref(model), weakref.ref(model[1].weight)
    del step, model, loss
    gc.collect()
    assert [each() for each in seen] == [None, None, None]


def test_the_test_sees_what_is_held():
    model, step = steps(None)
    held = step(torch.randn(6, 4), target=torch.randint(0, 2, (6,)))
    seen = weakref.ref(model.blocks[0].inner.weight)
    del step, model
    gc.collect()
    assert seen() is not None
    del held
    gc.collect()
    assert seen() is None
