"""`memory_plan`: what exact differentiation, checkpointing and horizons would keep, and how long they would take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import nn

from rewriter.passes.base import Entry, Refused
from rewriter.passes.chain import block_regions
from rewriter.passes.checkpoint import Checkpoint
from rewriter.passes.horizon import Horizon
from rewriter.passes.program import Cost, Program, Region, Value
from rewriter.passes.targets import Target
from rewriter.runtime.errors import RewriteError
from rewriter.runtime.windows import Windows

from .pipeline import analysed, undisturbed
from .plan import Plan
from .rewrite import arguments

_WORTH = 1.35  # times the ordinary tape, up to which an exact plan is preferred to a horizon


@dataclass(frozen=True)
class Option:
    """One way to train. entry: None for the ordinary tape; bytes: predicted peak of what is alive beyond parameters,
    optimizer state and inputs, gradients counted; time: of a step, as a multiple of the ordinary tape's; note: for the
    reader."""

    entry: Entry | None
    exact: bool
    bytes: int
    time: float
    note: str = ""

    @property
    def name(self) -> str:
        return "ordinary tape" if self.entry is None else str(self.entry)


@dataclass(frozen=True)
class MemoryPlan:
    """`str(plan)` is the table: exact ways first. best: what to use within the budget, None where nothing fits."""

    options: tuple[Option, ...]
    budget: int | None
    best: Option | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        width = max(len(option.name) for option in self.options)
        large = max(option.bytes for option in self.options) >= 2**20
        unit, spelled = (2**20, "MiB") if large else (2**10, "KiB")
        lines = [f"{'':{width}}  {'peak ' + spelled:>9}  {'time':>5}"]
        for option in self.options:
            over = "  over budget" if self.budget is not None and option.bytes > self.budget else ""
            note = f"  {option.note}" if option.note else ""
            exact = "  exact" if option.exact else ""
            lines.append(
                f"{option.name:{width}}  {option.bytes / unit:9.2f}  {option.time:5.2f}{exact}{over}{note}".rstrip()
            )
        if self.budget is not None:
            best = "nothing here fits the budget" if self.best is None else f"use: {self.best.name}"
            lines.append(f"budget {self.budget / unit:.2f} {spelled}; {best}")
        return "\n".join((*lines, *self.notes))


def memory_plan(
    model: nn.Module, example: Any, budget: int | None = None, *, blocks: Target | None = None
) -> MemoryPlan:
    """Predict memory and time of the ways to train a chain of blocks, from one forward pass of the example.

    example: as `rewrite` takes it; budget: bytes for what a step keeps; blocks: the chain, the model's longest list of
    blocks where None. Memory comes from the bytes that each block's tape keeps; time from FLOPs, with a backward of
    twice the forward, one half of it for the inputs (see `Windows`); what a horizon costs in quality is not in it.
    Raises RewriteError where the model has no such chain.
    """
    args, kwargs = arguments(example)
    program = undisturbed(lambda: analysed(model, Plan(), args, kwargs))[1]
    target, program, region = _chain(program, model, blocks)
    measured = _measured(program, region)
    options = [measured.tape(), *(measured.checkpointed(target, every) for every in _groupings(len(region.parts)))]
    horizon, refusal = _horizon(program, target)
    notes = () if refusal is None else (f"no horizon: {refusal.reason} ({refusal.remedy})",)
    if horizon is not None:
        least = min(option.bytes for option in options)
        options += [_judged(option, least) for option in measured.windowed(horizon)]
    return MemoryPlan(tuple(options), budget, _best(options, budget), (*notes, _verdict(options, budget)))


def _chain(program: Program, model: nn.Module, blocks: Target | None) -> tuple[Target, Program, Region]:
    if blocks is not None:
        found = block_regions(Checkpoint(blocks), program)
        if isinstance(found, Refused):
            raise RewriteError("no chain of blocks there", where=found.node, why=found.reason, remedy=found.remedy)
        return blocks, found[0], found[1][0]
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and name}
    for name in sorted(lists, key=lambda name: -len(lists[name])):
        found = block_regions(Checkpoint(name), program)
        if not isinstance(found, Refused):
            return name, found[0], found[1][0]
    raise RewriteError(
        "the model has no list of blocks with a single tensor between them",
        where=type(model).__name__,
        remedy="name the blocks: memory_plan(model, example, budget, blocks='encoder.layers')",
    )


def _groupings(blocks: int) -> list[int]:
    """Group sizes worth a look: up to the one with the least memory, which is near the root."""
    return sorted({size for size in (1, 2, 3, 4, round(blocks**0.5)) if size < blocks})


def _horizon(program: Program, target: Target) -> tuple[Callable[..., Horizon] | None, Refused | None]:
    refused: Refused | None = None
    for head in ("shared", "auxiliary"):
        found = Horizon(target, 1, head=head).apply(program)
        if not isinstance(found, Refused):
            return lambda horizon, head=head, **options: Horizon(target, horizon, head=head, **options), None
        refused = refused or found
    return None, refused


@dataclass(frozen=True)
class _Measured:
    """Per block: bytes its tape keeps, of the value it starts from, of its parameters' gradients, and FLOPs.

    largest: bytes of the largest value inside a block; around, gradients, work: bytes, bytes and FLOPs outside the
    blocks; tail: of the FLOPs, those behind them.
    """

    kept: tuple[int, ...]
    values: tuple[int, ...]
    trained: tuple[int, ...]
    flops: tuple[int, ...]
    largest: int
    around: int
    gradients: int
    work: int
    tail: int

    def tape(self) -> Option:
        return Option(None, True, self._peak([range(len(self.kept))]), 1.0)

    def checkpointed(self, target: Target, every: int) -> Option:
        count = len(self.kept)
        groups = [range(start, min(start + every, count)) for start in range(0, count, every)]
        time = 1.0 + (sum(self.flops) / self._total / 3 if self._total else 0.0)
        return Option(Checkpoint(target, every), True, self._peak(groups, checkpoints=True), time)

    def windowed(self, horizon: Callable[..., Horizon]) -> Iterator[Option]:
        count = len(self.kept)
        sizes = [2**power for power in range(count.bit_length()) if 2**power < count]
        for checkpoint in (False, True):
            for size in sizes:
                for when in ("forward",) if checkpoint else ("forward", "backward"):
                    entry = horizon(size, when=when, checkpoint=checkpoint)
                    yield Option(entry, False, self._window_peak(entry), self._window_time(entry))

    def _peak(self, groups: list[range], checkpoints: bool = False) -> int:
        """Over the groups, last one first: checkpoints so far, the group's tape, and gradients behind it."""
        found = 0
        for number, group in enumerate(groups):
            # The group's own checkpoint is among what its tape keeps.
            before = sum(self.values[each.start] for each in groups[:number]) if checkpoints else 0
            behind = sum(self.trained[group.stop :]) + self.gradients
            found = max(found, before + sum(self.kept[group.start : group.stop]) + behind)
        # A vjp has the cotangents before and behind an operation in hand while a whole block is on tape.
        working = 2 * self.largest if checkpoints else self.largest
        return self.around + max(found + working, sum(self.trained) + self.gradients)

    def _window_peak(self, entry: Horizon) -> int:
        windows = Windows(len(self.kept), entry.horizon, entry.stride or entry.horizon)
        stash = [0, *accumulate(self.trained)]
        found = 0
        for start in (*windows.starts, windows.last):
            blocks = slice(start, start + windows.horizon)
            inside = sum(self.values[blocks]) + max(self.kept[blocks]) if entry.checkpoint else sum(self.kept[blocks])
            early = stash[min(start, windows.last)] if entry.when == "forward" else sum(self.trained[windows.last :])
            found = max(found, inside + early)
        working = 2 * self.largest + (2 * max(self.values) if entry.when == "backward" else 0)
        return self.around + max(found + working, sum(self.trained) + self.gradients)

    def _window_time(self, entry: Horizon) -> float:
        windows = Windows(len(self.kept), entry.horizon, entry.stride or entry.horizon)
        pulled, again = [0] * windows.blocks, [0] * windows.blocks
        for start in (*windows.starts, windows.last):
            for block in range(start, start + windows.horizon):
                pulled[block] += 1
                again[block] += entry.checkpoint
        if entry.when == "backward" and windows.starts:
            for block in range(windows.starts[-1] + windows.horizon):
                again[block] += 1
        chain = sum(f * (2 + p + a) for f, p, a in zip(self.flops, pulled, again, strict=True))
        heads = 2 * self.tail * len(windows.starts)
        return (chain + heads + 3 * self.work) / (3 * self._total) if self._total else 1.0

    @property
    def _total(self) -> int:
        return sum(self.flops) + self.work


def _measured(program: Program, region: Region) -> _Measured:
    costs = [sum((program.costs.get(name, Cost()) for name in piece.nodes), Cost()) for piece in region.parts]
    everything = sum(program.costs.values(), Cost())
    order = [node.name for node in program.graph.nodes]
    behind = set(order[order.index(region.owned[-1]) + 1 :])
    tail = sum((cost for name, cost in program.costs.items() if name in behind), Cost())
    inside: set[int] = set()
    trained = tuple(_trained(program, piece.nodes, inside) for piece in region.parts)
    parameters = [p for p in program.model.parameters() if p.requires_grad]
    return _Measured(
        tuple(cost.saved for cost in costs),
        tuple(_bytes(program.values[piece.input]) for piece in region.parts),
        trained,
        tuple(cost.flops for cost in costs),
        max(_bytes(program.values.get(name)) for piece in region.parts for name in piece.nodes),
        everything.saved - sum(cost.saved for cost in costs),
        sum(p.numel() * p.element_size() for p in parameters if id(p) not in inside),
        everything.flops - sum(cost.flops for cost in costs),
        tail.flops,
    )


def _trained(program: Program, nodes: tuple[str, ...], seen: set[int]) -> int:
    """Bytes of the parameters that these nodes read and no earlier ones did."""
    found = 0
    for name in nodes:
        node = program.node(name)
        held: list[Any] = []
        if node.op == "call_module":
            held = list(program.module(str(node.target)).parameters())
        elif node.op == "get_attr":
            held = [program.attribute(str(node.target))]
        for each in held:
            if isinstance(each, nn.Parameter) and each.requires_grad and id(each) not in seen:
                seen.add(id(each))
                found += each.numel() * each.element_size()
    return found


def _bytes(value: Any) -> int:
    if not isinstance(value, Value):
        return 0
    count = 1
    for size in value.shape:
        count *= size
    return count * value.dtype.itemsize


def _judged(option: Option, least: int) -> Option:
    note = "buys nothing: checkpointing is exact and needs no more" if option.bytes >= least else ""
    return Option(option.entry, option.exact, option.bytes, option.time, note)


def _best(options: list[Option], budget: int | None) -> Option | None:
    """The fastest exact way that fits; else the longest horizon that does."""
    fitting = [option for option in options if budget is None or option.bytes <= budget]
    exact = sorted((option for option in fitting if option.exact), key=lambda option: option.time)
    if exact and exact[0].time <= _WORTH:
        return exact[0]
    windows = [option for option in fitting if isinstance(option.entry, Horizon)]
    longest = max((o.entry.horizon for o in windows if isinstance(o.entry, Horizon)), default=0)
    found = [o for o in windows if isinstance(o.entry, Horizon) and o.entry.horizon == longest]
    return min((*found, *exact), key=lambda option: option.time, default=None)


def _verdict(options: list[Option], budget: int | None) -> str:
    windows = [option for option in options if not option.exact]
    useful = [option for option in windows if not option.note]
    best = _best(options, budget)
    if not windows:
        return "a horizon does not apply to this chain"
    if not useful:
        return "a horizon buys nothing here: checkpointing needs no more memory and is exact"
    if budget is not None and best is not None and best.exact:
        return "a horizon buys nothing within this budget: an exact way fits"
    return (
        "horizons are approximations: their gradient is not that of the loss, whatever they save; windows that overlap "
        "(stride below the horizon) take longer and were found to train worse"
    )
