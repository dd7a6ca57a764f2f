"""The exact rule: a region's own operations, differentiated by autograd, through the bridge every rule uses."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .estimators.quality import History
from .ledger import Ledger
from .region import keeps_graph
from .rule import Call, Gradients, Taken
from .segment import Segment


@dataclass
class _Tape:
    """A tape of one forward: the aliases it starts from, its ends, and the tensors hoisted out of it."""

    aliases: tuple[Any, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    hoisted: list[Tensor] = field(default_factory=list)

    def recording(self) -> AbstractContextManager[Any]:
        """Under the caller's saved-tensor hooks (checkpoint, offloading), hoists what the tape keeps out of it.

        The bridge keeps it instead: those hooks then see it once, in the caller's own backward.
        """
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            return nullcontext()
        return saved_tensors_hooks(self._hoist, self._fetch)

    def _hoist(self, tensor: Tensor) -> int:
        self.hoisted.append(tensor.detach())
        return len(self.hoisted) - 1

    def _fetch(self, index: int) -> Tensor:
        return self.hoisted[index]


class ExactRule:
    """Runs a segment on detached aliases under its own tape; backward is one vjp of that tape.

    It is the oracle of the bridge: with it a region equals eager bit for bit, whatever surrounds the region.
    `parameters` are `segment.trainable()`, in that order.
    """

    def __init__(self, segment: Segment, ledger: Ledger) -> None:
        self.segment, self.ledger, self.history = segment, ledger, History()

    def forward(self, call: Call, inputs: tuple[Any, ...], parameters: tuple[Tensor, ...]) -> Taken:
        tape = _Tape()
        tape.aliases = tuple(
            value.detach().requires_grad_() if need else value
            for value, need in zip((*inputs, *parameters), call.needed, strict=True)
        )
        trained = [id(parameter) for parameter in self.segment.trainable()]
        replaced = dict(zip(trained, tape.aliases[len(inputs) :], strict=True))
        with torch.enable_grad(), tape.recording():
            tape.outputs = self.segment.run(tape.aliases[: len(inputs)], replaced)
        kept, tape.hoisted = tuple(tape.hoisted), []
        return Taken(tuple(output.detach() for output in tape.outputs), kept, tape)

    def backward(self, call: Call, taken: Taken, cotangents: Gradients, needed: tuple[bool, ...]) -> Gradients:
        tape = taken.memory
        assert isinstance(tape, _Tape)
        pairs = [(o, c) for o, c in zip(tape.outputs, cotangents, strict=True) if c is not None and o.requires_grad]
        sources = [alias for alias, need in zip(tape.aliases, needed, strict=True) if need]
        if not pairs or not sources:
            return tuple(None for _ in tape.aliases)
        self.ledger.add(call.region, vjps=1)
        outputs, given = zip(*pairs, strict=True)
        tape.hoisted = list(taken.tensors)
        try:
            with torch.enable_grad():
                found = iter(
                    torch.autograd.grad(outputs, sources, given, retain_graph=keeps_graph(), allow_unused=True)
                )
        finally:
            tape.hoisted = []
        return tuple(next(found) if need else None for need in needed)

    def record(self, forward: int, signal: float, noise: float) -> None:
        """There is no noise."""

    @property
    def quality(self) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"rule": "exact"}

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"the exact rule learns nothing, yet a state was given: {sorted(state)}")
