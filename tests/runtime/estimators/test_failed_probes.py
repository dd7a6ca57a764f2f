"""Probes that come back NaN: masked, counted, and no worse for the others than theory says."""

import math

import numpy as np
import pytest
import torch
from array_box import ArrayBox, cosine, forward, gradient, slope

from rewriter.runtime.black_box import BlackBoxRule
from rewriter.runtime.errors import RewriteError
from rewriter.runtime.ledger import Ledger

ROWS, WIDTH, SHARE = 2000, 32, 0.25
MATRIX = np.random.default_rng(0).standard_normal((WIDTH, 6))
X = torch.from_numpy(np.random.default_rng(1).standard_normal((ROWS, WIDTH)))
V = torch.from_numpy(np.random.default_rng(2).standard_normal((ROWS, 6)))
TRUE = V @ torch.from_numpy(MATRIX).T
NUMBERS = {"step_size": 1e-3, "input_scale": 1.0, "clip": None}


def failing(share):
    """Linear; a share of the rows, drawn anew at every call, is NaN. At the points of the forward it never fails."""
    random = np.random.default_rng(3)
    sound = {row.tobytes() for row in X.numpy()}

    def function(a):
        y = a @ MATRIX
        lost = random.random(len(y)) < share
        y[lost & [row.tobytes() not in sound for row in a]] = math.nan
        return y

    return function


@pytest.mark.parametrize("directions", ["orthogonal", "gaussian", "rademacher", "coordinate"])
@pytest.mark.parametrize("difference", ["forward", "central"])
def test_a_quarter_of_the_probes_fails(directions, difference):
    """Cosine sqrt(.75 q / d) at q = d / 2; a central pair that half fails is one-sided: only 1 / 16 are lost."""
    probes = WIDTH // 2
    ledger = Ledger()
    rule = BlackBoxRule(
        ArrayBox(failing(SHARE)),
        probes=probes,
        directions=directions,
        difference=difference,
        ledger=ledger,
        **NUMBERS,
    )
    gradient(rule, X, v=V)
    (found,) = gradient(rule, X, v=V, step=1)
    usable = 1 - SHARE if difference == "forward" else 1 - SHARE**2
    rms = float(cosine(found, TRUE).square().mean().sqrt())
    assert rms == pytest.approx(math.sqrt(usable * probes / WIDTH), abs=0.02)
    assert slope(found, TRUE) == pytest.approx(1.0, abs=0.03)
    made = ledger["region"].probes + ledger["region"].quality
    assert ledger["region"].failed / made == pytest.approx(SHARE, rel=0.1)


def test_averaging_what_is_left_as_if_nothing_failed_would_shrink():
    """The negative control: zeros in the place of lost slopes."""
    rule = BlackBoxRule(ArrayBox(lambda a: a @ MATRIX), probes=WIDTH // 2, **NUMBERS)
    (found,) = gradient(rule, X, v=V)
    assert slope(found, TRUE) == pytest.approx(1.0, abs=0.03)
    assert slope((1 - SHARE) * found, TRUE) < 0.8


def test_past_the_declared_share_backward_raises():
    rule = BlackBoxRule(ArrayBox(failing(SHARE)), probes=2, max_failed=0.2, **NUMBERS)
    with pytest.raises(RewriteError, match="of the queries of a black box failed") as found:
        gradient(rule, X, v=V)
    assert "max_failed" in str(found.value)


def test_rows_without_a_single_probe_left_get_zero():
    rule = BlackBoxRule(ArrayBox(failing(0.45)), probes=1, **NUMBERS)
    (found,) = gradient(rule, X, v=V)
    lost = ~found.any(1)
    assert 0.35 < float(lost.double().mean()) < 0.55
    assert slope(found[~lost], TRUE[~lost]) == pytest.approx(1.0, abs=0.2)


def shared_rule(**options):
    """y = x p with whole numbers as codes: a row with x[0] = 9 fails wherever it is evaluated."""

    def function(a, p):
        return np.where(a[:, :1] == 9, math.nan, a * p)

    return BlackBoxRule(ArrayBox(function, shared=(1,)), **{**NUMBERS, **options})


P = torch.linspace(0.5, 1.5, 4, dtype=torch.float64)


def rows_with_failures(count):
    x = X[:20, :4].clone()
    x[:count, 0] = 9
    return x


def test_rows_lost_in_forward_weigh_as_rows_where_the_batch_is_probed_as_one():
    """Two rows of twenty are a tenth, however few probes of the whole batch there are."""
    x, v = rows_with_failures(2), torch.ones(20, 4, dtype=torch.float64)
    rule = shared_rule(probes=4)
    _, found = gradient(rule, x, P, v=v, needed=(False, True))
    assert torch.allclose(found, x[2:].sum(0), rtol=1e-6)
    assert rule.quality.failed < 0.1
    with pytest.raises(RewriteError, match="of the queries of a black box failed"):
        gradient(shared_rule(probes=4), rows_with_failures(12), P, v=v, needed=(False, True))


def test_rows_lost_in_forward_are_counted_once_for_both_groups_and_both_backwards():
    rule = shared_rule()
    x, v = rows_with_failures(2), torch.ones(20, 4, dtype=torch.float64)
    call, taken = forward(rule, x, P)
    for _ in range(2):
        rule.backward(call, taken, (v,), (True, True))
    assert rule.ledger["region"].failed == 2
    rule = shared_rule(max_failed=1.0)
    call, taken = forward(rule, rows_with_failures(20), P)
    for _ in range(2):
        assert not any(found.any() for found in rule.backward(call, taken, (v,), (True, True)))
    assert rule.ledger["region"].failed == 20


def test_a_lost_probe_of_the_whole_batch_counts_its_rows():
    """The first probe beside the forward and the sweepless step fails in one row of twenty."""

    def function(a, p):
        y = a * p
        y[0, 0] = y[0, 0] if bool((p == P.numpy()).all()) else math.nan
        return y

    rule = BlackBoxRule(ArrayBox(function, shared=(1,)), max_failed=1.0, **NUMBERS)
    _, found = gradient(rule, X[:20, :4], P, v=torch.ones(20, 4), needed=(False, True))
    assert not found.any()
    counts = rule.ledger["region"]
    assert counts.failed == counts.probes + counts.quality == 40


def test_a_coordinate_that_fails_leaves_the_reference_of_the_others_alone():
    def function(a):
        y = a @ MATRIX
        y[a[:, 3] > X.numpy()[:, 3].max()] = math.nan
        return y

    x = X[[int(X[:, 3].argmax())]]
    rule = BlackBoxRule(ArrayBox(function), step_size=1e-2, input_scale=1.0, clip=None)
    call, taken = forward(rule, x)
    (found,) = rule.exact(call, taken, (V[:1],), (True,))
    expected = V[:1] @ torch.from_numpy(MATRIX).T
    expected[0, 3] = 0.0
    assert torch.allclose(found, expected, rtol=1e-6)


def test_a_row_that_is_not_finite_does_not_spoil_the_scale():
    """The box passes missing numbers over; the scale waits for a batch without them."""
    box = ArrayBox(lambda a: np.nan_to_num(np.sin(a / 1e-4)))
    rule = BlackBoxRule(box, probes=4)
    x, v = 1e-4 * X[:64, :4], torch.ones(64, 4, dtype=torch.float64)
    bad = x.clone()
    bad[0] = math.nan
    gradient(rule, bad, v=v)
    (found,) = gradient(rule, x, v=v, step=1)
    assert rule.describe()["absolute_step"] < 1e-5
    assert torch.allclose(found, torch.cos(x / 1e-4) / 1e-4, rtol=1e-3, atol=1)
    assert all(bool(torch.as_tensor(number).isfinite().all()) for number in rule.get_state()["rows"]["scale"].values())
