"""Chains as regions: which blocks a target has, where they are cut, and what cannot be cut."""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from chains import Chained, InPlace, PostNorm, PreNorm, ResNet, Small, Stack, compared, feed
from structures import program_of
from torch import nn

from rewriter import Checkpoint, Highway, Horizon, Plan, RewriteError, rewrite
from rewriter.passes.base import Entry, Refused
from rewriter.passes.chain import block_regions, chain_of, residual_regions
from rewriter.runtime.segment import Segment

ROWS = torch.randn(4, 6, 5)


@dataclass(frozen=True)
class Named(Entry):
    name: ClassVar[str] = "named"
    target: object

    def apply(self, program):
        return program

    def rule(self, *args):
        raise NotImplementedError


def regions(find, model, target, x=ROWS):
    found = find(Named(target), program_of(model, x))
    return found if isinstance(found, Refused) else found[1]


def test_residual_segments():
    (region,) = regions(residual_regions, Stack(PreNorm, 3), "blocks")
    assert region.name == "blocks"
    assert [piece.skip for piece in region.parts] == ["identity"] * 6
    (region,) = regions(residual_regions, ResNet(), "blocks", torch.randn(4, 3, 12, 12))
    kinds = ["identity", "identity", "projection", "identity", "projection", "identity"]
    assert [piece.skip for piece in region.parts] == kinds


@pytest.mark.parametrize(("target", "count"), [("blocks", 3), ("blocks.*", 3), ("blocks[0:2]", 2)])
def test_blocks_are_the_modules_that_are_named(target, count):
    (region,) = regions(block_regions, Stack(PreNorm, 3), target)
    assert len(region.parts) == count


def test_a_norm_outside_the_target_is_cut_off():
    model = nn.Sequential()
    model.add_module("blocks", nn.Sequential(Small(5), Small(5)))
    model.add_module("norm", nn.LayerNorm(5))
    (region,) = regions(residual_regions, model, "blocks")
    assert region.parts[-1].after == ()
    assert not any("norm" in name.split("_")[0] for name in region.owned)


class Looped(nn.Module):
    """The loop itself adds up: x + .5 block(x)."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([feed(5) for _ in range(3)])

    def forward(self, x):
        for block in self.blocks:
            x = x + 0.5 * block(x)
        return x


def test_sums_in_the_loop_itself_belong_to_the_blocks():
    (region,) = regions(residual_regions, Looped(), "blocks")
    assert region.name == "blocks"
    assert len(region.parts) == 3


def identities(model, x):
    program = program_of(model, x, front_end=None)
    found = residual_regions(Named("blocks"), program)
    assert not isinstance(found, Refused), found
    program, (region,) = found
    nothing = Segment("nothing", "", lambda *_: (), ())
    return [block.identity for block in chain_of(program, region, nothing, divided=True).blocks]


class Doubling(Small):
    def forward(self, x):
        return torch.add(self.feed(self.norm(x)), x, alpha=2)


def test_a_skip_is_the_identity_only_where_it_is():
    x = torch.randn(4, 12)
    assert identities(Chained([Small(), Small()]), x) == [True, True]
    assert identities(Chained([PostNorm(), PostNorm()]), x) == [False, False]
    assert identities(Chained([Doubling(), Small()]), x) == [False, True]


def test_a_sum_with_a_factor_is_exact():
    model = Chained([Doubling(), Small(), Doubling()]).double()
    x = torch.randn(4, 12, dtype=torch.float64)
    assert compared(model, (x,), Highway("blocks", 1000, segments=None, tape="never"))[0] <= 1e-12


class Widening(Small):
    """From (rows, 1, width) to (rows, 3, width): the sum repeats the skip."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 12))

    def forward(self, x):
        return x + self.feed(self.norm(x) + self.table)


def test_a_sum_that_repeats_its_skip_is_exact():
    x = torch.randn(4, 1, 12, dtype=torch.float64)
    assert identities(Chained([Widening(), Widening()]).double(), x) == [False, True]
    model = Chained([Widening(), Widening(), Small()]).double()
    for segments in (None, 2):
        assert compared(model, (x,), Highway("blocks", 1000, segments=segments, tape="never"))[0] <= 1e-12


class Overwriting(nn.Module):
    """Writes into what it is given."""

    def __init__(self, width=12):
        super().__init__()
        self.feed = feed(width)

    def forward(self, x):
        x += self.feed(torch.tanh(x))
        return x


def test_writes_in_place():
    entry = Highway("blocks", 1000, segments=None, tape="never")
    for block in (InPlace, Overwriting):
        assert compared(Stack(block, 4).double(), (ROWS.double(),), entry)[0] <= 1e-12


class Meddling(nn.Module):
    """Each block writes into a table that all of them read."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Adding() for _ in range(3)])

    def forward(self, x):
        table = x.detach().clone()
        for block in self.blocks:
            x = block(x, table)
        return x


class Adding(nn.Module):
    def __init__(self):
        super().__init__()
        self.feed = feed(5)

    def forward(self, x, table):
        table.add_(1)
        return x + self.feed(table + x)


def test_a_write_into_what_several_blocks_read_is_refused():
    refused = regions(residual_regions, Meddling(), "blocks")
    assert isinstance(refused, Refused)
    assert "writes into" in refused.reason or "no residual chain" in refused.reason


def test_refusals():
    refused = regions(residual_regions, nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), "0")
    assert isinstance(refused, Refused)
    assert "no residual chain" in refused.reason
    refused = regions(block_regions, Stack(Small, 3), "head")
    assert isinstance(refused, Refused)
    assert "no two blocks" in refused.reason
    refused = regions(residual_regions, Stack(Small, 3), "blocks:out")
    assert isinstance(refused, Refused)
    assert "border" in refused.reason


WAYS = [
    lambda target: Checkpoint(target),
    lambda target: Highway(target, iterations=2, segments=None, tape="never"),
    lambda target: Horizon(target, 3, tape="never"),
]


@pytest.mark.parametrize(("first", "second"), list(itertools.product(WAYS, WAYS)))
def test_two_entries_may_share_a_list_of_blocks(first, second):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return x + torch.tanh(self.inner(x))

    class Six(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(6))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model, x, y = Six().double(), torch.randn(5, 4).double(), torch.randn(5, 4).double()
    step = rewrite(model, Plan([first("blocks[:3]"), second("blocks[3:]")]), loss=F.mse_loss)
    ours, eager = step(x, target=y), F.mse_loss(model(x), y)
    assert torch.equal(ours, eager)
    assert [region.name for region in step.latest.program.regions] == ["blocks", "blocks@1"]
    found = [torch.autograd.grad(loss, list(model.parameters())) for loss in (ours, eager)]
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_regions_of_one_name_are_an_error():
    step = rewrite(Stack(PreNorm, 3), Plan([Checkpoint("blocks")]), example=(ROWS,))
    program = step.latest.program
    (region,) = program.regions
    half = len(region.owned) // 2
    parts = [dataclasses.replace(region, owned=owned) for owned in (region.owned[:half], region.owned[half:])]
    with pytest.raises(RewriteError, match="two regions have the same name"):
        program.with_(regions=tuple(parts)).verify()


def test_blocks_may_share_what_the_model_holds():
    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x, place):
            return torch.tanh(self.inner(x + place)) * 2 + x.sin()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.place, self.blocks = nn.Parameter(torch.randn(4)), nn.ModuleList(Placed() for _ in range(4))

        def forward(self, x):
            for block in self.blocks:
                x = block(x, self.place)
            return x

    model, x = Model().double(), torch.randn(3, 4).double()
    step = rewrite(model, Plan([Checkpoint("blocks")]), example=(x,))
    assert [len(region.parts) for region in step.latest.program.regions] == [4]
    found = [torch.autograd.grad(call(x).square().sum(), list(model.parameters())) for call in (step, model)]
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_a_block_that_cannot_be_cut_off_is_named():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x, mask):
            return x + torch.tanh(self.inner(x)) * mask

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.blocks = nn.Embedding(9, 4), nn.ModuleList(Masked() for _ in range(4))

        def forward(self, ids):
            x = self.table(ids)
            mask = (ids != 0).unsqueeze(-1).to(x.dtype)
            for block in self.blocks:
                x = block(x, mask)
            return x

    step = rewrite(Model(), Plan([Checkpoint("blocks")]), example=(torch.randint(0, 9, (3, 5)),))
    (region,) = step.latest.program.regions
    assert len(region.parts) == 3
    assert "blocks.0 stays on the ordinary tape" in step.explain()


def test_a_part_of_torchs_own_module_is_refused_by_its_name():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x):
            return self.encoder(x)

    with pytest.raises(RewriteError, match="encoder, a module of torch's own"):
        rewrite(Wrapped(), Plan([Checkpoint("encoder.layers")]), example=(torch.randn(2, 3, 8),))
