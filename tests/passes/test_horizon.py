"""`Horizon`: what it claims and refuses, and that all blocks of a chain are exact at a horizon of all of them."""

import pytest
import torch
import torch.nn.functional as F
from chains import EveryOutput, InPlace, PostNorm, PreNorm, ResNet, Small, Stack, error, gpt2, roberta
from torch import nn
from windowed import Eager, built, of_step

from rewriter import BlackBox, CallableBox, Checkpoint, Horizon, Plan, RewriteError, rewrite

GENERATOR = torch.Generator().manual_seed(0)
ROWS = torch.randn(4, 6, 5, generator=GENERATOR, dtype=torch.float64)
TARGET = torch.randn(4, 6, 3, generator=GENERATOR, dtype=torch.float64)
IMAGES = torch.randn(4, 3, 12, 12, generator=GENERATOR, dtype=torch.float64)
CLASSES = torch.tensor([0, 1, 4, 2])
TOKENS = torch.randint(0, 50, (3, 9), generator=GENERATOR)


def hidden(output):
    return output.last_hidden_state.square().mean()


MODELS = {  # model, input, target, loss, blocks and their number
    "pre-norm": (lambda: Stack(lambda: PreNorm(dropout=0.2), 3), ROWS, TARGET, F.mse_loss, "blocks", 3),
    "post-norm": (lambda: Stack(PostNorm, 5), ROWS, TARGET, F.mse_loss, "blocks", 5),
    "in-place": (lambda: Stack(InPlace, 5), ROWS, TARGET, F.mse_loss, "blocks", 5),
    "resnet": (ResNet, IMAGES, CLASSES, F.cross_entropy, "blocks", 3),
    "gpt2": (gpt2, TOKENS, None, hidden, "h", 2),
    "roberta": (roberta, TOKENS, None, hidden, "encoder.layer", 2),
}
WAYS = [{"checkpoint": True}, {"when": "backward"}]


def test_text_round_trips():
    plan = Plan([Horizon("blocks", 4), Horizon("encoder", 6, stride=3, when="backward", checkpoint=True)])
    text = "Horizon('blocks', horizon=4)\nHorizon('encoder', horizon=6, stride=3, when='backward', checkpoint=True)\n"
    assert plan.text() == text
    assert Plan.parse(plan.text()) == plan


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"horizon": 0}, "not a number of blocks"),
        ({"horizon": 2.0}, "not a number of blocks"),
        ({"horizon": True}, "not a number of blocks"),
        ({"horizon": 2, "stride": 3}, "from 1 to the horizon, 2"),
        ({"horizon": 2, "stride": 0}, "leaves blocks without a window"),
        ({"horizon": 2, "head": "own"}, "one of shared, auxiliary"),
        ({"horizon": 2, "when": "later"}, "one of forward, backward"),
        ({"horizon": 2, "tape": "always"}, "one of auto, never"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, reason):
    with pytest.raises(RewriteError, match=reason):
        Horizon("blocks", **options)


@pytest.mark.parametrize(
    ("name", "way"),
    [(name, {}) for name in MODELS] + [(name, way) for name in ("pre-norm", "gpt2") for way in WAYS],
    ids=str,
)
def test_exact_at_a_horizon_of_all_blocks(name, way):
    make, x, y, loss, target, blocks = MODELS[name]
    model = make().double()
    step = built(model, x, loss, blocks, target, tape="never", **way)
    (region,) = step.latest.program.regions
    expected = of_step(Eager(model, loss), model, x, y)
    assert error(of_step(step, model, x, y), expected) <= 1e-12
    assert step.ledger[region.name].vjps == len(region.parts) == blocks


def test_single_precision():
    model = Stack(PreNorm, 3)
    step = built(model, ROWS.float(), F.mse_loss, 3, tape="never")
    expected = of_step(Eager(model, F.mse_loss), model, ROWS.float(), TARGET.float())
    assert error(of_step(step, model, ROWS.float(), TARGET.float()), expected) <= 1e-5


def test_all_blocks_stay_on_the_ordinary_tape():
    step = built(Stack(Small, 4), ROWS.float(), F.mse_loss, 4)
    assert not step.latest.program.regions
    assert "a horizon of all 4 blocks is exact and stays on the ordinary tape" in step.explain()


def test_hidden_states_do_not_hinder_an_exact_horizon():
    model = EveryOutput(4).double()

    def loss(outputs):
        return sum(output.square().mean() for output in outputs)

    step = built(model, ROWS, loss, 4, tape="never")
    expected = of_step(Eager(model, loss), model, ROWS, None)
    assert error(of_step(step, model, ROWS, None), expected) <= 1e-12
    with pytest.raises(RewriteError, match="it lies inside the blocks and is read outside them"):
        built(model, ROWS, loss, 3)


def test_a_horizon_beyond_the_blocks_is_refused():
    with pytest.raises(RewriteError, match="horizon=5 is beyond its 4 blocks"):
        built(Stack(Small, 4), ROWS.float(), F.mse_loss, 5)


def test_one_block_is_refused():
    with pytest.raises(RewriteError, match="no two blocks"):
        built(Stack(Small, 1), ROWS.float(), F.mse_loss, 1)


def test_hooks_are_refused():
    model = Stack(Small, 4)
    model.blocks[2].register_full_backward_hook(lambda *_: None)
    with pytest.raises(RewriteError, match="hooks"):
        built(model, ROWS.float(), F.mse_loss, 2)


def test_a_loss_is_needed():
    model = Stack(Small, 4)
    step = built(model, ROWS.float(), F.mse_loss, 2)
    with pytest.raises(RewriteError, match=r"call step\(x, target=y\)"):
        step(ROWS.float())
    with pytest.raises(RewriteError, match=r"rewrite\(model, plan, loss=...\)"):
        built(model, ROWS.float(), None, 2)(ROWS.float())
    with torch.no_grad():
        assert torch.equal(step(ROWS.float()), model(ROWS.float()))


def test_a_loss_of_several_numbers_is_refused():
    step = built(Stack(Small, 4), ROWS.float(), lambda output, y: (output - y).square().mean((1, 2)), 2)
    with pytest.raises(RewriteError, match=r"it is a tensor of shape \[4\]"):
        step(ROWS.float(), target=TARGET.float())


def test_a_changing_shape_is_refused_without_auxiliary_heads():
    with pytest.raises(RewriteError, match='head="auxiliary"'):
        built(ResNet(), IMAGES.float(), F.cross_entropy, 1)


class Ended(Stack):
    """Blocks and an end of one's choice."""

    def __init__(self, end, count=4):
        super().__init__(Small, count)
        self.end = end

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.end(x))


class Written(nn.Module):
    """Changes a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(12))

    def forward(self, x):
        return x + self.seen.add_(1.0)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (nn.Dropout(0.1), "draws random numbers in training"),
        (nn.MultiheadAttention(12, 2, dropout=0.1), "draws random numbers in training"),
        (nn.BatchNorm1d(6), "its statistics would advance with every window"),
        (Written(), "would do so for every window"),
    ],
    ids=["dropout", "attention", "statistics", "buffer"],
)
def test_ends_that_cannot_be_run_for_every_window_are_refused(end, reason):
    model = Ended(end)
    if isinstance(end, nn.MultiheadAttention):
        end.forward = lambda x, forward=end.forward: forward(x, x, x)[0]
    with pytest.raises(RewriteError, match=reason):
        built(model, ROWS.float(), F.mse_loss, 2)


@pytest.mark.parametrize("end", [nn.Dropout(0.0), nn.BatchNorm1d(6).eval(), nn.ReLU(inplace=True)], ids=str)
def test_ends_that_do_nothing_of_the_kind_are_not(end):
    model = Ended(end)
    model.end.train(not isinstance(end, nn.BatchNorm1d))
    step = rewrite(model, Plan([Horizon("blocks", 2)]), loss=F.mse_loss, example=(ROWS.float(),))
    torch.autograd.backward(step(ROWS.float(), target=TARGET.float()))
    assert step.latest.program.regions
    assert all(parameter.grad.isfinite().all() for parameter in model.blocks.parameters())


def test_a_loss_that_draws_is_refused():
    step = built(Stack(Small, 4), ROWS.float(), lambda o, y: F.mse_loss(o, y + torch.rand_like(y)), 2)
    with pytest.raises(RewriteError, match="or the loss, draws random numbers"):
        step(ROWS.float(), target=TARGET.float())


def test_a_box_behind_the_blocks_is_refused():
    model = Ended(CallableBox(lambda x: x, name="box"))
    model.box = model.end
    with pytest.raises(RewriteError, match="box"):
        rewrite(model, Plan([BlackBox("box"), Horizon("blocks", 2)]), loss=F.mse_loss, example=(ROWS.float(),))


def test_another_region_behind_the_blocks_is_refused():
    class Twice(Stack):
        def __init__(self):
            super().__init__(Small, 4)
            self.more = nn.ModuleList([Small() for _ in range(3)])

        def forward(self, x):
            x = self.embed(x)
            for block in (*self.blocks, *self.more):
                x = block(x)
            return self.head(x)

    for plan in ([Horizon("blocks", 2), Horizon("more", 1)], [Horizon("more", 1), Horizon("blocks", 2)]):
        with pytest.raises(RewriteError, match="it belongs to more"):
            rewrite(Twice(), Plan(plan), loss=F.mse_loss, example=(ROWS.float(),))


def test_a_value_that_one_block_makes_for_the_others_is_refused():
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.bias = Small(), nn.Parameter(torch.ones(12))

        def forward(self, x, bias):
            bias = self.bias * x.new_ones(x.shape[-1]) if bias is None else bias
            return self.inner(x) + bias, bias

    class Relative(nn.Module):
        """The first block makes a bias from its parameter, as T5 does."""

        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(5, 12), nn.Linear(12, 3)
            self.blocks = nn.ModuleList([Biased() for _ in range(4)])

        def forward(self, x):
            x, bias = self.embed(x), None
            for block in self.blocks:
                x, bias = block(x, bias)
            return self.head(x)

    model = Relative().double()
    step = built(model, ROWS, F.mse_loss, 4, tape="never")
    expected = of_step(Eager(model, F.mse_loss), model, ROWS, TARGET)
    assert error(of_step(step, model, ROWS, TARGET), expected) <= 1e-12
    with pytest.raises(RewriteError, match="one block makes it"):
        built(model, ROWS, F.mse_loss, 2)


def test_auxiliary_heads_need_an_example_and_one_output():
    with pytest.raises(RewriteError, match=r"example=\(x,\)"):
        rewrite(ResNet(), Plan([Horizon("blocks", 1, head="auxiliary")]), loss=F.cross_entropy)
    model = ResNet()
    model.head = nn.Unflatten(1, (2, 2, 2))
    with pytest.raises(RewriteError, match="auxiliary heads predict one tensor"):
        built(model, IMAGES.float(), F.mse_loss, 1, head="auxiliary")


def test_explain_says_what_is_exact_and_what_would_do_instead():
    text = built(Stack(Small, 6), ROWS.float(), F.mse_loss, 2, stride=1).explain()
    assert "6 blocks in 5 window(s) of 2, one every 1; shared head" in text
    assert "exact: the last 2 block(s)" in text
    assert "cost: 10 block vjps per step, 6 on the tape" in text
    assert "stride=2 takes 6 vjps or few more, and was found to train better" in text
    assert "Checkpoint is exact at one more forward" in text
    text = rewrite(Stack(Small, 6), Plan([Checkpoint("blocks", 2)]), example=(ROWS.float(),)).explain()
    assert "6 blocks, run again 2 at a time in backward" in text


def test_heads_of_their_own_speak_for_themselves():
    text = built(ResNet(), IMAGES.float(), F.cross_entropy, 1, head="auxiliary", when="backward").explain()
    assert "3 blocks in 3 window(s) of 1, one every 1; auxiliary head" in text
    assert "in backward, from a second run" in text
