"""`Deferred`: a recurrent module's exact gradient, with what need not wait taken out of the loop over time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from rewriter.runtime.ledger import Ledger
from rewriter.runtime.rule import Rule
from rewriter.runtime.segment import Segment

from .base import TAPES, Entry, Refused, check_choice
from .program import Program, Region
from .recurrent import recurrence_rule, with_recurrences
from .targets import Target, resolve


@dataclass(frozen=True)
class Deferred(Entry):
    """Differentiate a recurrence exactly, with its weight gradients deferred to the end of the loop over time.

    target: an `nn.GRU`, `nn.LSTM` or `nn.RNN` (layers, directions, dropout between layers, batch_first, with or without
        biases), or a cell that the model calls in a Python loop, such as an `nn.GRUCell` or one's own.
    tape: "auto" keeps the ordinary tape where that is faster (float32 LSTM on CPUs, which has a fused kernel; loops of
        large cells; short sequences; other devices) or needed (autocast, half precision), and `explain()` says so;
        "never" always goes the way below.

    Backward evaluates what does not depend on the running cotangents for all steps at once, runs through time with what
    is left, which is products and additions where the cell's operations allow, and takes each weight's gradient in one
    product. Outputs are eager's; gradients differ by the order of sums. A cell must not draw random numbers, write into
    its arguments, or hold buffers. Refuses packed sequences, `proj_size`, subclasses of torch's recurrent modules,
    states passed as one tuple, and loops whose calls do not all do the same.
    """

    name: ClassVar[str] = "deferred"

    target: Target
    tape: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "tape", TAPES)

    def wholes(self, model: nn.Module) -> frozenset[str]:
        return frozenset(place.module for place in resolve(self.target, model))

    def apply(self, program: Program) -> Program | Refused:
        return with_recurrences(self, program, self.tape)

    def rule(self, program: Program, region: Region, segment: Segment, ledger: Ledger, known: Rule | None) -> Rule:
        return recurrence_rule(program, region, segment, ledger, self.tape)
