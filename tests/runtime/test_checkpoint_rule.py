"""Blocks that run twice: random numbers, statistics, repeated backwards, and what is kept."""

import gc

import pytest
import torch
from chains import PreNorm, ResNet, Small, Stack, error, gradients, scalar
from live_memory import LiveMemory
from torch import nn

from rewriter import Checkpoint, Plan, RewriteError, rewrite

ROWS = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def built(model, given, every=1):
    return rewrite(model, Plan([Checkpoint("blocks", every=every)]), example=(given,))


def dropping():
    return Stack(lambda: PreNorm(dropout=0.3), 3).double()


def test_forward_draws_eagers_numbers_and_backward_none():
    model = dropping()
    step = built(model, ROWS)
    torch.manual_seed(5)
    expected = model(ROWS)
    after = torch.rand(3)
    torch.manual_seed(5)
    loss = scalar(found := step(ROWS))
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(after, torch.rand(3))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_other_numbers_in_backward_are_noticed(monkeypatch):
    """The negative control: backward draws its own."""
    from rewriter.runtime import replay

    model = dropping()
    expected = gradients(model, model, (ROWS,))
    step = built(model, ROWS)
    assert error(gradients(step, model, (ROWS,)), expected) < 1e-12
    monkeypatch.setattr(replay, "_restore", lambda states: None)
    assert error(gradients(step, model, (ROWS,)), expected) > 1e-2


def test_statistics_advance_once():
    model, other = ResNet().double(), ResNet().double()
    step = built(model, IMAGES, every=2)
    for _ in range(3):
        scalar(step(IMAGES)).backward()
        scalar(other(IMAGES)).backward()
    for (name, found), expected in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=name)
    assert int(model.blocks[0][0].norms[0].num_batches_tracked) == 3


def test_a_buffer_that_the_output_depends_on_is_as_it_was():
    class Drifting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Small()
            self.register_buffer("gain", torch.ones((), dtype=torch.float64))

        def forward(self, x):
            self.gain.mul_(1.5)
            if float(x.sum()) > 1e9:  # keeps the module whole
                return x
            return x + self.gain * self.inner(x)

    model, other = Stack(Drifting, 3).double(), Stack(Drifting, 3).double()
    step = built(model, ROWS)
    for _ in range(2):
        expected = gradients(other, other, (ROWS,))
        assert error(gradients(step, model, (ROWS,)), expected) < 1e-12
        assert float(model.blocks[0].gain) == float(other.blocks[0].gain)


def test_backward_twice():
    model = dropping()
    output = built(model, ROWS, every=2)(ROWS)
    wanted = list(model.parameters())
    first = torch.autograd.grad(scalar(output), wanted, retain_graph=True)
    second = torch.autograd.grad(scalar(output), wanted)
    assert all(map(torch.equal, first, second))
    with pytest.raises((RewriteError, RuntimeError), match="second time"):
        scalar(output).backward()


def test_a_weight_changed_before_backward_is_noticed():
    model = Stack(Small, 3).double()
    loss = scalar(built(model, ROWS)(ROWS))
    with torch.no_grad():
        model.blocks[1].feed[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_mixed_precision():
    model = Stack(PreNorm, 3)
    step = built(model, ROWS.float())
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(model, model, (ROWS.float(),))
        found = gradients(step, model, (ROWS.float(),))
    assert error(found, expected) < 0.05


def test_without_gradients_nothing_is_kept():
    model = Stack(Small, 4).double()
    step = built(model, ROWS)
    with torch.no_grad():
        torch.testing.assert_close(step(ROWS), model(ROWS), rtol=1e-12, atol=1e-12)
    model.requires_grad_(False)
    assert not step(ROWS).requires_grad
    assert step.ledger.total("vjps") == 0


def test_offloading_hooks_get_what_is_kept():
    model = Stack(Small, 4).double()
    step = built(model, ROWS)
    packed = []
    expected = gradients(model, model, (ROWS,))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        found = gradients(step, model, (ROWS,))
    assert error(found, expected) < 1e-12
    assert packed


def test_memory_is_that_of_one_group():
    torch.manual_seed(0)
    model, given = Stack(Small, 12), torch.randn(64, 16, 5)
    peaks = {}
    for name, call in {"eager": model, "every": built(model, given), "three": built(model, given, 3)}.items():
        scalar(call(given)).backward()
        model.zero_grad()
        gc.collect()
        with LiveMemory() as memory:
            loss = scalar(call(given))
            loss.backward()
            peaks[name] = memory.peak
            model.zero_grad()
            assert memory.now < 1000  # the loss itself
    assert peaks["every"] < 0.4 * peaks["eager"]
    assert peaks["three"] < 0.5 * peaks["eager"]
