"""Copies per row: exact budgets, unbiased sums, and what Neyman's rule gains; split halves; surrogate gradients."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.runtime.estimators.allocation import copy_counts, pilot_norms
from rewriter.runtime.estimators.control import ControlVariate
from rewriter.runtime.estimators.likelihood_ratio import along, row_gradients
from rewriter.runtime.estimators.noise import draw_noise
from rewriter.runtime.estimators.split_half import SplitHalf
from rewriter.runtime.random import Key

lengths = st.lists(st.floats(0, 1e6) | st.just(float("nan")) | st.just(float("inf")), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(lengths, st.integers(1, 20), st.booleans())
def test_budgets_are_exact(norms, copies, even):
    copies = 2 * copies if even else copies
    counts = copy_counts(np.array(norms), copies, even=even)
    assert counts.sum() == len(norms) * copies
    assert counts.min() >= min(2, copies)
    assert not (even and (counts % 2).any())


def test_nothing_known_is_uniform():
    assert copy_counts(np.zeros(5), 7).tolist() == [7] * 5


def lognormal(tau=1.0, rows=128, batches=300):
    return np.exp(tau * np.random.default_rng(0).standard_normal((batches, rows)))


def test_neyman_gains_what_theory_says():
    """128 rows, 20 copies each on average, at least 2, lognormal lengths: .408 of the variance of equal shares."""
    ratios, bounds = [], []
    for norms in lognormal():
        counts = copy_counts(norms, 20)
        ratios.append((norms**2 / counts).sum() / (norms**2 / 20).sum())
        bounds.append(norms.mean() ** 2 / (norms**2).mean())
    assert np.mean(ratios) == pytest.approx(0.408, rel=0.03)
    assert np.mean(ratios) == pytest.approx(np.mean(bounds), rel=0.01)


def weighted_sums(counts, gradients, rows_weighted):
    """Sums over rows of estimates of a linear loss, many times; rows weighted a_i / N by the control."""
    repeats, (rows, width) = 1500, gradients.shape
    most = int(counts.max())
    noise = torch.from_numpy(draw_noise("gaussian", Key(0, 0, "x"), repeats * rows, most, width, dtype=np.float64))
    g = gradients.repeat(repeats, 1)
    losses = along(g, noise, 0.1)
    valid = (torch.arange(most) < torch.from_numpy(counts)[:, None]).repeat(repeats, 1)
    zero = torch.zeros(len(g), dtype=torch.float64)
    found = row_gradients(losses, zero, noise, 0.1, directions="gaussian", baseline="clean", valid=valid)
    found = found.view(repeats, rows, width)
    if rows_weighted:
        found = found * (torch.from_numpy(counts) * rows / counts.sum())[:, None]
    return found.mean(1)


def test_sums_over_rows_stay_unbiased():
    generator = torch.Generator().manual_seed(0)
    norms = torch.logspace(-1, 1, 12, dtype=torch.float64)
    gradients = torch.randn(12, 5, generator=generator, dtype=torch.float64) * norms[:, None]
    counts = copy_counts(norms.numpy(), 6)
    assert counts.max() > 4 * counts.min()

    def largest_z(found):
        error = found - gradients.mean(0)
        return float((error.mean(0) / (error.std(0) / math.sqrt(len(error)))).abs().max())

    assert largest_z(weighted_sums(counts, gradients, rows_weighted=False)) < 4.5
    assert largest_z(weighted_sums(counts, gradients, rows_weighted=True)) > 10  # a_i / N: another objective


def test_doubt_of_a_classifier_is_nearly_neyman():
    """Cross-entropy: 1 - p_y bounds the gradient's length in the logits, |p - y| <= sqrt(2) (1 - p_y)."""
    logits = 6 * torch.randn(128, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = logits.argmax(1)
    target[:20] = (target[:20] + 1) % 10
    p = logits.softmax(1)
    norms = (p - torch.nn.functional.one_hot(target, 10)).norm(dim=1).numpy()
    doubt = (1 - p.gather(1, target[:, None])[:, 0]).numpy()

    def variance(counts):
        return (norms**2 / counts).sum()

    oracle = variance(copy_counts(norms, 20))
    assert variance(copy_counts(doubt, 20)) <= 1.08 * oracle
    assert variance(np.full(128, 20)) > 1.5 * oracle


def test_pilot_norms_are_drawn_towards_the_mean():
    found = pilot_norms(np.array([-1.0, 1.0, 3.0]))
    assert found[0] == 0
    np.testing.assert_allclose(found[1:], [1.0, math.sqrt(0.75 * 3 + 0.25)])
    assert not pilot_norms(np.array([-1.0, -3.0])).any()


def test_split_halves_measure_cosine_and_copies():
    width, copies, rows = 10, 8, 4000
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    halves = SplitHalf()
    assert halves.cosine(4) is halves.best_copies(9, 2, 99) is None
    for step in range(3):
        pair = []
        for name in ("a", "b"):
            noise = torch.from_numpy(draw_noise("gaussian", Key(0, step, name), rows, copies, width, dtype=np.float64))
            valid = torch.ones(rows, copies, dtype=torch.bool)
            zero = torch.zeros(rows, dtype=torch.float64)
            pair.append(
                row_gradients(
                    along(g, noise, 0.1), zero, noise, 0.1, directions="gaussian", baseline="clean", valid=valid
                )
            )
        halves.record(*pair, copies)
    assert halves.noise / halves.signal == pytest.approx(width + 1, rel=0.05)
    pooled = torch.nn.functional.cosine_similarity(pair[0].flatten(), g.flatten(), dim=0)
    assert halves.cosine(copies) == pytest.approx(float(pooled), rel=0.02)
    assert halves.best_copies(100, 2, 99) == round(math.sqrt((width + 1) * 100))
    assert halves.best_copies(100, 2, 20) == 20
    kept = SplitHalf()
    kept.set_state(halves.get_state())
    kept.record(torch.full((1, 2), torch.nan), torch.zeros(1, 2), 4)  # a diverged step is passed over
    assert vars(kept) == vars(halves)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_a_surrogate_is_used_as_far_as_it_correlates(rho):
    """Scaled by regression on earlier steps: whatever its own length, variance falls to 1 - rho^2."""
    width, rows, copies = 16, 3000, 8
    g = torch.zeros(rows, width, dtype=torch.float64)
    g[:, 0] = 1
    surrogate = torch.zeros_like(g)
    surrogate[:, 0], surrogate[:, 1] = 40 * rho, 40 * math.sqrt(1 - rho**2)
    control = ControlVariate(cost=0.05)
    spreads = []
    for step in range(2):
        noise = torch.from_numpy(draw_noise("gaussian", Key(0, step, "c"), rows, copies, width, dtype=np.float64))
        scaled = control.scaled(surrogate)
        assert step > 0 or scaled is None
        losses, zero = along(g, noise, 0.1), torch.zeros(rows, dtype=torch.float64)
        valid = torch.ones(rows, copies, dtype=torch.bool)
        for used in (None, scaled):
            found = row_gradients(
                losses, zero, noise, 0.1, directions="gaussian", baseline="clean", valid=valid, control=used
            )
            spreads.append(float((found - g).square().sum(1).mean()))
        predicted = along(surrogate, noise, 0.1)
        control.observe(*(float((a * b).mean()) for a, b in ((losses, predicted), (predicted,) * 2, (losses,) * 2)))
    assert control.correlation == pytest.approx(rho, abs=0.02)
    assert control.pays == (rho > 0.3)
    assert spreads[3] / spreads[2] == pytest.approx(1 - rho**2 if control.pays else 1, rel=0.05)
    kept = ControlVariate(cost=0.05)
    kept.set_state(control.get_state())
    assert kept.correlation == control.correlation
