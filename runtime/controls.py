"""Surrogate gradients at the cuts of a chain: from earlier steps, from the next stage, or through the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .errors import RewriteError
from .estimators.copies import Found
from .estimators.cut_estimator import CutEstimator, Settings
from .estimators.quality import EVERY
from .estimators.surrogates import LinearTail, MeanGradient
from .ledger import Ledger
from .noisy_tail import NoisyTail
from .objective import Copied

_LARGEST = 2**20  # numbers of a learnt map, which is part of the state
_LEAST_COST = 0.01  # a correlation of a tenth is not worth its arithmetic
_DERIVATIVE = 3.0  # forward and backward in units of the forward


class Controls:
    """What the cuts of one rule use as control variates.

    kind: "last", "truncated", "distilled", or "none". All that a step uses is known before its first copy is drawn.
    """

    def __init__(self, kind: str, cuts: Sequence[CutEstimator], ledger: Ledger) -> None:
        self.kind, self.cuts, self.ledger = kind, cuts, ledger

    def prepare(self, region: str, tail: NoisyTail, settings: list[Settings], number: int) -> None:
        """Puts this step's surrogates into the settings of its cuts; number: of the step, from 1.

        Raises RewriteError where the loss has no derivative in the outputs, or a map to them would be too large.
        """
        if self.kind == "none":
            return
        found = self._next(region, tail, number) if self.kind == "truncated" else self._learnt(region, tail)
        for n, (cut, surrogate) in enumerate(zip(self.cuts, found, strict=True)):
            cut.control.cost = self._cost(tail, n) / settings[n].copies
            control = None if surrogate is None else cut.control.scaled(surrogate)
            settings[n] = replace(settings[n], surrogate=surrogate, control=control)
        if self.kind == "distilled":
            tail.watch = lambda n, moved, changed: self._see(n, moved, changed, settings[n].sigma)

    def learn(self, tail: NoisyTail, settings: Sequence[Settings], found: Sequence[Found]) -> None:
        """From what the step found; what later evaluations of the same tail say is passed over."""
        tail.watch = None
        for cut, own, each in zip(self.cuts, settings, found, strict=True):
            if own.surrogate is not None:
                cut.control.observe(each.both, each.predicted, each.spread)
            if isinstance(cut.learnt, MeanGradient):
                cut.learnt.learn(each.gradient)
            elif isinstance(cut.learnt, LinearTail):
                cut.learnt.learn()

    def describe(self) -> dict[str, object]:
        """Plain facts: the root mean square of known correlations, and how many cuts use theirs."""
        known = [each for cut in self.cuts if (each := cut.control.correlation) is not None]
        mean = (sum(each**2 for each in known) / len(known)) ** 0.5 if known else None
        used = sum(cut.control.pays for cut in self.cuts)
        return {"control": self.kind, "control_correlation": mean, "controlled": used}

    def _cost(self, tail: NoisyTail, n: int) -> float:
        """Of a row's surrogate, in copies of it."""
        if self.kind == "truncated":
            course = tail.course
            return _DERIVATIVE * course.length(n, 1) / course.length(n, course.window)
        return 1.0 if self.kind == "distilled" else _LEAST_COST * self.cuts[n].copies

    def _learnt(self, region: str, tail: NoisyTail) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        slopes = output_slopes(tail, region) if self.kind == "distilled" else None
        for cut, value in zip(self.cuts, tail.values, strict=True):
            if isinstance(cut.learnt, LinearTail) and slopes is not None:
                _check_size(value.shape[1], slopes.shape[1], region)
                found.append(cut.learnt.surrogate(slopes, value.shape[1]))
            else:
                found.append(cut.learnt.surrogate(value) if isinstance(cut.learnt, MeanGradient) else None)
        return found

    def _see(self, n: int, moved: Tensor, changed: Tensor, sigma: float | Tensor) -> None:
        learnt = self.cuts[n].learnt
        assert isinstance(learnt, LinearTail)
        learnt.see(moved, changed, sigma)

    def _next(self, region: str, tail: NoisyTail, number: int) -> list[Tensor | None]:
        """Derivatives where they pay, or are not known to; elsewhere looked at now and then."""
        wanted = [
            n
            for n, cut in enumerate(self.cuts)
            if number % EVERY == 1 or cut.control.correlation is None or cut.control.pays
        ]
        found: list[Tensor | None] = [None] * len(self.cuts)
        most = max(1, tail.max_rows // tail.rows)
        for start in range(0, len(wanted), most):
            some = wanted[start : start + most]
            for n, slope in zip(some, next_slopes(tail, some), strict=True):
                found[n] = slope
            self.ledger.add(region, forwards=1, vjps=1)
        tail.staged = 0  # the ledger's stages are those of copies
        return found


def next_slopes(tail: NoisyTail, cuts: Sequence[int]) -> list[Tensor | None]:
    """(rows, width) at each cut: gradient of what the next stage adds to the clean loss, by ordinary differentiation.

    What later stages make is held as it is: back-propagation truncated after one stage. None where it adds nothing.
    """
    every = torch.arange(tail.rows, device=tail.values[0].device)
    with torch.enable_grad():
        values = [[value.detach().requires_grad_() for value in tail.at[cut]] for cut in cuts]
        given = [(every, [value.clone() for value in own]) for own in values]
        source, outputs = tail.swept(cuts, given, 1)
        loss = tail.weighed(tail.objective.rows(outputs, Copied(source, tail.rows, tail.outputs)), source).sum()
        if not loss.requires_grad:
            return [None] * len(cuts)
        found = iter(torch.autograd.grad(loss, [value for own in values for value in own], allow_unused=True))
    slopes: list[Tensor | None] = []
    for cut, own in zip(cuts, values, strict=True):
        gradients = [next(found) for _ in own]
        filled = [torch.zeros_like(v) if g is None else g for g, v in zip(gradients, own, strict=True)]
        slopes.append(tail.side_by_side(cut, filled) if any(g is not None for g in gradients) else None)
    return slopes


def output_slopes(tail: NoisyTail, region: str) -> Tensor:
    """(rows, outputs): gradient of the clean loss in the flat outputs. Raises RewriteError where it has none."""
    every = torch.arange(tail.rows, device=tail.values[0].device)
    with torch.enable_grad():
        outputs = [v.detach().clone().requires_grad_(v.is_floating_point()) for v in tail.outputs]
        loss = tail.weighed(tail.objective.rows(outputs, Copied(every, tail.rows, tail.outputs)), every).sum()
        if not loss.requires_grad:
            raise RewriteError(
                'control="distilled" differentiates the loss in the model\'s outputs, and it has no derivative there',
                where=region,
                remedy='control="last"',
            )
        floating = [value for value in outputs if value.requires_grad]
        found = iter(torch.autograd.grad(loss, floating, allow_unused=True, materialize_grads=True))
    return tail.flat([next(found) if value.requires_grad else value for value in outputs])


def _check_size(width: int, outputs: int, region: str) -> None:
    if width * outputs > _LARGEST:
        raise RewriteError(
            f'control="distilled" would learn a map of {width} x {outputs} numbers',
            where=region,
            why=f"it is kept in the state, which should not hold more than {_LARGEST} of them for a cut",
            remedy='control="last", or cut where the value is narrower',
        )
