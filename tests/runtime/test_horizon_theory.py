"""Deep linear networks: how the gradient of a horizon turns away from the exact one, and where it leads."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from windowed import built

from rewriter.runtime.windows import Windows

WIDTH = 6
SHORT = (2, 4, 8, 16, 32)  # blocks that a horizon falls short of all of them


class Linear(nn.Module):
    """x (I + W / T), with W of order one."""

    def __init__(self, blocks):
        super().__init__()
        self.weight, self.blocks = nn.Parameter(torch.zeros(WIDTH, WIDTH, dtype=torch.float64)), blocks

    def forward(self, x):
        return x + x @ self.weight / self.blocks


class Deep(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList([Linear(blocks) for _ in range(blocks)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def squares(output, y):
    return (output - y).square().sum() / 2


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


WHITE = torch.eye(WIDTH, dtype=torch.float64)
TARGET = torch.randn(WIDTH, WIDTH, generator=generator(1), dtype=torch.float64)


@pytest.fixture(scope="module")
def deep():
    """128 blocks; `horizon(n)` sets what the step looks at."""
    model = Deep(128)
    step = built(model, WHITE, squares, 64, stride=1)
    rule = step.latest.emitted.regions["blocks"].rule

    def gradient(horizon):
        rule.windows = Windows(128, horizon, 1)
        found = torch.autograd.grad(step(WHITE, target=TARGET), list(model.parameters()))
        return torch.stack(found)

    return model, gradient


def weights(kind, count):
    draw = torch.randn(count, WIDTH, WIDTH, generator=generator(), dtype=torch.float64)
    time = torch.arange(count, dtype=torch.float64)[:, None, None] / count
    if kind == "iid":
        return 3 * draw
    if kind == "constant":
        return draw[:1].expand(count, -1, -1)
    return torch.cos(math.pi * time) * draw[0] + torch.sin(math.pi * time) * draw[1]


@pytest.mark.parametrize(("kind", "low", "high"), [("constant", 2.8, 3.05), ("smooth", 2.8, 3.05), ("iid", 1.5, 2.4)])
def test_the_angle_grows_with_the_third_power_where_weights_change_slowly(deep, kind, low, high):
    """1 - cos^2 against n blocks short of all: the sum of k^2 up to n is about n^3 / 3."""
    model, gradient = deep
    with torch.no_grad():
        for block, weight in zip(model.blocks, weights(kind, 128), strict=True):
            block.weight.copy_(weight)
    exact = gradient(128).flatten()
    away = []
    for short in SHORT:
        found = gradient(128 - short).flatten()
        away.append(float(1 - (found @ exact) ** 2 / (found @ found) / (exact @ exact)))
    corrected = [(n * (n + 1) * (2 * n + 1) / 2) ** (1 / 3) for n in SHORT]
    slope = np.polyfit(np.log(corrected), np.log(away), 1)[0]
    assert low < slope < high


def test_without_weights_every_horizon_is_exact(deep):
    model, gradient = deep
    with torch.no_grad():
        for block in model.blocks:
            block.weight.zero_()
    exact = gradient(128)
    for horizon in (1, 40, 100):
        torch.testing.assert_close(gradient(horizon), exact, rtol=1e-12, atol=1e-12)


def test_short_horizons_end_elsewhere():
    """Gradient descent: the bias of a horizon does not vanish with the loss."""
    ends = {}
    for horizon in (1, 4, 8):
        model = Deep(8)
        step = built(model, WHITE, squares, horizon, stride=1, tape="never")
        optimizer = torch.optim.SGD(model.parameters(), 2.0)
        target = WHITE + 0.3 * TARGET
        for _ in range(150):
            optimizer.zero_grad()
            loss = step(WHITE, target=target)
            loss.backward()
            optimizer.step()
        ends[horizon] = float(loss.detach())
    assert ends[8] < 1e-9
    assert 1e-7 < ends[4] < 1e-2
    assert ends[4] < ends[1] < 1
