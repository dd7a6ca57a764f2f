"""Probes that come back NaN: masked, counted, and no worse for the others than theory says."""

import math

import numpy as np
import pytest
import torch
from array_box import ArrayBox, cosine, gradient, slope

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
