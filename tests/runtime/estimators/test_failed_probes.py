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


def test_a_row_that_every_probe_of_the_whole_batch_loses_is_left_out_alone():
    def function(a, p):
        y = a * p
        y[0, 0] = y[0, 0] if bool((p == P.numpy()).all()) else math.nan
        return y

    rule = BlackBoxRule(ArrayBox(function, shared=(1,)), probes=4, **NUMBERS)
    _, found = gradient(rule, X[:20, :4], P, v=torch.ones(20, 4), needed=(False, True))
    assert torch.allclose(found, X[1:20, :4].sum(0), rtol=1e-6)
    counts = rule.ledger["region"]
    assert counts.failed == 5  # four probes and one that measures quality
    assert counts.probes + counts.quality == 100


@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("probes", [1, 2, 4])
def test_a_quarter_of_the_rows_is_lost_in_probes_of_the_whole_batch(probes, difference):
    """Calibration: hardly a probe of 200 rows comes back whole, and only rows that none has are missing."""
    random = np.random.default_rng(4)

    def function(a, p):
        y = a * p
        if bool((p != P.numpy()).any()):
            y[random.random(len(y)) < 0.25] = math.nan
        return y

    rule = BlackBoxRule(ArrayBox(function, shared=(1,)), probes=probes, difference=difference, **NUMBERS)
    x, v = X[:200, :4] + 1, torch.ones(200, 4, dtype=torch.float64)
    found = torch.stack([gradient(rule, x, P, v=v, needed=(False, True), step=step)[1] for step in range(400)])
    loss = 0.25 if difference == "forward" else 1 - 0.75**2
    expected = x.sum(0) * (1 - loss**probes)
    error = (found.mean(0) - expected).abs()
    assert (error < 4.5 * found.std(0) / 20 + 0.01 * expected).all()
    assert slope(found, expected.expand_as(found)) == pytest.approx(1, abs=0.05)
    assert slope(found * 0.85, expected.expand_as(found)) < 0.9  # negative control
    counts = rule.ledger["region"]
    assert counts.failed / (counts.probes + counts.quality) == pytest.approx(0.25, abs=0.01)
