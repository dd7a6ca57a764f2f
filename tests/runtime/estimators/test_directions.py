import math

import pytest
import torch

from rewriter.runtime.estimators.directions import KINDS
from rewriter.runtime.estimators.directions import draw as draw_array
from rewriter.runtime.random import Key

KEY = Key(0, 5, "box")


def draw(kind, key, rows, count, width, first_row=0, dtype=torch.float32):
    drawn = draw_array(kind, key, rows, count, width, first_row, str(dtype).removeprefix("torch."))
    return torch.tensor(drawn)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "count"), [(1, 1), (1, 3), (2, 1), (3, 2), (7, 7), (16, 5), (17, 15), (16, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_split_of_rows_changes_no_bit(kind, width, count, dtype):
    whole = draw(kind, KEY, 23, count, width, dtype=dtype)
    assert whole.shape == (23, count, width)
    for first, last in ((0, 1), (7, 8), (20, 23), (0, 11), (11, 23)):
        assert torch.equal(whole[first:last], draw(kind, KEY, last - first, count, width, first, dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "count"), [(1, 1), (5, 1), (5, 3), (5, 5), (5, 8)])
def test_unit_variance_per_entry(kind, width, count):
    u = draw(kind, KEY, 20000, count, width, dtype=torch.float64)
    second = u.transpose(1, 2) @ u / count
    deviation = (second - torch.eye(width)).mean(0) / (second.std(0) / math.sqrt(20000)).clamp(min=1e-6)
    assert float(deviation.abs().max()) < 4.5
    if kind != "coordinate":
        assert float(u.mean((0, 1)).abs().max()) < 5 / math.sqrt(20000)


@pytest.mark.parametrize("kind", ["orthogonal", "coordinate"])
@pytest.mark.parametrize(("width", "count"), [(2, 2), (16, 1), (16, 2), (16, 15), (16, 16), (64, 40), (256, 128)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_orthogonal_sets(kind, width, count, dtype, tolerance):
    u = draw(kind, KEY, 40, count, width, dtype=dtype)
    assert u.dtype == dtype
    error = u @ u.transpose(1, 2) - width * torch.eye(count)
    assert float(error.abs().max()) < tolerance * width


def test_blocks_beyond_the_width_are_independent():
    u = draw("orthogonal", KEY, 3000, 8, 4)
    inner = (u[:, :4] @ u[:, 4:].transpose(1, 2)).flatten()
    assert float(inner.double().var()) == pytest.approx(4, rel=0.1)  # of independent unit-variance vectors: d


@pytest.mark.parametrize("count", [1, 2, 4])
def test_orthogonal_frames_are_haar(count):
    """Entries of a Haar column have E u^4 = 3 d / (d + 2), which neither signs (1) nor coordinates (d) have.

    Over calls, as complete frames share one rotation within a call.
    """
    u = torch.cat([draw("orthogonal", Key(0, call, "box"), 1, count, 4) for call in range(4000)])
    fourth = (u**4).mean((0, 1))
    assert torch.allclose(fourth, torch.full((4,), 3 * 4 / 6), rtol=0.1)


@pytest.mark.parametrize("kind", ["orthogonal", "rademacher", "gaussian"])
def test_rows_are_not_shared(kind):
    for count in (1, 4):
        u = draw(kind, KEY, 2000, count, 8).double()
        inner = (u[:-1, 0] * u[1:, 0]).sum(1)
        assert abs(float(inner.mean())) < 4 * math.sqrt(8 / 2000)
        assert float(inner.square().mean()) == pytest.approx(8, rel=0.15)  # one direction for all would give 64
