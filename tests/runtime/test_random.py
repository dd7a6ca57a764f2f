import math

import numpy as np
import pytest
import torch

from rewriter.runtime.random import Key, normal, signs, subsets, words

KEY = Key(3, 14, "blocks.2.box")


@pytest.mark.parametrize("draw", [normal, signs, lambda *a, **k: subsets(*a[:3], max(1, a[2] // 2), **k)])
@pytest.mark.parametrize("width", [1, 3, 16, 65])
def test_rows_depend_on_nothing_but_key_and_row(draw, width):
    whole = draw(KEY, 41, width)
    for first, last in ((0, 1), (1, 2), (0, 17), (17, 41), (40, 41), (3, 9)):
        assert np.array_equal(whole[first:last], draw(KEY, last - first, width, first_row=first))
    assert not np.array_equal(whole[:20], draw(KEY, 20, width, first_row=21)) or width == 1


def test_each_field_of_the_key_matters():
    others = [Key(4, 14, "blocks.2.box"), Key(3, 15, "blocks.2.box"), Key(3, 14, "blocks.3.box")]
    others += [Key(3, 14, "blocks.2.box", 1), KEY.named("quality")]
    mine = words(KEY, 4, 4)
    assert all((words(other, 4, 4) != mine).any() for other in others)
    assert (words(Key(3, 14, "blocks.2.box"), 4, 4) == mine).all()


def test_numbers_have_their_distribution():
    z = torch.from_numpy(normal(KEY, 20000, 10)).double()
    count = z.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - moment) < 4 * math.sqrt(variance / count)
    within = float((z.abs() < 1).double().mean())
    assert abs(within - math.erf(1 / math.sqrt(2))) < 4 * math.sqrt(0.22 / count)
    correlation = (z.T @ z / len(z)).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 5 / math.sqrt(len(z))
    s = torch.from_numpy(signs(KEY, 20000, 70))
    assert set(s.unique().tolist()) == {-1.0, 1.0}
    assert float(s.double().mean(0).abs().max()) < 5 / math.sqrt(20000)


def test_subsets_are_uniform_and_without_repetition():
    chosen = torch.from_numpy(subsets(KEY, 12000, 6, 2))
    assert bool((chosen[:, 0] != chosen[:, 1]).all())
    pairs = torch.bincount(chosen[:, 0] * 6 + chosen[:, 1], minlength=36).view(6, 6)
    expected = 12000 / 30
    off_diagonal = pairs[~torch.eye(6, dtype=torch.bool)].double()
    assert float(((off_diagonal - expected) ** 2 / expected).sum()) < 58  # chi-square, 29 degrees: 99.9 %


def test_threads_do_not_disturb_each_other():
    from concurrent.futures import ThreadPoolExecutor

    expected = [normal(Key(0, step, "a"), 64, 33) for step in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda step: normal(Key(0, step, "a"), 64, 33), range(40)))
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
