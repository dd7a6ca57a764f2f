"""What is read from a sweep: the plateau, the order of the error above it, the noise floor."""

import numpy as np
import pytest
import torch
from array_box import ArrayBox, gradient

from rewriter.runtime.black_box import BlackBoxRule
from rewriter.runtime.estimators.plateau import choose, neighbour_gap
from rewriter.runtime.estimators.sweep import Sweep, noise_floor

STEPS = 10.0 ** (-np.arange(18) / 2)
RANDOM = np.random.default_rng(0)
MATRIX = RANDOM.standard_normal((10, 6)) / 3
KINKS, OUT = RANDOM.standard_normal((10, 40)) / 3, RANDOM.standard_normal((40, 6)) / 6


def swept(function, seed=0, steps=STEPS, rows=3):
    random = np.random.default_rng(seed)
    x, u = random.standard_normal((2, rows, 1, 10))
    offsets = u * steps[:, None]
    weights = random.standard_normal((rows, function(x[:, 0]).shape[1]))
    return Sweep(steps, function(x[:, 0]), function(x + offsets), function(x - offsets), weights, x[:, :0, :6])


def smooth(x):
    return np.tanh(x @ MATRIX)


def kinked(x):
    return np.maximum(x @ KINKS, 0) @ OUT


@pytest.mark.parametrize("seed", range(5))
def test_the_error_of_a_smooth_function_has_order_two(seed):
    choice = choose(swept(smooth, seed), central=True)
    assert choice.kind == "smooth"
    assert choice.order == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize("seed", range(5))
def test_the_error_of_a_function_with_kinks_has_not(seed):
    """Negative control of the order; and the step is smaller than a smooth function's, to meet fewer kinks."""
    choice = choose(swept(kinked, seed), central=True)
    assert choice.order < 1.5
    assert choice.step < choose(swept(smooth, seed), central=True).step


@pytest.mark.parametrize("central", [True, False])
@pytest.mark.parametrize("deviation", [1e-8, 1e-6, 1e-4])
def test_noise_floor_and_step_of_noise(deviation, central):
    random = np.random.default_rng(1)

    def function(x):
        return smooth(x) + deviation * random.standard_normal((*x.shape[:-1], 6))

    ratios, errors = [], []
    for seed in range(10):
        found = swept(function, seed)
        size = np.sqrt((found.base**2 * found.weights**2).sum() / (found.weights**2).sum())
        ratios.append(noise_floor(found) / (deviation / size))
        errors.append(choose(found, central).error)
    assert min(ratios) > 0.5
    assert max(ratios) < 1.5
    assert max(errors) < 0.05


def test_noise_floor_of_rounding():
    """Text of six decimals: uniform errors of deviation 1e-6 / sqrt(12). Steps without a change say nothing."""
    floors = []
    for seed in range(10):
        found = swept(lambda x: np.round(smooth(x), 6), seed)
        size = np.sqrt((found.base**2 * found.weights**2).sum() / (found.weights**2).sum())
        floors.append(noise_floor(found) * size)
    assert 0.3 < np.median(floors) / (1e-6 / np.sqrt(12)) < 2
    assert noise_floor(swept(smooth)) < 1e-15


def test_noise_floor_is_unknown_where_nothing_moves():
    assert noise_floor(swept(lambda x: np.zeros((*x.shape[:-1], 6)))) is None


def test_rounded_outputs_do_not_agree_where_they_do_not_move():
    """Without the guard zeros would agree with zeros at the finest steps."""
    choice = choose(swept(lambda x: np.round(smooth(x), 4)), central=True)
    assert choice.kind == "smooth"
    assert 1e-2 < choice.step < 1
    assert 1e-4 < choice.error < 0.05


def test_the_expected_error_bounds_the_true_one():
    for digits in (3, 5, 7):
        for central in (True, False):
            found = swept(lambda x, digits=digits: np.round(smooth(x), digits), seed=digits)
            exact = swept(smooth, seed=digits)
            k = int(np.flatnonzero(found.steps == choose(found, central).step)[0])
            far = found.minus[:, k] if central else found.base
            slope = ((found.plus[:, k] - far) / found.steps[k] / (2 if central else 1)) * found.weights
            true = ((exact.plus[:, 10] - exact.minus[:, 10]) / (2 * exact.steps[10])) * exact.weights
            error = np.linalg.norm(slope - true) / np.linalg.norm(true)
            assert error < 3 * choose(found, central).error


def test_a_gap_is_small_where_two_steps_agree_and_one_where_nothing_moves():
    two = np.array([1e-4, 1e-4 / np.sqrt(10)])
    assert neighbour_gap(swept(smooth, steps=two)) < 1e-6
    assert neighbour_gap(swept(lambda x: np.round(smooth(x), 2), steps=two)) == 1
    assert neighbour_gap(swept(lambda x: np.round(smooth(x), 5), steps=two)) > 0.02


def test_coordinates_are_measured_along_dense_directions():
    """One stiff input among twelve: three coordinates would miss it three times in four."""

    def stiff(a):
        return a[:, 1:] + 1e-4 * np.sin(1e4 * a[:, :1])

    x = torch.from_numpy(np.random.default_rng(3).standard_normal((64, 12)))
    steps = []
    for step in range(6):
        rule = BlackBoxRule(ArrayBox(stiff), probes=12, directions="coordinate")
        gradient(rule, x, v=torch.ones(64, 11), step=step)
        steps.append(rule.describe()["step_size"])
    assert max(steps) < 1e-5
