"""Estimators against their closed forms, on boxes that are linear, so that nothing but the probes errs."""

import math

import pytest
import torch
from array_box import ArrayBox, cosine, gradient, relative_error, slope

from rewriter.runtime.black_box import BlackBoxRule

TRIALS = 2000


def linear_problem(width, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(width, 4, generator=generator, dtype=torch.float64)
    v = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return ArrayBox(lambda a: a @ matrix.numpy()), x, v, v @ matrix.T


def estimates(width, probes, **options):
    """TRIALS rows of estimates and of true gradients, in batches that keep memory small."""
    batches = max(1, TRIALS * probes * width // 2**22)
    found, true = [], []
    for batch in range(batches):
        box, x, v, exact = linear_problem(width, TRIALS // batches, batch)
        rule = BlackBoxRule(box, probes=probes, step_size=1e-3, input_scale=1.0, clip=None, **options)
        found.append(gradient(rule, x, v=v, step=100 + batch)[0])
        true.append(exact)
    return torch.cat(found), torch.cat(true)


THEORY = {
    "gaussian": lambda d, q: (d + 1) / q,
    "rademacher": lambda d, q: (d - 1) / q,
    "orthogonal": lambda d, q: d / q - 1,
    "coordinate": lambda d, q: d / q - 1,
}


@pytest.mark.parametrize("width", [16, 64, 256])
@pytest.mark.parametrize("share", [0, 1 / 8, 1 / 2])
@pytest.mark.parametrize("kind", list(THEORY))
def test_relative_error_slope_and_cosine(kind, width, share):
    probes = max(1, int(share * width))
    reconstruction = "average" if kind in ("gaussian", "rademacher") else "least_squares"
    found, true = estimates(width, probes, directions=kind, reconstruction=reconstruction)
    expected = THEORY[kind](width, probes)
    tolerance = 0.1 if kind != "coordinate" or probes > 1 else 0.2  # one coordinate: the error itself is heavy-tailed
    assert relative_error(found, true) == pytest.approx(expected, rel=tolerance)
    standard_error = math.sqrt(expected / TRIALS)  # of the slope: rows err independently
    assert slope(found, true) == pytest.approx(1, abs=max(0.03, 3 * standard_error))
    squared = float(cosine(found, true).square().mean())
    assert squared == pytest.approx(1 / (1 + expected), rel=0.25)
    # negative control: a wrong scale is seen by error and slope alike, though not by the cosine
    assert relative_error(found * 3, true) > expected * 1.1
    assert abs(slope(found * 3, true) - 1) > 4 * standard_error


@pytest.mark.parametrize("kind", list(THEORY))
def test_least_squares_projects_whatever_the_directions(kind):
    found, true = estimates(16, 6, directions=kind)
    assert relative_error(found, true) == pytest.approx(16 / 6 - 1, rel=0.1)
    assert slope(found, true) == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize("kind", list(THEORY))
@pytest.mark.parametrize("difference", ["forward", "central"])
def test_exact_at_full_width(kind, difference):
    box, x, v, true = linear_problem(16, 128)
    rule = BlackBoxRule(box, probes=16, directions=kind, difference=difference)
    assert rule.quality is None
    (found,) = gradient(rule, x, v=v)
    if kind != "rademacher":  # signs may be dependent, and then a row is a projection
        assert relative_error(found, true) < 1e-6
    assert rule.quality.predicted_cosine == 1.0


@pytest.mark.parametrize("kind", list(THEORY))
@pytest.mark.parametrize("reconstruction", ["average", "least_squares"])
@pytest.mark.parametrize("probes", [1, 3, 5])
def test_unbiased(kind, reconstruction, probes):
    """z-test of every coordinate over 20,000 rows with one gradient."""
    rows = 20000
    box, x, _, _ = linear_problem(5, rows)
    v = torch.tensor([[1.0, -2.0, 0.5, 3.0]], dtype=torch.float64).expand(rows, 4)
    (true,) = BlackBoxRule(box, probes=5, directions="coordinate", step_size=1e-3, input_scale=1.0, clip=None).exact(
        *forward_of(box, x), (v,), (True,)
    )
    rule = BlackBoxRule(
        box, probes=probes, directions=kind, reconstruction=reconstruction, step_size=1e-3, input_scale=1.0, clip=None
    )
    (found,) = gradient(rule, x, v=v)
    error = (found - true).double()
    z = error.mean(0) / (error.std(0) / math.sqrt(rows)).clamp(min=1e-9)
    assert float(z.abs().max()) < 4.5
    if float(error.std()) > 1e-3:
        biased = (1.2 * found - true).double()  # negative control
        assert float((biased.mean(0) / (biased.std(0) / math.sqrt(rows))).abs().max()) > 4.5


def forward_of(box, x):
    from array_box import forward

    return forward(BlackBoxRule(box), x)


def test_unequal_units_are_mapped_back():
    """Inputs from 1e-6 to 1e4: each is perturbed in its own unit, and the gradient stays unbiased."""
    units = torch.tensor([1e-6, 1e-3, 1.0, 1e4], dtype=torch.float64)
    box, z, v, true = linear_problem(4, 4000)
    scaled = ArrayBox(lambda a: box.function(a / units.numpy()))
    rule = BlackBoxRule(scaled, probes=2)
    (found,) = gradient(rule, z * units, v=v)
    assert slope(found * units, true) == pytest.approx(1, abs=0.06)
    assert relative_error(found * units, true) == pytest.approx(1, rel=0.3)
    flat = BlackBoxRule(scaled, probes=2, input_scale=1.0, step_size=1e-3)  # negative control: one unit for all
    (found,) = gradient(flat, z * units, v=v)
    assert relative_error(found * units, true) > 100


def test_rows_err_independently():
    """The mean over rows of equal gradients is better by the number of rows; with a shared direction it is not."""
    rows, width = 4000, 16
    box, x, v, _ = linear_problem(width, rows)
    v = v[:1].expand(rows, 4)
    rule = BlackBoxRule(box, step_size=1e-3, input_scale=1.0, clip=None)
    (found,) = gradient(rule, x, v=v)
    true = rule.exact(*forward_of(box, x[:1]), (v[:1],), (True,))[0]
    error = float((found.mean(0) - true[0]).square().sum() / true.square().sum())
    assert error == pytest.approx((width - 1) / rows, rel=0.6)
    shared = found[:1].expand(rows, width)  # negative control
    assert float((shared.mean(0) - true[0]).square().sum() / true.square().sum()) > 100 * (width - 1) / rows
