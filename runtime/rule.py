"""What a region asks of the rule that supplies its pullback."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .ambient import PLAIN, Ambient
from .estimators.quality import History, Quality
from .objective import Objective
from .random import Key

Gradients = tuple[Tensor | None, ...]


class Call(NamedTuple):
    """One forward pass of one region: what backward needs to keep the promises forward made.

    region: the region's name; key: its random numbers; rank: index of this process (global row = rank * rows + row);
    needed: per input and then per parameter, whether its gradient will be asked for; ambient: autocast and flags;
    objective: the loss, where an entry of the plan evaluates it ahead and the step was given one.
    """

    region: str
    key: Key
    rank: int = 0
    needed: tuple[bool, ...] = ()
    ambient: Ambient = PLAIN
    objective: Objective | None = None


@dataclass(slots=True)
class Taken:
    """What a rule's forward took and leaves for its backward.

    outputs: the region's outputs; tensors: kept through `save_for_backward` (in-place changes are noticed, saved-tensor
    hooks see them); memory: anything else, dropped after the last backward.
    """

    outputs: tuple[Tensor, ...]
    tensors: tuple[Tensor, ...] = ()
    memory: object = None


class Rule(Protocol):
    """Supplies the pullback of one region: linear in the cotangents, or homogeneous of degree one under a clip."""

    def forward(self, call: Call, inputs: tuple[Any, ...], parameters: tuple[Tensor, ...]) -> Taken:
        """Run the region without a tape of the caller's; inputs and parameters are detached aliases."""
        ...

    def backward(self, call: Call, taken: Taken, cotangents: Gradients, needed: tuple[bool, ...]) -> Gradients:
        """One gradient, or None, for each input and then for each parameter; `taken.outputs` is empty here."""
        ...

    @property
    def history(self) -> History:
        """Of the quality, as long as the rule exists."""
        ...

    def record(self, forward: int, signal: float, noise: float) -> None:
        """Squared length of a forward's gradient of all parameters, and of the noise that this region puts into it.

        Both as shares of the mean squared length of that forward's estimates.
        """
        ...

    @property
    def quality(self) -> Quality | None:
        """How good the estimates are; None where they are exact or nothing is known yet."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain facts for `explain()`; "rule" is the rule's name."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Learnt statistics: tensors, numbers, strings, and lists and dicts of them."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned."""
        ...
