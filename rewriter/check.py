"""`step.check(...)`: one batch, every region's gradient against the best reference there is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rewriter.passes.program import holds_box
from rewriter.runtime.black_box import BlackBoxRule
from rewriter.runtime.errors import RewriteError
from rewriter.runtime.estimators.taylor import remainder_order
from rewriter.runtime.rule import Call, Gradients, Rule, Taken
from rewriter.runtime.segment import Segment
from rewriter.runtime.ulr_cut import UlrCutRule

from .measure import scalar
from .shadow import preserved
from .signature import flatten
from .standins import StandIn, standing_in, variant_of

if TYPE_CHECKING:
    from .rewritten import Rewritten

_TIMES = 16
_COPIES = f"{_TIMES} times the copies"
_ON_COPIES = "what follows the cut has no derivative: compared with more copies, which smooth as the estimate does"
_ON_CLEAN = (
    "compared with differentiating what follows the cut; steps in it (spikes, rounding, argmax) are in the estimate "
    "and not in the reference"
)


@dataclass(frozen=True)
class Agreement:
    """Of an estimate with its reference: cosine, and slope <estimate, reference> / <reference, reference>."""

    cosine: float
    slope: float

    @classmethod
    def of(cls, pairs: Iterable[tuple[Tensor | None, Tensor | None]]) -> Agreement:
        estimate = reference = product = 0.0
        for left, right in pairs:
            if left is None or right is None:
                continue
            a, b = left.detach().double().flatten(), right.detach().double().flatten()
            estimate, reference = estimate + float(a @ a), reference + float(b @ b)
            product += float(a @ b)
        if estimate == 0 or reference == 0:
            return cls(1.0 if estimate == reference else 0.0, 1.0 if estimate == reference else 0.0)
        return cls(product / (estimate * reference) ** 0.5, product / reference)

    def __str__(self) -> str:
        return f"cosine {self.cosine:6.3f}  slope {self.slope:6.3f}"


@dataclass(frozen=True)
class Checked:
    """One region. reference: what it was compared with; order: of the Taylor remainder of the reference, None where
    autograd is the reference; verdict: in words."""

    region: str
    reference: str
    inputs: Agreement
    order: float | None
    verdict: str


@dataclass(frozen=True)
class Report:
    """`str(report)` is the table.

    parameters: all trainable parameters (and inputs that require gradients), estimate against reference; silent:
    regions that this batch asked no gradient of.
    """

    regions: tuple[Checked, ...]
    parameters: Agreement
    silent: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = []
        for each in self.regions:
            lines.append(f"{each.region}: gradient of its inputs  {each.inputs}  (reference: {each.reference})")
            lines.append(f"  {each.verdict}")
        for name in self.silent:
            lines.append(f"{name}: no gradient asked: nothing before it requires one, or nothing after it is used")
        lines.append(f"parameters of the model:  {self.parameters}")
        return "\n".join(lines)


def check(step: Rewritten, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> Report:
    """Run one training forward and two backwards: with every rule's own gradient, and with the references.

    Learnt state, counters, buffers, `.grad` and random states are as before afterwards; the queries stay in the ledger.
    Raises RewriteError in eval mode, where there is nothing to check.
    """
    if not step.training:
        raise RewriteError("check() needs the training mode", remedy="call step.train() first")
    with torch.enable_grad(), preserved(step.model):
        variant = variant_of(step, args, kwargs, target)
        segments = {s.region: variant.emitted.segments[s.name] for s in variant.program.segments if s.region}
        boxed = {region.name: holds_box(variant.program.module(region.target)) for region in variant.program.regions}
        with standing_in(step, variant, lambda name, rule: _Spy(rule, segments[name], boxed[name])) as spies:
            loss = step(*args, target=target, **kwargs) if target is not None else step(*args, **kwargs)
            root = scalar(loss)
            given = [t for t in flatten((args, kwargs))[0] if t.requires_grad]
            parameters = [*(p for p in step.parameters() if p.requires_grad), *given]
            if not parameters or not root.requires_grad:
                raise RewriteError(
                    "check() found nothing to differentiate",
                    remedy="unfreeze a parameter, or pass an input that requires gradients",
                )
            estimate = torch.autograd.grad(root, parameters, retain_graph=True, allow_unused=True)
            for spy in spies.values():
                spy.answers = True
            reference = torch.autograd.grad(root, parameters, allow_unused=True)
        found = tuple(spy.checked(name) for name, spy in spies.items() if spy.seen)
        silent = tuple(name for name, spy in spies.items() if not spy.seen)
    return Report(found, Agreement.of(zip(estimate, reference, strict=True)), silent)


@dataclass
class _Seen:
    call: Call
    inputs: tuple[Any, ...]
    cotangents: Gradients
    estimate: Gradients
    reference: Gradients = ()
    order: float | None = None
    kind: str = ""


class _Spy(StandIn):
    """First lets its rule answer, then answers with the reference. boxed: autograd cannot cross the segment."""

    def __init__(self, rule: Rule, segment: Segment, boxed: bool) -> None:
        super().__init__(rule)
        self.segment, self.boxed = segment, boxed
        self.answers = False
        self.inputs: tuple[Any, ...] = ()
        self.seen: list[_Seen] = []

    def forward(self, call: Call, inputs: tuple[Any, ...], parameters: tuple[Tensor, ...]) -> Taken:
        self.inputs = inputs
        return self.rule.forward(call, inputs, parameters)

    def backward(self, call: Call, taken: Taken, cotangents: Gradients, needed: tuple[bool, ...]) -> Gradients:
        if not self.answers:
            estimate = self.rule.backward(call, taken, cotangents, needed)
            self.seen.append(_Seen(call, self.inputs, cotangents, estimate))
            return estimate
        seen = self.seen[0]
        if isinstance(self.rule, UlrCutRule):
            seen.reference, seen.kind = _of_cut(self.rule, call, taken, cotangents, needed)
        elif self.boxed and isinstance(self.rule, BlackBoxRule):
            seen.reference = self.rule.exact(call, taken, cotangents, needed)
            seen.order = remainder_order(self.rule, call, self.rule.inputs(taken), cotangents, seen.reference)
            kind = self.rule.describe()["kind"]  # as measured now: afterwards that is forgotten
            seen.kind = "noisy" if self.rule.evaluator.noisy else kind
        else:
            seen.reference = _autograd(self.segment, self.inputs, cotangents, needed)
        return seen.reference

    def checked(self, name: str) -> Checked:
        seen = self.seen[0]
        agreement = Agreement.of(zip(seen.estimate, seen.reference, strict=True))
        if seen.kind == _COPIES:
            return Checked(name, seen.kind, agreement, None, _ON_COPIES)
        if isinstance(self.rule, UlrCutRule):
            return Checked(name, seen.kind, agreement, None, _ON_CLEAN)
        if seen.order is None:
            return Checked(name, "autograd", agreement, None, "compared with automatic differentiation")
        return Checked(name, "every coordinate", agreement, seen.order, _verdict(seen.kind, seen.order))


def _of_cut(
    rule: UlrCutRule, call: Call, taken: Taken, cotangents: Gradients, needed: tuple[bool, ...]
) -> tuple[Gradients, str]:
    """Autograd through what follows the cut, where it says anything; else many more copies."""
    if rule.facts.kind not in ("box", "steps"):
        found = rule.exact(call, taken, cotangents, needed)
        if any(gradient is not None and bool(gradient.any()) for gradient in found):
            return found, "autograd of the clean loss"
    return rule.averaged(call, taken, needed, _TIMES), _COPIES


def _verdict(kind: str, order: float) -> str:
    if kind in ("piecewise-constant", "rough"):
        return (
            f"the box looks {kind}: it has no derivative to test; the reference is the gradient smoothed over the step"
        )
    if kind == "noisy":
        return "the box is noisy, which hides the Taylor remainder; the reference has the noise of its own differences"
    if order >= 1.5:
        return f"Taylor remainder of order {order:.1f}: the reference is the derivative of the box"
    return (
        f"Taylor remainder of order {order:.1f}, not 2: the reference is NOT the derivative of the box "
        "(noise, a kink, or a step of the wrong size); try difference='central' or set step_size"
    )


def _autograd(segment: Segment, inputs: tuple[Any, ...], cotangents: Gradients, needed: tuple[bool, ...]) -> Gradients:
    """The exact vjp of a segment; parameters of the region follow the inputs, as its bridge orders them."""
    with torch.enable_grad():
        aliases = tuple(
            value.detach().requires_grad_() if need else value for value, need in zip(inputs, needed, strict=False)
        )
        outputs = segment.run(aliases)
        sources = [*(a for a, need in zip(aliases, needed, strict=False) if need), *segment.trainable()]
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if c is not None and o.requires_grad]
        if not pairs:
            return tuple(None for _ in needed)
        ends, given = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(ends, sources, given, allow_unused=True))
    return tuple(next(found, None) if need else None for need in needed)  # the rule's own parameters come last
