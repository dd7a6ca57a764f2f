"""Copies shared among the cuts of a chain: within the budget, and what Neyman's rule with costs gains."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.runtime.estimators.allocation import cut_counts
from rewriter.runtime.estimators.likelihood_ratio import along, row_gradients
from rewriter.runtime.estimators.noise import draw_noise
from rewriter.runtime.estimators.split_half import SplitHalf
from rewriter.runtime.random import Key

noises = st.floats(0, 1e6) | st.just(float("nan")) | st.just(float("inf"))
pairs = st.lists(st.tuples(noises, st.floats(0.01, 1)), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(pairs, st.integers(2, 40), st.booleans())
def test_the_budget_holds(given_pairs, copies, even):
    copies = 2 * copies if even else copies
    noise, costs = map(np.array, zip(*given_pairs, strict=True))
    budget = copies * costs.sum()
    counts = cut_counts(noise, costs, budget, even=even)
    unit = 2 if even else 1
    assert counts.min() >= 2
    assert not (counts % unit).any()
    assert counts @ costs <= budget * (1 + 1e-9)
    assert budget - counts @ costs < unit * costs.max() * (1 + 1e-9)  # no copy that fits anywhere is left out


def test_equal_noise_and_cost_or_nothing_known_is_uniform():
    for noise in (np.ones(5), np.zeros(5)):
        assert cut_counts(noise, np.ones(5), 35.0).tolist() == [7] * 5
    assert cut_counts(np.ones(3), np.array([4.0, 1.0, 0.25]), 84.0).tolist() == [12, 24, 48]  # 1 / sqrt(cost)
    assert cut_counts(np.ones(3), np.ones(3), 1.0).tolist() == [2, 2, 2]  # floors come first


def test_no_other_whole_numbers_are_better():
    """Against every choice of three numbers within the budget."""
    noise, costs, budget = np.array([9.0, 1.0, 0.2]), np.array([1.0, 0.6, 0.3]), 19.0
    found = cut_counts(noise, costs, budget)
    every = np.stack(np.meshgrid(*[np.arange(2, 60)] * 3), -1).reshape(-1, 3)
    best = (noise / every[every @ costs <= budget]).sum(1).min()
    assert (noise / found).sum() <= 1.02 * best
    assert (noise / 10).sum() > 1.15 * best


CUTS, WIDTH, ALL = 8, 16, 256
NORMS = 0.6 ** np.arange(CUTS)


def estimates(cut, copies, name, repeats=4000):
    """Of a gradient of length NORMS[cut], from Gaussian copies and a linear loss."""
    g = torch.zeros(repeats, WIDTH, dtype=torch.float64)
    g[:, cut] = NORMS[cut]
    noise = torch.from_numpy(draw_noise("gaussian", Key(0, cut, name), repeats, copies, WIDTH, dtype=np.float64))
    zero, valid = torch.zeros(repeats, dtype=torch.float64), torch.ones(repeats, copies, dtype=torch.bool)
    losses = along(g, noise, 0.1)
    return g, row_gradients(losses, zero, noise, 0.1, directions="gaussian", baseline="clean", valid=valid)


def summed_variance(counts):
    pairs = [estimates(cut, int(copies), "found") for cut, copies in enumerate(counts)]
    return sum(float((found - g).square().sum(1).mean()) for g, found in pairs)


def test_geometric_lengths_gain_what_theory_says():
    """Eight cuts of width h = 16, lengths |g| = .6^s, K = 256 copies: variance .83 with equal shares, else .40.

    (h + 1) S / K sum |g|^2 with equal shares, (h + 1) / K (sum |g|)^2 with Neyman's.
    """
    measured = []
    for cut in range(CUTS):
        halves = SplitHalf()
        halves.record(estimates(cut, 32, "a")[1], estimates(cut, 32, "b")[1], 32)
        measured.append(halves.noise)
    counts = cut_counts(np.array(measured), np.ones(CUTS), float(ALL))
    assert counts.sum() == ALL
    assert counts[0] > 12 * counts[-1]
    assert summed_variance([ALL // CUTS] * CUTS) == pytest.approx(0.83, rel=0.03)
    assert summed_variance(counts) == pytest.approx(0.401, abs=0.02)
    assert summed_variance(counts[::-1]) > 1.5  # negative control: the wrong way round
