"""Recurrent models under Highway-BP against eager: exact in the end, close after one iteration, and bad input."""

import copy
import json

import pytest
import torch
from recurrent import SIZE, STEPS, WIDTH, Loop, OwnCell, Recurrent, error, example, train
from torch import nn

from rewriter import Highway, Plan, RewriteError, RewriteWarning, rewrite
from rewriter.runtime.recurrence.splitting import Splitting

ALL = STEPS - 1
OPTIONS = [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True, "bias": False}]
CELLS = [nn.GRUCell(WIDTH, SIZE), nn.LSTMCell(WIDTH, SIZE), nn.RNNCell(WIDTH, SIZE, bias=False), OwnCell()]


def iterated(model, iterations, shift=0.0, tape="never"):
    target = "part" if hasattr(model, "part") else "cell"
    return rewrite(model, Plan([Highway(target, tape=tape, iterations=iterations, shift=shift)]))


def compare(model, iterations, shift=0.0, given=None, skip=(), **options):
    """(largest relative error of a gradient, the rewritten step); outputs must be eager's bit for bit."""
    given = example(model, **options) if given is None else given
    step = iterated(model, iterations, shift)
    expected, found = train(model, model, given, skip=skip), train(step, model, given, skip=skip)
    assert all(torch.equal(a, b) for a, b in zip(expected[0], found[0], strict=True))
    return error(found[1], expected[1]), step


def rule_of(step):
    return step.latest.emitted.regions["part"].rule


def evaluated(steps):
    """Steps evaluated by all iterations of one recurrence."""
    return steps + sum(range(2, steps + 1))


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "two sides", "batch first"])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_modules_are_exact_in_the_end(kind, options):
    model = Recurrent(kind, **options).double()
    worst, step = compare(model, ALL)
    assert worst < 1e-12
    recurrences = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    assert step.ledger["part"].vjps == recurrences * evaluated(STEPS)


@pytest.mark.parametrize("shift", [0.3, 1.0])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_whatever_the_shift(kind, shift):
    model = Recurrent(kind, num_layers=2).double()
    assert compare(model, ALL, shift)[0] < 1e-12
    assert compare(model, 1, shift)[0] > 1e-6


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: type(cell).__name__)
def test_loops_are_exact_in_the_end(cell):
    model = Loop(copy.deepcopy(cell)).double()
    worst, step = compare(model, ALL, skip=() if not isinstance(cell, OwnCell) else (1,))
    assert worst < 1e-12
    assert step.ledger["cell"].vjps == evaluated(STEPS)


@pytest.mark.parametrize("model", [Recurrent(nn.GRU), Recurrent(nn.LSTM), Loop(nn.GRUCell(WIDTH, SIZE))])
def test_errors_shrink_with_the_iterations(model):
    model = copy.deepcopy(model).double()
    errors = [compare(model, count)[0] for count in (0, 1, 3)]
    assert errors[0] < 1
    assert 1e-12 < errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("model", [Recurrent(nn.LSTM), Loop(nn.LSTMCell(WIDTH, SIZE))], ids=["module", "loop"])
def test_k_counted_twice_is_seen(monkeypatch, model):
    """The negative control of the comparisons above. Other shapes than theirs: traces are shared."""
    plain = Splitting.__init__

    def wrong(self, joint, collapse):
        plain(self, joint, collapse)
        self.rest = collapse.updates

    monkeypatch.setattr(Splitting, "__init__", wrong)
    model = copy.deepcopy(model).double()
    given = example(model)
    rows = [each if each.shape[-2:] == (SIZE, SIZE) else torch.cat([each] * 3, _rows(model, each)) for each in given]
    assert compare(model, ALL, given=rows)[0] > 1e-3


def _rows(model, given):
    return 0 if isinstance(model, Loop) or given.dim() == 2 else 1


@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN])
def test_modules_in_single_precision(kind):
    given = example(Recurrent(kind), dtype=torch.float32, steps=40)
    assert compare(Recurrent(kind), 39, given=given)[0] < 1e-5


def keeping(gate=4.0, size=16):
    """A GRU whose update gate stays above .9 (torch's convention: the share that is kept)."""
    torch.manual_seed(0)
    part = nn.GRU(size, size)
    with torch.no_grad():
        part.bias_ih_l0[size : 2 * size] = gate
        for each in (part.weight_ih_l0, part.weight_hh_l0):
            each[size : 2 * size] *= 0.3
    return part.double()


def cosines(part, settings):
    """Of the gradient of all weights with the exact one, a loss at every step, per (iterations, shift)."""
    torch.manual_seed(1)
    x = torch.randn(96, 2, part.input_size, dtype=torch.float64)
    cotangent = torch.randn(96, 2, part.hidden_size, dtype=torch.float64)
    own = list(part.parameters())
    exact = torch.cat([each.flatten() for each in torch.autograd.grad(part(x)[0], own, cotangent)])
    found = []
    for iterations, shift in settings:
        step = rewrite(_Alone(part), Plan([Highway("part", tape="never", iterations=iterations, shift=shift)]))
        gradient = torch.cat([each.flatten() for each in torch.autograd.grad(step(x), own, cotangent)])
        found.append(float(torch.dot(gradient, exact) / gradient.norm() / exact.norm()))
    return found


class _Alone(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x)[0]


def test_one_iteration_is_worth_many_of_a_fixed_point():
    part = keeping()
    gates = torch.sigmoid(part.bias_ih_l0[16:32] + part.bias_hh_l0[16:32])
    assert gates.min() > 0.9
    highway = cosines(part, [(0, 0.0), (1, 0.0)])
    fixed_point = cosines(part, [(0, 1.0), (1, 1.0)])
    assert all(a > b for a, b in zip(highway, fixed_point, strict=True))
    assert highway[1] > 0.998
    assert fixed_point[1] < 0.5


def test_auto_stops_and_keeps_its_count():
    part = keeping()
    step = rewrite(_Alone(part), Plan([Highway("part", tape="never", iterations="auto")]))
    x = torch.randn(128, 4, 16, dtype=torch.float64)
    counts = []
    for _ in range(3):
        before = step.ledger["part"].vjps
        step(x).square().mean().backward()
        counts.append(step.ledger["part"].vjps - before)
    count = rule_of(step).get_state()["count"]
    assert 1 <= count <= 4
    assert counts == [128 + sum(128 - done for done in range(count))] * 3
    assert f"auto: {count} (measured at forward 0)" in str(rule_of(step).describe())
    again = rewrite(_Alone(part), Plan([Highway("part", tape="never", iterations="auto")]), example=(x,))
    rule_of(again).set_state(json.loads(json.dumps(rule_of(step).get_state())))
    assert rule_of(again).get_state() == rule_of(step).get_state()


def test_auto_falls_back_where_terms_grow():
    """Weights so large that every product adds to what it is given."""
    model = Recurrent(nn.RNN).double()
    with torch.no_grad():
        model.part.weight_hh_l0.copy_(-2.0 * torch.eye(SIZE, dtype=torch.float64))
        model.part.weight_ih_l0.mul_(0.01)
        model.part.bias_ih_l0.zero_()
        model.part.bias_hh_l0.zero_()
    x, h = torch.randn(30, 2, WIDTH, dtype=torch.float64), torch.zeros(1, 2, SIZE, dtype=torch.float64)
    step = iterated(model, "auto", tape="never")
    expected = train(model, model, [0.01 * x, h])[1]
    with pytest.warns(RewriteWarning, match="part do not converge"):
        found = train(step, model, [0.01 * x, h])[1]
    assert error(found, expected) < 1e-12
    again = train(step, model, [0.01 * x, h])[1]  # exact from here on, without a warning
    assert error(again, expected) < 1e-12
    assert step.ledger["part"].vjps == (30 + 30 + 29) + 30


def test_a_schedule_ends_exact():
    model = Recurrent(nn.GRU).double()
    step, given = iterated(model, ((0, 0), (1, 2), (2, "exact"))), example(model)
    expected = train(model, model, given)[1]
    errors = [error(train(step, model, given)[1], expected) for _ in range(3)]
    assert errors[0] > errors[1] > 1e-6
    assert errors[2] < 1e-12
    assert step.ledger["part"].vjps == STEPS + (STEPS + STEPS + STEPS - 1) + STEPS


@pytest.mark.parametrize("skip", [(0,), (1, 2)], ids=["last states only", "sequence only"])
def test_outputs_that_do_not_count(skip):
    model = Recurrent(nn.LSTM, bidirectional=True).double()
    assert compare(model, ALL, states=False, skip=skip)[0] < 1e-12


def test_frozen_weights_get_no_gradient():
    model = Recurrent(nn.GRU, num_layers=2).double()
    model.part.weight_hh_l0.requires_grad_(False)
    model.part.bias_ih_l1.requires_grad_(False)
    worst, step = compare(model, ALL)
    assert worst < 1e-12
    sum(each.sum() for each in step(*example(model))).backward()
    assert model.part.weight_hh_l0.grad is None
    assert model.part.weight_hh_l1.grad is not None


def test_zero_cotangents_give_zeros_and_teach_nothing():
    model = Recurrent(nn.GRU).double()
    step, given = iterated(model, "auto"), example(model)
    outputs = step(*given)
    gradients = torch.autograd.grad(outputs[0], list(model.part.parameters()), torch.zeros_like(outputs[0]))
    assert not any(each.any() for each in gradients)
    assert rule_of(step).get_state() == {}


def test_non_finite_cotangents_are_passed_on():
    model = Recurrent(nn.GRU).double()
    step, given = iterated(model, "auto"), example(model)
    outputs = step(*given)
    gradients = torch.autograd.grad(
        outputs[0], list(model.part.parameters()), torch.full_like(outputs[0], float("inf"))
    )
    assert not any(each.isfinite().all() for each in gradients)
    assert rule_of(step).get_state() == {}


@pytest.mark.parametrize("model", [Recurrent(nn.GRU), Loop(OwnCell())], ids=["module", "loop"])
def test_gradients_are_linear_in_the_cotangents(model):
    model = copy.deepcopy(model).double()
    step, given = iterated(model, 1), example(model)
    outputs, own = step(*given), list(model.parameters())[:4]
    first, second = torch.randn_like(outputs[0]), torch.randn_like(outputs[0])
    found = [
        torch.autograd.grad(outputs[0], own, each, retain_graph=True)
        for each in (first, second, 2 * first - 3 * second)
    ]
    for a, b, both in zip(*found, strict=True):
        assert torch.allclose(2 * a - 3 * b, both, rtol=1e-10, atol=1e-12)


def test_retained_graphs_give_the_same_again():
    model = Loop(nn.GRUCell(WIDTH, SIZE)).double()
    step, given = iterated(model, "auto"), example(model)
    own = list(model.cell.parameters())
    loss = step(*given)[0].square().sum()
    first = torch.autograd.grad(loss, own, retain_graph=True)
    second = torch.autograd.grad(loss, own)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_one_step_and_no_batch_dimension():
    assert compare(Recurrent(nn.LSTM).double(), 3, steps=1)[0] < 1e-12
    model = Recurrent(nn.GRU, num_layers=2).double()
    torch.manual_seed(0)
    given = [torch.randn(6, WIDTH, dtype=torch.float64), torch.randn(2, SIZE, dtype=torch.float64)]
    assert compare(model, 5, given=given)[0] < 1e-12


def test_wrong_iterations_are_refused():
    with pytest.raises(RewriteError, match="is not known"):
        iterated(Recurrent(nn.GRU), -1)


@pytest.mark.parametrize("iterations", [1, 6, "auto", ((0, 6), (1, 1))])
def test_the_planner_takes_the_exact_loop_where_iterations_take_longer(iterations):
    model = Recurrent(nn.GRU).double()
    step, given = iterated(model, iterations, tape="auto"), example(model, steps=40)
    exact = train(model, model, given)[1]
    found = train(step, model, given)[1]
    if iterations in (1, "auto"):
        assert "Highway-BP through time" in step.explain()
        assert error(found, exact) > 1e-12
    else:
        assert "6 iterations take longer here" in step.explain()
        assert error(found, exact) < 1e-12
        assert step.ledger["part"].vjps == 40
    if isinstance(iterations, tuple):
        assert error(train(step, model, given)[1], exact) > 1e-12


def test_large_steps_run_exactly_unless_told_otherwise():
    wide = nn.GRU(192, 192)
    x = torch.randn(24, 16, 192)
    for iterations, rule in ((1, "1 iterations take longer here"), ("auto", "one iteration takes longer"), (0, "auto")):
        step = rewrite(_Alone(wide), Plan([Highway("part", iterations=iterations)]), example=(x,))
        assert (rule in step.explain()) == (iterations != 0)


def test_the_planner_leaves_the_fused_kernel_alone():
    model = Recurrent(nn.LSTM)
    step = iterated(model, 1, tape="auto")
    given = example(model, torch.float32, steps=40)
    assert error(train(step, model, given)[1], train(model, model, given)[1]) == 0
    assert "fused" in step.explain()
