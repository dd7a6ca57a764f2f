"""The rule for boxes without a derivative: finite-difference probes of each row, contracted with its cotangent."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import RewriteError
from .estimators.arrays import Array, divided
from .estimators.batch import batch_of
from .estimators.estimator import Estimator
from .estimators.options import Options, Settings
from .estimators.probing import BatchProbes, Probed, RowProbes
from .estimators.quality import History, ParameterCosine, Quality
from .estimators.rows import LiveRows
from .evaluator import Evaluator, ModuleEvaluator, repeat_shared
from .ledger import Ledger
from .rule import Call, Gradients, Taken

__all__ = ["BlackBoxRule", "Evaluator", "ModuleEvaluator"]

log = logging.getLogger("rewriter.runtime")

_ROWS, _SHARED = "rows", "shared"


@dataclass(slots=True)
class _Memory:
    """What a forward leaves for its backward beside tensors.

    given: inputs of the region; inputs: those and the seeds drawn for them, the first of the kept tensors; finite: the
    outputs are known to be finite; settings: once used, by group; counted: rows that failed are in the ledger
    """

    given: int
    inputs: int
    finite: bool
    settings: dict[str, Settings] | None = None
    counted: bool = False


_Estimate = Callable[[str, Probed, int], Array]  # group, what to probe, lost rows -> (n, d)


class BlackBoxRule:
    """Pullback of a box by zeroth order: each row's own probes, all evaluated in one stacked call per backward.

    evaluator:      the box
    probes:         directions per row (q)
    directions:     "orthogonal", "rademacher", "gaussian", "coordinate"; unit variance per entry, independent per row
    difference:     "forward" reuses the output of the forward pass (q queries per row), "central" takes 2q; "auto":
                    central for boxes declared noisy, else forward
    step_size:      in units of the input scale; "auto" measures it at the first backward and follows the box
    clip:           quantile of the row norms above which a row is shortened; "auto": .9 on boxes that are not smooth
    reconstruction: "least_squares" (minimum norm, scaled to be unbiased) or "average"
    input_scale:    one number, or one for each probed element of a row; None: the running deviation of the inputs
    max_rows:       most rows in one call of the box
    max_failed:     share of failed queries in one backward above which it raises
    allocation:     "uniform": each row gets `probes`; "norm": as many in all, in proportion to the cotangents' norms

    Relative mean-square error on a box that is linear over a step, row width d: least squares and orthogonal
    d / q - 1; averages (d + 1) / q Gaussian, (d - 1) / q Rademacher. Homogeneous of degree one in the cotangent. Shared
    inputs of fixed shape form a second group, for which the whole batch is one row with min(probes, their size) probes.
    With numbers for step_size and input_scale and clip=None the result does not depend on how rows divide among ranks.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        *,
        probes: int = 1,
        directions: str = "orthogonal",
        difference: str = "auto",
        step_size: float | str = "auto",
        clip: float | str | None = "auto",
        reconstruction: str = "least_squares",
        input_scale: float | Sequence[float] | None = None,
        max_rows: int | None = None,
        max_failed: float = 0.5,
        allocation: str = "uniform",
        ledger: Ledger | None = None,
    ) -> None:
        options = Options(
            probes,
            directions,
            difference,
            step_size,
            clip,
            reconstruction,
            input_scale,
            max_rows,
            max_failed,
            allocation,
        )
        # One row cannot be compared with others, and a scale given per element of a row says nothing of shared inputs.
        whole = replace(options, clip=None, input_scale=None if isinstance(input_scale, Sequence) else input_scale)
        self.evaluator = evaluator
        self.options = options
        self.ledger = ledger if ledger is not None else Ledger()
        self._estimators = {
            _ROWS: Estimator(options, evaluator.label, noisy=evaluator.noisy),
            _SHARED: Estimator(whole, evaluator.label, bounded=True, noisy=evaluator.noisy),
        }
        self.history = History()
        self._parameters = ParameterCosine()
        self._rows = 0

    def forward(self, call: Call, inputs: tuple[Any, ...], parameters: tuple[Tensor, ...]) -> Taken:
        """One evaluation of the box; nothing else is computed."""
        evaluator, given = self.evaluator, len(inputs)
        inputs = evaluator.complete(inputs)
        if evaluator.shared:
            rows = next((value.shape[0] for i, value in enumerate(inputs) if i not in evaluator.shared), 1)
            returned, kept, finite = evaluator.answer(*repeat_shared(evaluator, inputs, rows))
        else:
            returned, kept, finite = evaluator.answer(*inputs)
            rows = len(kept[0])
        self.ledger.add(call.region, calls=1, forward=rows)
        self._rows = rows
        return Taken(returned, inputs + kept, _Memory(given, len(inputs), finite))

    def backward(self, call: Call, taken: Taken, cotangents: Gradients, needed: tuple[bool, ...]) -> Gradients:
        """Gradient of each needed floating input, in its dtype; None elsewhere.

        Rows without a cotangent cost nothing and get zero; rows with a non-finite cotangent get NaN; rows whose
        output is not finite get zero and count as failed. A second call with the same `taken` uses the same numbers
        and settings. Raises RewriteError as `Estimator.gradient` does, and where a parameter of the box needs a
        gradient.
        """
        memory: _Memory = taken.memory  # type: ignore[assignment]
        settings = memory.settings
        if settings is None:
            settings = memory.settings = {}
        measured = self._measurements

        def estimate(group: str, probed: Probed, lost: int) -> Array:
            found, used, failed = self._estimators[group].gradient(
                probed, call.key.named(group), lost, settings.get(group)
            )
            settings[group] = used
            if failed:
                self.ledger.add(call.region, failed=failed)
            return found

        gradients = self._pull_back(call, taken, cotangents, needed, estimate)
        if self._measurements > measured and (quality := self.quality) is not None:
            self.history.append(call.key.forward, quality)
        return gradients

    def record(self, forward: int, signal: float, noise: float) -> None:
        """As `Rule` says."""
        self._parameters.record(signal, noise)
        if (quality := self.quality) is not None:
            self.history.append(forward, quality)

    def inputs(self, taken: Taken) -> tuple[Tensor, ...]:
        """What the forward gave to the box: the inputs of the region, and the seeds drawn for them."""
        memory: _Memory = taken.memory  # type: ignore[assignment]
        return taken.tensors[: memory.inputs]

    def exact(self, call: Call, taken: Taken, cotangents: Gradients, needed: tuple[bool, ...]) -> Gradients:
        """As `backward`, from every coordinate of every row at the current step, unclipped; counted as "check"."""

        def estimate(group: str, probed: Probed, lost: int) -> Array:
            return self._estimators[group].exact(probed, call.key.named(group))

        return self._pull_back(call, taken, cotangents, needed, estimate)

    @property
    def quality(self) -> Quality | None:
        """Of the rows' gradients, or of the shared inputs' where no other is needed; None before the first backward."""
        found = (self._estimators[group].quality for group in (_ROWS, _SHARED))
        quality = next((quality for quality in found if quality is not None), None)
        return quality and replace(quality, parameter_cosine=self._parameters.value)

    @property
    def _measurements(self) -> int:
        return sum(estimator.tracker.measurements for estimator in self._estimators.values())

    def describe(self) -> dict[str, Any]:
        """Plain facts for reports; what is not known before the first backward is None."""
        estimator = min(self._estimators.values(), key=lambda candidate: candidate.width is None)
        quality = self.quality
        asked = [each for each in self._estimators.values() if each.width is not None] or [estimator]
        return {
            "rule": "black-box",
            "box": self.evaluator.label,
            "width": estimator.width,
            "probes": estimator.probes,
            "directions": self.options.directions,
            "difference": estimator.difference,
            "kind": estimator.step.kind,
            "step_size": estimator.step.value if estimator.width is not None else None,
            "absolute_step": estimator.absolute_step if estimator.width is not None else None,
            "step_error": estimator.step.error,
            "step_order": estimator.step.order,
            "noise_floor": estimator.step.noise_floor,
            "predicted_cosine": quality.predicted_cosine if quality else None,
            "measured_cosine": quality.measured_cosine if quality else None,
            "slope": quality.slope if quality else None,
            "parameter_cosine": quality.parameter_cosine if quality else None,
            "bias": quality.bias if quality else None,
            "rows_per_backward": sum(each.queries_per_row for each in asked) * self._rows or None,
        }

    def get_state(self) -> dict[str, Any]:
        """Running statistics of both groups: tensors, numbers and strings."""
        states: dict[str, Any] = {group: estimator.get_state() for group, estimator in self._estimators.items()}
        return {**states, "parameters": vars(self._parameters).copy(), "options": repr(self.options)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned, bit for bit.

        What was learnt under other options does not fit these: it is left aside, and a warning is logged.
        """
        if state.get("options", repr(self.options)) != repr(self.options):
            log.warning("%s: the options changed, so what was learnt under others starts anew", self.evaluator.label)
            return
        for group, estimator in self._estimators.items():
            estimator.set_state(state[group])
        vars(self._parameters).update(state["parameters"])  # in place: rules of other captures share it

    def _pull_back(
        self, call: Call, taken: Taken, cotangents: Gradients, needed: tuple[bool, ...], estimate: _Estimate
    ) -> Gradients:
        memory: _Memory = taken.memory  # type: ignore[assignment]
        inputs, outputs = self.inputs(taken), taken.tensors[memory.inputs :]
        if True in needed[memory.given :]:
            raise RewriteError(
                "a parameter of a black box needs a gradient",
                where=f"{call.region} ({self.evaluator.label})",
                why="probes perturb the inputs of the box, not what it holds",
                remedy="freeze it with requires_grad_(False), or pass it to the box as an input",
            )
        wanted = [i for i in range(memory.given) if needed[i] and inputs[i].is_floating_point()]
        contracted = tuple([k for k, v in enumerate(cotangents) if v is not None and outputs[k].is_floating_point()])
        gradients: list[Tensor | None] = [None] * len(needed)
        if not wanted or not contracted:
            return tuple(gradients)
        spend = partial(self.ledger.add, call.region)
        batch, rows = batch_of(
            self.evaluator,
            inputs,
            outputs,
            cotangents,
            contracted,
            call.rank,
            spend,
            self.options.max_rows,
            memory.finite,
        )
        if rows.lost and not memory.counted:
            spend(failed=rows.lost)
            memory.counted = True
        shared = frozenset() if self.evaluator.repeats_shared else self.evaluator.shared
        own = tuple([i for i in wanted if i not in shared])
        if own:
            found = rows.restore(self._estimate(_ROWS, RowProbes(batch, own), rows, estimate))
            self._divide(found, own, inputs, gradients)
        if len(own) < len(wanted):
            whole = tuple([i for i in wanted if i in shared])
            found = self._estimate(_SHARED, BatchProbes(batch, whole), rows, estimate)
            self._divide(np.full_like(found, math.nan) if rows.poisoned else found, whole, inputs, gradients)
        return tuple(gradients)

    def _divide(
        self, found: Array, positions: tuple[int, ...], inputs: tuple[Tensor, ...], gradients: list[Tensor | None]
    ) -> None:
        """Puts (rows, d) into the gradients of the inputs at `positions`, summed over rows for shared ones."""
        shared, parts = self.evaluator.shared, [found]
        if len(positions) > 1:
            parts = divided(found, [_width(inputs[i], i in shared) for i in positions])
        for i, part in zip(positions, parts, strict=True):
            like, total = inputs[i], torch.from_numpy(part.sum(0) if i in shared else part)
            if total.shape != like.shape:
                total = total.reshape(like.shape)
            gradients[i] = total if total.dtype is like.dtype and like.is_cpu else total.to(like.device, like.dtype)

    def _estimate(self, group: str, probed: RowProbes | BatchProbes, rows: LiveRows, estimate: _Estimate) -> Array:
        """The group's estimate over the live rows; where none is live, zero."""
        if rows.live:
            return probed.pull_back(estimate(group, probed, rows.lost))
        self._estimators[group].check_failures(rows.lost, rows.lost)
        return np.zeros_like(probed.base)


def _width(value: Tensor, whole: bool) -> int:
    return value.numel() if whole else math.prod(value.shape[1:])
