"""The ways to obtain a chain's gradients that are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from problem import Problem

from rewriter import Highway, Horizon
from rewriter.passes.base import Entry

Entries = Callable[[Problem], list[Entry]]
SEGMENTS = {"blocks": None, "4 segments": 4}  # Highway's units
MOST = {"blocks": 5, "4 segments": 3}  # iterations up to which gradients are compared at the end


@dataclass(frozen=True)
class Method:
    """One column of the comparison.

    entries:  the plan, empty for back-propagation on the ordinary tape
    compare:  its gradients with exact ones at the end
    goal:     what it may stay behind back-propagation: on images in points (upper end of the interval), on text in nats
              (mean)
    """

    name: str
    entries: Entries
    compare: bool = False
    goal: float | None = None


def highway(
    iterations: int | str | tuple[tuple[int, int | str], ...], units: str = "blocks", shift: float = 0.0
) -> Entries:
    """Highway over all blocks, always by its own path."""
    return lambda problem: [
        Highway(problem.chain, iterations, shift=shift, segments=SEGMENTS[units], tape="never"),
    ]


def horizon(blocks: int, stride: int | None = None) -> Entries:
    """Windows of so many blocks, side by side where no stride is given."""
    return lambda problem: [Horizon(problem.chain, blocks, stride=stride, tape="never")]


EXACT = Method("back-propagation", lambda problem: [], compare=True)
ON_IMAGES = (
    EXACT,
    Method("Highway, blocks, k=0", highway(0)),
    Method("Highway, blocks, k=1", highway(1), compare=True, goal=1.2),
    Method("Highway, blocks, k=3", highway(3), compare=True, goal=0.6),
    Method("Highway, 4 segments, k=1", highway(1, "4 segments"), compare=True),
)
ON_TEXT = (
    EXACT,
    Method("Highway, blocks, k=0", highway(0)),
    Method("Highway, blocks, k=1", highway(1), compare=True),
    Method("Highway, blocks, k=3", highway(3), compare=True),
    Method("Horizon 6 = T/2", horizon(6), goal=0.06),
    Method("Horizon 3 = T/4", horizon(3)),
    Method("Horizon 1", horizon(1)),
    Method("Horizon 3, stride 1", horizon(3, stride=1)),
)
BY_NAME = {method.name: method for method in (*ON_IMAGES, *ON_TEXT)}  # lambdas do not cross to another process
