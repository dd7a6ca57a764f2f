"""Simulators that draw random numbers: common ones on both sides of a difference, or declared noise."""

import numpy as np
import pytest
import torch
from array_box import gradient, relative_error

from rewriter.runtime.black_box import BlackBoxRule
from rewriter.runtime.boxes import CallableBox

ROWS, WIDTH = 256, 16
MATRIX = np.random.default_rng(0).standard_normal((WIDTH, 12)) / 4
X = torch.from_numpy(np.random.default_rng(1).standard_normal((ROWS, WIDTH)))
V = torch.from_numpy(np.random.default_rng(2).standard_normal((ROWS, 12)))
FREE = np.random.default_rng(5)


def mean(x):
    return np.tanh(x @ MATRIX)


def true_gradient():
    y = torch.tanh(X @ torch.from_numpy(MATRIX))
    return (V * (1 - y * y)) @ torch.from_numpy(MATRIX).T


def normal(seeds, width):
    """(n, width) standard normal numbers, a function of each row's seed."""
    return np.stack([np.random.default_rng(int(seed)).standard_normal(width) for seed in seeds])


def drawn(x, noise):
    """Expectation `mean(x)`: noise in the factor and added."""
    return mean(x) * (1 + 0.05 * noise[:, :1]) + 0.3 * noise


def seeded(x, *, seed):
    return drawn(x, normal(seed, 12))


def unseeded(x):
    return drawn(x, FREE.standard_normal((len(x), 12)))


@pytest.mark.parametrize("difference", ["forward", "central"])
def test_common_random_numbers(difference):
    """Without them the noise is divided by the step: at mu = .1 the error is 1,000 times as large."""
    options = {"probes": WIDTH, "step_size": 0.1, "input_scale": 1.0, "difference": difference, "clip": None}
    (common,) = gradient(BlackBoxRule(CallableBox(seeded, seed="seed"), **options), X, v=V)
    (free,) = gradient(BlackBoxRule(CallableBox(unseeded), **options), X, v=V)
    with_common, without = relative_error(common, true_gradient()), relative_error(free, true_gradient())
    assert with_common < 0.05
    assert without / with_common > 1000


def test_common_random_numbers_at_any_step():
    errors = []
    for step_size in (1e-1, 1e-3, 1e-5):
        rule = BlackBoxRule(
            CallableBox(seeded, seed="seed"), probes=WIDTH, step_size=step_size, input_scale=1.0, difference="central"
        )
        torch.manual_seed(0)
        (found,) = gradient(rule, X, v=V)
        errors.append(relative_error(found, true_gradient()))
    assert max(errors) / min(errors) < 1.3


def test_every_forward_draws_seeds_of_its_own_from_the_generator_of_torch():
    box = CallableBox(seeded, seed="seed")
    torch.manual_seed(3)
    first, second = box(X), box(X)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(box(X), first)
    assert len({tuple(row) for row in (first - torch.from_numpy(mean(X.numpy()))).tolist()}) == ROWS


def test_a_second_backward_uses_the_seeds_of_its_forward():
    rule = BlackBoxRule(CallableBox(seeded, seed="seed"), step_size=0.1, input_scale=1.0, clip=None)
    (one,) = gradient(rule, X, v=V, step=1)
    (other,) = gradient(rule, X, v=V, step=1)  # the same directions, other seeds
    assert not torch.equal(one, other)


def test_the_automatic_step_finds_a_seeded_simulator_smooth():
    rule = BlackBoxRule(CallableBox(seeded, seed="seed"), probes=WIDTH)
    (found,) = gradient(rule, X, v=V)
    assert rule.describe()["kind"] == "smooth"
    assert relative_error(found, true_gradient()) < 0.05


def test_declared_noise_takes_central_differences_of_large_steps():
    noisy = BlackBoxRule(CallableBox(unseeded, noisy=True), probes=WIDTH)
    assert noisy.describe()["difference"] == "central"
    assert BlackBoxRule(CallableBox(unseeded), probes=WIDTH).describe()["difference"] == "forward"
    assert BlackBoxRule(CallableBox(unseeded, noisy=True), difference="forward").describe()["difference"] == "forward"
