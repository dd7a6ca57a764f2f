"""The rule behind `Horizon`: gradients of early blocks from the loss a few blocks ahead (model predictive control)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .chain import Chain
from .checkpoint import pulled_back
from .errors import RewriteError
from .heads import AuxiliaryHeads, Heads
from .ledger import Ledger
from .noiseless import Noiseless
from .region import keeps_graph
from .replay import Recorder, Replay
from .rule import Call, Gradients, Taken
from .windows import Gathered, Passage, Windows


@dataclass(frozen=True, slots=True)
class _Memory:
    """passage: holds the last window's tapes; hoisted: number of their tensors among the kept ones.

    stash: early windows' gradients of the bare loss; replay: how the chain ran, where backward takes them instead;
    others: the inputs, None in place of tensors.
    """

    passage: Passage
    hoisted: int
    stash: Gathered
    replay: Replay | None
    others: tuple[Any, ...]


class HorizonRule(Noiseless):
    """Windows over a chain of blocks: the last one exact, those before it from the loss at their own end.

    heads: from the value at a window's end to the loss; None where the only window is the last one. streamed: early
    windows are differentiated while forward runs, and their tapes freed one by one; the gradients wait for the loss's
    own cotangent. Otherwise backward runs the chain again, with the same random numbers. checkpointed: blocks inside a
    window keep only their input, too. `parameters` are `trainable()`, in that order.
    """

    def __init__(
        self, chain: Chain, ledger: Ledger, windows: Windows, heads: Heads | None, streamed: bool, checkpointed: bool
    ) -> None:
        super().__init__()
        self.segment, self.ledger = chain.segment, ledger
        self.chain, self.windows, self.heads = chain, windows, heads
        self.streamed, self.checkpointed = streamed, checkpointed
        self._whole, self._block = Recorder(), Recorder() if checkpointed else None

    def trainable(self) -> tuple[Tensor, ...]:
        """The chain's parameters, and then the heads', window by window."""
        return (*self.segment.trainable(), *(p for window in self._of_heads() for p in window))

    def _of_heads(self) -> list[tuple[Tensor, ...]]:
        heads = self.heads
        return [] if heads is None else [heads.trainable(window) for window in range(len(self.windows.starts))]

    def forward(self, call: Call, inputs: tuple[Any, ...], parameters: tuple[Tensor, ...]) -> Taken:
        own, of_heads = self._divided(parameters)
        passage = self._passage(call, inputs, own)
        early = any(map(passage.wanted, self.windows.starts))
        if early and call.objective is None:
            raise _no_loss(call.region)
        replay = None
        if early and self.streamed:
            assert self.heads is not None
            passage.early(self.heads, of_heads, None)
            passage.advance(len(self.chain))
        elif early:
            segments = [block.segment for block in self.chain.blocks]
            replay = self._whole.record(0, segments, lambda: self._last_window(passage))
        else:
            self._last_window(passage)
        run = passage.run
        outputs, stash = run.outputs(), run.gradients
        run.gradients = {}
        run.values = passage.beside() if self.checkpointed else {}
        hoisted = run.hoisted()
        if replay is None and not self.checkpointed:
            return Taken(outputs, hoisted, _Memory(passage, len(hoisted), stash, None, ()))
        # Parameters too, so that changing one in place before blocks run again is noticed, as it is on a tape.
        tensors = (*hoisted, *(value for value in inputs if isinstance(value, Tensor)), *parameters)
        others = tuple([None if isinstance(value, Tensor) else value for value in inputs])
        return Taken(outputs, tensors, _Memory(passage, len(hoisted), stash, replay, others))

    def backward(self, call: Call, taken: Taken, cotangents: Gradients, needed: tuple[bool, ...]) -> Gradients:
        memory = taken.memory
        assert isinstance(memory, _Memory)
        run, last = memory.passage.run, range(self.windows.last, len(self.chain))
        run.give_back(taken.tensors[: memory.hoisted])
        outside = {name: c for name, c in zip(self.chain.outputs, cotangents, strict=True) if c is not None}
        into = last.start == 0
        blocks = memory.passage.blocks
        cotangent = pulled_back(run, blocks, last, None, outside, self.ledger, keep=keeps_graph(), into=into)
        if into and cotangent is not None:
            run.add(self.chain.stream[0], cotangent)
        self._add_early(call, memory, taken.tensors[memory.hoisted :])
        of_heads = [run.gradients.pop(id(p), None) for window in self._of_heads() for p in window]
        return (*run.collected(needed[: len(needed) - len(of_heads)]), *of_heads)

    def _add_early(self, call: Call, memory: _Memory, kept: Sequence[Tensor]) -> None:
        """Adds the gradients of the early windows, of the loss as it was weighed."""
        if memory.replay is None and not memory.stash:
            return
        run = memory.passage.run
        weight = None if call.objective is None else call.objective.weight
        assert weight is not None  # the region is reached through the loss alone
        early = memory.stash
        if memory.replay is not None:
            tensors = iter(kept)
            inputs = [next(tensors) if other is None else other for other in memory.others]
            own, of_heads = self._divided(tuple(tensors))
            assert self.heads is not None
            with memory.replay.again():
                passage = self._passage(call, inputs, own)
                passage.early(self.heads, of_heads, weight)
            self.ledger.add(call.region, forwards=passage.reached)
            early = passage.run.gradients
        streamed, keep = memory.replay is None, keeps_graph()
        for key in list(early):
            # One by one, so that the stash and what it becomes are never alive together.
            gradient = early[key] if keep else early.pop(key)
            run.add(key, gradient * weight if streamed else gradient)

    def _passage(self, call: Call, inputs: Sequence[Any], parameters: Sequence[Tensor]) -> Passage:
        return Passage(self.windows, self.chain, call, inputs, parameters, self.ledger, self._block)

    def _last_window(self, passage: Passage) -> None:
        passage.advance(self.windows.last, taped=False)
        passage.advance(len(self.chain))

    def _divided(self, parameters: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], list[tuple[Tensor, ...]]]:
        """The chain's parameters, and those of each window's head."""
        counts = [len(window) for window in self._of_heads()]
        own = len(parameters) - sum(counts)
        rest = iter(parameters[own:])
        return parameters[:own], [tuple([next(rest) for _ in range(count)]) for count in counts]

    def describe(self) -> dict[str, Any]:
        blocks, horizon, stride = self.windows
        return {
            "rule": "horizon",
            "blocks": blocks,
            "horizon": horizon,
            "stride": stride,
            "windows": len(self.windows.starts) + 1,
            "vjps": self.windows.vjps,
            "head": "auxiliary" if isinstance(self.heads, AuxiliaryHeads) else "shared",
            "when": "forward" if self.streamed else "backward",
            "checkpoint": self.checkpointed,
        }


def _no_loss(region: str) -> RewriteError:
    return RewriteError(
        "a horizon looks at the loss, and this forward pass has none",
        where=region,
        why="the early blocks' gradients come from the loss of a value inside the chain",
        remedy="rewrite(model, plan, loss=...), and call step(x, target=y)",
    )
