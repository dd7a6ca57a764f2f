"""Running code again as it ran: with the same random numbers, and without advancing buffers twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .segment import Segment

_Buffer = tuple[dict[str, Any], str]  # buffer = dictionary[key]


class Replay(NamedTuple):
    """How some code ran: the states of the generators before it, None where it drew nothing, and buffers it changed."""

    states: tuple[Tensor, ...] | None
    buffers: tuple[tuple[_Buffer, Tensor], ...]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, code draws the numbers that it drew, and reads and changes copies of its buffers."""
        lent = [((mapping, key), mapping[key]) for (mapping, key), _ in self.buffers]
        now = generators() if self.states is not None else ()
        try:
            if self.states is not None:
                _restore(self.states)
            for (mapping, key), before in self.buffers:
                mapping[key] = before.clone()
            yield
        finally:
            for (mapping, key), own in lent:
                mapping[key] = own
            _restore(now)


class Recorder:
    """Runs code so that it can be run again.

    Which buffers a piece of code changes is seen at its first run and then taken for granted: BatchNorm's change
    always or never.
    """

    def __init__(self) -> None:
        self._changing: dict[int, list[_Buffer]] = {}

    def record(self, number: int, segments: Sequence[Segment], action: Callable[[], None]) -> Replay:
        """Runs `action`, which runs these segments. number: names the code from call to call."""
        first = number not in self._changing
        buffers = list(_buffers(segments)) if first else self._changing[number]
        copies = [(buffer, buffer[0][buffer[1]].clone()) for buffer in buffers]
        before = generators()
        action()
        if first:
            copies = [(buffer, copy) for buffer, copy in copies if not _same(buffer[0][buffer[1]], copy)]
            self._changing[number] = [buffer for buffer, _ in copies]
        drew = any(not torch.equal(old, new) for old, new in zip(before, generators(), strict=True))
        return Replay(before if drew else None, tuple(copies))


def _buffers(segments: Sequence[Segment]) -> Iterator[_Buffer]:
    seen: set[tuple[int, str]] = set()
    for place in (place for segment in segments for place in segment.places):
        value = place.mapping[place.key]
        found: list[_Buffer] = []
        if isinstance(value, nn.Module):
            found = [(m._buffers, key) for m in value.modules() for key, b in m._buffers.items() if b is not None]
        elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and isinstance(place.mapping, dict):
            found = [(place.mapping, place.key)]
        for mapping, key in found:
            if (id(mapping), key) not in seen:
                seen.add((id(mapping), key))
                yield mapping, key


def _same(now: Tensor, before: Tensor) -> bool:
    return now.shape == before.shape and bool(((now == before) | ((now != now) & (before != before))).all())


def generators() -> tuple[Tensor, ...]:
    """States of the generators of the CPU and of the present CUDA device."""
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return (torch.get_rng_state(), torch.cuda.get_rng_state()) if cuda else (torch.get_rng_state(),)


def _restore(states: tuple[Tensor, ...]) -> None:
    if states:
        torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
