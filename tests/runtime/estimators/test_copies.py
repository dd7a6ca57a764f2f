"""Copies per row: exact budgets, unbiased sums, what Neyman's rule and a pilot gain; split halves; surrogates."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.runtime.estimators import copies as copies_module
from rewriter.runtime.estimators.allocation import (
    block_counts,
    block_variance,
    copy_counts,
    pilot_norms,
    pilot_shares,
)
from rewriter.runtime.estimators.control import ControlVariate
from rewriter.runtime.estimators.copies import Batch, estimate, estimate_by
from rewriter.runtime.estimators.cut_options import CutOptions
from rewriter.runtime.estimators.likelihood_ratio import along, row_gradients
from rewriter.runtime.estimators.noise import draw_noise, relative_variance
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


@settings(max_examples=200, deadline=None)
@given(lengths, st.integers(1, 20), st.booleans(), st.integers(1, 12))
def test_block_budgets_are_exact_and_never_worse_than_equal_shares(norms, copies, even, width):
    copies, unit, norms = (2 * copies, 2, np.array(norms)) if even else (copies, 1, np.array(norms))
    counts = block_counts(norms, copies, width, even=even)
    assert counts.sum() == len(norms) * copies
    assert counts.min() >= min(2, copies)
    assert not (even and (counts % 2).any())
    squares = np.where(np.isfinite(norms), norms, 0.0) ** 2
    equal = np.full(len(norms), copies // unit)
    assert squares @ block_variance(counts // unit, width) <= (1 + 1e-12) * (squares @ block_variance(equal, width))


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


@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_errors_of_orthogonal_blocks(width):
    for count in range(1, 4 * width + 2):
        assert block_variance(np.array([count]), width)[0] == pytest.approx(
            relative_variance("orthogonal", count, width, "clean")
        )


def test_whole_blocks_are_worth_more_than_their_parts():
    """As good as trying everything; in proportion, which suits independent noise, loses to equal shares."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        norms, width, copies = np.exp(generator.standard_normal(3)), 3, 6
        shares = [c for c in itertools.product(range(2, 19), repeat=3) if sum(c) == 3 * copies]
        best = min(float(norms**2 @ block_variance(np.array(each), width)) for each in shares)
        assert norms**2 @ block_variance(block_counts(norms, copies, width), width) <= 1.05 * best
    norms = lognormal(0.25)[0]
    equal = norms**2 @ block_variance(np.full(128, 20), 10)
    assert norms**2 @ block_variance(block_counts(norms, 20, 10), 10) < 0.98 * equal
    assert norms**2 @ block_variance(copy_counts(norms, 20), 10) > 1.2 * equal


def answered(estimation, gradients):
    """What an estimation finds on a linear loss with these gradients, (rows, width); and the copies it asked for."""
    request, asked = next(estimation), 0
    while True:
        source, values = request
        asked += len(source)
        try:
            request = estimation.send((values * gradients[source]).sum(1))
        except StopIteration as stop:
            return stop.value, asked


def estimates(gradients, copies, seed=0, norms=None, **options):
    """(estimate, copies asked for) of rows at zero: through `estimate`, or `estimate_by` what is known."""
    rows, width = gradients.shape
    zero = torch.zeros(rows, width, dtype=torch.float64)
    batch, chosen = Batch(zero, zero[:, 0].clone(), 0, 0.1), CutOptions(copies=copies, baseline="clean", **options)
    key = Key(seed, 0, "x")
    found = estimate(batch, chosen, copies, key) if norms is None else estimate_by(batch, chosen, copies, key, norms)
    return answered(found, gradients)


def spread_gradients(tau, rows=4000, width=6):
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64))
    return directions * torch.exp(tau * torch.randn(rows, 1, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("directions", ["gaussian", "orthogonal"])
def test_errors_are_those_the_counts_were_chosen_by(directions):
    gradients = spread_gradients(1.0, rows=1000)
    norms = gradients.norm(dim=1).numpy()
    found, asked = estimates(gradients, 12, norms=norms, directions=directions)
    assert asked == 12 * len(gradients)
    counts = block_counts(norms, 12, 6) if directions == "orthogonal" else copy_counts(norms, 12)
    errors = block_variance(counts, 6) if directions == "orthogonal" else 7 / counts
    expected = float(norms**2 @ errors)
    assert float((found.gradient - gradients).square().sum()) == pytest.approx(expected, rel=0.12)
    assert float((found.squares.numpy() / 0.01 / norms**2).mean()) == pytest.approx(1, rel=0.05)


def test_a_pilot_is_charged_and_reused():
    """Rows alike: as good as equal shares of all copies, which without the pilot's would err 20 / 16 as much."""
    gradients = spread_gradients(0.0)
    found, asked = estimates(gradients, 20, allocation="norm", directions="gaussian")
    assert asked == 20 * len(gradients)
    error = float((found.gradient - gradients).square().sum() / gradients.square().sum())
    assert error == pytest.approx(7 / 20, rel=0.05)
    assert error < 0.9 * 7 / 16


def test_a_pilot_pays_where_rows_differ():
    gradients = spread_gradients(1.0)
    found, asked = estimates(gradients, 20, allocation="norm", directions="gaussian")
    same, equal = estimates(gradients, 20, directions="gaussian")
    assert asked == equal
    squared = [float((each.gradient - gradients).square().sum()) for each in (found, same)]
    assert squared[0] < 0.65 * squared[1]


def test_a_pilots_part_may_not_depend_on_its_own_row(monkeypatch):
    """Rows weighted by how many copies the pilot gave them come out short: long estimates get small parts."""
    gradients = spread_gradients(0.5, rows=2000)

    def slopes():
        found = torch.stack(
            [estimates(gradients, 20, s, allocation="norm", directions="gaussian")[0].gradient for s in range(12)]
        )
        slope = (found * gradients).sum(2) / gradients.square().sum(1)
        return abs(float(slope.mean()) - 1) / float(slope.std() / slope.numel() ** 0.5)

    assert slopes() < 4
    pooled = lambda squares, pilot, rest: pilot / (pilot + copy_counts(pilot_norms(squares, pilot), rest))  # noqa: E731
    monkeypatch.setattr(copies_module, "pilot_shares", pooled)
    assert slopes() > 8


def test_pilot_norms_are_drawn_towards_the_mean():
    """As far as rows differ by no more than the pilot's own noise."""
    generator = np.random.default_rng(0)
    noise = generator.chisquare(4, 2000) / 4
    alike = pilot_norms(noise, 4)
    assert alike.std() < 0.1 * np.sqrt(noise).std()
    norms = np.exp(generator.standard_normal(2000))
    found = pilot_norms(norms**2 * noise, 4)
    assert np.corrcoef(found, norms)[0, 1] > 0.8
    assert found.std() > 0.6 * norms.std()
    for nothing in (np.zeros(3), np.array([1.0, np.nan])):
        assert not pilot_norms(nothing, 4).any()


def test_pilot_shares_read_other_rows_only():
    squares = np.exp(np.random.default_rng(0).standard_normal(50))
    shares = pilot_shares(squares, 4, 16)
    changed = squares.copy()
    changed[7] *= 100
    again = pilot_shares(changed, 4, 16)
    assert again[7] == pytest.approx(shares[7])
    assert (np.abs(np.delete(again, 7) - np.delete(shares, 7)) > 1e-3).all()
    assert pilot_shares(np.random.default_rng(0).chisquare(4, 5000), 4, 16) == pytest.approx(0.2, rel=0.05)
    for unknown in (np.zeros(3), np.ones(1), np.array([1.0, np.nan])):
        assert pilot_shares(unknown, 4, 16) == pytest.approx(0.2)


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
