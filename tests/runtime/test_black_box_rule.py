import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from array_box import ArrayBox, cosine, forward, gradient, slope
from torch import nn

from rewriter.runtime.black_box import BlackBoxRule, ModuleEvaluator
from rewriter.runtime.errors import BoxError, RewriteError
from rewriter.runtime.estimators.clip import Clip
from rewriter.runtime.ledger import Ledger

RANDOM = np.random.default_rng(0)
MATRIX = RANDOM.standard_normal((16, 12)) / 4
X = torch.from_numpy(RANDOM.standard_normal((128, 16)))
V = torch.from_numpy(RANDOM.standard_normal((128, 12)))
NUMBERS = {"step_size": 1e-4, "input_scale": 1.0, "clip": None}


def rowwise(a):
    """Bit-equal for a row whatever its neighbours, as a matrix product need not be."""
    return np.stack([np.tanh((a * column).sum(1)) for column in MATRIX.T], 1)


def true_gradient(x=X, v=V):
    y = torch.tanh(x.double() @ torch.from_numpy(MATRIX))
    return (v.double() * (1 - y * y)) @ torch.from_numpy(MATRIX).T


# ---- what is equal to the bit -------------------------------------------------------------------------------------


@pytest.mark.parametrize("directions", ["orthogonal", "rademacher", "gaussian", "coordinate"])
@pytest.mark.parametrize("probes", [1, 5, 16, 20])
@pytest.mark.parametrize("difference", ["forward", "central"])
def test_chunks_and_ranks_change_no_bit(directions, probes, difference):
    options = {"directions": directions, "probes": probes, "difference": difference, **NUMBERS}
    (whole,) = gradient(BlackBoxRule(ArrayBox(rowwise), **options), X, v=V)
    (chunked,) = gradient(BlackBoxRule(ArrayBox(rowwise), max_rows=77, **options), X, v=V)
    assert torch.equal(whole, chunked)
    for ranks in (2, 4, 128):
        size = 128 // ranks
        parts = []
        for rank in (0, 1, ranks - 1):
            rows = slice(rank * size, (rank + 1) * size)
            rule = BlackBoxRule(ArrayBox(rowwise), **options)
            parts.append(torch.equal(gradient(rule, X[rows], v=V[rows], rank=rank)[0], whole[rows]))
        assert all(parts)
    (other,) = gradient(BlackBoxRule(ArrayBox(rowwise), **options), X[:64], v=V[:64], rank=1)  # negative control
    if directions != "coordinate" or probes < 16:
        assert not torch.equal(other, whole[:64])


@pytest.mark.parametrize("box", [rowwise, lambda a: np.sign(rowwise(a))])
def test_a_second_backward_uses_the_same_numbers(box):
    """retain_graph: also where step, scale and clip have moved on in between."""
    rule = BlackBoxRule(ArrayBox(box), probes=2)
    for step in range(5):
        gradient(rule, X, v=V, step=step)
    call, taken = forward(rule, X, step=5)
    (first,) = rule.backward(call, taken, (V,), (True,))
    before = rule.get_state()
    (again,) = rule.backward(call, taken, (V,), (True,))
    assert torch.equal(first, again)
    assert str(before) == str(rule.get_state())
    gradient(rule, 3 * X, v=V, step=6)
    assert torch.equal(first, rule.backward(call, taken, (V,), (True,))[0])
    assert not torch.equal(first, gradient(rule, X, v=V, step=5)[0]) or box is rowwise


def test_homogeneous_of_degree_one():
    def steps(box, power):
        rule = BlackBoxRule(ArrayBox(box), probes=2)
        return [gradient(rule, X, v=V * 2.0**power, step=step)[0] / 2.0**power for step in range(4)]

    for box in (rowwise, lambda a: np.sign(rowwise(a))):
        for one, other in zip(steps(box, 0), steps(box, 16), strict=True):
            assert torch.equal(one, other)
        for one, other in zip(steps(box, 0), steps(box, -60), strict=True):
            assert torch.allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("box", [rowwise, lambda a: np.sign(rowwise(a))])
def test_state_round_trip_continues_bit_equal(box):
    one = BlackBoxRule(ArrayBox(box))
    for step in range(23):
        gradient(one, X, v=V, step=step)
    state = pickle.loads(pickle.dumps(one.get_state()))
    other = BlackBoxRule(ArrayBox(box))
    other.set_state(state)
    assert json.dumps(state, default=lambda tensor: tensor.tolist())
    fresh = BlackBoxRule(ArrayBox(box))
    differs = False
    for step in range(23, 60):
        x = X * (1 + step / 50)
        expected = gradient(one, x, v=V, step=step)[0]
        assert torch.equal(expected, gradient(other, x, v=V, step=step)[0])
        differs |= not torch.equal(expected, gradient(fresh, x, v=V, step=step)[0])
    assert differs
    assert one.quality == other.quality
    assert str(one.get_state()) == str(other.get_state())


def test_survives_deepcopy():
    rule = BlackBoxRule(ArrayBox(rowwise))
    gradient(rule, X, v=V)
    twin = copy.deepcopy(rule)
    assert torch.equal(gradient(rule, X, v=V, step=1)[0], gradient(twin, X, v=V, step=1)[0])


# ---- what costs nothing, and what is counted ----------------------------------------------------------------------


def test_forward_computes_nothing_extra():
    box = ArrayBox(rowwise)
    rule = BlackBoxRule(box)
    _, taken = forward(rule, X)
    assert (box.calls, box.rows) == (1, 128)
    assert rule.ledger["region"].forward == rule.ledger.total("queries") == 128
    assert taken.outputs[0].dtype == torch.float32  # finish() of the box
    assert rule.quality is None
    assert rule.describe()["width"] is None


def test_rows_without_a_cotangent_cost_nothing():
    box = ArrayBox(rowwise)
    rule = BlackBoxRule(box, probes=3, **NUMBERS)
    v = V.clone()
    v[::4] = 0
    gradient(rule, X, v=v)
    before = box.rows
    (found,) = gradient(rule, X, v=v, step=1)
    assert box.rows - before == 128 + 3 * 96
    assert rule.ledger.total("queries") == box.rows
    assert not found[::4].any()
    (dense,) = gradient(BlackBoxRule(ArrayBox(rowwise), probes=3, **NUMBERS), X, v=V, step=1)
    kept = torch.arange(128) % 4 != 0
    assert torch.equal(found[kept], dense[kept])  # the others' numbers are their own
    before = box.rows
    assert not gradient(rule, X, v=torch.zeros_like(V), step=2)[0].any()
    assert box.rows - before == 128


def test_nothing_needed_or_nothing_incoming_costs_nothing():
    box = ArrayBox(rowwise)
    rule = BlackBoxRule(box)
    call, taken = forward(rule, X)
    assert rule.backward(call, taken, (V,), (False,)) == (None,)
    assert rule.backward(call, taken, (None,), (True,)) == (None,)
    assert box.rows == 128


@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("max_rows", [None, 100])
def test_the_ledger_agrees_with_an_independent_count(difference, max_rows):
    box, ledger = ArrayBox(lambda a: np.sign(rowwise(a))), Ledger()
    rule = BlackBoxRule(box, probes=2, difference=difference, max_rows=max_rows, ledger=ledger)
    for step in range(60):
        gradient(rule, X, v=V, step=step)
    rule.exact(*forward(rule, X), (V,), (True,))
    counts = ledger["region"]
    assert (counts.queries, counts.calls) == (box.rows, box.calls)
    sides = 2 if difference == "central" else 1
    assert counts.forward == 61 * 128
    assert counts.probes == 60 * 2 * sides * 128
    assert counts.quality == 2 * sides * 128
    assert counts.check == 16 * sides * 128
    assert 0 < counts.step_size < 110 + 32 * 16


def test_one_stacked_call_per_backward():
    box = ArrayBox(rowwise)
    rule = BlackBoxRule(box, probes=7, **NUMBERS)
    gradient(rule, X, v=V)
    assert box.calls == 2


# ---- failures -----------------------------------------------------------------------------------------------------


def test_failed_queries_are_masked_and_the_row_is_rebuilt():
    """A quarter of the probes fail: the cosine is that of the remaining ones."""
    noise, calls = np.random.default_rng(3), []

    def failing(a):
        calls.append(len(a))
        y = rowwise(a)
        if len(calls) % 2 == 0:
            y[noise.random(len(a)) < 0.25] = np.nan
        return y

    rule = BlackBoxRule(ArrayBox(failing), probes=8, **NUMBERS)
    found = torch.cat([gradient(rule, X, v=V, step=step)[0] for step in range(20)])
    true = true_gradient().repeat(20, 1)
    expected = math.sqrt(0.75 * 8 / 16)
    assert float(cosine(found, true).square().mean().sqrt()) == pytest.approx(expected, abs=0.02)
    assert slope(found, true) == pytest.approx(1, abs=0.03)
    assert rule.ledger.total("failed") == pytest.approx(0.25 * 20 * 8 * 128, rel=0.1)
    assert rule.quality.failed > 0.1


def test_half_a_central_pair_becomes_one_sided():
    limit = X[:, :1].numpy().max() + 1e-9

    def bounded(a):
        return np.where(a[:, :1] <= limit, rowwise(a), np.nan)

    rule = BlackBoxRule(ArrayBox(bounded), probes=16, difference="central", **NUMBERS)
    (found,) = gradient(rule, X, v=V)
    assert torch.allclose(found, true_gradient(), atol=1e-3)
    assert 0 < rule.ledger.total("failed") <= 17  # 16 probes and one for the quality
    row = int(X[:, 0].argmax())
    smooth = gradient(BlackBoxRule(ArrayBox(rowwise), probes=16, difference="central", **NUMBERS), X, v=V)[0]
    assert not torch.equal(found[row], smooth[row])


def test_rows_that_failed_in_forward_get_zero_and_are_counted():
    def failing(a):
        return np.where(a[:, :1] > 1.5, np.nan, rowwise(a))

    bad = X[:, 0] > 1.5
    rule = BlackBoxRule(ArrayBox(failing), probes=16, **NUMBERS)
    (found,) = gradient(rule, X, v=V)
    assert not found[bad].any()
    assert rule.ledger.total("failed") == int(bad.sum())
    assert torch.allclose(found[~bad], true_gradient()[~bad], atol=1e-2)


def test_too_many_failures_raise():
    calls = []

    def failing(a):
        calls.append(1)
        return rowwise(a) * (np.nan if len(calls) % 2 == 0 else 1)

    with pytest.raises(RewriteError, match="100% of the queries"):
        gradient(BlackBoxRule(ArrayBox(failing), **NUMBERS), X, v=V)
    calls.clear()
    rule = BlackBoxRule(ArrayBox(failing), max_failed=1.0, **NUMBERS)
    assert not gradient(rule, X, v=V)[0].any()
    assert rule.ledger.total("failed") == 256  # a probe and, this time, one for the quality
    with pytest.raises(RewriteError, match="100% of the queries"):
        gradient(BlackBoxRule(ArrayBox(lambda a: rowwise(a) * np.nan), **NUMBERS), X, v=V)


def test_non_finite_cotangents_pass_through():
    v = V.clone()
    v[3, 2], v[7, 0], v[9] = math.nan, math.inf, 0
    box = ArrayBox(rowwise)
    (found,) = gradient(BlackBoxRule(box, **NUMBERS), X, v=v)
    assert found[[3, 7]].isnan().all()
    assert not found[9].any()
    assert found.isfinite().all(1).sum() == 126
    assert box.rows == 128 + 2 * 125  # a probe and, this time, one for the quality


def test_an_overflowing_estimate_raises():
    rule = BlackBoxRule(ArrayBox(lambda a: a.astype(np.float32) * np.float32(1e30), torch.float32), **NUMBERS)
    with pytest.raises(RewriteError, match=r"overflowed|queries of a black box failed"):
        gradient(rule, X.float(), v=torch.full((128, 16), 1e20))


# ---- inputs and outputs of every sort -----------------------------------------------------------------------------


def test_several_inputs_outputs_and_integers():
    """Two floating inputs of different dtype and shape, an integer side input, two outputs and an integer output."""
    a, b = torch.randn(32, 2, 3), torch.randn(32, dtype=torch.float64)
    k = torch.randint(0, 4, (32,))

    def box(a, b, k):
        first = np.stack([a[:, 0, 0] * b, a[:, 1, 2] ** 2], 1)
        return first, np.sin(b) * (k + 1), k

    u, w = torch.randn(32, 2), torch.randn(32)
    (ga, gb, gk) = gradient(BlackBoxRule(ArrayBox(box), probes=7, **NUMBERS), a, b, k, v=(u, w, None))
    la, lb = a.double().requires_grad_(), b.clone().requires_grad_()
    y = (torch.stack([la[:, 0, 0] * lb, la[:, 1, 2] ** 2], 1) * u).sum() + (torch.sin(lb) * (k + 1) * w).sum()
    ta, tb = torch.autograd.grad(y, (la, lb))
    assert (ga.dtype, ga.shape, gb.dtype, gb.shape) == (a.dtype, a.shape, b.dtype, b.shape)
    assert gk is None
    assert torch.allclose(ga.double(), ta, atol=2e-3)
    assert torch.allclose(gb, tb, atol=2e-3)
    rule = BlackBoxRule(ArrayBox(box), probes=7, **NUMBERS)
    only = gradient(rule, a, b, k, v=(None, w, None), needed=(False, True, False))
    assert only[0] is None
    assert torch.allclose(only[1], torch.cos(b) * (k + 1) * w, atol=2e-3)
    assert rule.describe()["width"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_have_the_dtype_of_the_input(dtype):
    (found,) = gradient(BlackBoxRule(ArrayBox(rowwise), probes=16), X.to(dtype), v=V)
    assert found.dtype == dtype
    assert slope(found, true_gradient(X.to(dtype))) == pytest.approx(1, abs=0.01)


def simulator(repeats):
    """A box with a parameter vector of its own, `shared`, of three numbers."""

    def box(x, shared):
        shared = shared if repeats else shared[None]
        return np.tanh(x * shared[:, :1] + shared[:, 1:2]) * shared[:, 2:3]

    return ArrayBox(box, shared=(1,), repeats_shared=repeats)


@pytest.mark.parametrize("repeats", [True, False])
def test_shared_inputs_sum_over_rows(repeats):
    x, shared, v = X[:, :5], torch.tensor([0.7, -0.2, 1.3], dtype=torch.float64), V[:, :5]
    leaf, theta = x.clone().requires_grad_(), shared.clone().requires_grad_()
    y = torch.tanh(leaf * theta[0] + theta[1]) * theta[2]
    true_x, true_shared = torch.autograd.grad((y * v).sum(), (leaf, theta))
    box = simulator(repeats)
    rule = BlackBoxRule(box, probes=8)
    found_x, found_shared = gradient(rule, x, shared, v=v)
    assert found_shared.shape == (3,)
    assert torch.allclose(found_x, true_x, atol=1e-5)
    assert torch.allclose(found_shared, true_shared, atol=1e-4)
    assert rule.ledger.total("queries") == box.rows
    before = box.rows
    gradient(rule, x, shared, v=v, step=1)
    expected = 128 * 8 if repeats else 128 * (8 + 3)  # the whole batch once for each of min(probes, 3) directions
    assert box.rows - before == 128 + expected
    exact = rule.exact(*forward(rule, x, shared), (v,), (True, True))
    assert torch.allclose(exact[1], true_shared, atol=1e-4)
    poisoned = v.clone()
    poisoned[0, 0] = math.nan
    found_x, found_shared = gradient(rule, x, shared, v=poisoned, step=2)
    assert found_shared.isnan().all()
    assert found_x[0].isnan().all()
    assert found_x[1:].isfinite().all()


def test_shared_inputs_alone():
    box = simulator(False)
    rule = BlackBoxRule(box)
    found = gradient(rule, X[:, :5], torch.tensor([0.7, -0.2, 1.3]), v=V[:, :5], needed=(False, True))
    assert found[0] is None
    assert found[1].dtype == torch.float32
    assert rule.quality.predicted_cosine == pytest.approx(math.sqrt(1 / 3))
    assert rule.describe()["width"] == 3


def test_modules_as_boxes():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 12)).double()
    rule = BlackBoxRule(ModuleEvaluator(net), probes=16)
    (found,) = gradient(rule, X, v=V)
    leaf = X.clone().requires_grad_()
    (true,) = torch.autograd.grad((net(leaf) * V).sum(), leaf)
    assert float(cosine(found, true).min()) > 0.999
    assert slope(found, true) == pytest.approx(1, abs=1e-3)
    assert all(parameter.grad is None for parameter in net.parameters())
    with pytest.raises(BoxError, match="returned dict"):
        forward(BlackBoxRule(ModuleEvaluator(lambda x: {"y": x})), X)
    with pytest.raises(BoxError, match="returned dict"):
        ModuleEvaluator(lambda x: {"y": x}, "lookup").evaluate(X)


def test_modules_with_a_mask_that_has_no_rows():
    mask = torch.rand(16, dtype=torch.float64)
    rule = BlackBoxRule(ModuleEvaluator(lambda x, mask: torch.sin(x * mask), shared=(1,)), probes=16)
    found = gradient(rule, X, mask, v=X, needed=(True, False))
    assert torch.allclose(found[0], X * mask * torch.cos(X * mask), atol=1e-5)


def test_autocast_does_not_reach_the_estimator():
    options = {"probes": 5, "directions": "gaussian", **NUMBERS}
    (plain,) = gradient(BlackBoxRule(ArrayBox(rowwise), **options), X, v=V)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (inside,) = gradient(BlackBoxRule(ArrayBox(rowwise), **options), X, v=V)
    assert torch.equal(plain, inside)


# ---- options and reports ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"probes": 0},
        {"probes": 1.5},
        {"directions": "spiral"},
        {"difference": "backward"},
        {"step_size": -1.0},
        {"step_size": "small"},
        {"clip": 2.0},
        {"reconstruction": "median"},
        {"input_scale": [1.0, 0.0]},
        {"max_rows": 0},
        {"max_failed": 1.5},
    ],
)
def test_bad_options_are_refused_by_name(options):
    with pytest.raises(RewriteError, match=next(iter(options))):
        BlackBoxRule(ArrayBox(rowwise), **options)


def test_a_scale_per_element_must_fit():
    rule = BlackBoxRule(ArrayBox(rowwise), input_scale=[1.0, 2.0])
    with pytest.raises(RewriteError, match="2 numbers for 16"):
        gradient(rule, X, v=V)
    scale = np.linspace(0.5, 2, 16).tolist()
    (found,) = gradient(BlackBoxRule(ArrayBox(rowwise), input_scale=scale, probes=16), X, v=V)
    assert torch.allclose(found, true_gradient(), atol=1e-4)


def test_trainable_parameters_of_the_box_are_refused():
    rule = BlackBoxRule(ArrayBox(rowwise))
    call, taken = forward(rule, X)
    with pytest.raises(RewriteError, match="parameter of a black box"):
        rule.backward(call, taken, (V,), (True, True))


def test_describe():
    rule = BlackBoxRule(ArrayBox(rowwise, label="pricing"), probes=4, difference="central")
    gradient(rule, X, v=V)
    facts = rule.describe()
    assert facts["box"] == "pricing"
    assert (facts["width"], facts["probes"], facts["kind"], facts["rows_per_backward"]) == (16, 4, "smooth", 1024)
    assert facts["predicted_cosine"] == 0.5
    assert facts["measured_cosine"] == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize(("quantile", "largest"), [(0.9, 1.0), (0.5, 0.6), (1.0, 100.0)])
def test_clip_limits_row_norms(quantile, largest):
    """Norms between 0 and 1, but one row in sixteen a hundred times longer; the limit scales with the cotangents."""
    direction = RANDOM.standard_normal((128, 4))
    gradients = np.linspace(0, 1, 128)[:, None] * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    gradients[15::16] *= 100
    clip = Clip(quantile)
    for _ in range(3):
        ratio = clip.update(gradients, np.full(128, 2.0))
    clipped, share = clip.apply(5 * gradients, np.full(128, 10.0), ratio)
    norms = np.linalg.norm(clipped, axis=1)
    assert 0.8 * largest < norms.max() / 5 <= largest * 1.001
    assert share == pytest.approx(1 - quantile, abs=0.01)
    kept = norms < 0.999 * norms.max()
    assert np.allclose(clipped[kept], 5 * gradients[kept])


@pytest.mark.parametrize("clip", ["auto", 0.5, None])
def test_clip_is_on_where_the_box_is_not_smooth(clip):
    for box, on in ((rowwise, clip == 0.5), (lambda a: np.sign(rowwise(a)), clip is not None)):
        rule = BlackBoxRule(ArrayBox(box), clip=clip)
        for step in range(5):
            gradient(rule, X, v=V, step=step)
        assert (rule.quality.clipped > 0) == on


def test_clip_where_most_rows_see_no_change():
    """A box that reacts in one row of twenty: the quantile is that of the rows with a gradient, and nothing is NaN."""
    box = ArrayBox(lambda a: np.where(a[:, :1] > 1.5, np.sign(rowwise(a)), 0))
    rule = BlackBoxRule(box, step_size=0.3, clip=0.9)
    (found,) = gradient(rule, X, v=V)
    assert found.isfinite().all()
    assert 0 < found.any(1).sum() < 12
