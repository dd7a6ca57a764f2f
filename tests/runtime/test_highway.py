"""The rule behind `Highway`: its vjps, what it leaves behind, and a step's daily life."""

import copy
import gc
import math
import weakref

import pytest
import torch
from chains import (
    Asides,
    Chained,
    EveryOutput,
    PreNorm,
    ResNet,
    Small,
    Stack,
    error,
    gradients,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from rewriter import Highway, Plan, rewrite
from rewriter.runtime.highway import HighwayRule, units_of
from rewriter.runtime.iterations import Iterations
from rewriter.runtime.tape import Tape

ROWS = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EXACT = 1000


def stepped(model, *args, iterations=EXACT, segments=None, shift=0.0):
    entry = Highway("blocks", iterations, shift, segments, tape="never")
    return rewrite(model, Plan([entry]), example=args or (ROWS,))


def ruled(step, iterations, segments=None, shift=0.0):
    (region,) = step.latest.emitted.regions.values()
    iterations = Iterations(iterations, region.name)
    region.rule = HighwayRule(region.rule.chain, step.ledger, iterations, shift, segments)


@pytest.mark.parametrize("shift", [0.0, 0.2])
def test_vjps_are_the_closed_count(shift):
    """n units of one block: (n - 1) + ... + (n - k) branches, and each block once for its parameters."""
    step = stepped(Stack(PreNorm, 3).double())
    for iterations in range(8):
        ruled(step, iterations, shift=shift)
        before = step.ledger.total("vjps")
        gradients(step, step.model, (ROWS,))
        count = sum(6 - each for each in range(1, min(iterations, 5) + 1)) + 6
        assert step.ledger.total("vjps") - before == count


def test_vjps_in_segments():
    """Two blocks in a unit: two pulls for each unit that still changes."""
    step = stepped(Stack(PreNorm, 3).double())
    for iterations, count in ((0, 6), (1, 6 + 4), (2, 6 + 4 + 2), (3, 6 + 4 + 2)):
        ruled(step, iterations, segments=3)
        before = step.ledger.total("vjps")
        gradients(step, step.model, (ROWS,))
        assert step.ledger.total("vjps") - before == count


def test_mapped_skips_cost_a_vjp_at_every_scan():
    """Post-norm: a scan of n - 1 skips to begin with, then n - 1 - k after iteration k."""
    step = stepped(Stack(lambda: nn.Sequential(Small(), nn.Tanh()), 5).double())
    for iterations in (0, 1, 2):
        ruled(step, iterations)
        before = step.ledger.total("vjps")
        gradients(step, step.model, (ROWS,))
        scans = 4 + sum(4 - each for each in range(1, iterations + 1))
        branches = sum(5 - each for each in range(1, iterations + 1))
        assert step.ledger.total("vjps") - before == scans + branches + 5


def test_units_are_even_and_straight_blocks_go_with_the_next():
    chain = stepped(Stack(Small, 7).double()).latest.emitted.regions["blocks"].rule.chain
    assert [list(unit) for unit in units_of(chain, 3)] == [[0, 1, 2], [3, 4], [5, 6]]
    step = rewrite(Stack(Small, 7, straight=True).double(), Plan([Highway("b*")]), example=(ROWS,))
    (region,) = step.latest.emitted.regions.values()
    divided = [block.divided for block in region.rule.chain.blocks]
    assert divided == [True] * 3 + [False] + [True] * 3 + [False] + [True]
    assert [list(unit) for unit in units_of(region.rule.chain, 3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert len(units_of(region.rule.chain, None)) == 7


def truncated(blocks, x, depth):
    """Gradients of each block by autograd, cut off `depth` blocks behind its output."""
    found = []
    for number in range(len(blocks)):
        h = x
        with torch.no_grad():
            for block in blocks[:number]:
                h = block(h)
        for behind, block in enumerate(blocks[number:]):
            h = block(h)
            if behind == depth and number + behind + 1 < len(blocks):
                h = h.detach()
        loss = (h * torch.linspace(-1, 1, h.numel(), dtype=h.dtype).view(h.shape)).sum()
        own = list(blocks[number].parameters())
        found += torch.autograd.grad(loss, own, allow_unused=True) if loss.requires_grad else [None] * len(own)
    return found


@pytest.mark.parametrize("depth", range(5))
def test_shift_one_is_truncation_of_that_depth(depth):
    torch.manual_seed(0)
    model = Chained([Small() for _ in range(5)]).double()
    x = torch.randn(3, 12, dtype=torch.float64)
    out = stepped(model, x, iterations=depth, shift=1.0)(x)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum()
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    expected = truncated(list(model.blocks), x, depth)
    assert [each is None for each in found] == [each is None for each in expected]
    for mine, theirs in zip(found, expected, strict=True):
        if theirs is not None:
            assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-12 * float(theirs.norm()))
    shallower = truncated(list(model.blocks), x, depth + 1)
    assert sum(each is None for each in shallower) < sum(each is None for each in expected) or depth == 4


@pytest.mark.parametrize(("segments", "shift"), [(None, 0.0), (None, 0.3), (2, 0.0), (3, 0.3), (2, 1.0)])
@pytest.mark.parametrize("make", [EveryOutput, Asides])
def test_losses_at_every_block(make, segments, shift):
    model = make(6).double()
    step = stepped(model, segments=segments, shift=shift)
    assert error(gradients(step, model, (ROWS,)), gradients(model, model, (ROWS,))) <= 1e-12
    units = len(step.latest.emitted.regions["blocks"].rule.units)
    ruled(step, units - 2, segments, shift)
    assert error(gradients(step, model, (ROWS,)), gradients(model, model, (ROWS,))) > 1e-9


def test_a_deep_linear_net_stays_under_the_binomial_bound():
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16, bias=False) for _ in range(24)]
    for layer in layers:
        with torch.no_grad():
            layer.weight.copy_(torch.linalg.qr(torch.randn(16, 16))[0] / 24)

    class Linear(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return x + self.layer(x)

    model = Chained([Linear(layer) for layer in layers]).double()
    x = torch.randn(8, 16, dtype=torch.float64)
    step, expected = stepped(model, x), gradients(model, model, (x,))
    before = math.inf
    for iterations in range(6):
        ruled(step, iterations)
        found = gradients(step, model, (x,))
        now = max(float((found[n] - g).norm() / g.norm()) for n, g in expected.items())
        # |w^k - w| <= |l| sum over m > k of C(23, m) / 24^m, and |w| >= |l| (1 - 1/24)^23
        bound = sum(math.comb(23, m) / 24**m for m in range(iterations + 1, 24)) / (1 - 1 / 24) ** 23
        assert now < min(bound * 2, before / 3)  # 2: conditioning of the products with the layers' inputs
        before = now


def test_dropout_draws_what_eager_draws():
    model = Stack(lambda: PreNorm(dropout=0.3), 3).double()
    step = stepped(model)
    torch.manual_seed(5)
    mine = step(ROWS)
    torch.manual_seed(5)
    assert torch.equal(mine, model(ROWS))
    assert error(gradients(step, model, (ROWS,)), gradients(model, model, (ROWS,))) <= 1e-12
    assert error(gradients(step, model, (ROWS,), seed=8), gradients(model, model, (ROWS,))) > 1e-3


def test_batch_norm_advances_once():
    images = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    model = ResNet().double()
    twin = copy.deepcopy(model)
    stepped(model, images)(images).sum().backward()
    twin(images).sum().backward()
    for mine, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("segments", [None, 2])
def test_retained_and_accumulated(segments):
    model = Stack(PreNorm, 2).double()
    wanted = list(model.parameters())
    step = stepped(model, iterations=1, segments=segments)
    loss = step(ROWS).square().sum()
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    second = torch.autograd.grad(loss, wanted)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss, wanted)
    for part in (ROWS[:2], ROWS[2:]):
        step(part).square().sum().backward()
    for parameter, whole in zip(wanted, first, strict=True):
        assert torch.allclose(parameter.grad, whole, rtol=1e-11, atol=1e-13)


def test_under_a_checkpoint():
    """What the tapes keep goes through the caller's saved-tensor hooks."""
    model = Stack(PreNorm, 2).double()
    step = stepped(model, iterations=1)
    plain = gradients(step, model, (ROWS,))
    again = gradients(lambda x: checkpoint(step, x, use_reentrant=False), model, (ROWS,))
    assert error(again, plain) == 0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_non_finite_cotangents_are_passed_on(bad):
    model = Stack(Small, 4).double()
    for iterations in (1, "auto"):
        step = stepped(model, iterations=iterations)
        (step(ROWS).sum() * bad).backward()
        assert not model.embed.weight.grad.isfinite().all()
        assert not model.blocks[0].feed[0].weight.grad.isfinite().all()
        model.zero_grad()


def test_nothing_is_left_after_backward(monkeypatch):
    """Not for want of a garbage collection either."""
    kept = []
    init = Tape.__init__

    def noted(self, *args):
        init(self, *args)
        kept.extend(map(weakref.ref, (*self.outputs, *filter(torch.is_tensor, self.aliases))))

    monkeypatch.setattr(Tape, "__init__", noted)
    model = Stack(PreNorm, 3).double()
    for segments in (None, 3):
        step = stepped(model, iterations=2, segments=segments)
        kept.clear()
        gc.disable()
        try:
            loss = step(ROWS).square().sum()
            assert len(kept) > 6 * 4
            assert all(each() is not None for each in kept)
            loss.backward()
            assert all(each() is None for each in kept)
        finally:
            gc.enable()
        assert loss.grad_fn is not None
        kept.clear()
        with torch.no_grad():
            step(ROWS)
        assert not kept


def test_the_learnt_count_is_part_of_the_state():
    model = Stack(Small, 5).double()
    step = stepped(model, iterations="auto")
    step(ROWS).square().sum().backward()
    state = step.state_dict()
    again = stepped(copy.deepcopy(model), iterations="auto")
    again.load_state_dict(state)
    assert again.explain().count("measured at forward 0") == 1
    before = again.ledger.total("vjps")
    again(ROWS).square().sum().backward()
    first = again.ledger.total("vjps") - before
    step(ROWS).square().sum().backward()
    assert step.ledger.total("vjps") - first in (first, step.ledger.total("vjps") - first)


def test_sizes_share_what_auto_has_learnt():
    model = Stack(Small, 5).double()
    step = rewrite(model, Plan([Highway("blocks", segments=None)]), example=(ROWS,))
    step(ROWS).square().sum().backward()
    step(ROWS[:, :3]).square().sum().backward()
    assert "measured at forward 0" in step.explain()


def test_an_optimizer_step_lowers_the_loss():
    torch.manual_seed(0)
    model = Stack(PreNorm, 3)
    target = torch.randn(4, 6, 3)
    step = rewrite(model, Plan([Highway("blocks")]), loss=nn.MSELoss(), example=(ROWS.float(),))
    optimizer = torch.optim.Adam(step.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = step(ROWS.float(), target=target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
