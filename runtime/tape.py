"""A tape of one run of a segment: the aliases it starts from, its ends, and its vjps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward, saved_tensors_hooks

from .segment import Segment

Optional = Tensor | None


class Tape:
    """Runs a segment on detached aliases and differentiates that run, as often and as far as asked.

    `outputs` are attached to the tape; hand out their `detach()`. `aliases` are those of the inputs, then of
    `parameters`; `needed` says of each whether its gradient will be asked for.
    """

    __slots__ = ("__weakref__", "_kept", "aliases", "outputs")

    def __init__(
        self, segment: Segment, inputs: Sequence[Any], parameters: Mapping[int, Tensor], needed: Sequence[bool]
    ) -> None:
        """parameters: by the id of the module's own, the tensor to read in its place.

        A tensor that requires a gradient already is taken as the alias it is.
        """
        self._kept = _Kept()
        self.aliases = tuple(
            [
                value.detach().requires_grad_() if need and not value.requires_grad else value
                for value, need in zip((*inputs, *parameters.values()), needed, strict=True)
            ]
        )
        replaced = dict(zip(parameters, self.aliases[len(inputs) :], strict=True))
        with torch.enable_grad(), self._recording():
            self.outputs = segment.run(self.aliases[: len(inputs)], replaced)

    def taken(self) -> tuple[Tensor, ...]:
        """What was kept outside the tape, for the caller to keep in its place; give it back to `pull`."""
        return tuple(self._kept.exchanged([]))

    def give(self, kept: Sequence[Tensor]) -> None:
        """Puts back what `taken` returned, for a vjp; nothing, to let it go again."""
        self._kept.exchanged(list(kept))

    def pull(
        self, cotangents: Sequence[Optional], wanted: Sequence[bool], keep: bool, hoisted: Sequence[Tensor] = ()
    ) -> list[Optional] | None:
        """One vjp: a gradient for each alias that is wanted, None for the others and where nothing flows.

        cotangents: one per output; keep: another `pull` may follow. None where no cotangent meets anything wanted, and
        then no vjp was computed.
        """
        (found,) = pull_all([(self, cotangents, wanted, hoisted)], keep)
        return found

    def _recording(self) -> AbstractContextManager[Any]:
        """Under the caller's saved-tensor hooks (checkpoint, offloading), hoists what the tape keeps out of it.

        The bridge keeps it instead: those hooks then see it once, in the caller's own backward.
        """
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            return nullcontext()
        return saved_tensors_hooks(self._kept.hoist, self._kept.fetch)


class _Kept:
    """Tensors that a tape refers to by number. The tape's nodes hold this object, so it must not hold the tape."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def exchanged(self, tensors: list[Tensor]) -> list[Tensor]:
        before, self._tensors = self._tensors, tensors
        return before

    def hoist(self, tensor: Tensor) -> int:
        self._tensors.append(tensor.detach())
        return len(self._tensors) - 1

    def fetch(self, number: int) -> Tensor:
        return self._tensors[number]


Wanted = tuple[Tape, Sequence[Optional], Sequence[bool], Sequence[Tensor]]  # the arguments of `Tape.pull`


def pull_all(asked: Sequence[Wanted], keep: bool) -> list[list[Optional] | None]:
    """`Tape.pull` of several tapes at once, which costs little more than the largest part of one.

    A gradient of what several of them share (tied parameters) is given once, with the first.
    """
    outputs: list[Tensor] = []
    given: list[Tensor] = []
    places: dict[int, int] = {}
    sources: list[Tensor] = []
    slots: list[list[int | None] | None] = []
    for tape, cotangents, wanted, _ in asked:
        pairs = [(o, c) for o, c in zip(tape.outputs, cotangents, strict=True) if c is not None and o.requires_grad]
        if not pairs or True not in wanted:
            slots.append(None)
            continue
        for output, cotangent in pairs:
            outputs.append(output)
            given.append(cotangent)
        own: list[int | None] = [None] * len(wanted)
        for place, want in enumerate(wanted):
            if want:
                alias = tape.aliases[place]
                if places.setdefault(id(alias), len(sources)) == len(sources):
                    own[place] = len(sources)
                    sources.append(alias)
        slots.append(own)
    if not outputs:
        return [None] * len(asked)
    for tape, _, _, hoisted in asked:
        tape.give(hoisted)
    try:
        with torch.enable_grad():
            # What `autograd.grad` ends in, once it has looked at its arguments, which takes longer than a small vjp.
            found = _engine_run_backward(
                tuple(outputs), tuple(given), keep, False, tuple(sources), True, accumulate_grad=False
            )
    finally:
        for tape, _, _, _ in asked:
            tape.give(())
    return [None if own is None else [None if slot is None else found[slot] for slot in own] for own in slots]
