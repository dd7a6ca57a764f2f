"""`Horizon`: gradients of a chain's early blocks from the loss a few blocks ahead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from rewriter.runtime.errors import RewriteError
from rewriter.runtime.heads import AuxiliaryHead, AuxiliaryHeads, Heads, SharedHead
from rewriter.runtime.horizon import HorizonRule
from rewriter.runtime.ledger import Ledger
from rewriter.runtime.rule import Rule
from rewriter.runtime.segment import Segment
from rewriter.runtime.windows import Windows

from .base import TAPES, Entry, Refused, check_choice
from .behind import CUT
from .chain import block_regions, chain_of
from .checkpoint import is_count, runs_once
from .program import Program, Region, Value
from .regions import outputs_of
from .tail import tail_of
from .targets import Target

_CHOICES = {"head": ("shared", "auxiliary"), "when": ("forward", "backward"), "tape": TAPES}


@dataclass(frozen=True)
class Horizon(Entry):
    """Differentiate a chain of blocks in windows, each of which sees the loss `horizon` blocks ahead (MPC).

    target: the list of blocks, or a pattern that names them.
    horizon: blocks of a window; with all of them the gradient is exact.
    stride: blocks between two windows' starts, whose gradients a window supplies; `horizon`, so that windows do not
        overlap, where None. Overlapping windows cost more vjps and were found to train worse.
    head: from a window's end to the model's outputs: "shared", the rest of the model as it is, for chains whose value
        keeps its shape; "auxiliary", for others: norm, mean over positions and one linear layer for each window, which
        its own loss trains. Their parameters are the rewritten module's, under `rewriter.heads`.
    when: "forward" differentiates the early windows while the model runs and frees each before the next, so that memory
        is that of one window and the gradients; "backward" runs the early blocks a second time in place of that.
    checkpoint: blocks inside a window keep only their input, too.
    tape: "auto" leaves a horizon of all blocks to the ordinary tape; "never" always goes the way above.

    The loss given to `rewrite` is evaluated at the end of every window, on the same target. The last `horizon` blocks
    and what follows them have exact gradients; those of earlier blocks are exact for their window's loss, which is not
    the model's: a small loss at the end does not make them vanish.
    Source: arXiv 2409.19561 (stride 1); block-local losses and interlocking backpropagation are its relatives.
    """

    name: ClassVar[str] = "horizon"
    ahead: ClassVar[bool] = True

    target: Target
    horizon: int
    stride: int | None = None
    head: str = "shared"
    when: str = "forward"
    checkpoint: bool = False
    tape: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, known in _CHOICES.items():
            check_choice(self, option, known)
        if not isinstance(self.checkpoint, bool):
            raise _unknown(f"checkpoint={self.checkpoint!r} is neither True nor False", "True or False")
        if not is_count(self.horizon):
            raise _unknown(f"horizon={self.horizon!r} is not a number of blocks", "a whole number from 1 on")
        if self.stride is not None and not (is_count(self.stride) and self.stride <= self.horizon):
            raise _unknown(
                f"stride={self.stride!r} leaves blocks without a window", f"from 1 to the horizon, {self.horizon}"
            )

    @property
    def learns(self) -> bool:
        return self.head == "auxiliary"

    def apply(self, program: Program) -> Program | Refused:
        found = block_regions(self, program)
        if isinstance(found, Refused):
            return found
        changed, (region,) = found
        blocks = len(region.parts)
        if self.horizon > blocks:
            return Refused(
                region.name, f"horizon={self.horizon} is beyond its {blocks} blocks", f"a horizon from 1 to {blocks}"
            )
        if self.horizon == blocks and self.tape == "auto":
            note = f"{self}: a horizon of all {blocks} blocks is exact and stays on the ordinary tape"
            return program.with_(notes=(*program.notes, note))
        refused = self._against(changed, region)
        return refused or changed.with_(regions=(*changed.regions, region))

    def _against(self, program: Program, region: Region) -> Refused | None:
        if self.checkpoint or self.when == "backward":
            refused = runs_once(program, region)
            if refused is not None:
                return refused
        if self.horizon == len(region.parts):
            return None
        refused = _crossing(program, region)
        if refused is not None:
            return refused
        if self.head == "auxiliary":
            sizes = _sizes(program, region)
            return sizes if isinstance(sizes, Refused) else None
        tail = _changing(program, region) or tail_of(program, region)
        return tail if isinstance(tail, Refused) else None

    def rule(self, program: Program, region: Region, segment: Segment, ledger: Ledger, known: Rule | None) -> Rule:
        windows = Windows(len(region.parts), self.horizon, self.stride or self.horizon)
        heads = self._heads(program, region, windows, known)
        chain = chain_of(program, region, segment, divided=False)
        return HorizonRule(chain, ledger, windows, heads, self.when == "forward", self.checkpoint)

    def trainable(self, rule: Rule, segment: Segment) -> Callable[[], tuple[Tensor, ...]]:
        assert isinstance(rule, HorizonRule)
        return rule.trainable

    def _heads(self, program: Program, region: Region, windows: Windows, known: Rule | None) -> Heads | None:
        if not windows.starts:
            return None
        if self.head == "shared":
            tail = tail_of(program, region)
            if isinstance(tail, Refused):  # another entry of the plan rules a part of it
                raise RewriteError(f"{self} does not apply", where=tail.node, why=tail.reason, remedy=tail.remedy)
            return SharedHead(tail.segment, tail.placeholders)
        if isinstance(known, HorizonRule) and isinstance(known.heads, AuxiliaryHeads):
            return known.heads
        sizes = _sizes(program, region)
        assert not isinstance(sizes, Refused)
        ends = [start + windows.horizon for start in windows.starts]
        return AuxiliaryHeads(nn.ModuleList(_head(program, region, sizes, end) for end in ends))


def _unknown(what: str, remedy: str) -> RewriteError:
    return RewriteError(what, where="Horizon", remedy=remedy)


def _streams(program: Program, region: Region) -> list[Value]:
    """The chain's values behind each block."""
    values = [program.values[piece.output] for piece in region.parts]
    return [value for value in values if isinstance(value, Value)]


def _crossing(program: Program, region: Region) -> Refused | None:
    """Why windows cannot be looked at one by one: something crosses their ends beside the chain's value."""
    outputs = outputs_of(program, region)
    end = region.parts[-1].output
    severed = next((name for name in region.owned if program.node(name).meta.get(CUT)), None)
    if severed is not None:
        return Refused(f"{region.name}: {severed}", "a UlrCut lies inside the blocks", "cut before or behind them")
    for node in outputs:
        if node.name != end:
            return Refused(
                f"{region.name}: {node.name}",
                "it lies inside the blocks and is read outside them, so the loss does not follow from their end alone",
                "do not return or read it (use_cache=False, output_hidden_states=False), or use Highway or Checkpoint",
            )
    made = {name: number for number, piece in enumerate(region.parts) for name in piece.nodes}
    for number, piece in enumerate(region.parts):
        for name in piece.side_inputs:
            value = program.values.get(name)
            if made.get(name, number) != number and isinstance(value, Value) and value.differentiable:
                return Refused(
                    f"{region.name}: {name}",
                    "one block makes it, others read it beside the chain's value, and it has a gradient",
                    "compute it before the blocks",
                )
    return None


def _changing(program: Program, region: Region) -> Refused | None:
    streams = _streams(program, region)
    shapes = {(value.shape, value.dtype) for value in streams}
    if len(shapes) == 1:
        return None
    return Refused(
        region.name,
        f"the value between its blocks changes shape: {', '.join(map(str, dict.fromkeys(streams)))}",
        'use head="auxiliary"',
    )


def _sizes(program: Program, region: Region) -> tuple[int, bool] | Refused:
    """Width of the model's output, and whether it is one for each token."""
    results = program.graph.output_node().all_input_nodes
    values = [program.values.get(node.name) for node in results]
    output = values[0] if len(values) == 1 else None
    dimensions = {len(value.shape) for value in _streams(program, region)}
    if not isinstance(output, Value) or not output.dtype.is_floating_point or len(output.shape) not in (2, 3):
        shown = ", ".join(map(str, values))
        return Refused(
            region.name,
            f"auxiliary heads predict one tensor of shape (rows, width) or (rows, tokens, width); the model returns "
            f"{shown}",
            'let the model return one such tensor, or use head="shared"',
        )
    each_token = len(output.shape) == 3
    if len(dimensions) != 1 or not dimensions <= ({3} if each_token else {2, 3, 4}):
        return Refused(
            region.name,
            f"no auxiliary head leads from {_streams(program, region)[0]} to {output}",
            'use head="shared", or Checkpoint',
        )
    return output.shape[-1], each_token


def _head(program: Program, region: Region, sizes: tuple[int, bool], end: int) -> AuxiliaryHead:
    value = _streams(program, region)[end - 1]
    like = next(program.model.parameters()).detach()
    width, each_token = sizes
    channels = value.shape[1] if len(value.shape) == 4 else value.shape[-1]
    return AuxiliaryHead(channels, width, each_token, f"{region.name} {end}", like)
