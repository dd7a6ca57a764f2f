"""The rule behind `UlrCut`: the gradient at a cut from losses of noisy copies, evaluated forward only."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import RewriteError
from .estimators.arrays import Array
from .estimators.copies import Batch, Found, estimate, estimate_by
from .estimators.copy_watch import CopyWatch, resolved
from .estimators.cut_options import CutOptions
from .estimators.noise import check_noise, relative_variance
from .estimators.noise_size import NoiseSize
from .estimators.quality import EVERY, History, ParameterCosine, Quality
from .estimators.split_half import SplitHalf
from .ledger import Ledger
from .noisy_tail import NoisyTail, Roles
from .random import Key
from .rule import Call, Gradients, Taken
from .segment import Segment

log = logging.getLogger("rewriter.runtime")

_FIRST_COPIES = 8
_MOST_COPIES = 256
_PROOFS = 2  # batches on which the tail is seen to treat rows alone


def anchor(values: tuple[Tensor, ...], sides: tuple[Tensor, ...], outputs: tuple[Any, ...]) -> Tensor:
    """Zero: what stands in the graph for the region, behind everything that it reads."""
    return torch.zeros((), dtype=values[0].dtype, device=values[0].device)


@dataclass(frozen=True)
class Settings:
    """What one backward used and a second one through the same forward uses again."""

    copies: int
    sigma: float | Tensor


@dataclass(slots=True)
class _Memory:
    settings: Settings | None = None


@dataclass(frozen=True)
class TailFacts:
    """What is known of a tail before it runs.

    kind: "box", "steps" (every way to the loss meets an operation without a derivative), "frozen" or "trainable";
    ratio: cost of a step without copies in units of one copy; noisy: it holds a box whose answers vary.
    """

    kind: str
    ratio: float
    noisy: bool = False


class UlrCutRule:
    """Supplies dL/dz at a cut as mean (f(z + sigma e) - baseline) score(e) / sigma of each row (likelihood ratio).

    tail: from the values at the cut and the sides to the model's flat outputs. copies: of every row, "auto" sets them
    from measured noise and costs. sigma: of the noise, "auto" a tenth of the value's running deviation, more where the
    losses do not resolve it. directions: "orthogonal", "gaussian", "laplace", "sobol". baseline: "none", "clean",
    "leave-one-out", "constant", or "auto". antithetic: copies come in pairs of opposite noise. allocation: "uniform";
    "doubt", in proportion to 1 - exp(-loss of the row), which is 1 - p_y for a mean cross-entropy; "norm", by a pilot
    that is part of the copies. max_rows: of one evaluation; max_failed: share of copies without a finite loss above
    which it raises. Unbiased for the loss smoothed over the noise; linear in the loss's cotangent.
    """

    def __init__(self, tail: Segment, roles: Roles, options: CutOptions, facts: TailFacts, ledger: Ledger) -> None:
        self.tail, self.roles, self.options, self.facts, self.ledger = tail, roles, options, facts, ledger
        self.history = History()
        self.size = NoiseSize(options.sigma)
        self.halves = SplitHalf()
        self.watch = CopyWatch()
        self._parameters = ParameterCosine()
        self._counters = {"backwards": 0, "proofs": 0, "copies": 0, "width": 0, "rows": 0}

    def learn_with(self, other: UlrCutRule) -> None:
        """Shares what is learnt with the rule of another capture."""
        for name in ("history", "size", "halves", "watch", "_parameters", "_counters"):
            setattr(self, name, getattr(other, name))

    def forward(self, call: Call, inputs: tuple[Any, ...], parameters: tuple[Tensor, ...]) -> Taken:
        """Keeps what backward evaluates; nothing is computed. Raises RewriteError where there is no loss."""
        if True in call.needed and call.objective is None:
            raise RewriteError(
                "a cut needs the loss",
                where=call.region,
                why="gradients cross it by evaluating the loss on noisy copies, and this call has none",
                remedy="rewrite(model, plan, loss=...) and step(x, target=y); for outputs alone, step.eval() or "
                "torch.no_grad()",
            )
        given = tuple([inputs[place] for place in self.roles.values])
        return Taken((anchor(given, (), ()),), tuple(inputs), _Memory())

    def backward(self, call: Call, taken: Taken, cotangents: Gradients, needed: tuple[bool, ...]) -> Gradients:
        """Gradients of the values at the cut; the cotangent of the loss is the objective's, the anchor's is ignored.

        A second call with the same `taken` uses the same numbers. Raises RewriteError where copies cannot be told
        apart, too many fail, or rows are not independent.
        """
        if True not in needed or call.objective is None or call.objective.weight is None:
            return (None,) * len(needed)
        memory = taken.memory
        assert isinstance(memory, _Memory)
        tail = self._tail(call, taken)
        if not tail.value.shape[1] or not tail.rows:
            return self._divided(tail, torch.zeros_like(tail.value), needed)
        first = memory.settings is None
        if first:
            memory.settings = self._settle(call, tail)
        assert memory.settings is not None
        found = self._estimate(call.region, tail, memory.settings, call.key, call.rank, "probes")
        if first and self.size.fixed is None:
            found, memory.settings = self._enlarged(call, tail, found, memory.settings)
        if found.failed:
            self.ledger.add(call.region, failed=found.failed)
        if tail.clean.isfinite().all():  # what has diverged is passed on
            size, limit = self.size.typical, self.options.max_failed
            self.watch.judge(call.region, found, size, _rounding(call, tail), limit)
            if first:
                self.watch.observe(call.region, found, size)
        if first and self._counters["backwards"] % EVERY == 1:
            key = call.key.named("quality")
            second = self._estimate(call.region, tail, memory.settings, key, call.rank, "quality")
            self.halves.record(found.gradient, second.gradient, memory.settings.copies)
            if self.quality is not None:
                self.history.append(call.key.forward, self.quality)
        return self._divided(tail, found.gradient, needed)

    def exact(self, call: Call, taken: Taken, cotangents: Gradients, needed: tuple[bool, ...]) -> Gradients:
        """As `backward`, by ordinary differentiation of the clean tail; zero or None where it has no derivative."""
        found = self._tail(call, taken).gradient()
        gradients = dict(zip(self.roles.values, found, strict=True))
        return tuple([gradients.get(place) if need else None for place, need in enumerate(needed)])

    def averaged(self, call: Call, taken: Taken, needed: tuple[bool, ...], times: int) -> Gradients:
        """As `backward`, the mean of `times` further estimates, counted as "check"."""
        memory, tail = taken.memory, self._tail(call, taken)
        assert isinstance(memory, _Memory)
        assert memory.settings is not None
        keys = [call.key.named(f"check{number}") for number in range(times)]
        found = [self._estimate(call.region, tail, memory.settings, key, call.rank, "check").gradient for key in keys]
        return self._divided(tail, torch.stack(found).mean(0), needed)

    def _tail(self, call: Call, taken: Taken) -> NoisyTail:
        assert call.objective is not None
        return NoisyTail(self.tail, self.roles, taken.tensors, call.objective, self.options.max_rows)

    def _settle(self, call: Call, tail: NoisyTail) -> Settings:
        """Copies and noise of a forward's first backward, once the tail is seen to treat rows alone."""
        counters = self._counters
        counters["backwards"] += 1
        counters["width"], counters["rows"] = tail.value.shape[1], tail.rows
        self.size.observe(tail.value)
        sigma = self.size.value(tail.value)
        if isinstance(sigma, Tensor) and sigma.shape != (tail.value.shape[1],):
            raise RewriteError(
                f"sigma has {len(sigma)} numbers for {tail.value.shape[1]} elements of a row at the cut",
                where=call.region,
                remedy="pass one number, or one for each element of a row, the cut's values side by side",
            )
        copies = self.copies
        check_noise(self.options.directions, copies, tail.value.shape[1], self.options.antithetic)
        if counters["proofs"] < _PROOFS and not self.facts.noisy and tail.clean.isfinite().all():
            counters["proofs"] += 1
            generator = torch.Generator().manual_seed(call.key.forward)
            noise = torch.randn(tail.value.shape, generator=generator).to(tail.value)
            tail.prove(call.region, sigma * noise, _rounding(call, tail))
            self._spend(call.region, tail, "quality")
        return Settings(copies, sigma)

    def _estimate(self, region: str, tail: NoisyTail, settings: Settings, key: Key, rank: int, purpose: str) -> Found:
        batch = Batch(tail.value, tail.clean, tail.losses, rank * tail.rows, settings.sigma)
        if self.options.allocation == "doubt":
            found = estimate_by(batch, self.options, settings.copies, key, self._doubt(tail))
        else:
            found = estimate(batch, self.options, settings.copies, key)
        self._spend(region, tail, purpose)
        return found

    def _doubt(self, tail: NoisyTail) -> Array:
        """1 - exp(-loss), the loss in units in which the rows' add up to their number times the mean."""
        losses = tail.clean.double().cpu().numpy() * tail.rows
        doubt: Array = -np.expm1(-np.maximum(losses, 0.0))
        return doubt

    def _spend(self, region: str, tail: NoisyTail, purpose: str) -> None:
        self.ledger.add(region, calls=tail.calls, **{purpose: tail.evaluated})
        tail.calls = tail.evaluated = 0

    def _enlarged(self, call: Call, tail: NoisyTail, found: Found, settings: Settings) -> tuple[Found, Settings]:
        """Again with larger noise, while copies are not told apart."""
        while not resolved(found, _rounding(call, tail)) and self.size.grow():
            log.info("%s: the losses of copies hardly differ; noise of %.2g", call.region, self.size.typical)
            settings = Settings(settings.copies, self.size.value(tail.value))
            found = self._estimate(call.region, tail, settings, call.key, call.rank, "step_size")
        return found, settings

    def _divided(self, tail: NoisyTail, gradient: Tensor, needed: tuple[bool, ...]) -> Gradients:
        """In each value's layout and dtype, times the loss's cotangent."""
        scaled = gradient * tail.scale.to(gradient.dtype)
        found = dict(zip(self.roles.values, tail.given(scaled), strict=True))
        return tuple([found.get(place) if need else None for place, need in enumerate(needed)])

    @property
    def copies(self) -> int:
        """Of a row, on average: as given, or from measured noise and costs."""
        options = self.options
        if isinstance(options.copies, int):
            return options.copies
        known = self.halves.best_copies(self.facts.ratio, 4, _MOST_COPIES)
        copies = _FIRST_COPIES if known is None else known // 2 * 2
        if copies != self._counters["copies"]:
            self._counters["copies"] = copies
            log.info("%s: %d copies of each row", self.tail.name, copies)
        return copies

    def record(self, forward: int, signal: float, noise: float) -> None:
        """As `Rule` says."""
        self._parameters.record(signal, noise)
        if (quality := self.quality) is not None:
            self.history.append(forward, quality)

    @property
    def quality(self) -> Quality | None:
        """Of the rows' gradients; None before the first backward."""
        width, copies = self._counters["width"], self.copies
        if not width:
            return None
        options = self.options
        variance = relative_variance(
            options.directions, copies, width, options.baseline_for(copies), options.antithetic
        )
        return Quality(
            predicted_cosine=(1 + variance) ** -0.5,
            measured_cosine=self.halves.cosine(copies),
            slope=None,
            parameter_cosine=self._parameters.value,
            changed=self.watch.changed,
            clipped=0.0,
            failed=self.watch.failed,
            bias=f"smoothing over noise of {self.size.typical:.2e}",
        )

    def describe(self) -> dict[str, Any]:
        """Plain facts for reports; what is not known before the first backward is None."""
        quality, copies = self.quality, self.copies
        return {
            "rule": "ulr-cut",
            "tail": self.facts.kind,
            "width": self._counters["width"] or None,
            "copies": copies,
            "sigma": self.size.typical if quality else None,
            "directions": self.options.directions,
            "antithetic": self.options.antithetic,
            "baseline": self.options.baseline_for(copies),
            "allocation": self.options.allocation,
            "predicted_cosine": quality.predicted_cosine if quality else None,
            "measured_cosine": quality.measured_cosine if quality else None,
            "parameter_cosine": quality.parameter_cosine if quality else None,
            "bias": quality.bias if quality else None,
            "rows_per_backward": copies * self._counters["rows"] or None,
        }

    def get_state(self) -> dict[str, Any]:
        """Running statistics."""
        return {
            "size": self.size.get_state(),
            "halves": self.halves.get_state(),
            "parameters": vars(self._parameters).copy(),
            "counters": self._counters.copy(),
            "watch": self.watch.get_state(),
            "options": repr(self.options),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned; under other options it starts anew, and a warning is logged."""
        if state.get("options", repr(self.options)) != repr(self.options):
            log.warning("%s: the options changed, so what was learnt under others starts anew", self.tail.name)
            return
        self.size.set_state(state["size"])
        self.halves.set_state(state["halves"])
        vars(self._parameters).update(state["parameters"])
        self._counters.update(state["counters"])
        self.watch.set_state(state["watch"])


def _rounding(call: Call, tail: NoisyTail) -> float:
    """Relative rounding of what computes the losses: the coarsest dtype there."""
    dtypes = {value.dtype for value in (*tail.values, *tail.outputs) if value.is_floating_point()}
    if call.ambient.autocast is not None:
        dtypes |= {dtype for enabled, dtype in call.ambient.autocast[0] if enabled}
    return max(torch.finfo(dtype).eps for dtype in dtypes)
