"""Recurrent models under `Deferred` against eager: outputs bit for bit, every gradient, and what may go wrong."""

import copy

import pytest
import torch
from recurrent import ROWS, SIZE, STEPS, WIDTH, Loop, OwnCell, Recurrent, error, example, train
from torch import nn
from torch.utils.checkpoint import checkpoint

from rewriter import Deferred, Plan, RewriteError, rewrite
from rewriter.runtime.recurrence import all_steps, native


def deferred(model, tape="never"):
    return rewrite(model, Plan([Deferred("part" if hasattr(model, "part") else "cell", tape=tape)]))


def name_of(step):
    return step.latest.program.regions[0].name


def compare(model, tape="never", given=None, skip=(), **options):
    """(outputs equal bit for bit, largest relative error of a gradient, the rewritten step)."""
    given = example(model, **options) if given is None else given
    step = deferred(model, tape)
    train(step, model, given)  # captures, and draws for it
    expected, found = train(model, model, given, skip=skip), train(step, model, given, skip=skip)
    same = all(torch.equal(a, b) for a, b in zip(expected[0], found[0], strict=True))
    return same, error(found[1], expected[1]), step


OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True, "bias": False},
    {"num_layers": 3, "dropout": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "two sides", "batch first", "dropout"])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_modules_are_exact(kind, options):
    model = Recurrent(kind, **options).double()
    same, worst, step = compare(model)
    assert same
    assert worst < 1e-12
    recurrences = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    assert step.ledger["part"].vjps == 2 * STEPS * recurrences


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_modules_in_single_precision(kind):
    same, worst, _ = compare(Recurrent(kind, num_layers=2), dtype=torch.float32, steps=40)
    assert same or kind is nn.LSTM  # whose fused kernel rounds otherwise when it need not remember
    assert worst < 1e-5


def test_the_fused_kernel_in_single_precision():
    model = Recurrent(nn.LSTM, num_layers=2)
    given = example(model, torch.float32, steps=40)
    expected, found = model(*given), deferred(model)(*given)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(expected, found, strict=True))


def test_rnn_with_relu():
    same, worst, _ = compare(Recurrent(nn.RNN, nonlinearity="relu").double())
    assert same
    assert worst < 1e-12


@pytest.mark.parametrize("skip", [(0,), (1, 2)], ids=["last states only", "sequence only"])
def test_outputs_that_do_not_count(skip):
    same, worst, _ = compare(Recurrent(nn.LSTM, bidirectional=True).double(), states=False, skip=skip)
    assert same
    assert worst < 1e-12


@pytest.mark.parametrize(
    "cell", [nn.GRUCell(WIDTH, SIZE), nn.LSTMCell(WIDTH, SIZE), nn.RNNCell(WIDTH, SIZE, bias=False), OwnCell()]
)
def test_loops_are_exact(cell):
    same, worst, step = compare(Loop(copy.deepcopy(cell)).double(), skip=() if not isinstance(cell, OwnCell) else (1,))
    assert same
    assert worst < 1e-12
    assert step.ledger["cell"].vjps == 2 * STEPS


@pytest.mark.parametrize("model", [Recurrent(nn.GRU), Loop(nn.GRUCell(WIDTH, SIZE))], ids=["module", "loop"])
def test_a_wrong_coefficient_is_seen(monkeypatch, model):
    """The negative control of the comparisons above."""
    plain = all_steps.AllSteps.__call__

    def wrong(self, values):
        plain(self, values)
        for node in [node for node in self.wanted if node.name.startswith("cat")]:
            values[node] = values[node] * (1 + 1e-6)

    monkeypatch.setattr(all_steps.AllSteps, "__call__", wrong)
    assert compare(copy.deepcopy(model).double())[1] > 1e-8


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_with_results_kept(monkeypatch, kind):
    """What large steps do: the cell runs step by step, where that gives torch's own numbers."""
    monkeypatch.setattr(native, "_LARGE", dict.fromkeys(native._LARGE, 0))
    same, worst, step = compare(Recurrent(kind, bidirectional=True, num_layers=2).double())
    assert same
    assert worst < 1e-12
    assert set(native._equal.values()) <= {True, False}
    again = step.ledger["part"].forwards
    assert again in (0, STEPS * 2, STEPS * 4, STEPS * 6, STEPS * 8)


def test_steps_that_give_other_numbers_are_not_kept(monkeypatch):
    monkeypatch.setattr(native, "_LARGE", dict.fromkeys(native._LARGE, 0))
    model = Recurrent(nn.GRU).double()
    given = example(model)
    step = rewrite(model, Plan([Deferred("part", tape="never")]), example=tuple(given))
    monkeypatch.setattr(native.torch, "equal", lambda a, b: False)
    train(step, step.model, given)
    train(step, step.model, given)
    assert step.ledger["part"].forwards == 2 * STEPS


def test_one_step_and_no_batch_dimension():
    assert compare(Recurrent(nn.LSTM).double(), steps=1)[1] < 1e-12
    model = Recurrent(nn.GRU, num_layers=2).double()
    torch.manual_seed(0)
    given = [torch.randn(6, WIDTH, dtype=torch.float64), torch.randn(2, SIZE, dtype=torch.float64)]
    same, worst, _ = compare(model, given=given)
    assert same
    assert worst < 1e-12


def test_frozen_parameters_get_no_gradient():
    model = Recurrent(nn.GRU, num_layers=2).double()
    model.part.weight_hh_l0.requires_grad_(False)
    model.part.bias_ih_l1.requires_grad_(False)
    same, worst, step = compare(model)
    assert same
    assert worst < 1e-12
    loss = sum(each.sum() for each in step(*example(model)))
    loss.backward()
    assert model.part.weight_hh_l0.grad is None
    assert model.part.weight_hh_l1.grad is not None


def test_tied_weights_get_the_sum():
    model = Recurrent(nn.RNN, num_layers=2, bidirectional=True).double()
    model.part.weight_hh_l0_reverse = model.part.weight_hh_l0
    assert compare(model)[1] < 1e-12


def test_no_grad_and_eval_give_the_numbers_of_eager():
    model = Recurrent(nn.GRU).double()
    step, given = deferred(model), example(model)
    step(*given)
    with torch.no_grad():
        assert torch.equal(step(*given)[0], model(*given)[0])
    assert torch.equal(step.eval()(*given)[0], model.eval()(*given)[0])


def test_other_batch_sizes_and_lengths():
    model = Recurrent(nn.GRU).double()
    step = deferred(model)
    for steps, rows in ((7, 3), (7, 5), (12, 3)):
        given = [torch.randn(steps, rows, WIDTH, dtype=torch.float64), torch.randn(1, rows, SIZE, dtype=torch.float64)]
        assert error(train(step, model, given)[1], train(model, model, given)[1]) < 1e-12


def test_no_rows():
    model = Recurrent(nn.GRU).double()
    step = deferred(model)
    step(*example(model))
    given = [torch.randn(STEPS, 0, WIDTH, dtype=torch.float64), torch.randn(1, 0, SIZE, dtype=torch.float64)]
    outputs, gradients = train(step, model, given)
    assert outputs[0].shape == (STEPS, 0, 2)
    assert not any(each.any() for each in gradients)


def test_wrong_shapes_raise_as_in_eager():
    model = Recurrent(nn.GRU).double()
    step, given = deferred(model), example(model)
    step(*given)
    with pytest.raises(RuntimeError):
        step(given[0], torch.randn(1, ROWS + 1, SIZE, dtype=torch.float64))


def test_autocast_keeps_the_tape_or_is_refused():
    model = Recurrent(nn.GRU)
    given = example(model, dtype=torch.float32, steps=30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same, worst, step = compare(model, "auto", given=given)
    assert same
    assert worst < 1e-2
    assert "autocast is on" in step.explain()
    strict = deferred(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RewriteError, match="float32 or float64"):
        strict(*given)


def test_the_planner_leaves_the_fused_kernel_alone():
    same, worst, step = compare(Recurrent(nn.LSTM), "auto", dtype=torch.float32, steps=40)
    assert same
    assert worst == 0
    assert step.ledger["part"].vjps == 2  # of the tape


def test_retained_graphs_give_the_same_again():
    model = Loop(nn.GRUCell(WIDTH, SIZE)).double()
    step, given = deferred(model), example(model)
    parameters = list(model.cell.parameters())
    loss = step(*given)[0].square().sum()
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("model", [Recurrent(nn.LSTM), Loop(nn.LSTMCell(WIDTH, SIZE))], ids=["module", "loop"])
def test_under_checkpoint(model):
    model = copy.deepcopy(model).double()
    step, given = deferred(model), example(model)
    expected = train(model, model, given)[1]
    found = train(lambda *each: checkpoint(step, *each, use_reentrant=False), model, given)[1]
    assert error(found, expected) < 1e-12


def test_weights_changed_before_backward_are_noticed():
    model = Recurrent(nn.GRU).double()
    step, given = deferred(model), example(model)
    loss = step(*given)[0].sum()
    with torch.no_grad():
        model.part.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_differentiating_twice_is_refused():
    model = Recurrent(nn.GRU).double()
    step, given = deferred(model), example(model)
    weight = model.part.weight_hh_l0
    (gradient,) = torch.autograd.grad(step(*given)[0].square().sum(), weight, create_graph=True)
    with pytest.raises(RewriteError, match="differentiated twice"):
        gradient.sum().backward()


def test_check_agrees_with_autograd():
    model = Recurrent(nn.GRU).double()
    step = deferred(model)
    (x, h) = example(model)
    report = rewrite(model, Plan([Deferred("part", tape="never")]), loss=lambda out, y: out[0].square().mean() + y)
    step = report.check(x.requires_grad_(), h, target=torch.zeros(()))
    assert step.regions[0].inputs.cosine == pytest.approx(1)
    assert step.regions[0].inputs.slope == pytest.approx(1)
