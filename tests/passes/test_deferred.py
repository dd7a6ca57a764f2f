"""`Deferred`: what it claims, what it refuses, and that it round-trips as text."""

import pytest
import torch
from torch import nn

from rewriter import Deferred, Plan, RewriteError, rewrite


class Recurrent(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part, self.head = part, nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.part(x)[0])


class Loop(nn.Module):
    """step(cell, x_t, h) -> h, called for every row of x."""

    def __init__(self, step, cell=None):
        super().__init__()
        self.step, self.cell = step, cell or nn.GRUCell(3, 4)

    def forward(self, x, h):
        outputs = []
        for number in range(x.shape[1]):
            h = self.step(self.cell, x[:, number], h)
            outputs.append(h)
        return torch.stack(outputs, 1)


def built(model, *example, plan=None):
    return rewrite(model, plan or Plan([Deferred("part")]), example=example)


def looped(step, cell=None):
    return built(Loop(step, cell), torch.randn(2, 5, 3), torch.randn(2, 4), plan=Plan([Deferred("cell")]))


def test_text_round_trips():
    plan = Plan([Deferred("decoder.*"), Deferred("encoder", tape="never")])
    assert plan.text() == "Deferred('decoder.*')\nDeferred('encoder', tape='never')\n"
    assert Plan.parse(plan.text()) == plan


def test_an_unknown_tape_is_refused():
    with pytest.raises(RewriteError, match="one of auto, never"):
        Deferred("part", tape="always")


def test_a_module_is_one_region():
    step = built(Recurrent(nn.GRU(3, 4)), torch.randn(30, 2, 3))
    (region,) = step.latest.program.regions
    assert region.name == "part"
    assert [step.latest.program.node(name).op for name in region.owned] == ["call_module", "call_function"]


def test_a_loop_is_one_region_and_the_rest_goes_around_it():
    model = Loop(lambda cell, x, h: cell(x, h))
    model.step = lambda cell, x, h: cell(torch.tanh(x), h)  # what precedes a call goes before the first one
    plan = Plan([Deferred("cell", tape="never")])
    step = built(model, torch.randn(2, 5, 3), torch.randn(2, 4), plan=plan)
    (region,) = step.latest.program.regions
    assert len(region.owned) == 5
    assert [segment.region for segment in step.latest.program.segments] == [None, "cell", None]


def test_explain_says_what_runs_and_why():
    assert "weight gradients after the loop" in built(Recurrent(nn.GRU(3, 4)), torch.randn(30, 2, 3)).explain()
    assert "float32 LSTM is faster" in built(Recurrent(nn.LSTM(3, 4)), torch.randn(30, 2, 3)).explain()
    assert "3 steps are too few" in built(Recurrent(nn.GRU(3, 4)), torch.randn(3, 2, 3)).explain()


def test_a_loop_of_large_cells_stays_where_it_is():
    model = Loop(lambda cell, x, h: cell(x, h), nn.GRUCell(300, 300))
    example = torch.randn(8, 25, 300), torch.randn(8, 300)
    program = built(model, *example, plan=Plan([Deferred("cell")])).latest.program
    assert not program.regions
    assert "MFLOP, beside which the tape costs little" in program.notes[-1]
    assert built(model, *example, plan=Plan([Deferred("cell", tape="never")])).latest.program.regions


class Shouting(nn.GRU):
    pass


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (nn.LSTM(3, 4, proj_size=2), "proj_size"),
        (Shouting(3, 4), "changes what nn.GRU does"),
        (nn.Linear(3, 4), "it is called once"),
    ],
)
def test_modules_that_do_not_fit_are_refused(part, reason):
    model = nn.Sequential()
    model.add_module("part", part)
    with pytest.raises(RewriteError, match=reason):
        built(model, torch.randn(30, 2, 3))


def test_computed_weights_are_refused():
    part = nn.utils.parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0")
    with pytest.raises(RewriteError):
        built(Recurrent(part), torch.randn(30, 2, 3))


def test_a_value_at_a_border_is_refused():
    with pytest.raises(RewriteError, match="write the target as `part`"):
        built(Recurrent(nn.GRU(3, 4)), torch.randn(30, 2, 3), plan=Plan([Deferred("part:out")]))


def test_a_state_passed_as_one_tuple_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.LSTM(3, 3)

        def forward(self, x):
            x, state = self.part(x)
            return self.part(x, state)[0]

    with pytest.raises(RewriteError, match="as one tuple"):
        built(Twice(), torch.randn(30, 2, 3))


def test_packed_sequences_are_refused():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.GRU(3, 4)

        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(x, [5, 3], enforce_sorted=True)
            return nn.utils.rnn.pad_packed_sequence(self.part(packed)[0])[0]

    with pytest.raises(RewriteError):
        built(Packed(), torch.randn(5, 2, 3))


def test_hooks_are_refused():
    part = nn.GRU(3, 4)
    part.register_forward_hook(lambda *_: None)
    with pytest.raises(RewriteError, match="hooks"):
        built(Recurrent(part), torch.randn(30, 2, 3))


class OlderState(nn.Module):
    """Each call reads the state before the last one."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(3, 4)

    def forward(self, x, h):
        before = h
        for number in range(x.shape[1]):
            before, h = h, self.cell(x[:, number], before)
        return h


def test_loops_that_are_no_recurrence_are_refused():
    with pytest.raises(RewriteError, match="changed outside the cell"):
        looped(lambda cell, x, h: torch.tanh(cell(x, h)))
    with pytest.raises(RewriteError, match="draws random numbers"):
        looped(lambda cell, x, h: cell(nn.functional.dropout(x, 0.1), h))
    with pytest.raises(RewriteError, match=r"what the call before it left|no call reads"):
        built(OlderState(), torch.randn(2, 5, 3), torch.randn(2, 4), plan=Plan([Deferred("cell")]))


def test_calls_that_differ_are_refused():
    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(3, 4)

        def forward(self, x):
            h = self.cell(x[:, 0])
            for number in range(1, x.shape[1]):
                h = self.cell(x[:, number], h)
            return h

    with pytest.raises(RewriteError, match="do not do the same"):
        built(Uneven(), torch.randn(2, 5, 3), plan=Plan([Deferred("cell")]))


def test_cells_with_buffers_are_refused():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner = nn.BatchNorm1d(3), nn.GRUCell(3, 4)

        def forward(self, x, h):
            return self.inner(self.norm(x), h)

    with pytest.raises(RewriteError, match="holds buffers"):
        looped(lambda cell, x, h: cell(x, h), Normed())


class Stacked(nn.Module):
    """Two cells that take turns: each stands between two calls of the other."""

    def __init__(self, between=nn.Identity):
        super().__init__()
        self.lower, self.upper, self.between = nn.GRUCell(3, 4), nn.GRUCell(4, 4), between()

    def forward(self, x, h, g):
        for number in range(x.shape[1]):
            h = self.lower(x[:, number], h)
            g = self.upper(self.between(h), g)
        return g


def test_cells_that_take_turns_are_two_regions():
    plan = Plan([Deferred("lower", tape="never"), Deferred("upper", tape="never")])
    model = Stacked().double()
    given = torch.randn(2, 5, 3).double(), torch.randn(2, 4).double(), torch.randn(2, 4).double()
    step = built(model, *given, plan=plan)
    assert [region.name for region in step.latest.program.regions] == ["lower", "upper"]
    weights = list(model.parameters())
    ours, eager = (torch.autograd.grad(call(*given).square().sum(), weights) for call in (step, model))
    for left, right in zip(ours, eager, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_a_dropout_between_two_calls_is_refused():
    given = torch.randn(2, 5, 3), torch.randn(2, 4), torch.randn(2, 4)
    with pytest.raises(RewriteError, match="draws random numbers"):
        built(Stacked(nn.Dropout), *given, plan=Plan([Deferred("lower", tape="never")]))
