"""Likelihood-ratio estimates against closed forms: unbiased, with the variance theory says."""

import functools
import math

import losses
import numpy as np
import pytest
import torch

from rewriter.runtime.errors import RewriteError
from rewriter.runtime.estimators.baselines import BASELINES, check_baseline
from rewriter.runtime.estimators.likelihood_ratio import along, row_gradients
from rewriter.runtime.estimators.noise import KINDS, draw_noise, relative_variance
from rewriter.runtime.random import Key

ROWS, COPIES = 4000, 96
KEY = Key(0, 3, "cut")
LOSSES = (losses.linear, losses.quadratic, losses.sine, losses.step, losses.cubic)


@functools.cache
def noise_of(kind, antithetic, rows=ROWS, copies=COPIES, width=losses.WIDTH):
    drawn = draw_noise(kind, KEY, rows, copies, width, antithetic=antithetic, dtype=np.float64)
    return torch.from_numpy(np.ascontiguousarray(drawn))


def estimates(loss, noise, z=losses.Z, sigma=losses.SIGMA, **options):
    """One estimate for every row of the noise, all at the same point."""
    values = loss(z + sigma * noise)
    clean = loss(z).expand(len(noise))
    options = {"directions": "gaussian", "baseline": "clean", "valid": torch.ones_like(values).bool(), **options}
    return row_gradients(values, clean, noise, sigma, **options)


def largest_z(found, true):
    error = found - true
    return float((error.mean(0) / (error.std(0) / math.sqrt(len(error)))).abs().max())


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("antithetic", [False, True], ids=["single", "antithetic"])
@pytest.mark.parametrize("kind", ["orthogonal", "gaussian", "laplace"])
def test_unbiased(kind, antithetic, baseline, loss):
    found = estimates(loss, noise_of(kind, antithetic), directions=kind, baseline=baseline, antithetic=antithetic)
    true = losses.smoothed(loss, laplace=kind == "laplace")
    assert largest_z(found, true) < 4.5
    assert largest_z(1.1 * found, true) > 4.5  # negative control: a scale of one tenth more is seen


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("baseline", ["none", "clean"])
def test_unbiased_from_sobol_sets(baseline, loss):
    """Rows share one set and differ in their shift: independent given the set, as one shift already is uniform."""
    found = estimates(loss, noise_of("sobol", False), directions="sobol", baseline=baseline)
    assert largest_z(found, losses.smoothed(loss, laplace=False)) < 4.5


def test_a_baseline_of_the_other_points_is_biased_for_sobol_sets():
    found = estimates(losses.linear, noise_of("sobol", False), directions="sobol", baseline="leave-one-out")
    assert largest_z(found, losses.W) > 4.5
    for baseline in ("leave-one-out", "constant"):
        with pytest.raises(RewriteError, match="biased"):
            check_baseline(baseline, "sobol")


def test_ordinary_differentiation_of_a_step_has_nothing_to_say():
    z = losses.Z.clone().requires_grad_()
    assert not losses.step(z).requires_grad
    assert losses.smoothed(losses.step, laplace=False).norm() > 0.1


def spread(found, true):
    return float((found - true).square().sum(1).mean() / true.square().sum())


UNIT = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(5)).double(), dim=0)


def offset(z):
    return 1 + z @ UNIT


def curved(z):
    """Hessian of trace 0, so that it adds no mean."""
    signs = torch.tensor([1.0, -1.0] * 16, dtype=torch.float64)
    return offset(z) + 0.5 * (signs * z.square()).sum(-1) / 4


@pytest.mark.parametrize(
    ("kind", "antithetic", "baseline", "expected"),
    [
        ("gaussian", False, "none", (1 / 0.3**2 * 32 + 33) / 32),
        ("gaussian", False, "clean", 33 / 32),
        ("gaussian", False, "leave-one-out", 33 / 31),
        ("gaussian", True, "clean", 2 * 33 / 32),
        ("orthogonal", True, "clean", (2 * 34 - 32) / 32),
        ("orthogonal", False, "clean", 2 / 32),
        ("laplace", False, "clean", 63 / 32),
    ],
)
def test_variance_of_a_linear_loss(kind, antithetic, baseline, expected):
    """32 dimensions, 32 evaluations, sigma = .3, |g| = 1."""
    found = estimates(
        offset,
        noise_of(kind, antithetic, 4000, 32, 32),
        torch.zeros(32).double(),
        0.3,
        directions=kind,
        baseline=baseline,
        antithetic=antithetic,
    )
    assert spread(found, UNIT) == pytest.approx(expected, rel=0.05)
    if baseline != "none":
        assert relative_variance(kind, 32, 32, baseline, antithetic) == pytest.approx(expected, rel=1e-12)


def test_variance_of_a_quadratic_loss():
    """Antithetic pairs remove curvature exactly; single copies pay sigma^2 (D + 4)(2 tr H^2 + (tr H)^2) / 4 for it."""
    squared = 32 / 16  # tr H^2; tr H = 0
    expected = {True: 2 * 33 / 32, False: (33 + 0.3**2 / 4 * 36 * 2 * squared) / 32}
    for antithetic, value in expected.items():
        noise = noise_of("gaussian", antithetic, 4000, 32, 32)
        found = estimates(curved, noise, torch.zeros(32).double(), 0.3, antithetic=antithetic)
        assert spread(found, UNIT) == pytest.approx(value, rel=0.05)


def test_the_best_constant_suits_discontinuous_losses():
    """A jump at distance t sigma: E (f - b)^2 |e|^2 = (1 - 2 b)(D p - t phi(t)) + b^2 D, with f = 1 on a share p."""
    t, width, copies, sigma = 2 / 3, 32, 32, 0.3
    z, noise = torch.zeros(width).double(), noise_of("gaussian", False, 4000, copies, width)
    phi, p = math.exp(-(t**2) / 2) / math.sqrt(2 * math.pi), (1 + math.erf(t / math.sqrt(2))) / 2
    true = UNIT * phi / sigma

    def jump(values):
        return (values @ UNIT + t * sigma > 0).double()

    def theory(b, count):
        return ((1 - 2 * b) * (width * p - t * phi) + b * b * width - phi**2) / (count * phi**2)

    found = {kind: spread(estimates(jump, noise, z, sigma, baseline=kind), true) for kind in BASELINES}
    assert found["none"] == pytest.approx(theory(0, copies), rel=0.05)
    assert found["clean"] == pytest.approx(theory(1, copies), rel=0.05)
    assert found["leave-one-out"] == pytest.approx(theory(p, copies - 1), rel=0.05)
    best = (width * p - t * phi) / width
    assert found["constant"] == pytest.approx(theory(best, copies - 1), rel=0.05)
    assert found["constant"] < found["clean"] < found["none"]


def test_orthogonal_blocks_on_a_linear_loss():
    """64 dimensions, 256 evaluations: two blocks of pairs against independent samples."""
    unit = torch.eye(64, dtype=torch.float64)[0]
    found = {}
    for kind in ("orthogonal", "gaussian"):
        noise = noise_of(kind, True, 400, 256, 64)
        values = estimates(lambda z: z @ unit, noise, torch.zeros(64).double(), 0.1, directions=kind, antithetic=True)
        found[kind] = spread(values, unit)
    assert found["orthogonal"] <= 0.02
    assert found["gaussian"] == pytest.approx(0.508, rel=0.05)


def test_losses_of_rows_beat_the_batch_mean():
    """1 + (B - 1) m / (m + 1) = 30.2 at B = 32, m = 16: rows with their own noise need their own losses."""
    batch, width, repeats = 32, 16, 1500
    noise = noise_of("gaussian", True, batch * repeats, 2, width)
    unit = torch.eye(width, dtype=torch.float64)[3]
    own = (noise @ unit) * 0.1
    summed = own.view(repeats, batch, 2).sum(1, keepdim=True).expand(-1, batch, -1).reshape(-1, 2)
    options = {"directions": "gaussian", "baseline": "clean", "antithetic": True, "valid": torch.ones_like(own).bool()}
    zero = torch.zeros(len(own), dtype=torch.float64)
    alone = spread(row_gradients(own, zero, noise, 0.1, **options), unit)
    together = spread(row_gradients(summed, zero, noise, 0.1, **options), unit)
    assert together / alone == pytest.approx(1 + 31 * 16 / 17, rel=0.05)


def test_pairs_are_pairs_of_one_row():
    """2 (m + 1) |g|^2 / n however rows are stacked; halves negated by position pair other rows, and win nothing."""
    width, copies, rows = 32, 16, 3000
    unit = torch.eye(width, dtype=torch.float64)[0]
    noise = noise_of("gaussian", True, rows, copies, width)
    half = torch.from_numpy(draw_noise("gaussian", KEY, rows // 2, copies, width, dtype=np.float64))
    positional = torch.cat((half, -half))  # the second half of the rows mirrors the first

    def loss(z):
        return 2 + z @ unit

    options = {"z": torch.zeros(width).double(), "sigma": 0.3}
    expected = 2 * (width + 1) / copies
    tiled = estimates(loss, noise, antithetic=True, **options)
    assert spread(tiled, unit) == pytest.approx(expected, rel=0.05)
    assert spread(estimates(loss, positional, baseline="none", **options), unit) > 5 * expected


def test_one_draw_shared_by_all_rows_does_not_average_out():
    rows, repeats = 16, 400
    noise = noise_of("gaussian", False, rows * repeats, 8, losses.WIDTH)
    found = estimates(losses.linear, noise).view(repeats, rows, -1)
    single, mean = found.var((0, 1)).sum(), found.mean(1).var(0).sum()
    assert float(mean / single * rows) == pytest.approx(1, rel=0.2)
    shared = noise[: repeats * rows : rows].repeat_interleave(rows, 0)
    mean = estimates(losses.linear, shared).view(repeats, rows, -1).mean(1).var(0).sum()
    assert float(mean / single * rows) > 8


@pytest.mark.parametrize("rho", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_a_control_variate_of_correlation_rho(kind, rho):
    noise = noise_of(kind, False, 4000, 32, 32)
    other = torch.nn.functional.normalize(torch.eye(32, dtype=torch.float64)[0] - UNIT * UNIT[0], dim=0)
    surrogate = rho * (rho * UNIT + math.sqrt(1 - rho**2) * other)
    z = torch.zeros(32).double()
    without = estimates(offset, noise, z, 0.3, directions=kind)
    control = surrogate.expand(len(noise), -1)
    found = estimates(offset, noise, z, 0.3, directions=kind, control=control)
    assert largest_z(found, UNIT) < 4.5
    assert spread(found, UNIT) / spread(without, UNIT) == pytest.approx(1 - rho**2, rel=0.05)
    values, clean = offset(0.3 * noise), offset(z)
    correlation = np.corrcoef((values - clean).flatten(), along(control, noise, 0.3).flatten())[0, 1]
    assert correlation == pytest.approx(rho, abs=0.01)


def test_diagonal_noise():
    sigma = torch.linspace(0.05, 0.6, losses.WIDTH, dtype=torch.float64)
    noise = noise_of("orthogonal", False)
    found = row_gradients(
        losses.quadratic(losses.Z + sigma * noise),
        losses.quadratic(losses.Z).expand(len(noise)),
        noise,
        sigma,
        directions="orthogonal",
        baseline="leave-one-out",
        valid=torch.ones(noise.shape[:2], dtype=torch.bool),
    )
    assert largest_z(found, losses.W + losses.H @ losses.Z) < 4.5


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("antithetic", [False, True])
def test_copies_that_do_not_exist_are_left_out(baseline, antithetic):
    """Rows of different numbers of copies, some with a failed one: each the mean over its own."""
    noise = noise_of("gaussian", antithetic)
    values = losses.sine(losses.Z + losses.SIGMA * noise)
    clean = losses.sine(losses.Z).expand(len(noise))
    options = {"directions": "gaussian", "baseline": baseline, "antithetic": antithetic}
    valid = torch.zeros_like(values).bool()
    valid[:, :40] = True
    broken = values.where(valid, torch.nan)
    found = row_gradients(broken, clean, noise, losses.SIGMA, valid=valid, **options)
    short = row_gradients(values[:, :40], clean, noise[:, :40], losses.SIGMA, valid=valid[:, :40], **options)
    torch.testing.assert_close(found, short)
    valid[:, 7] = False
    assert (
        largest_z(
            row_gradients(broken, clean, noise, losses.SIGMA, valid=valid, **options),
            losses.smoothed(losses.sine, laplace=False),
        )
        < 4.5
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("antithetic", [False, True])
def test_rows_draw_the_same_wherever_they_are(kind, antithetic):
    copies, width = (64, 2) if kind == "sobol" else (10, 4)
    whole = draw_noise(kind, KEY, 9, copies, width, antithetic=antithetic)
    assert whole.shape == (9, copies, width)
    assert whole.dtype == np.float32
    part = draw_noise(kind, KEY, 4, copies, width, antithetic=antithetic, first_row=5)
    assert (whole[5:] == part).all()
    assert not (whole == draw_noise(kind, KEY.named("other"), 9, copies, width, antithetic=antithetic)).all()
    if antithetic:
        assert (whole[:, 0::2] == -whole[:, 1::2]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_noise_has_mean_zero_and_unit_covariance(kind):
    copies, width = (96, 6) if kind == "sobol" else (9, 6)
    noise = noise_of(kind, False, 4000, copies, width)
    one = noise[:, 3]  # a single copy over rows
    second = one.T @ one / len(one)
    assert float(one.mean(0).abs().max()) < 5 / math.sqrt(len(one))
    assert float((second - torch.eye(width)).abs().max()) < 6 * math.sqrt(5 / len(one))
    fourth = float(noise.pow(4).mean())
    assert fourth == pytest.approx(6 if kind == "laplace" else 3, rel=0.12)


def test_orthogonal_blocks_are_orthogonal():
    noise = noise_of("orthogonal", False, 50, 9, 6)
    for block in (noise[:, :6], noise[:, 6:]):
        gram = block @ block.transpose(1, 2)
        assert float((gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))).abs().max()) < 1e-10
    assert float((noise[:, :6] @ noise[:, 6:].transpose(1, 2)).abs().max()) > 0.1


def test_sobol_sets_start_well_and_are_refused_where_they_do_harm():
    noise = draw_noise("sobol", KEY, 200, 16 * 8, 8)
    assert 0.7 < float((noise[:, :16] ** 2).mean()) < 1.3  # the unscrambled set with Box-Muller: 3.1
    unit = torch.nn.functional.normalize(torch.ones(8).double(), dim=0)
    noise = noise_of("sobol", False, 2000, 256, 8)
    found = estimates(lambda z: z @ unit, noise, torch.zeros(8).double(), 0.1, directions="sobol")
    assert spread(found, unit) < 9 / 256 / 4
    for copies, width in ((127, 8), (64, 64), (512, 512)):
        with pytest.raises(RewriteError, match="Sobol"):
            draw_noise("sobol", KEY, 1, copies, width)
    with pytest.raises(RewriteError, match="do not make pairs"):
        draw_noise("gaussian", KEY, 1, 3, 2, antithetic=True)
