"""The exact rule: a region's own operations, differentiated by autograd, through the bridge every rule uses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .ledger import Ledger
from .noiseless import Noiseless
from .region import keeps_graph
from .rule import Call, Gradients, Taken
from .segment import Segment
from .tape import Tape


class ExactRule(Noiseless):
    """Runs a segment on detached aliases under its own tape; backward is one vjp of that tape.

    It is the oracle of the bridge: with it a region equals eager bit for bit, whatever surrounds the region.
    `parameters` are `segment.trainable()`, in that order.
    """

    def __init__(self, segment: Segment, ledger: Ledger) -> None:
        super().__init__()
        self.segment, self.ledger = segment, ledger

    def forward(self, call: Call, inputs: tuple[Any, ...], parameters: tuple[Tensor, ...]) -> Taken:
        trained = [id(parameter) for parameter in self.segment.trainable()]
        tape = Tape(self.segment, inputs, dict(zip(trained, parameters, strict=True)), call.needed)
        return Taken(tuple(output.detach() for output in tape.outputs), tape.taken(), tape)

    def backward(self, call: Call, taken: Taken, cotangents: Gradients, needed: tuple[bool, ...]) -> Gradients:
        tape = taken.memory
        assert isinstance(tape, Tape)
        found = tape.pull(cotangents, needed, keeps_graph(), taken.tensors)
        if found is None:
            return (None,) * len(needed)
        self.ledger.add(call.region, vjps=1)
        return tuple(found)

    def describe(self) -> dict[str, Any]:
        return {"rule": "exact"}
