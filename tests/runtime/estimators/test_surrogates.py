"""What is learnt of a cut from earlier steps: a mean, and a linear map to the outputs."""

import pytest
import torch

from rewriter.runtime.estimators.surrogates import LinearTail, MeanGradient

GENERATOR = torch.Generator().manual_seed(0)
MAP = torch.randn(6, 3, generator=GENERATOR, dtype=torch.float64)
SIGMA = torch.linspace(0.05, 0.4, 6, dtype=torch.float64)


def error(learnt, expected=MAP):
    slopes = torch.eye(3, dtype=torch.float64)
    found = learnt.surrogate(slopes, 6)
    return 1.0 if found is None else float((found.T - expected).norm() / expected.norm())


def taught(steps, copies, sigma=0.1, bend=0.0):
    learnt, generator = LinearTail(), torch.Generator().manual_seed(1)
    for _ in range(steps):
        for _ in range(2):
            moved = sigma * torch.randn(copies // 2, 6, generator=generator, dtype=torch.float64)
            learnt.see(moved, moved @ MAP + bend * (moved**2) @ MAP, sigma)
        learnt.learn()
    return learnt


@pytest.mark.parametrize("sigma", [0.1, SIGMA], ids=["one", "each"])
@pytest.mark.parametrize("copies", [4, 100])
def test_a_linear_tail_is_found_exactly(sigma, copies):
    """Also from fewer copies than dimensions, where steps must be short."""
    assert error(taught(600, copies, sigma)) < 1e-6
    assert error(taught(1, copies, sigma)) > 0.01
    assert error(LinearTail()) == 1


def test_a_bent_tail_gives_its_mean_slope():
    assert error(taught(100, 400, bend=0.5)) < 0.05


def test_failed_copies_and_other_shapes_are_passed_over():
    learnt = taught(100, 100)
    before = error(learnt)
    learnt.see(torch.ones(2, 6, dtype=torch.float64), torch.full((2, 3), torch.nan, dtype=torch.float64), 0.1)
    learnt.learn()
    assert error(learnt) == before
    assert learnt.surrogate(torch.zeros(4, 5), 6) is None
    again = LinearTail()
    again.set_state(learnt.get_state())
    assert error(again) == before
    learnt.see(torch.ones(2, 6, dtype=torch.float64), torch.ones(2, 5, dtype=torch.float64), 0.1)  # another model
    learnt.learn()
    assert learnt.surrogate(torch.zeros(4, 5, dtype=torch.float64), 6).shape == (4, 6)


def test_the_mean_of_rows():
    learnt, like = MeanGradient(), torch.zeros(4, 6)
    assert learnt.surrogate(like) is None
    learnt.learn(torch.arange(12.0).reshape(2, 6))
    torch.testing.assert_close(learnt.surrogate(like), torch.arange(3.0, 9.0).expand(4, 6))
    learnt.learn(torch.full((2, 6), torch.inf))
    kept = MeanGradient()
    kept.set_state(learnt.get_state())
    torch.testing.assert_close(kept.surrogate(like), torch.arange(3.0, 9.0).expand(4, 6))
    assert kept.surrogate(torch.zeros(4, 5)) is None
