import math

import numpy as np
import pytest
import torch
from array_box import ArrayBox, cosine, gradient

from rewriter.runtime.black_box import BlackBoxRule
from rewriter.runtime.estimators.directions import draw
from rewriter.runtime.estimators.quality import EVERY, QualityTracker, predicted_cosine
from rewriter.runtime.random import Key

WIDTH, ROWS = 16, 256
MATRIX = torch.from_numpy(np.random.default_rng(0).standard_normal((WIDTH, 4)))
X = torch.from_numpy(np.random.default_rng(1).standard_normal((ROWS, WIDTH)))
V = torch.from_numpy(np.random.default_rng(2).standard_normal((ROWS, 4)))
TRUE = V @ MATRIX.T
CASES = [
    ("orthogonal", 1, "least_squares"),
    ("orthogonal", 6, "least_squares"),
    ("orthogonal", 16, "least_squares"),
    ("orthogonal", 24, "average"),
    ("rademacher", 4, "average"),
    ("gaussian", 1, "average"),
    ("gaussian", 16, "average"),
    ("coordinate", 3, "least_squares"),
]


@pytest.mark.parametrize(("kind", "probes", "reconstruction"), CASES)
def test_predicted_and_measured_agree_with_the_truth(kind, probes, reconstruction):
    box = ArrayBox(lambda a: a @ MATRIX.numpy())
    rule = BlackBoxRule(box, probes=probes, directions=kind, reconstruction=reconstruction, step_size=1e-3, clip=None)
    seen = []
    for step in range(6 * EVERY):
        (found,) = gradient(rule, X, v=V, step=step)
        error = (found - TRUE).square().sum() / TRUE.square().sum()
        seen.append(float(error))
    quality = rule.quality
    truth = math.sqrt(1 / (1 + np.mean(seen)))
    assert quality.predicted_cosine == pytest.approx(truth, abs=0.01)
    assert quality.measured_cosine == pytest.approx(truth, abs=0.05)
    assert quality.failed == quality.clipped == 0
    assert "step bias" in quality.bias
    assert rule.ledger.total("quality") == 6 * ROWS  # one probe every fifty backwards
    assert rule.ledger.total("queries") == box.rows


def test_two_halves_of_one_orthogonal_set_measure_nothing():
    """Their inner product is zero whatever the gradient; independent blocks give its square."""
    u = draw("orthogonal", Key(0, 0, "box"), ROWS, 8, WIDTH, dtype=np.float64)
    other = draw("orthogonal", Key(0, 1, "box"), ROWS, 1, WIDTH, dtype=np.float64)[:, 0]
    true = TRUE.numpy()
    estimate = np.einsum("nk,nkd->nd", np.einsum("nkd,nd->nk", u[:, :7], true), u[:, :7]) / 7
    norms = np.ones(ROWS)
    independent, same = QualityTracker(), QualityTracker()
    independent.measure(estimate, other, np.einsum("nd,nd->n", other, true), norms)
    same.measure(estimate, u[:, 7], np.einsum("nd,nd->n", u[:, 7], true), norms)
    assert independent.measured_cosine == pytest.approx(math.sqrt(7 / WIDTH), abs=0.12)
    assert same.measured_cosine is None or not 0.3 < same.measured_cosine < 0.9


def test_measured_falls_below_predicted_where_the_box_is_rough():
    rule = BlackBoxRule(ArrayBox(lambda a: np.sign(a @ MATRIX.numpy())), probes=8)
    for step in range(3 * EVERY):
        gradient(rule, X, v=V, step=step)
    assert rule.quality.measured_cosine < rule.quality.predicted_cosine - 0.05
    assert "smoothing over step" in rule.quality.bias


def test_closed_forms():
    assert predicted_cosine("orthogonal", 4, 16, averaged=False) == 0.5
    assert predicted_cosine("gaussian", 4, 16, averaged=False) == 0.5
    assert predicted_cosine("gaussian", 17, 16, averaged=True) == pytest.approx(math.sqrt(0.5))
    assert predicted_cosine("rademacher", 15, 16, averaged=True) == pytest.approx(math.sqrt(0.5))
    assert predicted_cosine("orthogonal", 32, 16, averaged=True) == 1
    assert predicted_cosine("coordinate", 20, 16, averaged=False) == 1


def test_eighth_of_the_probes():
    rule = BlackBoxRule(ArrayBox(lambda a: np.tanh(a @ MATRIX.numpy())), probes=2)
    exact = BlackBoxRule(ArrayBox(lambda a: np.tanh(a @ MATRIX.numpy())), probes=16, directions="coordinate")
    found = [cosine(gradient(rule, X, v=V, step=s)[0], gradient(exact, X, v=V, step=s)[0]) for s in range(20)]
    assert float(torch.stack(found).square().mean().sqrt()) == pytest.approx(math.sqrt(1 / 8), abs=0.02)
