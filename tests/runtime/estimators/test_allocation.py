"""How many probes each row gets: whole numbers, an exact budget, and what Neyman's rule gains."""

import numpy as np
import pytest
import torch
from array_box import ArrayBox, gradient
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.runtime.black_box import BlackBoxRule
from rewriter.runtime.errors import RewriteError
from rewriter.runtime.estimators.allocation import integer_counts, neyman_counts
from rewriter.runtime.ledger import Ledger

ROWS, WIDTH = 400, 12
MATRIX = np.linalg.qr(np.random.default_rng(0).standard_normal((WIDTH, WIDTH)))[0]  # |g_i| = |v_i|
X = torch.from_numpy(np.random.default_rng(1).standard_normal((ROWS, WIDTH)))
NORMS = np.exp(1.5 * np.random.default_rng(2).standard_normal(ROWS))  # a few rows matter most
UNIT = np.random.default_rng(3).standard_normal((ROWS, WIDTH))
V = torch.from_numpy(UNIT / np.linalg.norm(UNIT, axis=1, keepdims=True) * NORMS[:, None])
TRUE = V @ torch.from_numpy(MATRIX).T
NUMBERS = {"step_size": 1e-3, "input_scale": 1.0, "clip": None}

weights = st.lists(st.floats(0, 1e6) | st.just(float("nan")), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(weights, st.integers(0, 3), st.integers(3, 9), st.floats(0, 1))
def test_counts_are_whole_bounded_and_spend_the_budget(values, floor, ceiling, share):
    budget = round(len(values) * (floor + share * (ceiling - floor)))
    counts = integer_counts(np.array(values), budget, floor, ceiling)
    assert counts.dtype == np.int64
    assert counts.sum() == budget
    assert counts.min() >= floor
    assert counts.max() <= ceiling


def test_counts_in_proportion():
    assert integer_counts(np.array([1.0, 2.0, 5.0]), 16, 0, 16).tolist() == [2, 4, 10]
    assert integer_counts(np.array([1.0, 2.0, 5.0]), 16, 1, 6).tolist() == [4, 6, 6]  # what is cut off goes to others
    assert integer_counts(np.array([0.0, 1.0, 1.0]), 6, 1, 9).tolist() == [1, 3, 2]


def test_a_budget_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not lie between"):
        integer_counts(np.ones(3), 10, 0, 3)


def squared_error(steps=40, **options):
    """Mean over backwards of the summed squared error, and the rows that all of them evaluated."""
    box, ledger = ArrayBox(lambda a: a @ MATRIX), Ledger()
    rule = BlackBoxRule(box, probes=3, ledger=ledger, **NUMBERS, **options)
    errors = [float((gradient(rule, X, v=V, step=step)[0] - TRUE).square().sum()) for step in range(steps)]
    assert ledger["region"].queries == box.rows
    assert ledger["region"].quality == ROWS  # of the very first backward
    return np.mean(errors), box.rows


@pytest.mark.parametrize("directions", ["orthogonal", "coordinate"])
def test_probes_by_norm_cost_the_same_and_err_as_neyman_says(directions):
    uniform, rows = squared_error(directions=directions)
    by_norm, other = squared_error(directions=directions, allocation="norm")
    assert rows == other == ROWS * (40 * (1 + 3) + 1)
    counts = neyman_counts(NORMS, 3, WIDTH)
    expected = float((NORMS**2 * (WIDTH / counts - 1)).sum() / (NORMS**2 * (WIDTH / 3 - 1)).sum())
    assert expected < 0.35
    assert by_norm / uniform == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("directions", ["orthogonal", "gaussian", "rademacher", "coordinate"])
@pytest.mark.parametrize("difference", ["forward", "central"])
def test_every_row_stays_unbiased(directions, difference):
    rule = BlackBoxRule(
        ArrayBox(lambda a: a @ MATRIX),
        probes=2,
        directions=directions,
        difference=difference,
        allocation="norm",
        **NUMBERS,
    )
    found = torch.stack([gradient(rule, X, v=V, step=step)[0] for step in range(300)])
    scaled, true = found / torch.from_numpy(NORMS)[:, None], TRUE / torch.from_numpy(NORMS)[:, None]
    slopes = (scaled * true).sum(2)  # of each row and step: 1 in the mean
    error = slopes.mean(0) - 1
    if directions != "coordinate":  # whose errors are too heavy-tailed for a test of single rows
        assert (error.abs() < 5 * slopes.std(0) / 300**0.5 + 1e-9).all()
    assert abs(float(slopes.mean()) - 1) < 0.02
    mean_error = (scaled - true).mean(0)  # of each row, over steps: what is left must be independent between rows
    assert (
        float(mean_error.mean(0).norm())
        < 4 * float((scaled - true).square().sum(2).mean().sqrt()) / (300 * ROWS) ** 0.5
    )


def rows_of_a_classifier(generator):
    """Outputs of a box, a linear head behind it, the cotangents of a cross-entropy at both, and 1 - p_y."""
    box = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    head = 3 * torch.randn(WIDTH, 10, generator=generator, dtype=torch.float64)
    logits = box.tanh() @ head
    target = torch.where(torch.rand(ROWS, generator=generator) < 0.8, logits.argmax(1), torch.arange(ROWS) % 10)
    loss = torch.nn.functional.cross_entropy(logits, target)
    at_logits, at_box = torch.autograd.grad(loss, (logits, box))
    doubt = 1 - logits.detach().softmax(1).gather(1, target[:, None])[:, 0]
    return at_logits.norm(dim=1).numpy(), at_box.norm(dim=1).numpy(), doubt.numpy()


def test_the_cotangents_norm_is_what_doubt_stands_for():
    """Of logits, |p - y| lies between sqrt(C / (C - 1)) and sqrt(2) times 1 - p_y; in front of a head it knows more.

    Where all rows of a box stretch cotangents alike, the norm is Neyman's rule itself.
    """
    at_logits, at_box, doubt = rows_of_a_classifier(torch.Generator().manual_seed(0))
    ratio = at_logits * ROWS / doubt
    assert ratio.min() >= (10 / 9) ** 0.5 - 1e-9
    assert ratio.max() <= 2**0.5 + 1e-9

    def error(norms, by, width):
        counts = neyman_counts(by, 3, width)
        return float(norms**2 @ (width / counts - 1))

    equal = np.ones(ROWS)
    assert error(at_logits, doubt, 10) == pytest.approx(error(at_logits, at_logits, 10), rel=0.05)
    assert error(at_logits, doubt, 10) < 0.4 * error(at_logits, equal, 10)
    assert error(at_box, doubt, WIDTH) > 1.1 * error(at_box, at_box, WIDTH)
    assert error(at_box, at_box, WIDTH) < 0.4 * error(at_box, equal, WIDTH)


def test_what_the_norm_does_not_know_is_the_boxs_own_slope():
    """Rows that the box stretches by known factors: lengths of gradients would do better, but cost probes."""
    _, at_box, _ = rows_of_a_classifier(torch.Generator().manual_seed(0))
    norms = at_box * np.exp(np.random.default_rng(4).standard_normal(ROWS))

    def error(by):
        return float(norms**2 @ (WIDTH / neyman_counts(by, 3, WIDTH) - 1))

    assert error(norms) < 0.8 * error(at_box)
    assert error(at_box) < error(np.ones(ROWS))


def test_allocation_is_spelled_right():
    with pytest.raises(RewriteError, match="allocation"):
        BlackBoxRule(ArrayBox(np.sin), allocation="neyman")
