"""A chain cut into sub-chains: each keeps what it starts from, and is differentiated by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ledger import Ledger
from .noiseless import Noiseless
from .replay import Recorder, Replay
from .rule import Call, Gradients, Taken
from .segment import Segment
from .tape import Tape

Optional = Tensor | None

_BYTES = 2**26  # kept by the sub-chains that are differentiated together, unless the user says how many


@dataclass(frozen=True)
class SubChain:
    """Code from one cut to the next. reads, writes: names of values."""

    segment: Segment
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True)
class SubChains:
    """pieces: in order; inputs, outputs: names of the region's; cuts: by the name under which a sub-chain reads what an
    earlier one wrote, that one's name for it; rows: by name, the dimension of the rows, absent where a value has none;
    alike: groups of pieces, by number, that have the same code and may be stacked; saved: bytes that the tape of one
    piece keeps for each row."""

    pieces: tuple[SubChain, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cuts: Mapping[str, str]
    rows: Mapping[str, int]
    alike: tuple[tuple[int, ...], ...]
    saved: float


class _Memory(NamedTuple):
    """others: what is read and is no tensor; names: of the kept tensors; replays: of each piece."""

    others: dict[str, Any]
    names: tuple[str, ...]
    replays: tuple[Replay, ...]


class SubChainsRule(Noiseless):
    """Exact within each sub-chain; nothing crosses from one to the one before it: another region supplies that.

    Forward keeps no tape. Backward runs sub-chains again on tapes, `at_once` of them as one with their rows stacked
    (None: as many as 64 MiB hold), so that as many steps follow each other as one sub-chain has. What draws random
    numbers or changes buffers runs again alone, with the same numbers.
    """

    def __init__(self, chains: SubChains, segment: Segment, ledger: Ledger, at_once: int | None) -> None:
        super().__init__()
        self.chains, self.segment, self.ledger, self.at_once = chains, segment, ledger, at_once
        self._recorder = Recorder()
        self._kept = frozenset(chains.cuts.get(name, name) for piece in chains.pieces for name in piece.reads)

    def forward(self, call: Call, inputs: tuple[Any, ...], parameters: tuple[Tensor, ...]) -> Taken:
        chains = self.chains
        values: dict[str, Any] = dict(zip(chains.inputs, inputs, strict=True))
        keep, own = self._kept | set(chains.outputs), self._own(parameters)
        replays = []
        for number, piece in enumerate(chains.pieces):

            def run(piece: SubChain = piece) -> None:
                found = piece.segment.run(self._reads(piece, values), piece.segment.among(own))
                values.update({n: v.detach() for n, v in zip(piece.writes, found, strict=True) if n in keep})

            replays.append(self._recorder.record(number, (piece.segment,), run))
        outputs = tuple([values[name] for name in chains.outputs])
        kept = {name: values[name] for name in sorted(self._kept)}
        tensors = {name: value for name, value in kept.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in kept.items() if name not in tensors}
        # The parameters are among them so that changing one in place before the backward is noticed, as on a tape.
        return Taken(outputs, (*tensors.values(), *parameters), _Memory(others, tuple(tensors), tuple(replays)))

    def backward(self, call: Call, taken: Taken, cotangents: Gradients, needed: tuple[bool, ...]) -> Gradients:
        memory, chains = taken.memory, self.chains
        assert isinstance(memory, _Memory)
        values = {**memory.others, **dict(zip(memory.names, taken.tensors, strict=False))}
        given = {name: c for name, c in zip(chains.outputs, cotangents, strict=True) if c is not None}
        trained = self._own(taken.tensors[len(memory.names) :])
        keys: tuple[str | int, ...] = (*chains.inputs, *trained)
        wanted = {key for key, need in zip(keys, needed, strict=True) if need}
        gradients: dict[str | int, Tensor] = {}
        for group in self._groups(memory.replays, given, values):
            pieces = [chains.pieces[number] for number in group]
            with memory.replays[group[0]].again():
                tape, reads = self._taped(pieces, values, trained, wanted)
            self.ledger.add(call.region, forwards=1)
            for key, gradient in self._pulled(call.region, pieces, tape, reads, given):
                before = gradients.get(key)
                gradients[key] = gradient if before is None else before + gradient
        return tuple([gradients.get(key) if need else None for key, need in zip(keys, needed, strict=True)])

    def describe(self) -> dict[str, Any]:
        longest = max(map(len, self.chains.alike))
        return {"rule": "sub-chains", "sub_chains": len(self.chains.pieces), "alike": longest, "at_once": self.at_once}

    def _own(self, parameters: Sequence[Tensor]) -> dict[int, Tensor]:
        return dict(zip(map(id, self.segment.trainable()), parameters, strict=True))

    def _reads(self, piece: SubChain, values: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple([values[self.chains.cuts.get(name, name)] for name in piece.reads])

    def _groups(
        self, replays: Sequence[Replay], given: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> Iterator[list[int]]:
        """Numbers of pieces that something flows into, those that run as one together."""
        for alike in reversed(self.chains.alike):
            reached = [n for n in alike if any(name in given for name in self.chains.pieces[n].writes)]
            plain = all(replays[number].states is None and not replays[number].buffers for number in reached)
            most = self._most(alike[0], values) if plain else 1
            yield from (reached[start : start + most] for start in range(0, len(reached), most))

    def _most(self, number: int, values: Mapping[str, Any]) -> int:
        if self.at_once is not None:
            return self.at_once
        reads = self.chains.pieces[number].reads
        name = next((name for name in reads if name in self.chains.rows), None)
        if name is None:
            return 1
        rows = values[self.chains.cuts.get(name, name)].shape[self.chains.rows[name]]
        return max(1, int(_BYTES // max(1.0, self.chains.saved * rows)))

    def _taped(
        self,
        pieces: Sequence[SubChain],
        values: Mapping[str, Any],
        trained: Mapping[int, Tensor],
        wanted: set[str | int],
    ) -> tuple[Tape, list[tuple[str | int, ...]]]:
        """The pieces as one on a tape; of what it reads and then of the parameters, whose gradients each one holds."""
        segment, rows = pieces[0].segment, self.chains.rows
        given: list[Any] = []
        keys: list[tuple[str | int, ...]] = []
        for place, name in enumerate(pieces[0].reads):
            names = [piece.reads[place] for piece in pieces]
            parts = [values[self.chains.cuts.get(each, each)] for each in names]
            stacked = len(pieces) > 1 and name in rows
            given.append(torch.cat(parts, rows[name]) if stacked else parts[0])
            keys.append(tuple(names) if stacked else (name,))
        own = segment.among(trained)
        keys += [(key,) for key in own]
        needed = [any(key in wanted for key in each) for each in keys]
        return Tape(segment, given, own, needed), [k if need else () for k, need in zip(keys, needed, strict=True)]

    def _pulled(
        self,
        region: str,
        pieces: Sequence[SubChain],
        tape: Tape,
        keys: Sequence[tuple[str | int, ...]],
        given: Mapping[str, Tensor],
    ) -> Iterator[tuple[str | int, Tensor]]:
        cotangents = []
        for place, output in enumerate(tape.outputs):
            names = [piece.writes[place] for piece in pieces]
            cotangents.append(self._stacked(names, output, given))
        found = tape.pull(cotangents, [bool(each) for each in keys], keep=False)
        if found is None:
            return
        self.ledger.add(region, vjps=1)
        for each, gradient in zip(keys, found, strict=True):
            if gradient is not None:
                parts = gradient.chunk(len(each), self.chains.rows[str(each[0])]) if len(each) > 1 else (gradient,)
                yield from zip(each, parts, strict=True)

    def _stacked(self, names: Sequence[str], output: Tensor, given: Mapping[str, Tensor]) -> Optional:
        """The cotangents of what pieces wrote, as one: zero where nothing flows into some of them."""
        if not any(name in given for name in names):
            return None
        if len(names) == 1:
            return given[names[0]]
        dimension = self.chains.rows[names[0]]
        parts = zip(names, output.chunk(len(names), dimension), strict=True)
        return torch.cat([given[name] if name in given else torch.zeros_like(part) for name, part in parts], dimension)
