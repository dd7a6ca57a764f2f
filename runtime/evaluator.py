"""What the rules may evaluate without differentiating it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import BoxError


class Evaluator(Protocol):
    """A box: evaluated on stacked rows, never differentiated.

    label:          for messages
    shared:         positions of inputs without rows
    repeats_shared: True where `evaluate` takes the shared inputs repeated per row, False where they keep their shape
    """

    label: str
    shared: frozenset[int]
    repeats_shared: bool

    def dtypes(self, *inputs: Tensor) -> tuple[torch.dtype, ...]:
        """The dtype each input is evaluated in."""
        ...

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs in the box's own dtype, rows in dimension 0; a failed row holds non-finite numbers."""
        ...

    def finish(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the forward returns for these outputs."""
        ...


class ModuleEvaluator:
    """An ordinary module, or any function of tensors, used as a box: rows in dimension 0, no tape.

    function: must neither couple rows nor draw random numbers; shared: positions of its inputs without rows.
    Raises BoxError where it returns something else than a tensor or a tuple of tensors.
    """

    repeats_shared = False

    def __init__(self, function: Callable[..., Any], label: str = "", shared: Iterable[int] = ()) -> None:
        self.function = function
        self.label = label or type(function).__name__
        self.shared = frozenset(shared)

    def dtypes(self, *inputs: Tensor) -> tuple[torch.dtype, ...]:
        """The function sees its inputs as they come."""
        return tuple(value.dtype for value in inputs)

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One call without a tape."""
        with torch.no_grad():
            outputs = self.function(*inputs)
        if isinstance(outputs, Tensor):
            return (outputs,)
        if isinstance(outputs, tuple | list) and all(isinstance(value, Tensor) for value in outputs):
            return tuple(outputs)
        raise BoxError(
            f"the black box {self.label} returned {type(outputs).__name__}",
            where=self.label,
            why="only a tensor or a tuple of tensors has rows to contract",
            remedy="wrap it in a module that returns its tensors as a tuple",
        )

    def finish(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs unchanged."""
        return tuple(outputs)


def repeat_shared(evaluator: Evaluator, inputs: Sequence[Tensor], rows: int) -> Sequence[Tensor]:
    """What `evaluate` takes: the shared inputs repeated per row, without a copy, where the evaluator asks for it."""
    if not (evaluator.repeats_shared and evaluator.shared):
        return inputs
    return [v.unsqueeze(0).expand(rows, *v.shape) if i in evaluator.shared else v for i, v in enumerate(inputs)]
