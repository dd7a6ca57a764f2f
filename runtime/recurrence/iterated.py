"""Highway-BP through time: a few products for all steps at once instead of one product after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from rewriter.runtime.iterations import Iterations

from .all_steps import AllSteps, Values
from .at_once import AtOnce
from .cheap import Cheap
from .collapse import Collapse
from .joint import Joint
from .splitting import Splitting

States = list[Tensor]


@dataclass
class Highway:
    """One backward: how often to iterate on this forward pass, and the share of K that is moved into J.

    vjps: steps evaluated so far.
    """

    iterations: Iterations
    forward: int
    shift: float = 0.0
    vjps: int = 0


class Iterated:
    """The cotangents of all states as w^k = sum of d^0 ... d^k, d^0 = Scan(l; K), d^(i+1) = Scan(J d^i; K).

    l are the cotangents from outside, K and J those of `Splitting`, changed to (1 - shift) K and J + shift K. Every
    iteration evaluates J for all steps at once; after k iterations the last k + 1 states' cotangents are exact, d being
    zero there, and are left out. Exact with one iteration less than there are steps. (Fagnou et al., Highway-BP, 2025.)
    """

    def __init__(self, joint: Joint, collapse: Collapse, hoisted: Sequence[fx.Node]) -> None:
        self._joint, self._updates = joint, collapse.updates
        self._at_once = AtOnce(joint, collapse)
        self._splitting = Splitting(joint, collapse)
        self._coefficients = AllSteps(joint, hoisted, self._splitting.added)

    def __call__(self, values: Values, cotangents: Sequence[Tensor], highway: Highway) -> bool:
        """Adds to `values` what the loop over time adds; False where "auto" wants that loop, everything as before.

        cotangents: as `Recurrence.pull` takes them; row 0 gets the gradient of the initial state.
        """
        steps = len(cotangents[0]) - 1
        self._coefficients(values)
        room = self._at_once.buffers(steps, cotangents[0])
        cheap = Cheap(self._splitting, self._joint, values, cotangents, highway.shift)
        watched = highway.iterations.watches(highway.forward)
        first = [each[:1].clone() for each in cotangents]
        total = [each.clone() for each in cotangents] if watched else list(cotangents)
        if self._joint.output_cotangents:
            self._add_outputs(values, total, room)
        cheap.scan(total)
        if not self._iterate(values, total, room, cheap, highway):
            return False
        highway.vjps += steps
        found = self._at_once.fill(values, [each[1:] for each in total], room, linear=False)
        for buffer, form, outside in zip(cotangents, self._updates, first, strict=True):
            self._at_once.update(form, values, found, buffer[:1], linear=False)
            buffer[:1] += outside
        values.update(found)
        return True

    def _add_outputs(self, values: Values, total: States, room: Values) -> None:
        """What the cell's other outputs send to the states, which is the update for cotangents of zero."""
        found = self._at_once.fill(values, [torch.zeros_like(each[1:]) for each in total], room, linear=False)
        for each, form in zip(total, self._updates, strict=True):
            out = torch.empty_like(each[:-1])
            self._at_once.update(form, values, found, out, linear=False)
            each[:-1] += out

    def _iterate(self, values: Values, total: States, room: Values, cheap: Cheap, highway: Highway) -> bool:
        """Adds d^1, d^2, ... to d^0; False where the terms grow."""
        iterations, steps = highway.iterations, len(total[0]) - 1
        count = iterations.limit(highway.forward, steps - 1)
        if count == 0:
            return True
        term, other = [each.clone() for each in total], [torch.zeros_like(each) for each in total]
        watched = iterations.watches(highway.forward)
        lengths = [_length(term)] if watched else []
        for done in range(1, count + 1):
            rows = steps + 1 - done
            found = self._at_once.fill(values, [each[1 : rows + 1] for each in term], room, linear=True)
            for each, form in zip(other, self._splitting.rest, strict=True):
                self._at_once.update(form, values, found, each[:rows], linear=True)
                each[rows:].zero_()
            if highway.shift:
                cheap.add(other, term, rows)
            highway.vjps += rows
            cheap.scan(other)
            for whole, each in zip(total, other, strict=True):
                whole += each
            term, other = other, term
            if watched:
                lengths.append(_length(term))
                verdict = iterations.watch(highway.forward, steps - 1, lengths, _length(total))
                if verdict != "on":
                    return verdict == "stop"
        return True


def _length(states: Sequence[Tensor]) -> float:
    return float(torch.stack([torch.linalg.vector_norm(each[1:]) for each in states]).norm())
