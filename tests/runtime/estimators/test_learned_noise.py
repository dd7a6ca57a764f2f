"""Gradients in the logarithms of standard deviations, against the closed form of a quadratic loss."""

import functools
import math

import losses
import numpy as np
import pytest
import torch

from rewriter.runtime.errors import RewriteError
from rewriter.runtime.estimators.baselines import weights
from rewriter.runtime.estimators.likelihood_ratio import size_gradients
from rewriter.runtime.estimators.noise import draw_noise, size_score
from rewriter.runtime.estimators.noise_size import NoiseSize
from rewriter.runtime.learned_noise import channels_of, learned_sizes, size_gradient
from rewriter.runtime.random import Key

ROWS, COPIES = 6000, 24
SIGMA = torch.linspace(0.3, 1.2, losses.WIDTH, dtype=torch.float64)
TRUE = SIGMA.square() * losses.H.diagonal()  # F = f + sum_j sigma_j^2 H_jj / 2, whatever the noise of unit variance


@functools.cache
def noise_of(kind, antithetic):
    drawn = draw_noise(kind, Key(0, 5, "size"), ROWS, COPIES, losses.WIDTH, antithetic=antithetic, dtype=np.float64)
    return torch.from_numpy(np.ascontiguousarray(drawn))


def largest_z(found, true):
    error = found - true
    return float((error.mean(0) / (error.std(0) / math.sqrt(len(error)))).abs().max())


def batch(kind, antithetic=False):
    noise = noise_of(kind, antithetic)
    values = losses.quadratic(losses.Z + SIGMA * noise)
    return values, losses.quadratic(losses.Z).expand(ROWS), noise, torch.ones_like(values).bool()


@pytest.mark.parametrize("baseline", ["none", "clean", "leave-one-out", "constant"])
@pytest.mark.parametrize("antithetic", [False, True], ids=["single", "antithetic"])
@pytest.mark.parametrize("kind", ["orthogonal", "gaussian", "laplace"])
def test_of_a_quadratic_loss(kind, antithetic, baseline):
    values, clean, noise, valid = batch(kind, antithetic)
    options = {"directions": kind, "baseline": baseline, "antithetic": antithetic}
    found = size_gradients(values, clean, noise, valid=valid, **options)
    assert largest_z(found, TRUE) < 4
    assert largest_z(2 * found, TRUE) > 4.5  # negative controls: another scale, and the score of z in place of sigma's
    assert largest_z(found + found.roll(1, 1), TRUE) > 4.5


def test_other_copies_of_an_orthogonal_block_are_no_baseline():
    """Two directions at right angles and f = e_1^2: with the other copy as baseline it is 2.5 in place of 2."""
    noise = torch.from_numpy(draw_noise("orthogonal", Key(0, 5, "two"), ROWS, 2, 2, dtype=np.float64))
    values = noise[:, :, 0].square()
    clean, valid, true = torch.zeros(ROWS).double(), torch.ones(ROWS, 2).bool(), torch.tensor([2.0, 0.0]).double()
    options = {"directions": "orthogonal", "baseline": "leave-one-out"}
    assert largest_z(size_gradients(values, clean, noise, valid=valid, **options), true) < 4
    own = weights("leave-one-out", values, clean, valid, noise.square().sum(2), antithetic=False)
    biased = (own.unsqueeze(1) @ size_score("orthogonal", noise)).squeeze(1)
    assert largest_z(biased, true) > 4.5
    assert float(biased[:, 0].mean()) == pytest.approx(2.5, rel=0.1)


def test_copies_that_failed_are_left_out():
    values, clean, noise, valid = batch("gaussian")
    values, valid = values.clone(), valid.clone()
    valid[:, 3], valid[:100, 5:] = False, False
    values[~valid] = torch.nan
    found = size_gradients(values, clean, noise, valid=valid, directions="gaussian", baseline="leave-one-out")
    assert largest_z(found, TRUE) < 4


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(1, 3)], [0, 1, 2]),
        ([(1,)], [0]),
        ([(2, 3)], [0, 1, 2, 0, 1, 2]),  # two positions folded into each row
        ([(1, 2, 3)], [0, 1, 2, 0, 1, 2]),  # a sequence (T, C)
        ([(1, 2, 2, 2)], [0, 0, 0, 0, 1, 1, 1, 1]),  # a feature map (C, H, W)
        ([(1, 2), (1, 2)], [0, 1, 2, 3]),  # a state of two tensors
    ],
)
def test_channels_of_elements(shapes, expected):
    assert channels_of(shapes).tolist() == expected


def test_elements_that_share_a_channel_add_up_and_bounds_hold():
    channels = channels_of([(1, 3, 2, 1)])
    log_sigma, elements = torch.zeros(3), torch.tensor([1.0, 2, 3, 4, -5, -6])
    free = torch.zeros(3)
    found = size_gradient((log_sigma, channels), elements, free, torch.tensor(2.0))
    assert found.tolist() == [6, 14, -22]
    below = size_gradient((log_sigma, channels), elements, free + 1, torch.tensor(2.0))
    assert below.tolist() == [0, 0, -22]  # no step further down; back up is free
    assert size_gradient((log_sigma, channels), elements, free - 1, torch.tensor(2.0)).tolist() == [6, 14, 0]


def test_another_capture_has_the_same_parameters_or_none():
    like, three = torch.zeros(1, dtype=torch.float64), [channels_of([(1, 4)])] * 3
    known = learned_sizes(None, three, like, "cell")
    assert [tuple(noise.log_sigma.shape) for noise in known] == [(4,)] * 3
    assert known[0].log_sigma.dtype is torch.float64
    assert learned_sizes(known, three[:2], like, "cell") is known
    for other in (three + three[:1], [channels_of([(1, 5)])]):
        with pytest.raises(RewriteError, match="longest sequence"):
            learned_sizes(known, other, like, "cell")


def learned(rows=400):
    size = NoiseSize("learned")
    size.observe(3 * torch.randn(rows, 4, generator=torch.Generator().manual_seed(0)), [4])
    return size


def test_noise_starts_at_a_tenth_of_the_first_deviation():
    size = learned()
    sigma, held = size.bounded(torch.zeros(4))
    assert torch.allclose(sigma, torch.full((4,), 0.3), rtol=0.05)
    assert not held.any()
    size.observe(torch.randn(400, 4), [4])  # a later batch changes nothing
    assert torch.equal(size.bounded(torch.zeros(4))[0], sigma)
    assert torch.allclose(size.bounded(torch.full((4,), -1.0))[0], sigma * math.exp(-1))
    far, held = size.bounded(torch.tensor([-100.0, 0, 0, 1000.0]))
    assert held.tolist() == [1, 0, 0, -1]
    assert far.isfinite().all()
    assert (far > 0).all()
    with pytest.raises(RewriteError, match="not finite"):
        size.bounded(torch.tensor([torch.nan]))


def test_the_lower_bound_rises_while_copies_are_not_told_apart_and_falls_again():
    size, log_sigma = learned(), torch.full((4,), -5.0)
    small = float(size.bounded(log_sigma)[0][0])
    assert size.grow()
    assert float(size.bounded(log_sigma)[0][0]) == pytest.approx(2 * small, rel=1e-5)
    assert size.bounded(log_sigma)[1].eq(1).all()
    kept = NoiseSize("learned")
    kept.set_state(size.get_state())
    assert torch.equal(kept.bounded(log_sigma)[0], size.bounded(log_sigma)[0])
    for _ in range(20):
        size.rest(apart=True)
    assert float(size.bounded(log_sigma)[0][0]) == pytest.approx(small, rel=1e-5)


def test_grown_noise_halves_once_copies_have_long_been_apart():
    size = NoiseSize("auto")
    assert [size.grow() for _ in range(5)] == [True] * 4 + [False]
    assert size.factor == 10
    for _ in range(19):
        size.rest(apart=True)
    size.rest(apart=False)
    assert size.factor == 10
    for _ in range(20):
        size.rest(apart=True)
    assert size.factor == 5
    for _ in range(200):
        size.rest(apart=True)
    assert size.factor == 1


def test_noise_that_did_not_help_is_taken_back_for_a_while():
    size = NoiseSize("auto")
    assert size.grow()
    size.shrink()
    assert size.factor == 1
    assert not size.grow()
    for _ in range(50):
        size.rest(apart=False)
    assert size.grow()
