"""The rule behind `UlrCut`: gradients at cuts from losses of noisy copies, evaluated forward only."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .controls import Controls
from .cut_facts import TailFacts, described
from .errors import RewriteError
from .estimators.copies import Estimation, Found
from .estimators.copy_watch import warn_where_lost
from .estimators.cut_estimator import CutEstimator, Settings
from .estimators.cut_options import CutOptions
from .estimators.cuts_of_chain import resize, share_copies, share_signal
from .estimators.quality import EVERY, History, ParameterCosine, Quality, cosine_of
from .evaluations import rounding, together
from .learned_noise import channels_of, size_gradient, sizes_of
from .ledger import Ledger
from .noisy_tail import Course, NoisyTail
from .pinned import Pinned, held_by
from .row_proof import prove
from .rule import Call, Gradients, Taken

log = logging.getLogger("rewriter.runtime")

Learnt = tuple[Tensor, Tensor] | None  # log_sigma, and the channel of each element, where noise is learnt

_PROOFS = 2  # batches on which the tail is seen to treat rows alone


def anchor(
    values: tuple[Tensor, ...], sides: tuple[Tensor, ...], outputs: tuple[Any, ...], weights: tuple[Tensor, ...] = ()
) -> Tensor:
    """Zero: what stands in the graph for the region, behind everything that it reads."""
    return torch.zeros((), dtype=values[0].dtype, device=values[0].device)


@dataclass(slots=True)
class _Memory:
    """inputs, weights: numbers of them among the tensors kept, which log_sigmas follow; learning: cuts whose log_sigma
    asks for a gradient; settings: of each cut, once used."""

    inputs: int
    weights: int
    pinned: Pinned
    learning: tuple[int, ...] = ()
    settings: list[Settings] | None = None


class UlrCutRule:
    """Supplies dL/dz at each cut as mean (f(z + sigma e) - baseline) score(e) / sigma of each row (likelihood ratio).

    Unbiased for the loss smoothed over the noise; linear in the loss's cotangent. Each cut has its own noise, one at a
    time; copies of all join one evaluation of the chain. noise: the learnt standard deviations of each cut, if any,
    whose gradients are returned with the others. The entry `UlrCut` says what the options do.
    """

    def __init__(self, course: Course, options: CutOptions, facts: TailFacts, ledger: Ledger, label: str) -> None:
        self.course, self.options, self.facts, self.ledger, self.label = course, options, facts, ledger, label
        self.history = History()
        several = len(course.names) > 1
        labels = [f"{label}: {name}" if several else label for name in course.names]
        self.cuts = [CutEstimator(options, ratio, own) for ratio, own in zip(facts.ratios, labels, strict=True)]
        self.noise: nn.ModuleList | None = None
        self._parameters = ParameterCosine()
        self._counters = {"backwards": 0, "proofs": 0}
        self._controls = Controls(options.control, self.cuts, ledger)
        self._values = [tuple([course.places[name] for name in names]) for names in course.cuts]

    def learn_with(self, other: UlrCutRule) -> None:
        """Shares what is learnt with the rule of another capture, as far as that has the same cuts."""
        self.history, self._parameters = other.history, other._parameters
        for number, cut in enumerate(other.cuts[: len(self.cuts)]):
            if (number in self.course.layers) == (number in other.course.layers):
                self.cuts[number] = cut

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
        self._refuse_unsupplied(call, len(inputs))
        sizes = sizes_of(self.noise, len(self.cuts))
        learning = tuple([cut for cut, size in enumerate(sizes) if size.requires_grad])
        weights = parameters[: len(parameters) - len(learning)]
        kept = (*inputs, *weights, *(size.detach() for size in sizes))
        memory = _Memory(len(inputs), len(weights), self._pinned(call), learning)
        return Taken((anchor((inputs[self._values[0][0]],), (), ()),), kept, memory)

    def _pinned(self, call: Call) -> Pinned:
        if call.objective is None or True not in call.needed:
            return Pinned(())  # no backward will come
        return Pinned([*call.objective.read, *held_by(stage.segment for stage in self.course.stages)])

    def trainable(self) -> tuple[Tensor, ...]:
        """The learnt standard deviations, cut by cut."""
        return tuple([size for size in sizes_of(self.noise, len(self.cuts)) if size.requires_grad])

    def _refuse_unsupplied(self, call: Call, inputs: int) -> None:
        """Raises RewriteError where something before a layer needs a gradient, and there is noise in its weights."""
        supplied = {place for cut, own in enumerate(self._values) if cut not in self.course.layers for place in own}
        if any(need and place not in supplied for place, need in enumerate(call.needed[:inputs])):
            raise RewriteError(
                "an input of a layer with noise in its weights needs a gradient",
                where=call.region,
                why="such noise says how the loss depends on the weights, and nothing of what the layer reads",
                remedy='noise="activation", or requires_grad_(False) on that input',
            )

    def backward(self, call: Call, taken: Taken, cotangents: Gradients, needed: tuple[bool, ...]) -> Gradients:
        """Gradients of the values at the cuts; the cotangent of the loss is the objective's, the anchor's is ignored.

        A second call with the same `taken` uses the same numbers. Raises RewriteError where copies cannot be told
        apart, too many fail, or rows are not independent.
        """
        if True not in needed or call.objective is None or call.objective.weight is None:
            return (None,) * len(needed)
        memory = taken.memory
        assert isinstance(memory, _Memory)
        memory.pinned.check(call.region)
        at_cuts = [taken.tensors[place] for own in self._values for place in own]
        if not call.objective.weight.any() or not all(value.numel() for value in at_cuts):
            return self._zeros(taken, needed)
        tail = self._tail(call, taken)
        first = memory.settings is None
        learnt = self._learnt(tail, taken)
        if first:
            memory.settings = self._settle(call, tail, learnt)
        settings = memory.settings
        assert settings is not None
        found = self._estimates(call, tail, settings, "", "probes")
        if first and self.options.sigma in ("auto", "learned") and tail.clean.isfinite().all() and tail.clean.any():
            self._resize(call, tail, found, settings, learnt)
        self._judge(call, tail, found, first)
        if first:
            for number, each in enumerate(found):
                key = call.key.named(f"cut{number}")
                self.cuts[number].learn(tail.clean, call.rank * tail.rows, settings[number], key, each)
            self._controls.learn(tail, settings, found)
        if first and self._counters["backwards"] % EVERY == 1:
            again = self._estimates(call, tail, settings, "quality", "quality")
            for cut, own, a, b in zip(self.cuts, settings, found, again, strict=True):
                cut.halves.record(a.gradient, b.gradient, own.copies)
            if self.quality is not None:
                self.history.append(call.key.forward, self.quality)
        gradients = self._divided(taken, tail, [each.gradient for each in found], needed)
        sizes = [
            size_gradient(learnt[cut], found[cut].sizes, settings[cut].held, tail.scale) for cut in memory.learning
        ]
        return (*gradients[: len(gradients) - len(sizes)], *sizes)

    def _zeros(self, taken: Taken, needed: tuple[bool, ...]) -> Gradients:
        """Where the loss's cotangent is zero, or there are no rows."""
        assert isinstance(taken.memory, _Memory)
        first = taken.memory.inputs + taken.memory.weights
        tensors = [*taken.tensors[:first], *(taken.tensors[first + cut] for cut in taken.memory.learning)]
        pairs = zip(tensors, needed, strict=True)
        return tuple([torch.zeros_like(value) if need else None for value, need in pairs])

    def exact(self, call: Call, taken: Taken, cotangents: Gradients, needed: tuple[bool, ...]) -> Gradients:
        """As `backward`, by ordinary differentiation of the clean tail; zero or None where it has no derivative."""
        tail = self._tail(call, taken)
        return self._placed(taken, [tail.gradient(cut) for cut in range(len(self.cuts))], needed)

    def averaged(self, call: Call, taken: Taken, needed: tuple[bool, ...], times: int) -> Gradients:
        """As `backward`, the mean of `times` further estimates, counted as "check"."""
        memory, tail = taken.memory, self._tail(call, taken)
        assert isinstance(memory, _Memory)
        assert memory.settings is not None
        found = [self._estimates(call, tail, memory.settings, f"check{number}", "check") for number in range(times)]
        means = [torch.stack([each.gradient for each in one]).mean(0) for one in zip(*found, strict=True)]
        return self._divided(taken, tail, means, needed)

    def _tail(self, call: Call, taken: Taken) -> NoisyTail:
        assert call.objective is not None
        assert isinstance(taken.memory, _Memory)
        inputs, weights = taken.memory.inputs, taken.memory.weights
        kept = taken.tensors[:inputs], taken.tensors[inputs : inputs + weights]
        return NoisyTail(self.course, *kept, call.objective, self.options.max_rows)

    def _learnt(self, tail: NoisyTail, taken: Taken) -> list[Learnt]:
        """For each cut, where its noise is learnt: log_sigma as it was in forward, and the channel of each element."""
        if self.noise is None:
            return [None] * len(self.cuts)
        sizes = taken.tensors[-len(self.cuts) :]
        return [(size, channels_of(tail.shapes(cut)).to(size.device)) for cut, size in enumerate(sizes)]

    def _settle(self, call: Call, tail: NoisyTail, learnt: Sequence[Learnt]) -> list[Settings]:
        """Copies and noise of a forward's first backward, once the tail is seen to treat rows alone."""
        counters = self._counters
        counters["backwards"] += 1
        share_signal(self.cuts)
        if self.options.across == "neyman":
            share_copies(self.cuts, self.facts.costs, self.options.antithetic)
        settings = [
            cut.settle(tail.values[number], tail.weighed_against(number), tail.parts(number), learnt[number])
            for number, cut in enumerate(self.cuts)
        ]
        if counters["proofs"] < _PROOFS and not self.facts.noisy and tail.clean.isfinite().all():
            counters["proofs"] += 1
            for number, own in enumerate(settings):
                prove(tail, number, call.region, own.sigma, rounding(call, tail), call.key.forward)
            self._spend(call.region, tail, "quality")
        self._controls.prepare(call.region, tail, settings, counters["backwards"])
        return settings

    def _estimates(
        self, call: Call, tail: NoisyTail, settings: Sequence[Settings], name: str, purpose: str
    ) -> list[Found]:
        found = together(tail, {n: self._estimation(call, tail, n, settings[n], name) for n in range(len(self.cuts))})
        self._spend(call.region, tail, purpose)
        return found

    def _estimation(self, call: Call, tail: NoisyTail, cut: int, settings: Settings, name: str) -> Estimation:
        key = call.key.named(f"cut{cut}{name}")
        doubts = tail.doubts if self.options.allocation == "doubt" else None
        return self.cuts[cut].estimation(tail.values[cut], tail.clean, call.rank * tail.rows, settings, key, doubts)

    def _resize(
        self, call: Call, tail: NoisyTail, found: list[Found], settings: list[Settings], learnt: Sequence[Learnt]
    ) -> None:
        def again(number: int) -> Found:
            sigma, held = self.cuts[number].sized(tail.values[number], learnt[number])
            settings[number] = replace(settings[number], sigma=sigma, held=held)
            (only,) = together(tail, {number: self._estimation(call, tail, number, settings[number], "")})
            self._spend(call.region, tail, "step_size")
            return only

        resize(self.cuts, found, settings, rounding(call, tail), again)

    def _judge(self, call: Call, tail: NoisyTail, found: Sequence[Found], first: bool) -> None:
        failed = sum(each.failed for each in found)
        if failed:
            self.ledger.add(call.region, failed=failed)
        if not tail.clean.isfinite().all():
            return  # what has diverged is passed on
        for cut, each in zip(self.cuts, found, strict=True):
            size = cut.size.typical
            cut.watch.judge(call.region, each, size, rounding(call, tail), self.options.max_failed)
            if first:
                cut.watch.observe(call.region, each, size, any(other.changed for other in found))
        if first and self.options.sigma not in ("auto", "learned"):
            warn_where_lost(call.region, self.cuts[0].size.typical, found, rounding(call, tail))

    def _spend(self, region: str, tail: NoisyTail, purpose: str) -> None:
        self.ledger.add(region, calls=tail.calls, stages=tail.staged, **{purpose: tail.evaluated})
        tail.calls = tail.evaluated = tail.staged = 0

    def _divided(self, taken: Taken, tail: NoisyTail, found: Sequence[Tensor], needed: tuple[bool, ...]) -> Gradients:
        """In the layout and dtype of each value or weight, times the loss's cotangent."""
        scaled = [gradient * tail.scale.to(gradient.dtype) for gradient in found]
        return self._placed(taken, [tail.gradients(cut, rows) for cut, rows in enumerate(scaled)], needed)

    def _placed(self, taken: Taken, found: Sequence[Sequence[Tensor | None]], needed: tuple[bool, ...]) -> Gradients:
        """Of each input and parameter; a weight that several cuts perturb gets the sum."""
        assert isinstance(taken.memory, _Memory)
        gradients: dict[int, Tensor] = {}
        for cut, own in enumerate(found):
            layer = self.course.layers.get(cut)
            places = self._values[cut] if layer is None else [taken.memory.inputs + place for place in layer.places]
            for place, gradient in zip(places, own, strict=True):
                if gradient is not None:
                    gradients[place] = gradients[place] + gradient if place in gradients else gradient
        return tuple([gradients.get(place) if need else None for place, need in enumerate(needed)])

    def record(self, forward: int, signal: float, noise: float) -> None:
        """As `Rule` says."""
        self._parameters.record(signal, noise)
        if (quality := self.quality) is not None:
            self.history.append(forward, quality)

    @property
    def quality(self) -> Quality | None:
        """Of the rows' gradients, over all cuts; None before the first backward."""
        found = [each for cut in self.cuts if (each := cut.quality) is not None]
        if not found:
            return None
        measured = [cut for cut in self.cuts if cut.halves.measurements]
        signal = sum(cut.halves.signal for cut in measured)
        noise = sum(cut.halves.noise / cut.copies for cut in measured)
        return replace(
            found[0],
            predicted_cosine=sum(each.predicted_cosine for each in found) / len(found),
            measured_cosine=cosine_of(signal, noise) if measured else None,
            parameter_cosine=self._parameters.value,
            changed=sum(cut.watch.changed for cut in self.cuts) / len(self.cuts),
            failed=sum(cut.watch.failed for cut in self.cuts) / len(self.cuts),
        )

    def describe(self) -> dict[str, Any]:
        """Plain facts for reports; what is not known before the first backward is None."""
        own = {"window": self.course.window, "rule": "ulr-cut", "tail": self.facts.kind}
        noise = ["weight" if number in self.course.layers else "activation" for number in range(len(self.cuts))]
        layers = list(zip(self.course.names, noise, strict=True))
        return own | described(self.cuts, layers, self.options, self.quality) | self._controls.describe()

    def get_state(self) -> dict[str, Any]:
        """Running statistics."""
        return {
            "cuts": [cut.get_state() for cut in self.cuts],
            "parameters": vars(self._parameters).copy(),
            "backwards": self._counters["backwards"],
            "options": repr(self.options),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned; under other options it starts anew, and a warning is logged."""
        if state.get("options", repr(self.options)) != repr(self.options):
            log.warning("%s: the options changed, so what was learnt under others starts anew", self.label)
            return
        for cut, own in zip(self.cuts, state["cuts"], strict=False):
            cut.set_state(own)
        vars(self._parameters).update(state["parameters"])
        self._counters["backwards"] = state["backwards"]
