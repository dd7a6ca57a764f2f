"""`Checkpoint`: a chain of blocks that keeps only what lies between them, and runs them again in backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rewriter.runtime.checkpoint import CheckpointRule
from rewriter.runtime.errors import RewriteError
from rewriter.runtime.ledger import Ledger
from rewriter.runtime.rule import Rule
from rewriter.runtime.segment import Segment

from .base import Entry, Refused
from .chain import block_regions, chain_of
from .program import Program, Region
from .targets import Target


@dataclass(frozen=True)
class Checkpoint(Entry):
    """Differentiate a chain of blocks exactly, keeping one value for every `every` blocks.

    target: the list of blocks, or a pattern that names them.
    every: blocks that run again together in backward. Memory is what `every` blocks keep on tapes, and one value for
        each group; time is one more forward of the blocks.

    Random numbers are drawn once and used twice, buffers such as BatchNorm's advance once. Gradients equal eager's.
    """

    name: ClassVar[str] = "checkpoint"

    target: Target
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_count(self.every):
            raise RewriteError(
                f"every={self.every!r} is not a number of blocks", where="Checkpoint", remedy="a whole number from 1 on"
            )

    def apply(self, program: Program) -> Program | Refused:
        found = block_regions(self, program)
        if isinstance(found, Refused):
            return found
        changed, regions = found
        for region in regions:
            refused = runs_once(changed, region)
            if refused is not None:
                return refused
        return changed.with_(regions=(*changed.regions, *regions))

    def rule(self, program: Program, region: Region, segment: Segment, ledger: Ledger, known: Rule | None) -> Rule:
        return CheckpointRule(chain_of(program, region, segment, divided=False), ledger, self.every)


def is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def runs_once(program: Program, region: Region) -> Refused | None:
    """Why some part of a region must not run a second time in backward."""
    for name in region.owned:
        node = program.node(name)
        reason = program.opaque.get(str(node.target), "") if node.op == "call_module" else ""
        if "changes its attribute" in reason or "draws from random" in reason or "draws from numpy" in reason:
            return Refused(
                str(node.target),
                f"it {reason}, and would do so twice",
                "keep that state in buffers, draw from torch, or leave the module outside the blocks",
            )
    return None
