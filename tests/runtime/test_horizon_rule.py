"""Windows against the same windows by hand, and everything that training does to a step."""

import copy

import pytest
import torch
import torch.nn.functional as F
from chains import PostNorm, PreNorm, ResNet, Small, Stack, error
from torch import nn
from windowed import Eager, built, by_hand, of_step

from rewriter import Checkpoint, Horizon, Plan, rewrite
from rewriter.runtime.windows import Windows

GENERATOR = torch.Generator().manual_seed(0)
ROWS = torch.randn(4, 6, 5, generator=GENERATOR, dtype=torch.float64)
TARGET = torch.randn(4, 6, 3, generator=GENERATOR, dtype=torch.float64)
IMAGES = torch.randn(4, 3, 12, 12, generator=GENERATOR, dtype=torch.float64)
CLASSES = torch.tensor([0, 1, 4, 2])
WAYS = [
    {},
    {"checkpoint": True},
    {"when": "backward"},
    {"when": "backward", "checkpoint": True},
]
loss = F.mse_loss


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_windows_are_those_by_hand(way):
    model = Stack(Small, 7).double()
    step = built(model, ROWS, loss, 2, **way)
    rule = step.latest.emitted.regions["blocks"].rule
    for horizon, stride in [(1, 1), (2, 2), (3, 1), (3, 2), (4, 4), (5, 5), (6, 1)]:
        rule.windows = Windows(7, horizon, stride)
        found = of_step(step, model, ROWS, TARGET)
        assert error(found, by_hand(model, ROWS, TARGET, loss, horizon, stride)) <= 1e-12
        if (horizon, stride) != (3, 1):  # the negative control: other windows are other gradients
            assert error(found, by_hand(model, ROWS, TARGET, loss, 3, 1)) > 1e-3


@pytest.mark.parametrize("block", [PreNorm, PostNorm])
def test_the_last_blocks_are_exact_and_the_others_are_not(block):
    model = Stack(block, 6).double()
    expected = of_step(Eager(model, loss), model, ROWS, TARGET)
    for horizon in (1, 2, 4, 6):
        found = of_step(built(model, ROWS, loss, horizon, tape="never"), model, ROWS, TARGET)
        exact = {f"blocks.{number}." for number in range(6 - horizon, 6)} | {"head."}
        last = {name for name in expected if name.startswith(tuple(exact))}
        rest = expected.keys() - last
        assert error({n: found[n] for n in last}, {n: expected[n] for n in last}) <= 1e-12
        for name in rest if horizon < 6 else ():
            if "in_proj_bias" not in name:
                assert error({name: found[name]}, {name: expected[name]}) > 1e-4, (horizon, name)
        if horizon == 6:
            assert error({n: found[n] for n in rest}, {n: expected[n] for n in rest}) <= 1e-12


def test_vjps():
    class Thin(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(12, 12)

        def forward(self, x):
            return x + torch.tanh(self.inner(x))

    step = built(Stack(Thin, 24), ROWS.float(), loss, 2)
    rule = step.latest.emitted.regions["blocks"].rule
    spent = 0
    for stride, counts in (
        (lambda horizon: 1, {2: 46, 4: 84, 6: 114, 8: 136, 12: 156, 18: 126, 24: 24}),
        (lambda horizon: horizon // 2, {4: 44, 6: 42, 8: 40, 12: 36}),
        (lambda horizon: horizon, {1: 24, 2: 24, 4: 24, 8: 24, 12: 24, 24: 24}),
    ):
        for horizon, expected in counts.items():
            rule.windows = Windows(24, horizon, stride(horizon))
            of_step(step, step.model, ROWS.float(), TARGET.float())
            assert step.ledger["blocks"].vjps - spent == expected == rule.windows.vjps
            spent = step.ledger["blocks"].vjps


@pytest.mark.parametrize("factor", [3.0, 0.25, 65536.0])
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_scaled_loss_scales_the_gradient(factor, when):
    model = Stack(Small, 5).double()
    step = built(model, ROWS, loss, 2, when=when)
    expected = by_hand(model, ROWS, TARGET, lambda o, y: factor * loss(o, y), 2, 2)
    assert error(of_step(step, model, ROWS, TARGET, factor), expected) <= 1e-12


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_accumulation_and_a_second_backward(way):
    model = Stack(lambda: PreNorm(dropout=0.2), 4).double()
    step = built(model, ROWS, loss, 2, **way)
    value = step(ROWS, target=TARGET)
    wanted = list(model.parameters())
    first = torch.autograd.grad(value, wanted, retain_graph=True)
    again = torch.autograd.grad(3.0 * value, wanted, retain_graph=True)
    assert all(torch.allclose(3 * a, b, rtol=1e-12, atol=1e-15) for a, b in zip(first, again, strict=True))
    assert all(map(torch.equal, first, torch.autograd.grad(value, wanted)))
    model = Stack(Small, 5).double()
    step = built(model, ROWS, loss, 2, **way)
    for part in (slice(0, 2), slice(2, 4)):
        (step(ROWS[part], target=TARGET[part]) / 2).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    expected = by_hand(model, ROWS, TARGET, loss, 2, 2)
    assert error(found, {name: expected[name] for name in found}) <= 1e-12


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_forward_draws_eagers_numbers_and_backward_none(way):
    model = Stack(lambda: PreNorm(dropout=0.3), 5).double()
    step = built(model, ROWS, loss, 2, **way)
    torch.manual_seed(5)
    expected, after = loss(model(ROWS), TARGET), torch.rand(3)
    torch.manual_seed(5)
    found = step(ROWS, target=TARGET)
    state = torch.get_rng_state()
    found.backward()
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(after, torch.rand(3))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_all_ways_draw_the_same_dropout():
    model = Stack(lambda: PreNorm(dropout=0.3), 5).double()
    expected = of_step(built(model, ROWS, loss, 2, stride=1), model, ROWS, TARGET)
    for way in WAYS[1:]:
        found = of_step(built(model, ROWS, loss, 2, stride=1, **way), model, ROWS, TARGET)
        assert error(found, expected) <= 1e-12
    other = of_step(built(model, ROWS, loss, 2, stride=1, **way), model, ROWS, TARGET, seed=8)
    assert error(other, expected) > 1e-2


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(12, 12), nn.BatchNorm1d(6)

    def forward(self, x):
        return x + torch.tanh(self.norm(self.inner(x)))


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("stride", [1, 3])
def test_statistics_advance_once(way, stride):
    model, other = Stack(Normed, 5).double(), Stack(Normed, 5).double()
    step = built(model, ROWS, loss, 3, stride=stride, **way)
    for _ in range(2):
        step(ROWS, target=TARGET).backward()
        loss(other(ROWS), TARGET).backward()
    for (name, found), expected in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_frozen_and_tied_blocks(way):
    model = Stack(Small, 6).double()
    model.blocks[4] = model.blocks[1]
    model.blocks[0].requires_grad_(False)
    model.blocks[3].requires_grad_(False)
    found = of_step(built(model, ROWS, loss, 2, "blocks.*", **way), model, ROWS, TARGET)
    free = copy.deepcopy(model).requires_grad_(True)
    expected = by_hand(free, ROWS, TARGET, loss, 2, 2)
    assert not any(name.startswith(("blocks.0.", "blocks.3.")) for name in found)
    assert error(found, {name: expected[name] for name in found}) <= 1e-12


def test_windows_without_anything_to_train_are_not_looked_at():
    model = Stack(Small, 6).double()
    model.embed.requires_grad_(False)
    model.blocks[:4].requires_grad_(False)
    step = built(model, ROWS, loss, 2)
    step(ROWS, target=TARGET).backward()
    assert step.ledger["blocks"].vjps == 2


class Sided(Small):
    def forward(self, x, side):
        return x + self.feed(self.norm(x) * side)


class Memory(nn.Module):
    """Every block reads a value from before the blocks, too, and the head an input of the model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.side, self.head = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(12, 3)
        self.blocks = nn.ModuleList([Sided() for _ in range(5)])

    def forward(self, x, scale):
        side = torch.tanh(self.side(x))
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, side)
        return self.head(x) * scale.abs()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_what_blocks_read_beside_the_stream_has_a_gradient(way):
    model = Memory().double()
    scale = torch.rand(4, 1, 1, dtype=torch.float64)
    plan = Plan([Horizon("blocks", 5, tape="never", **way)])
    expected = torch.autograd.grad(loss(model(ROWS, scale), TARGET), list(model.parameters()))
    step = rewrite(model, plan, loss=loss, example=(ROWS, scale))
    found = torch.autograd.grad(step(ROWS, scale, target=TARGET), list(model.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-15) for a, b in zip(found, expected, strict=True))
    # By hand, horizon 2: side's gradient is the sum over windows.
    step = rewrite(model, Plan([Horizon("blocks", 2, **way)]), loss=loss, example=(ROWS, scale))
    found = torch.autograd.grad(step(ROWS, scale, target=TARGET), list(model.side.parameters()))
    side, value = torch.tanh(model.side(ROWS)), model.embed(ROWS).detach()
    total = torch.zeros((), dtype=torch.float64)
    for start in (0, 2, 3):
        own, seen = side.detach().requires_grad_(), value
        for number in range(start, start + 2):
            # Block 3 belongs to the last window alone.
            given = side if start == 3 or number < 3 else own
            seen = model.blocks[number](seen, given)
        total = total + loss(model.head(seen) * scale.abs(), TARGET)
        for number in range(start, min(start + 2, 3)):
            value = model.blocks[number](value, side).detach()
    expected = torch.autograd.grad(total, list(model.side.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-15) for a, b in zip(found, expected, strict=True))


def test_mixed_precision():
    model = Stack(PreNorm, 4)
    x, y = ROWS.float(), TARGET.float()
    for when in ("forward", "backward"):
        step = built(model, x, loss, 2, when=when)
        with torch.autocast("cpu", torch.bfloat16):
            found = of_step(step, model, x, y)
        assert error(found, of_step(step, model, x, y)) < 0.1


def test_half_precision_keeps_small_gradients():
    """Without a scale inside, gradients of a loss of 1e-6 vanish in float16."""
    model = Stack(Small, 4)
    half = copy.deepcopy(model).half()
    x, y = ROWS.float(), TARGET.float()

    def small(output, y):
        return 1e-6 * F.mse_loss(output.float(), y)

    expected = by_hand(model, x, y, small, 2, 2)
    step = built(half, x.half(), small, 2)
    found = of_step(step, half, x.half(), y, factor=2.0**20)
    early = [name for name in expected if name.startswith(("blocks.0.", "blocks.1."))]
    scaled = {name: found[name].float() / 2**20 for name in early}
    assert error(scaled, {name: expected[name] for name in early}) < 0.02
    without = of_step(Eager(half, small), half, x.half(), y)
    assert error({n: without[n].float() for n in early}, {n: expected[n] for n in early}) > 0.1


def test_without_gradients_and_in_evaluation():
    model = Stack(lambda: PreNorm(dropout=0.2), 4).double()
    step = built(model, ROWS, loss, 2)
    step.eval()
    torch.testing.assert_close(step(ROWS, target=TARGET), loss(model(ROWS), TARGET))
    step.train()
    with torch.no_grad():
        step(ROWS, target=TARGET)
    assert step.ledger.total("vjps") == 0


def test_under_the_callers_checkpoint():
    model = Stack(Small, 5).double()
    step = built(model, ROWS, loss, 2)
    expected = of_step(step, model, ROWS, TARGET)
    value = torch.utils.checkpoint.checkpoint(lambda: step(ROWS, target=TARGET), use_reentrant=False)
    found = torch.autograd.grad(value, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    assert error(dict(zip(names, found, strict=True)), {name: expected[name] for name in names}) <= 1e-12


def test_check_compares_with_autograd():
    model = Stack(Small, 4).double()
    report = built(model, ROWS, loss, 2).check(ROWS, target=TARGET)
    assert 0 < report.parameters.cosine < 1 - 1e-6
    report = built(model, ROWS, loss, 4, tape="never").check(ROWS, target=TARGET)
    assert report.parameters.cosine > 1 - 1e-12
    report = built(ResNet(), IMAGES.float(), F.cross_entropy, 1, head="auxiliary").check(IMAGES.float(), target=CLASSES)
    assert "compared with automatic differentiation" in str(report)


def test_windows_of_checkpointed_blocks_count_what_they_run_again():
    model = Stack(Small, 6).double()
    for way, forwards in zip(WAYS, (0, 6, 4, 10), strict=True):
        step = built(model, ROWS, loss, 2, **way)
        of_step(step, model, ROWS, TARGET)
        assert step.ledger["blocks"].forwards == forwards
    step = rewrite(model, Plan([Checkpoint("blocks")]), loss=loss, example=(ROWS,))
    of_step(step, model, ROWS, TARGET)
    assert step.ledger["blocks"].forwards == 6
