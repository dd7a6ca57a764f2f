"""Auxiliary heads: windows by hand with the step's own heads, and their parameters as part of the step."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from chains import ResNet, Small, Stack, error
from torch import nn
from windowed import of_step

from rewriter import Horizon, Plan, rewrite

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(4, 3, 12, 12, generator=GENERATOR, dtype=torch.float64)
CLASSES = torch.tensor([0, 1, 4, 2])
ROWS = torch.randn(4, 6, 5, generator=GENERATOR, dtype=torch.float64)
loss = F.cross_entropy


def stepped(model=None, horizon=1, **options):
    model = ResNet().double() if model is None else model
    plan = Plan([Horizon("blocks", horizon, head="auxiliary", **options)])
    return rewrite(model, plan, loss=loss, example=(IMAGES,))


def by_hand(model, heads):
    """Three stages, windows of one, heads on the first two."""
    wanted = dict(model.named_parameters()) | {f"rewriter.heads.blocks.{n}": p for n, p in heads.named_parameters()}
    x = model.stem(IMAGES)
    total = torch.zeros((), dtype=torch.float64)
    for stage, head in zip(model.blocks[:2], heads, strict=True):
        x = stage(x)
        normed = F.layer_norm(x.mean((2, 3)), x.shape[1:2], head.scale, head.shift)
        total = total + loss(F.linear(normed, head.weight, head.bias), CLASSES)
        x = x.detach()
    total = total + loss(model.head(model.blocks[2](x).mean((2, 3))), CLASSES)
    return dict(zip(wanted, torch.autograd.grad(total, list(wanted.values())), strict=True))


@pytest.mark.parametrize("way", [{}, {"when": "backward"}, {"checkpoint": True}], ids=str)
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_stages_and_heads_have_the_gradients_of_their_own_losses(way, factor):
    step = stepped(**way)
    found = of_step(step, step.model, IMAGES, CLASSES, factor)
    del found["input"]
    expected = by_hand(step.model, step.rewriter.heads["blocks"])
    assert len(expected) == len(list(step.model.parameters())) + 8
    assert error(found, {name: factor * gradient for name, gradient in expected.items()}) <= 1e-12


def test_tokens_are_averaged_unless_each_has_its_own_output():
    class Pooled(Stack):
        def forward(self, x):
            return self.head(self.body(x).mean(1))

        def body(self, x):
            x = self.embed(x)
            for block in self.blocks:
                x = block(x)
            return x

    for kind, classes in ((Pooled, CLASSES % 3), (Stack, torch.zeros(4, 3, dtype=torch.long))):
        model = kind(Small, 4).double()
        plan = Plan([Horizon("blocks", 2, head="auxiliary")])
        own = loss if kind is Pooled else (lambda output, y: loss(output[:, :3].transpose(1, 2), y))
        step = rewrite(model, plan, loss=own, example=(ROWS,))
        (head,) = step.rewriter.heads["blocks"]
        found = of_step(step, model, ROWS, classes)
        value = model.embed(ROWS)
        for block in model.blocks[:2]:
            value = block(value)
        assert head(value).shape == model(ROWS).shape
        wanted = list(model.blocks[:2].parameters())
        names = [f"blocks.{name}" for name, _ in model.blocks[:2].named_parameters()]
        expected = torch.autograd.grad(own(head(value), classes), wanted)
        assert error({n: found[n] for n in names}, dict(zip(names, expected, strict=True))) <= 1e-12


def test_heads_are_parameters_of_the_step():
    step = stepped()
    names = [name for name, _ in step.named_parameters() if name.startswith("rewriter.heads.blocks.")]
    assert len(names) == 8
    assert {name for name in step.state_dict() if "heads" in name} == set(names)
    assert not any("heads" in name for name in step.model.state_dict())
    before = [p.clone() for p in step.rewriter.parameters()]
    optimizer = torch.optim.SGD(step.parameters(), 0.1)
    step(IMAGES, target=CLASSES).backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, step.rewriter.parameters(), strict=True) if a.dim() == 2)


def test_heads_learn_their_windows_loss():
    step = stepped()
    optimizer = torch.optim.Adam(step.rewriter.parameters(), 0.05)
    first, _ = step.rewriter.heads["blocks"]
    value = step.blocks[0](step.stem(IMAGES))
    start = float(loss(first(value), CLASSES))
    for _ in range(30):
        optimizer.zero_grad()
        step(IMAGES, target=CLASSES).backward()
        optimizer.step()
    assert float(loss(first(value), CLASSES)) < 0.2 * start


def test_first_weights_do_not_depend_on_the_random_state_and_leave_it_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    model = ResNet().double()
    torch.set_rng_state(state)
    first = list(stepped(model).rewriter.parameters())
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    assert all(map(torch.equal, first, stepped(model).rewriter.parameters()))


def test_checkpoints_with_and_without_heads():
    step, other = stepped(), stepped()
    with torch.no_grad():
        for parameter in step.parameters():
            parameter.add_(1.0)
    assert not other.load_state_dict(step.state_dict()).missing_keys
    assert all(map(torch.equal, step.parameters(), other.parameters()))
    plain = ResNet().double().state_dict()
    other.load_state_dict(plain)
    assert torch.equal(other.stem.weight, plain["stem.weight"])
    assert torch.equal(next(other.rewriter.parameters()), next(step.rewriter.parameters()))
    broken = {name: value for name, value in step.state_dict().items() if not name.endswith("0.weight")}
    with pytest.raises(RuntimeError, match=r"rewriter\.heads\.blocks\.0\.weight"):
        other.load_state_dict(broken)


def test_copies_and_pickles_keep_their_heads():
    step = rewrite(ResNet().double(), Plan([Horizon("blocks", 1, head="auxiliary")]), loss=loss, example=(IMAGES,))
    with torch.no_grad():
        for parameter in step.rewriter.parameters():
            parameter.add_(0.3)
    file = io.BytesIO()
    torch.save(step, file)
    file.seek(0)
    expected = of_step(step, step.model, IMAGES, CLASSES)
    for other in (copy.deepcopy(step), torch.load(file, weights_only=False)):
        assert error(of_step(other, other.model, IMAGES, CLASSES), expected) <= 1e-12
        kept = {id(p) for p in other.rewriter.parameters()}
        assert kept.isdisjoint(map(id, step.rewriter.parameters()))


def test_another_capture_shares_the_heads():
    step = stepped()
    count = len(list(step.parameters()))
    images = torch.cat([IMAGES, IMAGES], -1)
    step(images, target=CLASSES).backward()
    step.recapture()
    step(IMAGES, target=CLASSES).backward()
    assert len(list(step.parameters())) == count
    assert all(p.grad is not None for p in step.rewriter.parameters())


def test_frozen_heads():
    step = stepped()
    step.rewriter.requires_grad_(False)
    found = of_step(step, step.model, IMAGES, CLASSES)
    assert not any("heads" in name for name in found)
    assert isinstance(step.rewriter.heads["blocks"], nn.ModuleList)
