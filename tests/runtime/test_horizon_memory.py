"""What windows keep: all live storages, counted at the level of the dispatcher."""

import gc
import weakref

import numpy as np
import pytest
import torch
from chains import Stack, feed
from live_memory import LiveMemory
from torch import nn
from windowed import Eager

from rewriter import Checkpoint, Horizon, Plan, rewrite

BLOCKS = 24
X, Y = torch.randn(64, 16, 5), torch.randn(64, 16, 3)
WAYS = {
    "forward": {},
    "backward": {"when": "backward"},
    "forward, checkpointed": {"checkpoint": True},
    "backward, checkpointed": {"when": "backward", "checkpoint": True},
}


def squares(output, y):
    return (output - y).square().mean()  # F.mse_loss keeps its input after backward


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.feed = nn.LayerNorm(12), feed(12)

    def forward(self, x):
        return x + self.feed(self.norm(x))


def model():
    return Stack(Unit, BLOCKS)


def peak(entry):
    net = model()
    call = Eager(net, squares)
    if entry is not None:
        call = rewrite(net, Plan([entry]), loss=squares, example=(X,))
    call(X, target=Y).backward()
    net.zero_grad()
    gc.collect()
    with LiveMemory() as memory:
        loss = call(X, target=Y)
        loss.backward()
        most = memory.peak
        net.zero_grad()
        assert memory.now < 100, "only the loss is alive after backward"
    return most


@pytest.fixture(scope="module")
def eager():
    return peak(None)


def test_memory_grows_in_proportion_to_the_horizon(eager):
    horizons = [2, 6, 12, 24]
    found = [peak(Horizon("blocks", horizon, tape="never")) for horizon in horizons]
    slope, offset = np.polyfit(horizons, found, 1)
    rest = np.array(found) - np.polyval([slope, offset], horizons)
    assert 1 - rest.var() / np.var(found) > 0.999
    assert 0.95 < found[-1] / eager < 1.05


@pytest.mark.parametrize(
    ("way", "most"),
    [("forward", 0.38), ("backward", 0.30), ("forward, checkpointed", 0.22), ("backward, checkpointed", 0.20)],
)
def test_memory_of_a_quarter(eager, way, most):
    assert peak(Horizon("blocks", BLOCKS // 4, **WAYS[way])) < most * eager


def test_overlapping_windows_need_no_more(eager):
    assert peak(Horizon("blocks", BLOCKS // 4, stride=1)) < 0.38 * eager
    assert peak(Horizon("blocks", BLOCKS // 4, stride=2, when="backward")) < 0.38 * eager


def test_checkpointing_is_beside_it(eager):
    assert peak(Checkpoint("blocks")) < 0.3 * eager


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_forward_that_is_never_differentiated_is_freed(way):
    net = model()
    step = rewrite(net, Plan([Horizon("blocks", 6, **way)]), loss=squares, example=(X,))
    gc.collect()
    gc.disable()
    try:
        loss = step(X, target=Y)
        held = weakref.ref(loss.grad_fn)
        del loss
        assert held() is None
        with LiveMemory() as memory:
            step(X, target=Y)
            assert memory.now < 100
    finally:
        gc.enable()
