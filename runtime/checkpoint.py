"""Checkpointing: blocks keep their input in place of a tape, and run again on one in backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .chain import Chain, Run, Stream, total
from .ledger import Ledger
from .noiseless import Noiseless
from .region import keeps_graph
from .replay import Recorder, Replay
from .rule import Call, Gradients, Taken

Optional = Tensor | None


class CheckpointRule(Noiseless):
    """Exact: runs the chain in groups of `every` blocks, each of which keeps only what it starts from.

    Backward runs one group after the other again, last one first, on tapes: with the random numbers that forward drew,
    and with copies of the buffers that it changed, so that statistics advance once. `parameters` are the chain's
    trainable ones, in its segment's order.
    """

    def __init__(self, chain: Chain, ledger: Ledger, every: int) -> None:
        super().__init__()
        self.segment, self.ledger = chain.segment, ledger
        self.chain, self.every = chain, every
        self._recorder = Recorder()
        self._groups = [range(start, min(start + every, len(chain))) for start in range(0, len(chain), every)]
        sides = {name for block in chain.blocks for name in block.reads[1:]}
        starts = {chain.stream[group.start] for group in self._groups}
        self._kept, self._between = sides | starts, starts - sides - {chain.stream[0]}

    def forward(self, call: Call, inputs: tuple[Any, ...], parameters: tuple[Tensor, ...]) -> Taken:
        run = Run(self.chain, call, inputs, parameters)
        keep = self._kept | set(self.chain.outputs)
        replays = []
        for group in self._groups:

            def blocks(group: range = group) -> None:
                for number in group:
                    run.block(number, taped=False)
                    if self.chain.stream[number] not in keep:
                        del run.values[self.chain.stream[number]]

            segments = [self.chain.blocks[number].segment for number in group]
            replays.append(self._recorder.record(group.start, segments, blocks))
        outputs = run.outputs()
        values = {name: value for name, value in run.values.items() if name in self._kept and isinstance(value, Tensor)}
        run.values = {name: value for name, value in run.values.items() if not isinstance(value, Tensor)}
        # What lies between groups is nobody else's: kept here, it goes with its group, while what the bridge keeps
        # lives as long as the whole backward. The caller's saved-tensor hooks (offloading) are to see it, though.
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        between = () if hooked else tuple(self._between & values.keys())
        inner = {name: values.pop(name).detach() for name in between}
        # The parameters are among them so that changing one in place before the backward is noticed, as on a tape.
        return Taken(outputs, (*values.values(), *parameters), _Memory(run, tuple(values), inner, tuple(replays)))

    def backward(self, call: Call, taken: Taken, cotangents: Gradients, needed: tuple[bool, ...]) -> Gradients:
        memory = taken.memory
        assert isinstance(memory, _Memory)
        run, others = memory.run, dict(memory.run.values)
        kept, keep = dict(zip(memory.names, taken.tensors, strict=False)), keeps_graph()
        outside = {name: c for name, c in zip(self.chain.outputs, cotangents, strict=True) if c is not None}
        cotangent: Optional = None
        for group, replay in reversed(list(zip(self._groups, memory.replays, strict=True))):
            run.values = {**others, **kept, **memory.inner}
            if not keep:
                memory.inner.pop(self.chain.stream[group.start], None)
            with replay.again():
                for number in group:
                    run.block(number)
            self.ledger.add(call.region, forwards=len(group))
            run.values = {}
            cotangent = pulled_back(run, run, group, cotangent, outside, self.ledger)
        run.values = others
        if cotangent is not None:
            run.add(self.chain.stream[0], cotangent)
        return run.collected(needed)

    def describe(self) -> dict[str, Any]:
        return {"rule": "checkpoint", "blocks": len(self.chain), "every": self.every}


@dataclass(frozen=True, slots=True)
class _Memory:
    """names: of the values among the tensors, in order; inner: values between groups; replays: one per group."""

    run: Run
    names: tuple[str, ...]
    inner: dict[str, Tensor]
    replays: tuple[Replay, ...]


def pulled_back(
    run: Run,
    by: Run | Checkpointed,
    blocks: range,
    cotangent: Optional,
    outside: Mapping[str, Tensor],
    ledger: Ledger,
    *,
    keep: bool = False,
    into: bool = True,
) -> Optional:
    """The exact vjp of some blocks of a run, last one first: the cotangent of the first one's stream.

    by: what pulls them. cotangent: of the last one's stream from the blocks behind it; outside: from outside the
    chain, by name of the value. keep: tapes stay; into: the first block's stream is asked for.
    """
    for number in reversed(blocks):
        writes = run.chain.blocks[number].writes
        # What later blocks read beside the stream has its gradient from them by now.
        given = [total((outside.get(name), run.gradients.pop(name, None))) for name in writes]
        given[0] = total((cotangent, given[0]))
        stream: Stream = "both" if into or number > blocks.start else "none"
        cotangent = by.pull(number, given, ledger, keep=keep, stream=stream)
    return cotangent


class Checkpointed:
    """The blocks of a run, each of which keeps its input in place of a tape and runs again when it is pulled."""

    def __init__(self, run: Run, recorder: Recorder, call: Call, ledger: Ledger) -> None:
        self.run, self._recorder, self._call, self._ledger = run, recorder, call, ledger
        self._kept: dict[int, tuple[Any, Replay]] = {}

    def block(self, number: int) -> None:
        """As `Run.block`."""
        run = self.run
        # An alias: the value may be an output of the region, which would hold what holds it.
        value, segment = run.values[run.chain.stream[number]].detach(), run.chain.blocks[number].segment
        replay = self._recorder.record(number, (segment,), lambda: run.block(number, taped=False))
        self._kept[number] = value, replay

    def pull(
        self,
        number: int,
        cotangents: Sequence[Optional],
        ledger: Ledger,
        *,
        keep: bool,
        stream: Stream = "both",
        rest: bool = True,
    ) -> Optional:
        """As `Run.pull`."""
        run, (value, replay) = self.run, self._kept[number]
        values = run.values
        run.values = {**values, run.chain.stream[number]: value}
        with replay.again():
            run.block(number)
        run.values = values
        ledger.add(self._call.region, forwards=1)
        found = run.pull(number, cotangents, ledger, keep=False, stream=stream, rest=rest)
        run.free(number)
        if not keep:
            self.free(number)
        return found

    def free(self, number: int) -> None:
        """As `Run.free`."""
        self._kept.pop(number, None)
