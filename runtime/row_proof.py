"""Whether what follows a cut treats rows alone: seen on a batch, in another order and beside other rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import RewriteError
from .noisy_tail import NoisyTail, Request

_TOLERANCE = 1e3  # in units of rounding
_COARSE = 1e-4  # relative rounding of low precision, of which
_FEW = 4.0  # must do


def prove(tail: NoisyTail, cut: int, region: str, sigma: float | Tensor, eps: float, seed: int) -> None:
    """Raises RewriteError where rows have other losses once they are copies, or with other rows beside them.

    sigma: of the noise to be used; neighbours get half the value's own deviation where that is more. eps: relative
    rounding of what computes the losses.
    """
    limit = (_TOLERANCE if eps < _COARSE else _FEW) * eps * float(tail.clean.double().nan_to_num().abs().max())
    value = tail.values[cut]
    order = torch.arange(tail.rows, device=value.device)
    again = tail.losses([Request(cut, order.flip(0), value.flip(0))])[0].flip(0)
    if not _alike(again, tail.clean, limit):
        raise RewriteError(
            "what follows a cut cannot be evaluated on copies of rows",
            where=region,
            why="evaluated again without noise, in another order, it gives rows other losses "
            f"(by up to {float((again - tail.clean).abs().max()):.2g}): it couples rows, draws random numbers, "
            "or changes what it reads",
            remedy="put such a part into eval(), or before the cut",
        )
    moved = order % 2 == 0
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).to(value)
    deviation = value.std(0) / 2 if tail.rows > 1 else torch.zeros_like(value[0])
    noise *= torch.maximum(deviation.nan_to_num(), torch.as_tensor(sigma, dtype=value.dtype, device=value.device))
    beside = tail.losses([Request(cut, order, value + torch.where(moved[:, None], noise, 0))])[0]
    if not _alike(beside[~moved], tail.clean[~moved], limit):
        raise RewriteError(
            "what follows a cut couples the rows of a batch",
            where=region,
            why="the losses of some rows change with the noise of others",
            remedy="cut behind what couples them, or give it the statistics of eval()",
        )


def _alike(found: Tensor, expected: Tensor, limit: float) -> bool:
    return torch.allclose(found.double(), expected.double(), rtol=0, atol=limit, equal_nan=True)
