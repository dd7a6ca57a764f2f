"""Is a gradient the derivative of its function? The order of the Taylor remainder says so without another step size."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rewriter.runtime.evaluator import Evaluator, repeat_shared

if TYPE_CHECKING:
    from rewriter.runtime.black_box import BlackBoxRule
    from rewriter.runtime.rule import Call, Gradients

LARGEST = 0.05  # of the input's spread
HALVINGS = 8  # steps from there
ROWS = 16  # of the batch; the test is about the box, not about the batch


def remainder_order(
    rule: BlackBoxRule, call: Call, inputs: tuple[Any, ...], cotangents: Gradients, gradients: Gradients
) -> float:
    """Largest order p seen in R(h) = sum over rows |v.(f(x + h u) - f(x)) - h g.u| ~ h^p along one random direction.

    inputs: of the forward, its seeds among them. 2 for the derivative of a smooth f (Taylor), 1 for a wrong gradient,
    0 where differences are noise. Infinite where the remainder is below rounding everywhere (f is linear). Queries
    count as "check".
    """
    evaluator = rule.evaluator
    rows = next((len(value) for i, value in enumerate(inputs) if i not in evaluator.shared), 1)
    few = min(rows, ROWS)
    values = [v if i in evaluator.shared else v[:few] for i, v in enumerate(inputs)]
    wide = [v.to(dtype) for v, dtype in zip(values, evaluator.dtypes(*values), strict=True)]
    generator = torch.Generator().manual_seed(0)
    moves = {
        i: _inward(evaluator, i, wide[i], torch.randn(wide[i].shape, generator=generator).to(wide[i]))
        for i, gradient in enumerate(gradients[: len(inputs)])
        if gradient is not None and i not in evaluator.shared
    }
    kept = [(k, v[:few]) for k, v in enumerate(cotangents) if v is not None]
    predicted = torch.zeros(few, dtype=torch.float64)
    for i, move in moves.items():
        gradient = gradients[i]
        assert gradient is not None
        predicted = predicted.to(move.device) + (gradient[:few].double() * move.double()).reshape(few, -1).sum(1)

    def objective(step: float) -> Tensor:
        points = [v + step * moves[i] if i in moves else v for i, v in enumerate(wide)]
        outputs = evaluator.evaluate(*repeat_shared(evaluator, points, few))
        rule.ledger.add(call.region, calls=1, check=few)
        return torch.stack([(outputs[k].double() * v.double()).reshape(few, -1).sum(1) for k, v in kept]).sum(0)

    base = objective(0.0)
    steps = [2 * LARGEST * 2.0**-k for k in range(1, HALVINGS + 1)]
    remainders = [float((objective(h) - base - h * predicted).abs().sum()) for h in steps]
    noise = 64 * max(torch.finfo(wide[i].dtype).eps for i in moves) * float(base.abs().sum())
    return _order(remainders, noise)


def _order(remainders: list[float], noise: float) -> float:
    if all(remainder <= noise for remainder in remainders):
        return math.inf
    orders = [
        math.log2(larger / smaller)
        for larger, smaller in itertools.pairwise(remainders)
        if smaller > noise and larger > 0
    ]
    return max(orders, default=0.0)


def _inward(evaluator: Evaluator, position: int, value: Tensor, direction: Tensor) -> Tensor:
    """The direction in units of the spread, with those elements turned round that lead out of the input's domain."""
    move = _spread(value) * direction
    domain = evaluator.domains.get(position)
    if domain is None:
        return move
    bounds = domain.bounds(math.prod(value.shape[1:]), evaluator.label)
    low, high = (torch.from_numpy(bound.copy()).reshape(value.shape[1:]).to(value) for bound in bounds)
    ends = value + LARGEST * move
    return torch.where((ends < low) | (ends > high), -move, move)


def _spread(value: Tensor) -> Tensor:
    """Per element of a row: deviation over the batch, or the typical size, or one."""
    deviation = value.std(0, unbiased=False) if len(value) > 1 else torch.zeros_like(value[0])
    size = torch.maximum(deviation, 0.1 * value.abs().mean(0))
    return torch.where(size > 0, size, torch.ones_like(size))
