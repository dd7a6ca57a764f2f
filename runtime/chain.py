"""Blocks at detached boundaries: one tape each, with vjps to the stream and to everything else separately callable.

Highway-BP, horizons and checkpointing differ in which of these vjps they take, with what, and when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from .ledger import Ledger
from .rule import Call, Gradients
from .segment import Segment
from .tape import Tape, Wanted, pull_all

Optional = Tensor | None
Stream = Literal["both", "branch", "skip", "none"]

# Whether to follow the branch and the skip; a block that is not divided has one stream, the last.
_FOLLOWED = {"both": (True, True), "branch": (True, False), "skip": (False, True), "none": (False, False)}


@dataclass(frozen=True)
class Block:
    """One link of a chain: code from the stream's value to its next one.

    reads, writes: names of values; the stream's first. divided: the code takes the stream twice, for the branch and for
    the skip, so that each has a vjp of its own: d block = J + K with J through the branch and K through the skip.
    identity: K is the identity, and no vjp is needed for it; the skip is not on the block's tape then.
    """

    name: str
    segment: Segment
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    divided: bool = False
    identity: bool = False

    @property
    def streams(self) -> int:
        return 2 if self.divided else 1


@dataclass(frozen=True)
class Chain:
    """Blocks one after the other, each reading what the one before it wrote.

    segment: the whole region, whose trainable parameters the bridge knows; inputs, outputs: names of the region's, in
    its order; the first block's stream is among the inputs.
    """

    segment: Segment
    blocks: tuple[Block, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.blocks)

    @cached_property
    def stream(self) -> tuple[str, ...]:
        """Names of the values at the cuts, the chain's input first."""
        return (self.blocks[0].reads[0], *(block.writes[0] for block in self.blocks))


@dataclass(slots=True)
class _Taped:
    """A block's tape.

    streams: whether the branch and the skip have aliases to follow, in one place where they are not divided; rest: the
    same of side inputs and parameters; keys: of these, by name of a side input or id of a parameter.
    """

    tape: Tape
    streams: list[bool]
    rest: list[bool]
    keys: tuple[str | int, ...]
    hoisted: tuple[Tensor, ...]


class Run:
    """One forward pass of a chain, block by block, and the gradients gathered on its way back.

    values: everything read or written so far, detached, by name; drop what has been read for the last time.
    gradients: what `pull` has summed so far, by name of a side input or id of a parameter.
    """

    def __init__(self, chain: Chain, call: Call, inputs: Sequence[Any], parameters: Sequence[Tensor]) -> None:
        self.chain, self.region = chain, call.region
        self.values: dict[str, Any] = dict(zip(chain.inputs, inputs, strict=True))
        trained = [id(parameter) for parameter in chain.segment.trainable()]
        self._parameters = dict(zip(trained, parameters, strict=True))
        self._keys: tuple[str | int, ...] = (*chain.inputs, *trained)
        self._needed: set[str | int] = {key for key, need in zip(self._keys, call.needed, strict=True) if need}
        for key, parameter in self._parameters.items():  # the bridge's aliases serve the tapes of all blocks
            parameter.requires_grad_(key in self._needed)
        self._tapes: list[_Taped | None] = [None] * len(chain)
        self.gradients: dict[str | int, Tensor] = {}

    def block(self, number: int, taped: bool = True) -> None:
        """Runs one block and adds what it writes to `values`; taped: on a tape of its own, if anybody needs one."""
        block = self.chain.blocks[number]
        reads = [self.values[name] for name in block.reads]
        given = [*reads[:1] * (block.streams - 1), *reads]
        own = block.segment.among(self._parameters)
        keys: tuple[str | int, ...] = (*block.reads[1:], *own)
        stream = block.reads[0] in self._needed
        streams = [stream, stream and not block.identity][: block.streams]
        rest = [key in self._needed for key in keys]
        needed = [*streams, *rest]
        if taped and True in needed:
            tape = Tape(block.segment, given, own, needed)
            outputs = tape.outputs
            self._tapes[number] = _Taped(tape, streams, rest, keys, tape.taken())
            self._needed.update(n for n, o in zip(block.writes, outputs, strict=True) if o.requires_grad)
        else:
            outputs = block.segment.run(tuple(given), own)
            if True in needed:
                self._needed.update(n for n, o in zip(block.writes, outputs, strict=True) if o.is_floating_point())
        self.values.update(zip(block.writes, (output.detach() for output in outputs), strict=True))

    def trains(self, number: int) -> bool:
        """Whether a block has gradients to supply beside the stream's."""
        block = self.chain.blocks[number]
        return any(key in self._needed for key in (*block.reads[1:], *map(id, block.segment.trainable())))

    def outputs(self) -> tuple[Tensor, ...]:
        """The region's."""
        return tuple([self.values[name] for name in self.chain.outputs])

    def hoisted(self) -> tuple[Tensor, ...]:
        """What the tapes kept outside themselves, for the bridge to keep; `give_back` it in backward."""
        found = [tensor for taped in self._tapes if taped is not None for tensor in taped.hoisted]
        for taped in self._tapes:
            if taped is not None:
                taped.hoisted = (None,) * len(taped.hoisted)  # type: ignore[assignment]
        return tuple(found)

    def give_back(self, hoisted: Sequence[Tensor]) -> None:
        rest = iter(hoisted)
        for taped in self._tapes:
            if taped is not None:
                taped.hoisted = tuple([next(rest) for _ in taped.hoisted])

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
        """A vjp of one block: the cotangent of the stream before it, None where nothing flows.

        cotangents: one per value the block writes, the stream's first. stream: what to follow: "both", the "branch"
        (J), the "skip" (K), or "none". rest: add the gradients of parameters and side inputs to `gradients` too.
        keep: the tape stays for another vjp.
        """
        (found,) = self.pull_all([(number, cotangents, stream)], ledger, keep=keep, rest=rest)
        return found

    def pull_all(
        self, asked: Sequence[tuple[int, Sequence[Optional], Stream]], ledger: Ledger, *, keep: bool, rest: bool
    ) -> list[Optional]:
        """`pull` of several blocks, (number, cotangents, stream) each, at once; no block twice."""
        found: list[Optional] = [None] * len(asked)
        jobs: list[tuple[int, _Taped]] = []
        wanted: list[Wanted] = []
        for place, (number, cotangents, stream) in enumerate(asked):
            taped, block = self._tapes[number], self.chain.blocks[number]
            if taped is None:
                continue
            follow = _FOLLOWED[stream][-block.streams :]
            if block.identity and follow[-1] and taped.streams[0]:
                found[place] = cotangents[0]
            streams = [need and followed for need, followed in zip(taped.streams, follow, strict=True)]
            others = taped.rest if rest else [False] * len(taped.rest)
            jobs.append((place, taped))
            wanted.append((taped.tape, cotangents, [*streams, *others], taped.hoisted))
            if not keep:
                self._tapes[number] = None
        vjps = 0
        for (place, taped), gradients in zip(jobs, pull_all(wanted, keep), strict=True):
            if gradients is not None:
                vjps += 1
                count = len(taped.streams)
                found[place] = total((*gradients[:count], found[place]))
                for key, gradient in zip(taped.keys, gradients[count:], strict=True):
                    if gradient is not None:
                        self.add(key, gradient)
        if vjps:
            ledger.add(self.region, vjps=vjps)
        return found

    def taped(self, number: int) -> bool:
        """Whether a block has a tape: something in it, or before it, needs a gradient."""
        return self._tapes[number] is not None

    def free(self, number: int) -> None:
        """Drops a block's tape."""
        self._tapes[number] = None

    def add(self, key: str | int, gradient: Tensor) -> None:
        """Adds to the gradient of a value by name, or of a parameter by id."""
        before = self.gradients.get(key)
        self.gradients[key] = gradient if before is None else before + gradient

    def collected(self, needed: Sequence[bool]) -> Gradients:
        """The region's gradients, of its inputs and then of its parameters; `gradients` starts anew."""
        gradients, self.gradients = self.gradients, {}
        return tuple([gradients.get(key) if need else None for key, need in zip(self._keys, needed, strict=True)])


def total(parts: Sequence[Optional]) -> Optional:
    """Sum of what is there, None where nothing is."""
    found: Optional = None
    for part in parts:
        if part is not None:
            found = part if found is None else found + part
    return found
