"""`step.measure(...)`: how much of the gradient of all parameters is noise of the estimates, region by region."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rewriter.runtime.errors import RewriteError
from rewriter.runtime.estimators.quality import cosine_of
from rewriter.runtime.rule import Call, Gradients, Rule, Taken

from .shadow import preserved
from .signature import flatten
from .standins import StandIn, standing_in, variant_of

if TYPE_CHECKING:
    from .rewritten import Rewritten


@dataclass(frozen=True)
class Measured:
    """Of one batch: the cosine between the estimated gradient of all parameters and what it estimates.

    cosine: with every region as it is; regions: as if that region alone were estimated
    """

    cosine: float
    regions: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"parameter cosine {self.cosine:.3f}"]
        lines += [f"  {name} alone: {cosine:.3f}" for name, cosine in self.regions.items()]
        return "\n".join(lines)


class _Replicated(StandIn):
    """Draws the random numbers of another copy of the row where told to."""

    def __init__(self, rule: Rule) -> None:
        super().__init__(rule)
        self.replicate = 0
        self.asked = False

    def backward(self, call: Call, taken: Taken, cotangents: Gradients, needed: tuple[bool, ...]) -> Gradients:
        self.asked = True
        own = call._replace(key=call.key._replace(replicate=self.replicate))
        return self.rule.backward(own, taken, cotangents, needed)


def measure(step: Rewritten, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> Measured:
    """One training forward, one backward, and one more for each region, in which that region draws anew.

    What differs between two such gradients is that region's noise; `ParameterCosine` says what follows. The running
    values go to `step.quality`. `.grad`, learnt state, counters and random states are as before afterwards; the queries
    stay in the ledger. Raises RewriteError in eval mode, and where there is nothing to differentiate.
    """
    if not step.training:
        raise RewriteError("measure() needs the training mode", remedy="call step.train() first")
    with torch.enable_grad(), preserved(step.model):
        variant = variant_of(step, args, kwargs, target)
        forward = step._clock.forward + 1
        with standing_in(step, variant, lambda name, rule: _Replicated(rule)) as lent:
            loss = step(*args, **kwargs) if target is None else step(*args, target=target, **kwargs)
            root = scalar(loss)
            parameters = [p for p in step.parameters() if p.requires_grad]
            if not parameters or not root.requires_grad:
                raise RewriteError("measure() found nothing to differentiate", remedy="unfreeze a parameter")
            first = _gradient(root, parameters)
            lengths, noises = [_square(first)], {}
            for name in [name for name, stand_in in lent.items() if stand_in.asked]:
                lent[name].replicate = 1
                other = _gradient(root, parameters)
                lent[name].replicate = 0
                lengths.append(_square(other))
                noises[name] = _square([a - b for a, b in zip(first, other, strict=True)]) / 2
    length = sum(lengths) / len(lengths)
    if not 0 < length < math.inf:
        raise RewriteError(
            f"measure() got a gradient that is {'not finite' if length else 'zero'}",
            why="the loss is not finite" if length else "no probe changed an output, or nothing is trained before it",
            remedy="check the model with step.check(...)" if not length else "measure another batch",
        )
    signal = 1 - sum(noises.values()) / length
    for name, noise in noises.items():
        variant.emitted.regions[name].rule.record(forward, signal, noise / length)
    alone = {name: cosine_of(signal, noise / length) for name, noise in noises.items()}
    return Measured(cosine_of(signal, 1 - signal), alone)


def scalar(output: Any) -> Tensor:
    """The loss itself, or a fixed random projection of an output that is no scalar."""
    tensors = [t for t in flatten(output)[0] if t.is_floating_point() and t.requires_grad]
    if len(tensors) == 1 and tensors[0].numel() == 1:
        (loss,) = tensors
        return torch.sum(loss)
    generator = torch.Generator().manual_seed(0)
    terms = [(t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in tensors]
    total = torch.zeros((), dtype=torch.float64)
    for term in terms:
        total = total + term.double().cpu()
    return total


def _gradient(root: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(root, parameters, retain_graph=True, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def _square(tensors: list[Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors)
