"""Allocation learnt over batches: FLOPS's policies learn, and stay behind the closed form and a running regression."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from rewriter.runtime.estimators.allocation import copy_counts
from rewriter.runtime.estimators.learned_allocation import LEARNED, GaussianAllocator
from rewriter.runtime.random import Key
from rewriter.state import _plain, _restored

ROWS, COPIES = 64, 20
finite = st.floats(-1e6, 1e6) | st.just(float("nan")) | st.just(float("inf"))


def variance(norms, counts):
    """Of the mean gradient, in units of what equal shares give."""
    return float((norms**2 / counts).sum() / (norms**2 / counts.mean()).sum())


def asked(allocator, losses, seed, step):
    return allocator.shares(losses, Key(seed, step, "allocation"), 0, allocator.parameters)


def batch(generator):
    """Losses and gradient lengths of a classifier's rows, many of them fitted: 1 - p_y, and what that misses."""
    losses = np.exp(-1.25 + generator.standard_normal(ROWS))
    return losses, -np.expm1(-losses) * np.exp(0.2 * generator.standard_normal(ROWS))


def trained(name, seed, steps, blind=False):
    """Variance by step: learnt, by 1 - p_y, by the true lengths. blind: it is told that rows do not differ."""
    generator, allocator, found = np.random.default_rng(seed), LEARNED[name](), []
    for step in range(steps):
        losses, norms = batch(generator)
        shares = asked(allocator, losses, seed, step)
        counts = copy_counts(shares, COPIES)
        noisy = norms**2 * generator.chisquare(counts) / counts
        allocator.learn(losses, shares, counts, np.ones(ROWS) if blind else noisy)
        known = (counts, copy_counts(-np.expm1(-losses), COPIES), copy_counts(norms, COPIES))
        found.append([variance(norms, each) for each in known])
    return np.array(found)


def test_the_gaussian_policy_learns_and_stays_behind_the_closed_form():
    runs = np.mean([trained("gaussian", seed, 350) for seed in range(2)], 0)
    learnt, closed, oracle = runs.T
    assert learnt[:10].mean() > 1.1
    assert learnt[300:].mean() < 0.85
    assert closed.mean() < 1.08 * oracle.mean()
    assert learnt[300:].mean() > 1.05 * closed[300:].mean()
    assert trained("gaussian", 0, 350, blind=True)[300:, 0].mean() > 0.95


def test_the_bernoulli_policy_learns_whether_to_halve():
    runs = np.mean([trained("bernoulli", seed, 300) for seed in range(3)], 0)
    assert runs[:10, 0].mean() > 0.93
    assert runs[250:, 0].mean() < 0.87
    assert runs[250:, 0].mean() > 1.1 * runs[250:, 1].mean()
    assert trained("bernoulli", 0, 300, blind=True)[250:, 0].mean() > 0.95


def test_running_norms_are_near_the_best_from_a_few_batches_on():
    """Without knowing that the loss is a cross-entropy: what lengths go with losses is read off the copies."""
    runs = np.mean([trained("running", seed, 120) for seed in range(3)], 0)
    learnt, closed, oracle = runs.T
    assert learnt[0] == 1
    assert learnt[20:].mean() < 1.08 * oracle[20:].mean()
    assert learnt[20:].mean() < 1.04 * closed[20:].mean()
    assert np.mean([trained("running", seed, 120, blind=True)[20:, 0] for seed in range(3)]) > 0.97


def test_the_score_is_the_derivative_of_the_density():
    generator = np.random.default_rng(0)
    losses, allocator = np.exp(generator.standard_normal(7)), GaussianAllocator()
    allocator.parameters = np.array([0.4, 1.3, -0.2, -0.7])
    shares = asked(allocator, losses, 0, 0)
    parameters = torch.tensor(allocator.parameters, requires_grad=True)
    x = torch.from_numpy((losses - losses.mean()) / losses.std())
    slope, intercept, length, amplitude = parameters
    kernel = torch.exp(-0.5 * (x[:, None] - x) ** 2 / length.exp() ** 2) + 0.01 * torch.eye(7, dtype=torch.float64)
    density = torch.distributions.MultivariateNormal(intercept + slope * x, kernel * amplitude.exp() ** 2)
    (expected,) = torch.autograd.grad(density.log_prob(torch.from_numpy(shares)), parameters)
    np.testing.assert_allclose(allocator.score(losses, shares), expected.numpy(), rtol=1e-8)
    assert not np.allclose(allocator.score(losses, shares[::-1]), expected.numpy(), rtol=0.1)  # negative control


def test_draws_follow_the_policy():
    losses = np.linspace(0, 3, 8)
    allocator = GaussianAllocator()
    allocator.parameters = np.array([0.4, 1.3, -0.2, -0.7])
    drawn = np.array([asked(allocator, losses, 0, step) for step in range(4000)])
    x = (losses - losses.mean()) / losses.std()
    spread = math.exp(-0.7) * 1.01**0.5
    np.testing.assert_allclose(drawn.mean(0), 1.3 + 0.4 * x, atol=5 * spread / 4000**0.5)
    np.testing.assert_allclose(drawn.std(0), spread, rtol=0.06)
    halved = np.array([asked(LEARNED["bernoulli"](), losses, 0, step) == 0.5 for step in range(4000)])
    assert not halved[:, 4:].any()  # at or above the mean loss
    np.testing.assert_allclose(halved[:, :4].mean(0), 0.3, atol=0.035)


@settings(max_examples=100, deadline=None)
@given(st.lists(finite, min_size=1, max_size=30), st.sampled_from(sorted(LEARNED)), st.integers(2, 20), st.booleans())
def test_budgets_are_exact_whatever_the_losses(losses, name, copies, even):
    copies = 2 * copies if even else copies
    allocator, losses = LEARNED[name](), np.array(losses)
    for step in range(3):
        shares = asked(allocator, losses, 0, step)
        counts = copy_counts(shares, copies, even=even)
        assert counts.sum() == len(losses) * copies
        assert counts.min() >= 2
        allocator.learn(losses, shares, counts, np.where(np.isfinite(losses), np.abs(losses), 1.0))
        assert np.isfinite(asked(allocator, losses, 0, step)).all()


@pytest.mark.parametrize("name", sorted(LEARNED))
def test_only_ranks_or_relative_losses_count_and_state_continues(name):
    generator, allocator, kept = np.random.default_rng(0), LEARNED[name](), LEARNED[name]()
    for step in range(8):
        losses, norms = batch(generator)
        shares = asked(allocator, losses, 0, step)
        np.testing.assert_allclose(asked(allocator, 1e-3 * losses, 0, step), shares, rtol=1e-6)
        allocator.learn(losses, shares, copy_counts(shares, COPIES), norms**2)
        if step == 3:
            kept.set_state(_restored(json.loads(json.dumps(_plain(allocator.get_state())))))
        elif step > 3:
            kept.learn(losses, asked(kept, losses, 0, step), copy_counts(shares, COPIES), norms**2)
            np.testing.assert_array_equal(kept.parameters, allocator.parameters)
    before = allocator.parameters
    allocator.learn(losses, shares, copy_counts(shares, COPIES), np.full(ROWS, np.nan))  # a diverged batch
    allocator.learn(losses, shares, copy_counts(shares, COPIES), np.zeros(ROWS))  # a silent one
    np.testing.assert_array_equal(allocator.parameters, before)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_doubt_and_running_norms_along_a_training(noise):
    """Ten classes of digits, a part of the labels wrong, the cut behind 32 hidden units, batches of 128."""
    torch.manual_seed(0)
    x, y = (torch.from_numpy(each) for each in load_digits(return_X_y=True))
    x, y = (x / 16).float(), y.long()
    y = torch.where(torch.rand(len(y)) < noise, torch.randint(0, 10, y.shape), y)
    encoder = nn.Sequential(nn.Linear(64, 32), nn.Tanh())
    head = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer, allocator = torch.optim.Adam([*encoder.parameters(), *head.parameters()], 3e-3), LEARNED["running"]()
    steps, found = 401, []
    for step in range(steps):
        rows = torch.randint(0, len(y), (128,))
        z = encoder(x[rows])
        losses = F.cross_entropy(head(z), y[rows], reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), z, retain_graph=True)
        norms, clean = gradient.norm(dim=1).double().numpy(), losses.detach().double().numpy()
        shares = asked(allocator, clean, 0, step)
        counts = copy_counts(shares, COPIES)
        ways = (norms, -np.expm1(-clean), shares, clean[::-1])
        found.append([float(clean.mean()), *(variance(norms, copy_counts(each, COPIES)) for each in ways)])
        allocator.learn(clean, shares, counts, norms**2)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    loss, oracle, doubt, running, wrong = np.array(found).T
    assert loss[:5].mean() > 2
    assert loss[-50:].mean() < 0.7
    assert max(doubt) <= 1.02  # before rows differ there is nothing to gain, and nothing is lost
    assert max(running) <= 1.02
    for start in range(100, steps - 1, 50):
        stage = slice(start, start + 50)
        assert doubt[stage].mean() <= 1.09 * oracle[stage].mean()
        assert running[stage].mean() <= 1.12 * oracle[stage].mean()
        assert doubt[stage].mean() < 0.6
        assert wrong[stage].mean() > 1.2  # negative control: the losses of other rows
