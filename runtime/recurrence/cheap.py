"""K, the part of a step's map that acts element by element, for all steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .all_steps import Values
from .joint import Joint
from .scan import Scan
from .splitting import Splitting


class Cheap:
    """(1 - shift) K as a recurrence backward in time, and shift K as a part of J.

    cotangents: one tensor (steps + 1, *state) per state; values: of the coefficients, among others.
    """

    def __init__(
        self, splitting: Splitting, joint: Joint, values: Values, cotangents: Sequence[Tensor], shift: float
    ) -> None:
        self._order, self._shift = splitting.order, shift
        self._terms: list[list[tuple[int, Tensor | None]]] = []
        self._scans: list[Scan | None] = []
        numbers = {node: index for index, node in enumerate(joint.state_cotangents)}
        for index, (like, terms) in enumerate(zip(cotangents, splitting.cheap, strict=True)):
            found: dict[int, Tensor | None] = {}
            for node, coefficient in terms.items():
                value = None if coefficient is None else values[coefficient]
                found[numbers[node]] = None if value is None else value.expand_as(like[1:])
            self._terms.append([*found.items()])
            self._scans.append(self._scan(found[index], like) if index in found and shift != 1 else None)

    def _scan(self, coefficient: Tensor | None, like: Tensor) -> Scan:
        if self._shift:
            given = like.new_ones(()).expand_as(like[1:]) if coefficient is None else coefficient
            coefficient = given * (1 - self._shift)
        return Scan(coefficient, len(like) - 1, like[0].numel())

    def scan(self, states: Sequence[Tensor]) -> None:
        """In place, all states: the sum over every way through K alone."""
        if self._shift == 1:
            return
        for index in self._order:
            for source, coefficient in self._terms[index]:
                if source != index:
                    _add(states[index][:-1], coefficient, states[source][1:], 1 - self._shift)
            scan = self._scans[index]
            if scan is not None:
                scan(states[index])

    def add(self, out: Sequence[Tensor], states: Sequence[Tensor], rows: int) -> None:
        """out_t += shift K_t states_(t+1), for the first rows."""
        for target, terms in zip(out, self._terms, strict=True):
            for source, coefficient in terms:
                part = None if coefficient is None else coefficient[:rows]
                _add(target[:rows], part, states[source][1 : rows + 1], self._shift)


def _add(out: Tensor, coefficient: Tensor | None, values: Tensor, share: float) -> None:
    if coefficient is None:
        out.add_(values, alpha=share)
    else:
        torch.addcmul(out, coefficient, values, value=share, out=out)
