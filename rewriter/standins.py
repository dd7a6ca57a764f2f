"""Rules that stand in for others during one forward and some backwards, after which everything is as before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from rewriter.runtime.estimators.quality import History, Quality
from rewriter.runtime.rule import Call, Gradients, Rule, Taken

if TYPE_CHECKING:
    from .pipeline import Variant
    from .rewritten import Rewritten


class StandIn:
    """Does what its rule does."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    @property
    def history(self) -> History:
        return self.rule.history

    @property
    def quality(self) -> Quality | None:
        return self.rule.quality

    def forward(self, call: Call, inputs: tuple[Any, ...], parameters: tuple[Tensor, ...]) -> Taken:
        return self.rule.forward(call, inputs, parameters)

    def backward(self, call: Call, taken: Taken, cotangents: Gradients, needed: tuple[bool, ...]) -> Gradients:
        return self.rule.backward(call, taken, cotangents, needed)

    def record(self, forward: int, signal: float, noise: float) -> None:
        self.rule.record(forward, signal, noise)

    def describe(self) -> dict[str, Any]:
        return self.rule.describe()

    def get_state(self) -> dict[str, Any]:
        return self.rule.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self.rule.set_state(state)


def variant_of(step: Rewritten, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> Variant:
    """The capture that `step(*args, target=target, **kwargs)` runs: the model may take the target itself."""
    takes_target = step.loss is not None and step.loss.takes_target
    given = kwargs if target is None or takes_target else {**kwargs, "target": target}
    return step._variant(args, given)[0]


StandInT = TypeVar("StandInT", bound=StandIn)


@contextmanager
def standing_in(
    step: Rewritten, variant: Variant, make: Callable[[str, Rule], StandInT]
) -> Iterator[dict[str, StandInT]]:
    """Each region's stand-in by name; on leaving, the rules are back and what they learnt meanwhile is forgotten."""
    forward, regions = step._clock.forward, variant.emitted.regions
    rules = {name: region.rule for name, region in regions.items()}
    states = {name: rule.get_state() for name, rule in rules.items()}
    histories = {name: copy.deepcopy(rule.history) for name, rule in rules.items()}
    lent = {name: make(name, rule) for name, rule in rules.items()}
    for name, region in regions.items():
        region.rule = lent[name]
    try:
        yield lent
    finally:
        step._clock.forward = forward
        for name, region in regions.items():
            region.rule = rules[name]
            rules[name].set_state(states[name])
            vars(rules[name].history).update(vars(histories[name]))
