"""The rule behind `Highway`: a residual chain's cotangents by iterations in which every unit works at once.

Highway-BP (arXiv 2501.17086), in delta form. Split a unit's Jacobian into K, along its skips alone, and J, the rest.
With l the cotangents from outside and Scan(l)_i = l_i + Scan(l)_{i+1} K_{i+1},

    d^0 = Scan(l),   d^{k+1} = Scan(d^k J),   w^k = d^0 + ... + d^k:

w^k holds every path back that takes at most k branches. The d of unit i is zero from k = units - i on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .chain import Chain, Run, Stream, total
from .iterations import Iterations, tail
from .ledger import Ledger
from .noiseless import Noiseless
from .region import keeps_graph
from .rule import Call, Gradients, Taken

Optional = Tensor | None
Cotangents = list[Optional]  # one per unit, at its output
Unit = range  # of blocks
_Each = dict[int, Optional]  # by unit

_EVERY = 100  # forwards between two looks at the size of the terms
_HALF = (torch.float16, torch.bfloat16)


def units_of(chain: Chain, segments: int | None) -> tuple[Unit, ...]:
    """Neighbouring blocks as units of nearly equal numbers of residual blocks; None: a unit for each.

    A block without a skip goes with the residual one after it, or with the last one.
    """
    residual = [number for number, block in enumerate(chain.blocks) if block.divided]
    count = len(residual) if segments is None else min(segments, len(residual))
    ends = [residual[-(-len(residual) * each // count) - 1] + 1 for each in range(1, count)]
    return tuple([range(a, b) for a, b in zip([0, *ends], [*ends, len(chain)], strict=True)])


class Pass:
    """One backward through the tapes of a run, for given cotangents of the region's outputs.

    shift: K' = (1 - shift) K, and J' = J + shift K, of a block with a skip; without one, K is all of it. keep: the
    tapes stay for another backward. All units are pulled together, block by block from their ends; cotangents are
    float32 or wider between blocks.
    """

    def __init__(
        self, run: Run, units: Sequence[Unit], shift: float, given: Mapping[str, Tensor], ledger: Ledger, keep: bool
    ) -> None:
        self.run, self.units, self.shift, self.ledger, self.keep = run, units, shift, ledger, keep
        self._stream, self._blocks = run.chain.stream, run.chain.blocks
        self._given = {name: _wide(cotangent) for name, cotangent in given.items()}
        # Units below the first one that anything is asked of need no cotangent.
        self.first = next((n for n, unit in enumerate(units) if any(map(run.taped, unit))), len(units))

    def outside(self) -> Cotangents:
        """l: what comes from outside to the units' outputs, and into a unit on its way to the output below it."""
        found: Cotangents = [self._given.get(self._stream[unit.stop]) for unit in self.units]
        inner = self._down({n: self.units[n] for n in range(self.first + 1, len(self.units))}, {}, rest=False)
        for number, cotangent in inner.items():
            found[number - 1] = total((found[number - 1], cotangent))
        return found

    def scan(self, terms: Cotangents) -> Cotangents:
        """The reverse linear recurrence with K."""
        found = list(terms)
        for number in range(len(self.units) - 1, self.first, -1):
            through = found[number]
            for block in reversed(self.units[number]):
                share = self._share(block)
                along = self._pull({number: block}, {number: through if share < 1 else None}, "skip")
                through = _scaled(along[number], 1 - share)
            found[number - 1] = total((found[number - 1], through))
        return found

    def branches(self, terms: Cotangents) -> Cotangents:
        """Every unit's J, at the output below it: exact through its blocks, less the one path along all its skips."""
        off: _Each = {n: None for n in range(self.first + 1, len(self.units)) if terms[n] is not None}
        skipped: _Each = {n: terms[n] for n in off}
        lowest = {n: next(block for block in self.units[n] if self._blocks[block].divided) for n in off}
        for at in self._depths({n: self.units[n] for n in off}):
            branch = self._pull(at, {n: total((off[n], skipped[n])) for n in at}, "branch")
            beside = self._pull(at, off, "skip")
            # Where no branch is left below, paths that have met none need not be followed.
            followed = {n: block for n, block in at.items() if self.shift or block > lowest[n]}
            along = self._pull(followed, skipped, "skip")
            for number, block in at.items():
                share, kept = self._share(block), along.get(number)
                off[number] = total((branch[number], beside[number], _scaled(kept, share)))
                skipped[number] = _scaled(kept, 1 - share) if block > lowest[number] else None
        found: Cotangents = [None] * len(self.units)
        for number, cotangent in off.items():
            found[number - 1] = cotangent
        return found

    def finish(self, cotangents: Cotangents | None) -> None:
        """To parameters and side inputs, exactly inside each unit; cotangents: of the units' outputs, None: all exact.

        Tapes are freed unless they are kept.
        """
        if self.first == len(self.units):
            return
        units = dict(enumerate(self.units[self.first :], self.first))
        if cotangents is None:
            units = {self.first: range(self.units[self.first].start, len(self._blocks))}
            cotangents = [self._given.get(self._stream[-1])] * len(self.units)
        left = self._down(units, dict(enumerate(cotangents)), rest=True)[self.first]
        if left is not None and self.first == 0:
            self.run.add(self._stream[0], left)

    def _down(self, units: Mapping[int, Unit], ends: Mapping[int, Optional], rest: bool) -> _Each:
        """Exactly through units, with what comes into them from outside; ends: cotangents of their outputs.

        rest: to parameters and side inputs as well, and to the stream before a unit only if it is the first.
        """
        flowing: _Each = {number: ends.get(number) for number in units}
        for at in self._depths(units):
            asked: dict[int, tuple[int, tuple[Optional, ...], Stream]] = {}
            for number, block in at.items():
                if block + 1 < units[number].stop:
                    flowing[number] = total((flowing[number], self._given.get(self._stream[block + 1])))
                given = (flowing[number], *[self._given.get(name) for name in self._blocks[block].writes[1:]])
                onward = not rest or block > units[number].start or number == self.first
                if any(each is not None for each in given):
                    asked[number] = (block, given, "both" if onward else "none")
            keep = self.keep or not rest
            found = self.run.pull_all(list(asked.values()), self.ledger, keep=keep, rest=rest)
            flowing |= dict(zip(asked, map(_wide, found), strict=True))
        return flowing

    def _pull(self, at: Mapping[int, int], cotangents: Mapping[int, Optional], stream: Stream) -> _Each:
        """Vjps of one block of each unit, to the stream alone."""
        asked: dict[int, tuple[int, tuple[Optional, ...], Stream]] = {}
        for number, block in at.items():
            if cotangents[number] is not None:
                others = [None] * (len(self._blocks[block].writes) - 1)
                asked[number] = (block, (cotangents[number], *others), stream)
        found = self.run.pull_all(list(asked.values()), self.ledger, keep=True, rest=False)
        return dict.fromkeys(at) | dict(zip(asked, map(_wide, found), strict=True))

    def _depths(self, units: Mapping[int, Unit]) -> Iterator[dict[int, int]]:
        """By unit, its last block, the one before it, and so on."""
        for depth in range(max(map(len, units.values()), default=0)):
            yield {number: unit[-1 - depth] for number, unit in units.items() if depth < len(unit)}

    def _share(self, block: int) -> float:
        """Of a block's K that counts as J."""
        return self.shift if self._blocks[block].divided else 0.0


class HighwayRule(Noiseless):
    """Runs a chain block by block on tapes of their own; backward iterates over all units, then pulls each once.

    segments: contiguous groups that are exact inside, None for single blocks; shift: see `Pass`. The ledger's vjps:
    with units 1 .. n of one residual block each, identity skips, and a loss at the end, k iterations pull
    (n - 1) + ... + (n - k) branches, and every block once more for its parameters. Skips other than the identity add
    a vjp of the skip at each scan.
    """

    def __init__(
        self, chain: Chain, ledger: Ledger, iterations: Iterations, shift: float, segments: int | None
    ) -> None:
        super().__init__()
        self.chain, self.ledger, self.iterations, self.shift = chain, ledger, iterations, shift
        self.segment, self.units = chain.segment, units_of(chain, segments)
        self._terms: tuple[float, ...] = ()  # |d^0|, ... |d^k| when last looked at
        self._length = 0.0  # |w^k| then
        self._ran: int | None = None  # iterations of the last backward; None before, and where it was exact
        self._seconds = 0.0  # of the last forward
        self._cost: float | None = None  # measured on the last iterated backward; None where a clock says nothing

    def forward(self, call: Call, inputs: tuple[Any, ...], parameters: tuple[Tensor, ...]) -> Taken:
        start = time.perf_counter()
        run = Run(self.chain, call, inputs, parameters)
        for number in range(len(self.chain)):
            run.block(number)
        outputs = run.outputs()
        run.values.clear()
        self._seconds = time.perf_counter() - start
        return Taken(outputs, run.hoisted(), run)

    def backward(self, call: Call, taken: Taken, cotangents: Gradients, needed: tuple[bool, ...]) -> Gradients:
        run = taken.memory
        assert isinstance(run, Run)
        run.give_back(taken.tensors)
        given = {name: c for name, c in zip(self.chain.outputs, cotangents, strict=True) if c is not None}
        back = Pass(run, self.units, self.shift, given, self.ledger, keeps_graph())
        self._ran = None
        exact = self.iterations.exact(call.key.forward)
        start = time.perf_counter()
        found = None if exact else self._iterated(back, call.key.forward)
        middle = time.perf_counter()
        back.finish(found)
        if found is not None and all(cotangent.is_cpu for cotangent in given.values()):
            once = self._seconds + time.perf_counter() - middle
            self._cost = 1 + (middle - start) / once
        return run.collected(needed)

    def _iterated(self, back: Pass, forward: int) -> Cotangents | None:
        """w^k, or None where the exact backward is to run instead."""
        most = max(len(self.units) - 1 - back.first, 0)
        watched = self.iterations.watches(forward)
        looked = watched or forward % _EVERY == 0
        term = back.scan(back.outside())
        found = list(term)
        lengths = [_length(term)] if looked else []
        ran = 0
        for ran in range(1, self.iterations.limit(forward, most) + 1):  # noqa: B007
            term = back.scan(back.branches(term))
            found = [total(pair) for pair in zip(found, term, strict=True)]
            if looked:
                lengths.append(_length(term))
            if watched:
                verdict = self.iterations.watch(forward, most, lengths, _length(found))
                if verdict == "exact":
                    return None
                if verdict == "stop":
                    break
        if looked:
            self._terms, self._length = tuple(lengths), _length(found)
        self._ran = ran
        return found

    def describe(self) -> dict[str, Any]:
        """skips: blocks by kind; count: iterations of the last backward, or of the next where that is known; cost: of
        forward and backward with them, over exact ones, measured or else predicted; error: predicted when the terms
        were last looked at, as a share of |w|.
        """
        blocks, units = self.chain.blocks, len(self.units)
        straight, identity = sum(not block.divided for block in blocks), sum(block.identity for block in blocks)
        count = self._ran
        if count is None and not self.iterations.watches(0) and not self.iterations.exact(0):
            count = self.iterations.limit(0, units - 1)
        extra = sum(units - each for each in range(1, (count or 0) + 1)) / units
        return {
            "rule": "highway",
            "blocks": len(blocks),
            "skips": {"identity": identity, "mapped": len(blocks) - straight - identity, "none": straight},
            "units": units,
            "iterations": self.iterations.describe(),
            "count": count,
            "cost": self._cost or 1 + extra / 3,  # predicted: forward, gradients of inputs and of weights cost the same
            "measured": self._cost is not None,
            "terms": self._terms,
            "error": tail(self._terms) / self._length if self._length else None,
        }

    def get_state(self) -> dict[str, Any]:
        return self.iterations.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self.iterations.set_state(state)


def _wide(value: Any) -> Any:
    return value.float() if value is not None and value.dtype in _HALF else value


def _scaled(value: Optional, factor: float) -> Optional:
    """None for a factor of zero: nothing flows."""
    return value if value is None or factor == 1 else value * factor if factor else None


def _length(values: Cotangents) -> float:
    """Over all units."""
    there = [value for value in values if value is not None]
    return float(torch.nn.utils.get_total_norm(there)) if there else 0.0
