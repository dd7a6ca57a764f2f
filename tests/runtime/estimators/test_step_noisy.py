"""Boxes declared noisy: the step at which bias and noise are least together, against closed forms."""

import math

import numpy as np
import pytest
import torch
from array_box import ArrayBox, gradient, relative_error

from rewriter.runtime.black_box import BlackBoxRule
from rewriter.runtime.estimators.noisy import choose_noisy
from rewriter.runtime.estimators.plateau import choose
from rewriter.runtime.estimators.sweep import Sweep

STEPS = 10.0 ** (-np.arange(8) / 2)
DEVIATIONS = [1e-9, 1e-6, 1e-4, 1e-2]


def noisy_sweep(function, deviation, seed, steps=STEPS, rows=6, repeats=2):
    """A sweep of y = function(x) + noise with one input, and its base points (rows, 1)."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, 1))

    def box(points):
        return function(points) + deviation * random.standard_normal(points.shape)

    plus, minus = box(x[:, None] + steps[:, None]), box(x[:, None] - steps[:, None])
    return Sweep(steps, box(x), plus, minus, np.ones((rows, 1)), box(np.repeat(x[:, None], repeats, 1))), x


def cubic(x):
    """Central differences of x + x^3 / 6 have bias h^2 / 6 everywhere."""
    return x + x**3 / 6


@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_central_step_of_a_cubic(deviation):
    """argmin of b^2 h^4 + sigma^2 / 2 h^2 is h^6 = sigma^2 / 4 b^2."""
    best = (9 * deviation**2) ** (1 / 6)
    found = [choose_noisy(noisy_sweep(cubic, deviation, seed)[0], central=True).step for seed in range(100)]
    assert min(found) / best > 0.5
    assert max(found) / best < 2


@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_central_step_of_waves_much_shorter_than_the_largest_step(deviation):
    """sin(30 x) is a cubic only below .1: larger steps must not enter the fit."""
    found = []
    for seed in range(50):
        measured, x = noisy_sweep(lambda x: np.sin(30 * x), deviation, seed)
        bias = 4500 * np.cos(30 * x)
        best = (deviation**2 / (4 * (bias**2).mean())) ** (1 / 6)
        found.append(choose_noisy(measured, central=True).step / best)
    assert min(found) > 0.5
    assert max(found) < 2


@pytest.mark.parametrize("deviation", DEVIATIONS[1:])
def test_forward_step_of_a_quadratic(deviation):
    """argmin of b^2 h^2 + 2 sigma^2 / h^2 is h^4 = 2 sigma^2 / b^2; x + x^2 has b = 1."""
    best = (2 * deviation**2) ** 0.25
    found = [
        choose_noisy(noisy_sweep(lambda x: x + x * x, deviation, seed)[0], central=False).step for seed in range(100)
    ]
    assert min(found) / best > 0.5
    assert max(found) / best < 2


def test_central_step_of_a_quadratic_is_the_largest():
    """Central differences of a quadratic have no bias, so that only noise is left, which falls with the step."""
    found = [choose_noisy(noisy_sweep(lambda x: x + x * x, 1e-2, seed)[0], central=True) for seed in range(50)]
    assert np.median([choice.step for choice in found]) == 1.0
    assert min(choice.step for choice in found) > 0.3
    assert {choice.kind for choice in found} == {"smooth"}


def test_the_plateau_rule_alone_is_wrong_by_more_than_a_factor_of_two():
    """Negative control: it looks for agreement, which is not where the error is least."""
    steps = 10.0 ** (-np.arange(18) / 2)
    best = (9 * 1e-6**2) ** (1 / 6)
    found = [choose(noisy_sweep(cubic, 1e-6, seed, steps, rows=3)[0], central=True).step for seed in range(50)]
    assert np.mean([not 0.5 < step / best < 2 for step in found]) > 0.5


def test_equal_repeats_are_no_noise():
    assert choose_noisy(noisy_sweep(cubic, 0.0, 0)[0], central=True) is None


def test_failed_queries_are_left_out():
    measured, _ = noisy_sweep(cubic, 1e-4, 0)
    measured.plus[:, 0] = math.nan
    measured.minus[2, 3] = math.inf
    measured.repeated[1, 0] = math.nan
    assert 0.5 < choose_noisy(measured, central=True).step / (9 * 1e-4**2) ** (1 / 6) < 2


MATRIX = np.random.default_rng(0).standard_normal((16, 12)) / 4
X = torch.from_numpy(np.random.default_rng(1).standard_normal((128, 16)))
V = torch.from_numpy(np.random.default_rng(2).standard_normal((128, 12)))


def noisy_rule(deviation, noisy, **options):
    """Rule, its gradient from all coordinates, and the true one, of sin(x A) + noise."""
    random = np.random.default_rng(3)

    def function(a):
        exact = np.sin(a @ MATRIX)
        return exact + deviation * random.standard_normal(exact.shape)

    box = ArrayBox(function)
    box.noisy = noisy
    rule = BlackBoxRule(box, probes=16, **options)
    (found,) = gradient(rule, X, v=V)
    assert rule.ledger.total("step_size") <= 110
    leaf = X.clone().requires_grad_()
    (true,) = torch.autograd.grad((torch.sin(leaf @ torch.from_numpy(MATRIX)) * V).sum(), leaf)
    return rule, found, true


@pytest.mark.parametrize("deviation", [1e-6, 1e-4, 1e-2])
def test_the_step_of_a_noisy_box_is_nearly_the_best_of_all(deviation):
    _, found, true = noisy_rule(deviation, True, clip=None)
    fixed = [
        relative_error(*noisy_rule(deviation, True, clip=None, step_size=step)[1:])
        for step in 10.0 ** (-np.arange(13) / 4)
    ]
    assert relative_error(found, true) < 1.5 * min(fixed)


def test_a_noisy_box_whose_noise_drowns_everything_is_rough():
    rule, *_ = noisy_rule(30.0, True)
    assert rule.describe()["kind"] == "rough"
    assert rule.describe()["absolute_step"] > 0.5


def test_repeats_are_counted():
    rule, *_ = noisy_rule(1e-4, True)
    assert rule.ledger.total("step_size") == 6 * (2 * 8 + 2)
