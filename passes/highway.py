"""`Highway`: a chain's gradient by iterations that work on all of its blocks, or steps through time, at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from rewriter.runtime.deferred import DeferredRule
from rewriter.runtime.errors import RewriteError
from rewriter.runtime.highway import HighwayRule
from rewriter.runtime.iterations import Iterations
from rewriter.runtime.ledger import Ledger
from rewriter.runtime.rule import Rule
from rewriter.runtime.segment import Segment
from rewriter.runtime.unrolled import UnrolledRule

from .base import TAPES, Entry, Refused, check_choice
from .chain import chain_of, residual_regions
from .program import Program, Region
from .recurrent import is_recurrence, recurrence_rule, with_recurrences
from .structure import ChainSegment
from .targets import Place, Target, resolve
from .unrolled import Unrolled, gathered, read


@dataclass(frozen=True)
class Highway(Entry):
    """Highway-BP (arXiv 2501.17086): cotangents that have passed at most `iterations` branches of a residual chain.

    target: what holds the chain, such as a list of blocks, or the blocks by a pattern. Each residual sum ends a block.
        Or what `Deferred` takes: an nn.GRU, nn.LSTM or nn.RNN, or a cell called in a Python loop. There every step is a
        unit, `segments` says nothing, and the skip is whatever acts element by element on the state (a GRU's z).
    iterations: a whole number; "auto", which measures every 100 forwards how many are needed, and takes the exact
        backward where they do not converge; or a schedule, ((forward, number or "exact"), ...) from forward 0 on.
    shift: share of every skip that is counted with the branch, in 0 .. 1. Above 0 where branches cancel a part of
        their input (the paper: .2 for GPT-2, .8 behind post-norms); 1 is truncation after `iterations` blocks.
    segments: so many groups of neighbouring blocks are exact inside; None for single blocks.
    tape: "auto" leaves the chain on the ordinary tape where `iterations` makes the gradient exact anyway; "never" goes
        the way below even then. A recurrence runs exactly under "auto" where its iterations would take longer.

    Every unit (segment or block) pulls its own cotangent at once in each iteration, in place of one after the other;
    exact at `iterations` = units - 1. That pays with a device for each unit and one or two micro-batches at most. On a
    single device the ordinary tape is faster, and exact: `explain()` says what the iterations cost there.
    Refuses models without a chain of residual blocks, blocks with hooks, and writes in place across blocks.
    """

    name: ClassVar[str] = "highway"

    target: Target
    iterations: int | str | tuple[tuple[int, int | str], ...] = "auto"
    shift: float = 0.0
    segments: int | None = 4
    tape: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        Iterations(self.iterations, "Highway")
        if not _is_number(self.shift) or not 0 <= self.shift <= 1:
            raise RewriteError(f"shift={self.shift!r} is not a share", where="Highway", remedy="a number in 0 .. 1")
        whole = isinstance(self.segments, int) and not isinstance(self.segments, bool)
        if self.segments is not None and (not whole or self.segments < 1):
            raise RewriteError(
                f"segments={self.segments!r} is not known",
                where="Highway",
                remedy="how many groups of blocks, or None for single blocks",
            )
        check_choice(self, "tape", TAPES)

    def wholes(self, model: nn.Module) -> frozenset[str]:
        names = [place.module for place in resolve(self.target, model)]
        return frozenset(name for name in names if isinstance(model.get_submodule(name), nn.RNNBase))

    def apply(self, program: Program) -> Program | Refused:
        places = resolve(self.target, program.model)
        if not all(is_recurrence(place, program) for place in places):
            return self._over_blocks(program)
        # One block called several times on what it left, and on nothing else, is a chain of tied blocks, not a cell.
        first, second = self._through_time, self._over_blocks
        if any(self._reads_its_own(place, program) for place in places):
            first, second = second, first
        outcome = first(program)
        if isinstance(outcome, Refused):
            other = second(program)
            return outcome if isinstance(other, Refused) else other
        return outcome

    def _reads_its_own(self, place: Place, program: Program) -> bool:
        if isinstance(program.module(place.module), nn.RNNBase):
            return False
        found = gathered(self, place, program)
        cell = found if isinstance(found, Refused) else read(found[1], found[0])
        return isinstance(cell, Unrolled) and not cell.roles.inputs

    def _over_blocks(self, program: Program) -> Program | Refused:
        outcome = residual_regions(self, program)
        if isinstance(outcome, Refused):
            return outcome
        changed, found = outcome
        kept, notes = [], []
        for region in found:
            units = _residual(region)
            if units < 2:
                return Refused(region.name, "it has one residual block only", "leave it to automatic differentiation")
            units = units if self.segments is None else min(units, self.segments)
            if self.tape == "auto" and isinstance(self.iterations, int) and self.iterations >= units - 1:
                notes.append(
                    f"{self}: {region.name} stays on the ordinary tape: {self.iterations} iterations over {units} "
                    "units are exact, and so is the tape, for less"
                )
            else:
                kept.append(region)
        return (changed if kept else program).with_(regions=(*program.regions, *kept), notes=(*program.notes, *notes))

    def _through_time(self, program: Program) -> Program | Refused:
        return with_recurrences(self, program, self.tape)

    def rule(self, program: Program, region: Region, segment: Segment, ledger: Ledger, known: Rule | None) -> Rule:
        iterations = _learnt(known) or Iterations(self.iterations, region.name)
        if not region.parts:
            return recurrence_rule(program, region, segment, ledger, self.tape, iterations, self.shift)
        chain = chain_of(program, region, segment, divided=True)
        return HighwayRule(chain, ledger, iterations, self.shift, self.segments)


def _learnt(known: Rule | None) -> Iterations | None:
    if isinstance(known, HighwayRule):
        return known.iterations
    return known.planner.iterations if isinstance(known, DeferredRule | UnrolledRule) else None


def _residual(region: Region) -> int:
    return sum(isinstance(piece, ChainSegment) and piece.add is not None for piece in region.parts)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
