"""A tape of one run of a segment: the aliases it starts from, its ends, and its vjps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .segment import Segment

Optional = Tensor | None


class Tape:
    """Runs a segment on detached aliases and differentiates that run, as often and as far as asked.

    `outputs` are attached to the tape; hand out their `detach()`. `aliases` are those of the inputs, then of
    `parameters`; `needed` says of each whether its gradient will be asked for.
    """

    __slots__ = ("aliases", "hoisted", "outputs")

    def __init__(
        self, segment: Segment, inputs: Sequence[Any], parameters: Mapping[int, Tensor], needed: Sequence[bool]
    ) -> None:
        """parameters: by the id of the module's own, the tensor to read in its place."""
        self.hoisted: list[Tensor] = []
        self.aliases = tuple(
            [
                value.detach().requires_grad_() if need else value
                for value, need in zip((*inputs, *parameters.values()), needed, strict=True)
            ]
        )
        replaced = dict(zip(parameters, self.aliases[len(inputs) :], strict=True))
        with torch.enable_grad(), self._recording():
            self.outputs = segment.run(self.aliases[: len(inputs)], replaced)

    def taken(self) -> tuple[Tensor, ...]:
        """What was kept outside the tape, for the caller to keep in its place; give it back to `pull`."""
        kept, self.hoisted = tuple(self.hoisted), []
        return kept

    def pull(
        self, cotangents: Sequence[Optional], wanted: Sequence[bool], keep: bool, hoisted: Sequence[Tensor] = ()
    ) -> list[Optional] | None:
        """One vjp: a gradient for each alias that is wanted, None for the others and where nothing flows.

        cotangents: one per output; keep: another `pull` may follow. None where no cotangent meets anything wanted, and
        then no vjp was computed.
        """
        pairs = [(o, c) for o, c in zip(self.outputs, cotangents, strict=True) if c is not None and o.requires_grad]
        sources = [alias for alias, want in zip(self.aliases, wanted, strict=True) if want]
        if not pairs or not sources:
            return None
        outputs, given = zip(*pairs, strict=True)
        self.hoisted = list(hoisted)
        try:
            with torch.enable_grad():
                found = iter(torch.autograd.grad(outputs, sources, given, retain_graph=keep, allow_unused=True))
        finally:
            self.hoisted = []
        return [next(found) if want else None for want in wanted]

    def _recording(self) -> AbstractContextManager[Any]:
        """Under the caller's saved-tensor hooks (checkpoint, offloading), hoists what the tape keeps out of it.

        The bridge keeps it instead: those hooks then see it once, in the caller's own backward.
        """
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            return nullcontext()
        return saved_tensors_hooks(self._hoist, self._fetch)

    def _hoist(self, tensor: Tensor) -> int:
        self.hoisted.append(tensor.detach())
        return len(self.hoisted) - 1

    def _fetch(self, index: int) -> Tensor:
        return self.hoisted[index]
