"""The copies of several cuts in common evaluations of what follows them."""

from __future__ import annotations

import torch

from .estimators.copies import Estimation, Found
from .noisy_tail import NoisyTail, Request
from .rule import Call


def together(tail: NoisyTail, estimations: dict[int, Estimation]) -> list[Found]:
    """What the estimations of cuts find, each round of their copies in one evaluation."""
    waiting = {cut: next(estimation) for cut, estimation in estimations.items()}
    found: dict[int, Found] = {}
    while waiting:
        requests = [Request(cut, *waiting[cut]) for cut in sorted(waiting)]
        for request, losses in zip(requests, tail.losses(requests), strict=True):
            try:
                waiting[request.cut] = estimations[request.cut].send(losses)
            except StopIteration as stop:
                found[request.cut] = stop.value
                del waiting[request.cut]
    return [found[cut] for cut in sorted(found)]


def rounding(call: Call, tail: NoisyTail) -> float:
    """Relative rounding of what computes the losses: the coarsest dtype there."""
    tensors = [*(value for values in tail.at for value in values), *tail.outputs]
    dtypes = {value.dtype for value in tensors if value.is_floating_point()}
    if call.ambient.autocast is not None:
        dtypes |= {dtype for enabled, dtype in call.ambient.autocast[0] if enabled}
    return max(torch.finfo(dtype).eps for dtype in dtypes)
