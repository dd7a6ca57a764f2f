import numpy as np
import pytest

from rewriter.runtime.estimators.directions import KINDS, draw
from rewriter.runtime.estimators.reconstruction import average, least_squares
from rewriter.runtime.random import Key


def problem(kind, rows, count, width, step=0):
    directions = draw(kind, Key(1, step, "box"), rows, count, width, dtype=np.float64)
    true = np.random.default_rng(step).standard_normal((rows, width))
    return directions, true, np.einsum("nkd,nd->nk", directions, true)


@pytest.mark.parametrize("kind", ["orthogonal", "coordinate"])
@pytest.mark.parametrize(("count", "width"), [(1, 6), (3, 6), (6, 6), (12, 6), (40, 64)])
def test_the_average_is_the_solve_for_orthogonal_sets(kind, count, width):
    directions, _, slopes = problem(kind, 20, count, width)
    assert np.allclose(average(directions, slopes, None), least_squares(directions, slopes, None), atol=1e-10)


@pytest.mark.parametrize("kind", ["orthogonal", "coordinate"])
def test_the_average_is_the_solve_with_lost_probes(kind):
    directions, _, slopes = problem(kind, 50, 5, 8)
    usable = np.random.default_rng(0).random((50, 5)) > 0.4
    slopes = np.where(usable, slopes, 0)
    found = average(directions, slopes, usable)
    assert np.allclose(found, least_squares(directions, slopes, usable), atol=1e-10)
    assert not found[~usable.any(1)].any()


@pytest.mark.parametrize("kind", KINDS)
def test_least_squares_is_exact_where_directions_span(kind):
    directions, true, slopes = problem(kind, 200, 40, 5)
    usable = np.random.default_rng(0).random(slopes.shape) > 0.3
    assert np.allclose(least_squares(directions, np.where(usable, slopes, 0), usable), true, atol=1e-9)


@pytest.mark.parametrize(("count", "width"), [(5, 16), (7, 9), (20, 5)])
def test_a_row_is_solved_the_same_wherever_it_lies(count, width):
    directions, _, slopes = problem("gaussian", 40, count, width)
    whole = least_squares(directions, slopes, None)
    for row in range(40):
        assert np.array_equal(
            whole[row : row + 1], least_squares(directions[row : row + 1].copy(), slopes[row : row + 1], None)
        )


@pytest.mark.parametrize(("width", "count"), [(2, 2), (3, 3), (3, 2), (6, 4)])
def test_unbiased_with_dependent_directions(width, count):
    """Rademacher directions in few dimensions are often parallel: the scale is width / rank, row by row."""
    directions, _, _ = problem("rademacher", 40000, count, width)
    true = np.tile(np.random.default_rng(3).standard_normal(width), (40000, 1))
    found = least_squares(directions, np.einsum("nkd,nd->nk", directions, true), None)
    z = (found - true).mean(0) / (found.std(0) / np.sqrt(len(found)))
    assert np.abs(z).max() < 4
    projected = found * (np.linalg.matrix_rank(directions) / width)[:, None]  # the control: a projection is shorter
    z = (projected - true).mean(0) / (projected.std(0) / np.sqrt(len(found)))
    assert np.abs(z).max() > 10


def test_no_usable_probe_gives_zero():
    directions, _, slopes = problem("gaussian", 3, 4, 6)
    nothing = np.zeros_like(slopes, dtype=bool)
    for method in (average, least_squares):
        assert not method(directions, np.zeros_like(slopes), nothing).any()
