"""`Checkpoint`: what it claims and refuses, and that its gradient is eager's."""

import random

import pytest
import torch
from chains import (
    WIDTH,
    EveryOutput,
    InPlace,
    PostNorm,
    PreNorm,
    ResNet,
    Small,
    Stack,
    compared,
    error,
    feed,
    gpt2,
    gradients,
    roberta,
)
from torch import nn

from rewriter import Checkpoint, Plan, RewriteError, rewrite

ROWS = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))
MODELS = {
    "pre-norm": (lambda: Stack(lambda: PreNorm(dropout=0.2), 3), ROWS, "blocks"),
    "post-norm": (lambda: Stack(PostNorm, 5), ROWS, "blocks.*"),
    "in-place": (lambda: Stack(InPlace, 5), ROWS, "blocks"),
    "straight": (lambda: Stack(Small, 6, straight=True), ROWS, "b*"),
    "resnet": (ResNet, IMAGES, "blocks"),
    "every output": (lambda: EveryOutput(4), ROWS, "blocks"),
    "gpt2": (gpt2, TOKENS, "h"),
    "roberta": (roberta, TOKENS, "encoder"),
}


def test_text_round_trips():
    plan = Plan([Checkpoint("blocks"), Checkpoint("encoder.*", every=3)])
    assert plan.text() == "Checkpoint('blocks')\nCheckpoint('encoder.*', every=3)\n"
    assert Plan.parse(plan.text()) == plan


@pytest.mark.parametrize("every", [0, -1, 1.5, True, None])
def test_a_number_of_blocks_is_a_whole_number(every):
    with pytest.raises(RewriteError, match="whole number from 1 on"):
        Checkpoint("blocks", every=every)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("every", [1, 2])
def test_gradients_are_eagers(name, every):
    make, given, target = MODELS[name]
    difference, step = compared(make().double(), (given,), Checkpoint(target, every=every))
    (region,) = step.latest.program.regions
    assert difference <= 1e-12
    assert step.ledger[region.name].forwards == step.ledger[region.name].vjps == len(region.parts) > 1


def test_a_group_that_starts_elsewhere_is_noticed(monkeypatch):
    """The negative control: what a group starts from is doubled."""
    from rewriter.runtime import checkpoint

    monkeypatch.setattr(checkpoint, "dict", lambda *a, **k: {n: 2 * v for n, v in dict(*a, **k).items()}, raising=False)
    difference, _ = compared(Stack(Small, 4).double(), (ROWS,), Checkpoint("blocks"))
    assert difference > 1e-3


def test_single_precision():
    difference, _ = compared(Stack(PreNorm, 3), (ROWS.float(),), Checkpoint("blocks"))
    assert difference <= 1e-5


def test_operations_that_are_the_same_give_the_same_bits():
    model = Stack(Small, 4)
    given = (ROWS.float(),)
    expected = gradients(model, model, given)
    found = gradients(rewrite(model, Plan([Checkpoint("blocks", every=2)]), example=given), model, given)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Crossing(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.feed = nn.MultiheadAttention(WIDTH, 2, batch_first=True), feed()

    def forward(self, x, memory):
        x = x + self.attention(x, memory, memory, need_weights=False)[0]
        return x + self.feed(x)


class Translator(nn.Module):
    """A decoder reads what an encoder left, in every block."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.encoder = nn.ModuleList([Small() for _ in range(3)])
        self.decoder = nn.ModuleList([Crossing() for _ in range(3)])

    def forward(self, x, y):
        memory, stream = self.embed(x), self.embed(y)
        for block in self.encoder:
            memory = block(memory)
        for block in self.decoder:
            stream = block(stream, memory)
        return self.head(stream)


def test_two_chains_and_what_they_read_beside_the_stream():
    model = Translator().double()
    difference, step = compared(model, (ROWS, ROWS[:, :4]), Checkpoint("encoder"), Checkpoint("decoder", every=2))
    assert difference <= 1e-12
    assert set(step.ledger.regions()) == {"encoder", "decoder"}


def test_frozen_and_tied_blocks():
    model = Stack(Small, 5).double()
    model.blocks[4] = model.blocks[3]
    model.blocks[1].requires_grad_(False)
    difference, _ = compared(model, (ROWS,), Checkpoint("blocks.*"))
    assert difference <= 1e-12
    model.embed.requires_grad_(False)
    model.blocks[:2].requires_grad_(False)
    step = rewrite(model, Plan([Checkpoint("blocks.*")]), example=(ROWS,))
    expected = gradients(model, model, (ROWS,))
    assert error(gradients(step, model, (ROWS,)), expected) <= 1e-12


def test_one_block_is_refused():
    with pytest.raises(RewriteError, match="no two blocks"):
        rewrite(Stack(Small, 1), Plan([Checkpoint("blocks")]), example=(ROWS.float(),))


def test_hooks_are_refused():
    model = Stack(Small, 3)
    model.blocks[1].register_forward_hook(lambda *_: None)
    with pytest.raises(RewriteError, match="hooks"):
        rewrite(model, Plan([Checkpoint("blocks")]), example=(ROWS.float(),))


class Counting(nn.Module):
    """A block with a memory of its own."""

    def __init__(self):
        super().__init__()
        self.inner, self.calls = Small(), 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x)


class Jittered(Small):
    def forward(self, x):
        return super().forward(x) * (1 + 0.1 * random.random())


@pytest.mark.parametrize(("block", "reason"), [(Counting, "changes its attribute"), (Jittered, "draws from random")])
def test_what_must_not_run_twice_is_refused(block, reason):
    with pytest.raises(RewriteError, match=reason):
        rewrite(Stack(block, 3), Plan([Checkpoint("blocks")]), example=(ROWS.float(),))
