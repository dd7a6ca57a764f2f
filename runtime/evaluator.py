"""What the rules may evaluate without differentiating it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .domain import Domain
from .errors import BoxError
from .estimators.arrays import Array, host


class Answer(NamedTuple):
    """One evaluation in the forward.

    returned: what the forward returns; kept: what `evaluate` returns, for the backward; finite: all outputs are known
    to be finite
    """

    returned: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]
    finite: bool


class Evaluator(Protocol):
    """A box: evaluated on stacked rows, never differentiated.

    label:          for messages
    shared:         positions of inputs without rows
    repeats_shared: True where `evaluate` takes the shared inputs repeated per row, False where they keep their shape
    domains:        where inputs may be evaluated, by position
    noisy:          equal inputs do not give equal outputs
    """

    label: str
    shared: frozenset[int]
    repeats_shared: bool
    domains: Mapping[int, Domain]
    noisy: bool

    def complete(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The inputs of one forward, with what each row's evaluations have in common beside them: random seeds."""
        ...

    def dtypes(self, *inputs: Tensor) -> tuple[torch.dtype, ...]:
        """The dtype each input is evaluated in."""
        ...

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs in the box's own dtype, rows in dimension 0; a failed row holds non-finite numbers."""
        ...

    def query(self, arrays: Sequence[Array], like: Sequence[Tensor]) -> Sequence[Array]:
        """As `evaluate`, from arrays of any precision to arrays; like: tensors of the devices and dtypes to use."""
        ...

    def answer(self, *inputs: Tensor) -> Answer:
        """What the forward returns, and what `evaluate` does."""
        ...


class ModuleEvaluator:
    """An ordinary module, or any function of tensors, used as a box: rows in dimension 0, no tape.

    function: must neither couple rows nor draw random numbers; shared: positions of its inputs without rows.
    Raises BoxError where it returns something else than a tensor or a tuple of tensors.
    """

    repeats_shared = False
    domains: Mapping[int, Domain] = MappingProxyType({})
    noisy = False

    def __init__(self, function: Callable[..., Any], label: str = "", shared: Iterable[int] = ()) -> None:
        self.function = function
        self.label = label or type(function).__name__
        self.shared = frozenset(shared)

    def complete(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The function draws nothing."""
        return inputs

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

    def query(self, arrays: Sequence[Array], like: Sequence[Tensor]) -> Sequence[Array]:
        """One call without a tape, on the devices and in the dtypes of `like`."""
        inputs = [torch.from_numpy(a).to(value.device, value.dtype) for a, value in zip(arrays, like, strict=True)]
        return [host(output) for output in self.evaluate(*inputs)]

    def answer(self, *inputs: Tensor) -> Answer:
        """One call without a tape."""
        outputs = self.evaluate(*inputs)
        return Answer(outputs, outputs, False)


def repeat_shared(evaluator: Evaluator, inputs: Sequence[Tensor], rows: int) -> Sequence[Tensor]:
    """What `evaluate` takes: the shared inputs repeated per row, without a copy, where the evaluator asks for it."""
    if not (evaluator.repeats_shared and evaluator.shared):
        return inputs
    return [v.unsqueeze(0).expand(rows, *v.shape) if i in evaluator.shared else v for i, v in enumerate(inputs)]
