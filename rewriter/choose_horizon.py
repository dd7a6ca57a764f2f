"""Choosing a horizon without a run at full memory: how far its gradient points the right way, and short pilot runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from rewriter.passes.base import Entry
from rewriter.passes.checkpoint import Checkpoint
from rewriter.passes.horizon import Horizon
from rewriter.runtime.errors import RewriteError

from .plan import Plan
from .rewrite import arguments, rewrite
from .rewritten import Rewritten
from .shadow import preserved

State = TypeVar("State")


def alignment(step: Rewritten, batches: Iterable[tuple[Any, Any]], horizons: Sequence[int]) -> dict[int, float]:
    """Cosine between the gradient of each horizon and the exact one, over all micro-batches together.

    step: rewritten with a loss and one `Horizon`, whose other options hold; batches: (example, target) each, examples
    as `rewrite` takes them. Gradients are summed before the cosine is taken, as the mean of small batches' cosines is
    too high. The exact gradient is taken under checkpointing, so that no horizon's memory is exceeded but by the sums.
    Parameters, `.grad`, buffers and random states are left as they were. On weights that another horizon trained the
    cosine says little about how training with this one ends; see `pilot`. Raises RewriteError where there is no loss
    or not one `Horizon`, and where a horizon does not apply.
    """
    entries = [entry for entry in step.plan if isinstance(entry, Horizon)]
    if len(entries) != 1 or step.loss is None or entries[0].learns:
        raise RewriteError(
            "alignment() takes a step with a loss and one Horizon with a shared head",
            where=repr(step.plan),
            remedy="rewrite(model, Plan([Horizon(blocks, horizon)]), loss=...)",
        )
    (entry,) = entries
    ways: dict[int, Entry] = {horizon: replace(entry, horizon=horizon, stride=None) for horizon in horizons}
    ways[0] = Checkpoint(entry.target)
    given = list(batches)
    total = {number: _accumulated(step, entry, way, given) for number, way in ways.items()}
    return {horizon: _cosine(total[horizon], total[0]) for horizon in horizons}


def _accumulated(step: Rewritten, entry: Entry, way: Entry, batches: Sequence[tuple[Any, Any]]) -> list[Tensor]:
    """The gradients of the batches' losses, added up, with this way in place of the step's own."""
    plan = Plan([way if each is entry else each for each in step.plan])
    loss = step.loss
    assert loss is not None
    other = rewrite(step.model, plan, loss=loss.function, seed=step._clock.seed)
    wanted = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
    sums = [torch.zeros_like(parameter) for parameter in wanted]
    with preserved(step.model), torch.enable_grad():
        for example, target in batches:
            args, kwargs = arguments(example)
            value = other(*args, **kwargs) if target is None else other(*args, target=target, **kwargs)
            for total, gradient in zip(sums, torch.autograd.grad(value, wanted, allow_unused=True), strict=True):
                if gradient is not None:
                    total.add_(gradient)
    return sums


def _cosine(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    product = square = other = 0.0
    for a, b in zip(found, exact, strict=True):
        a, b = a.double().flatten(), b.double().flatten()
        product, square, other = product + float(a @ b), square + float(a @ a), other + float(b @ b)
    return product / math.sqrt(square * other) if square and other else 0.0


@dataclass(frozen=True)
class Pilot:
    """A short run: its horizon, what `evaluate` said of it (a held-out loss), and its seconds."""

    horizon: int
    loss: float
    seconds: float


def pilot(
    horizons: Iterable[int], train: Callable[[int], State], evaluate: Callable[[State], float]
) -> tuple[Pilot, ...]:
    """Run `train(horizon)` for each horizon and `evaluate` what it returns; the lowest loss first.

    train: a few hundred steps from the same initial weights and batches; evaluate: the loss on data kept apart.
    """
    found = []
    for horizon in horizons:
        start = time.perf_counter()
        trained = train(horizon)
        seconds = time.perf_counter() - start
        found.append(Pilot(horizon, evaluate(trained), seconds))
    return tuple(sorted(found, key=lambda run: run.loss if math.isfinite(run.loss) else math.inf))
