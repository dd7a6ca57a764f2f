"""Is a gradient the derivative of its function? The order of the Taylor remainder says so without another step size."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rewriter.runtime.domain import Domain
from rewriter.runtime.errors import RewriteError
from rewriter.runtime.evaluator import Evaluator, repeat_shared

if TYPE_CHECKING:
    from rewriter.runtime.black_box import BlackBoxRule
    from rewriter.runtime.rule import Call, Gradients

LARGEST = 0.05  # of the input's spread
HALVINGS = 8  # steps from there
_ANY = Domain()
ROWS = 16  # of the batch; the test is about the box, not about the batch


def remainder_order(
    rule: BlackBoxRule, call: Call, inputs: tuple[Any, ...], cotangents: Gradients, gradients: Gradients
) -> float:
    """Largest order p seen in R(h) = sum over rows |v.(f(x + h u) - f(x)) - h g.u| ~ h^p along one random direction.

    inputs: of the forward, its seeds among them. 2 for the derivative of a smooth f (Taylor), 1 for a wrong gradient,
    0 where differences are noise or failed. Infinite where the remainder is below rounding everywhere (f is linear).
    With the gradient of a shared input, which sums over rows, all rows are moved, and R(h) = |sum over rows ...|.
    Queries count as "check". Raises RewriteError for a batch without rows.
    """
    evaluator = rule.evaluator
    rows = next((len(value) for i, value in enumerate(inputs) if i not in evaluator.shared), 1)
    moved = [i for i, gradient in enumerate(gradients[: len(inputs)]) if gradient is not None]
    moved = [i for i in moved if not evaluator.domains.get(i, _ANY).integer] or moved  # those have no derivative
    whole = any(i in evaluator.shared for i in moved)
    few = rows if whole else min(rows, ROWS)
    if few == 0:
        raise RewriteError("a batch without rows says nothing of a box", where=call.region, remedy="pass some rows")
    values = [v if i in evaluator.shared else v[:few] for i, v in enumerate(inputs)]
    wide = [v.to(dtype) for v, dtype in zip(values, evaluator.dtypes(*values), strict=True)]
    generator = torch.Generator().manual_seed(0)
    moves = {i: _inward(evaluator, i, wide[i], generator) for i in moved}
    kept = [(k, v[:few]) for k, v in enumerate(cotangents) if v is not None]

    def objective(step: float) -> Tensor:
        points = [v + step * moves[i] if i in moves else v for i, v in enumerate(wide)]
        outputs = evaluator.evaluate(*repeat_shared(evaluator, points, few))
        rule.ledger.add(call.region, calls=1, check=few)
        return torch.stack([(outputs[k].double() * v.double()).reshape(few, -1).sum(1) for k, v in kept]).sum(0).cpu()

    base = objective(0.0)
    steps = [2 * LARGEST * 2.0**-k for k in range(1, HALVINGS + 1)]
    changes = torch.stack([objective(h) - base for h in steps])  # (steps, rows)
    sound = (base if whole else changes.sum(0)).isfinite()  # a gradient leaves out the rows that fail at their base
    if not sound.any():
        return 0.0
    predicted = _predicted(moves, gradients, evaluator.shared, few, whole)
    changes, predicted = changes[:, sound], predicted if whole else predicted[sound]
    found = changes.sum(1, keepdim=True) if whole else changes
    remainders = [float((now - h * predicted).abs().sum()) for h, now in zip(steps, found, strict=True)]
    noise = 64 * max(torch.finfo(wide[i].dtype).eps for i in moves) * float(base[sound].abs().sum())
    return _order(remainders, noise)


def _predicted(
    moves: dict[int, Tensor], gradients: Gradients, shared: frozenset[int], rows: int, whole: bool
) -> Tensor:
    """g.u of each row, (rows,), or (1,) of all of them together."""
    parts = []
    for i, move in moves.items():
        gradient = gradients[i]
        assert gradient is not None
        products = (gradient if i in shared else gradient[:rows]).double() * move.double()
        parts.append(products.cpu().sum().reshape(1) if whole else products.cpu().reshape(rows, -1).sum(1))
    return torch.stack(parts).sum(0)


def _order(remainders: list[float], noise: float) -> float:
    if all(remainder <= noise for remainder in remainders):
        return math.inf
    orders = [
        math.log2(larger / smaller)
        for larger, smaller in itertools.pairwise(remainders)
        if smaller > noise and larger > 0
    ]
    return max(orders, default=0.0)


def _inward(evaluator: Evaluator, position: int, value: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction in units of the spread, with those elements turned round that lead out of the domain."""
    rows = value[None] if position in evaluator.shared else value
    move = _spread(rows) * torch.randn(rows.shape, generator=generator).to(rows)
    domain = evaluator.domains.get(position)
    if domain is not None:
        shape = rows.shape[1:]
        bounds = domain.bounds(math.prod(shape), evaluator.label)
        low, high = (torch.from_numpy(bound.copy()).reshape(shape).to(rows) for bound in bounds)
        ends = rows + LARGEST * move
        move = torch.where((ends < low) | (ends > high), -move, move)
    return move.reshape(value.shape)


def _spread(value: Tensor) -> Tensor:
    """Per element of a row: deviation over the batch, or the typical size, or one."""
    deviation = value.std(0, unbiased=False) if len(value) > 1 else torch.zeros_like(value[0])
    size = torch.maximum(deviation, 0.1 * value.abs().mean(0))
    return torch.where(size > 0, size, torch.ones_like(size))
