"""`Highway`: what it claims and refuses, and that its gradient is exact when its iterations are."""

import functools
import itertools
import math

import pytest
import torch
from chains import (
    Chained,
    Highways,
    InPlace,
    PostNorm,
    PreNorm,
    ResNet,
    Scaled,
    Small,
    Stack,
    Translator,
    compared,
    cosine,
    error,
    feed,
    gpt2,
    gradients,
    roberta,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from rewriter import Highway, Plan, RewriteError, rewrite
from rewriter.runtime import chain as chain_module
from rewriter.runtime.highway import HighwayRule
from rewriter.runtime.iterations import Iterations

ROWS = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))
MODELS = {
    "pre-norm": (lambda: Stack(PreNorm, 3), ROWS, "blocks"),
    "post-norm": (lambda: Stack(PostNorm, 5), ROWS, "blocks"),
    "in-place": (lambda: Stack(InPlace, 5), ROWS, "blocks"),
    "gate": (lambda: Stack(Highways, 5), ROWS, "blocks"),
    "straight": (lambda: Stack(Small, 6, straight=True), ROWS, "b*"),
    "resnet": (ResNet, IMAGES, "blocks"),
    "gpt2": (gpt2, TOKENS, "h"),
    "roberta": (roberta, TOKENS, "encoder"),
}


@functools.cache
def captured(name):
    """(step, what it is given, eager's gradients) of a model, captured once."""
    make, given, target = MODELS[name]
    model = make().double()
    step = rewrite(model, Plan([exact(target)]), example=(given,))
    return step, given, gradients(model, model, (given,))


def ruled(step, iterations, segments=None, shift=0.0):
    """The step's only region with a rule for other options; returns the rule."""
    (region,) = step.latest.emitted.regions.values()
    iterations = Iterations(iterations, region.name)
    region.rule = HighwayRule(region.rule.chain, step.ledger, iterations, shift, segments)
    return region.rule


def exact(target, segments=None, shift=0.0):
    return Highway(target, iterations=1000, shift=shift, segments=segments, tape="never")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shift", [0.0, 0.2, 0.8, 1.0])
@pytest.mark.parametrize("segments", [None, 3])
def test_exact_at_units_less_one(name, segments, shift):
    step, given, expected = captured(name)
    units = len(ruled(step, 0, segments, shift).units)
    ruled(step, units - 1, segments, shift)
    before = step.ledger.total("vjps")
    assert error(gradients(step, step.model, (given,)), expected) <= 1e-12
    assert step.ledger.total("vjps") - before > len(step.latest.program.regions[0].parts)
    ruled(step, units - 2, segments, shift)
    assert error(gradients(step, step.model, (given,)), expected) > 1e-9


@pytest.mark.parametrize("name", ["pre-norm", "post-norm", "resnet", "gpt2", "roberta"])
def test_exact_in_single_precision(name):
    make, given, target = MODELS[name]
    given = given.float() if given.is_floating_point() else given
    reference = gradients(model := make().double(), model, (given.double() if given.is_floating_point() else given,))
    model.float()
    step = rewrite(model, Plan([exact(target)]), example=(given,))
    found = {name: each.double() for name, each in gradients(step, model, (given,)).items()}
    assert cosine(found, reference) > 1 - 1e-9
    longest = max(float(each.norm()) for each in reference.values())
    assert max(float((found[n] - each).norm()) for n, each in reference.items()) <= 1e-5 * longest


def test_a_skip_counted_twice_is_not_exact(monkeypatch):
    step, given, expected = captured("pre-norm")
    for segments in (None, 3):
        ruled(step, 1000, segments)
        assert error(gradients(step, step.model, (given,)), expected) <= 1e-12
        with monkeypatch.context() as patched:
            patched.setitem(chain_module._FOLLOWED, "branch", (True, True))
            assert error(gradients(step, step.model, (given,)), expected) > 1e-3


def test_text_round_trips():
    plan = Plan([Highway("h"), Highway("h", ((0, 1), (100, "exact")), 0.2, None), Highway("h", tape="never")])
    assert plan.text().splitlines()[0] == "Highway('h')"
    assert Plan.parse(plan.text()) == plan


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"iterations": -1}, "iterations=-1"),
        ({"iterations": ((1, 2),)}, "is not known"),
        ({"shift": 1.5}, "not a share"),
        ({"shift": "a"}, "not a share"),
        ({"segments": 0}, "segments=0"),
        ({"segments": 2.0}, "segments=2.0"),
        ({"tape": "always"}, "one of auto, never"),
    ],
)
def test_bad_options(options, reason):
    with pytest.raises(RewriteError, match=reason):
        Highway("blocks", **options)


def built(model, *given, entry=None):
    return rewrite(model, Plan([entry or Highway("blocks")]), example=given or (ROWS,))


def test_one_block_is_refused():
    with pytest.raises(RewriteError, match="no residual chain of at least two"):
        built(Stack(Small, 1).double())


def test_a_block_and_a_layer_are_refused():
    model = nn.Sequential()
    model.add_module("blocks", nn.Sequential(feed(5), Small(5), feed(5)))
    with pytest.raises(RewriteError, match=r"no residual|one residual block only"):
        built(model.double())


def test_a_model_without_skips_is_refused():
    with pytest.raises(RewriteError, match="no residual chain"):
        built(Stack(lambda: feed(12), 3).double())


def test_hooks_in_a_block_are_refused():
    model = Stack(Small, 3).double()
    model.blocks[1].norm.register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(RewriteError, match="hooks"):
        built(model)


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Stack(Small, 3)

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


def test_a_chain_inside_a_checkpoint_is_refused():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Opaque()

        def forward(self, x):
            return self.part(x)

    with pytest.raises(RewriteError, match=r"stays whole|no residual chain"):
        built(Outer().double(), entry=Highway("part.body.blocks"))


class Remembering(nn.Module):
    """A branch that checkpoints its own insides."""

    def __init__(self):
        super().__init__()
        self.body = feed()

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


class Checkpointed(Small):
    def forward(self, x):
        return x + checkpoint(self.feed, self.norm(x), use_reentrant=False)


def test_checkpoints_inside_blocks():
    def small():
        block = Small()
        block.feed = Remembering()
        return block

    assert compared(Stack(small, 4).double(), (ROWS,), exact("blocks"))[0] <= 1e-12
    assert compared(Stack(small, 4).double(), (ROWS,), exact("blocks", segments=2))[0] <= 1e-12
    with pytest.raises(RewriteError, match="stay whole"):
        built(Stack(Checkpointed, 4).double())


def test_two_chains_in_one_model():
    given = (ROWS, ROWS[:, :4] * 2)
    for segments in (None, 2):
        difference, step = compared(Translator().double(), given, exact("*coder", segments))
        assert difference <= 1e-12
        assert [region.name for region in step.latest.program.regions] == ["encoder", "decoder"]
    # What the encoder gets through the memory, a side input, is the decoder's estimate; with wrong vjps it is wrong.
    entries = Highway("decoder", iterations=0, segments=None), exact("encoder")
    assert 1e-3 < compared(Translator().double(), given, *entries)[0] < 2


def test_a_part_of_the_target_without_blocks_is_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first_blocks = nn.Sequential(Small(5), Small(5))
            self.second_blocks = feed(5)

        def forward(self, x):
            return self.second_blocks(self.first_blocks(x))

    with pytest.raises(RewriteError, match=r"(?s)second_blocks.*none here"):
        built(Two().double(), entry=Highway("*_blocks"))


def test_tied_blocks():
    block = Small()
    model = Chained([block, Small(), block, block]).double()
    x = torch.randn(3, 12, dtype=torch.float64)
    assert compared(model, (x,), exact("blocks*"))[0] <= 1e-12
    first = model.blocks[1].feed
    first[0].weight = block.feed[0].weight
    assert compared(model, (x,), exact("blocks*", segments=2))[0] <= 1e-12


@pytest.mark.parametrize("frozen", [(), (0,), (0, 1, 2), (3, 4), (2,), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("segments", [None, 2])
def test_frozen_blocks(frozen, segments):
    model = Chained([Small() for _ in range(5)]).double()
    x = torch.randn(3, 12, dtype=torch.float64)
    step = built(model, x, entry=exact("blocks", segments))
    for number in frozen:
        model.blocks[number].requires_grad_(False)
    assert error(gradients(step, model, (x,)), gradients(model, model, (x,))) <= 1e-12
    if segments is None and len(frozen) < 5:  # without the input's gradient, blocks below the first one are left alone
        before = step.ledger.total("vjps")
        step(x).square().sum().backward()
        units = 5 - min({0, 1, 2, 3, 4}.difference(frozen))
        assert step.ledger.total("vjps") - before == units * (units - 1) // 2 + 5 - len(frozen)
        assert [each.norm.weight.grad is None for each in model.blocks] == [each in frozen for each in range(5)]


def test_half_precision_autocast_is_close():
    model = Stack(PreNorm, 3)

    def mixed(call):
        def run(x):
            with torch.autocast("cpu", torch.bfloat16):
                return call(x)

        return run

    x = ROWS.float()
    reference = gradients(model, model, (x,))
    eager = gradients(mixed(model), model, (x,))
    for segments in (None, 3):
        step = built(model, x, entry=exact("blocks", segments))
        found = gradients(mixed(step), model, (x,))
        assert cosine(found, reference) > max(0.995, 1 - 2 * (1 - cosine(eager, reference)))
        assert {each.dtype for each in found.values()} == {torch.float32}


def test_an_exact_count_is_left_to_the_tape():
    step = built(Stack(Small, 6).double(), entry=Highway("blocks", iterations=3))
    assert not step.latest.program.regions
    assert "stays on the ordinary tape" in step.explain()
    assert built(Stack(Small, 6).double(), entry=Highway("blocks", iterations=2)).latest.program.regions


def test_explain_says_what_it_costs_before_anything_runs():
    model = Stack(Small, 6).double()
    said = built(model, entry=Highway("blocks", iterations=2, segments=None)).explain()
    assert "6 blocks in 6 units" in said
    assert "6 identity" in said
    assert "on one device" in said
    assert "1.50 x" in said
    step = built(model)
    assert "not measured yet" in step.explain()
    step(ROWS).square().sum().backward()
    assert "measured at forward 0" in step.explain()
    assert "predicted error" in step.explain()


def test_errors_on_the_commuting_chain():
    """J = eps I, c = 24 eps = 1: at distance n the error is the tail of a binomial distribution."""
    model = Chained([Scaled(1 / 24) for _ in range(25)])
    x = torch.ones(1, 1, dtype=torch.float64)
    expected = gradients(model, model, (x,))
    stated = (0.625, 0.249, 0.0693, 0.0143, 2.30e-3, 2.95e-4)
    for iterations, known in enumerate(stated):
        step = built(model, x, entry=Highway("blocks", iterations, segments=None))
        found = gradients(step, model, (x,))
        for block, distance in ((0, 24), (4, 20), (24 - iterations, iterations)):
            name = f"blocks.{block}.gain"
            relative = float(1 - found[name] / expected[name])
            assert math.isclose(relative, _beyond(iterations, distance), rel_tol=1e-10, abs_tol=1e-14)
        assert math.isclose(_beyond(iterations, 24), known, rel_tol=5e-3)


def _beyond(count, distance, share=1 / 25):
    """P[Bin(distance, share) > count]; share = eps / (1 + eps)."""
    more = range(count + 1, distance + 1)
    return math.fsum(math.comb(distance, m) * share**m * (1 - share) ** (distance - m) for m in more)


class Cancelling(nn.Module):
    """x - .2 x and a little noise."""

    def __init__(self, width=16):
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(-0.2 * torch.eye(width) + 0.003 * torch.randn(width, width))

    def forward(self, x):
        return x + self.layer(x)


def cancelling():
    torch.manual_seed(0)
    return Chained([Cancelling() for _ in range(24)]).double(), torch.randn(8, 16, dtype=torch.float64)


def first_error(model, x, entry):
    """Of the first block's gradient, the farthest from the loss."""
    expected, name = gradients(model, model, (x,)), "blocks.0.layer.weight"
    found = gradients(built(model, x, entry=entry), model, (x,))
    return float((found[name] - expected[name]).norm() / expected[name].norm())


def test_blocks_that_cancel_their_input_need_a_shift():
    model, x = cancelling()
    plain = [first_error(model, x, Highway("blocks", count, segments=None)) for count in (0, 3, 23)]
    assert plain[0] > 50
    assert plain[1] > 1e3
    assert first_error(model, x, Highway("blocks", 0, 0.2, segments=None)) < 0.1
    assert first_error(model, x, exact("blocks")) < 1e-10
    assert first_error(model, x, exact("blocks", shift=0.2)) < 1e-12


def test_auto_notices_growth_and_takes_the_exact_backward():
    model, x = cancelling()
    step = built(model, x, entry=Highway("blocks", segments=None))
    expected = gradients(model, model, (x,))
    with pytest.warns(UserWarning, match="blocks do not converge"):
        found = gradients(step, model, (x,))
    assert error(found, expected) < 1e-12
    before = step.ledger.total("vjps")
    assert error(gradients(step, model, (x,)), expected) < 1e-12
    assert step.ledger.total("vjps") - before == 24
    assert "exact, as the iterations do not pay" in step.explain()


def test_auto_stops_early_where_terms_shrink():
    torch.manual_seed(0)
    model = Chained([Scaled(0.5 / 24) for _ in range(24)])
    x = torch.ones(1, 1, dtype=torch.float64)
    step = built(model, x, entry=Highway("blocks", segments=None))
    expected = gradients(model, model, (x,))
    for _ in range(2):
        found = gradients(step, model, (x,))
        assert 0 < float(1 - found["blocks.0.gain"] / expected["blocks.0.gain"]) < 0.1
    assert "auto: 1 (measured at forward 0)" in step.explain()
    count = 23 + 24
    assert step.ledger.total("vjps") == 2 * count


def test_a_schedule_ends_exact():
    model = Stack(Small, 5).double()
    entry = Highway("blocks", ((0, 0), (1, 2), (2, "exact")), segments=None)
    step = built(model, entry=entry)
    expected = gradients(model, model, (ROWS,))
    errors, spent = [], [0]
    for _ in range(3):
        errors.append(error(gradients(step, model, (ROWS,)), expected))
        spent.append(step.ledger.total("vjps"))
    assert errors[0] > errors[1] > 1e-6 > 1e-12 >= errors[2]
    assert [after - before for before, after in itertools.pairwise(spent)] == [5, 5 + 4 + 3, 5]
