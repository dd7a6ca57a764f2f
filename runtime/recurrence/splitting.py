"""One step's map on the running cotangents, split for Highway-BP: K, element by element, and J, all the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .collapse import Collapse
from .forms import Fill, Form
from .joint import Joint, shape

aten: Any = torch.ops.aten

Coefficients = dict[fx.Node, fx.Node | None]


class Splitting:
    """g_t = K_t g_(t+1) + J_t g_(t+1) for the states' cotangents g; both parts are exact, and so is their sum.

    cheap: K, per state the coefficients (None for one) of the cotangents of the states one step later, itself among
    them: whatever reaches it without passing a product or an operation that does not collapse. rest: J, per state what
    remains of its update. order: the states (by number) such that each comes after the others that its K reads.
    added: nodes put into the joint graph for K.
    """

    def __init__(self, joint: Joint, collapse: Collapse) -> None:
        self._joint = joint
        self.added: list[fx.Node] = []
        self._reached: dict[fx.Node, Coefficients] = {node: {node: None} for node in joint.state_cotangents}
        for each in collapse.instructions:
            if isinstance(each, Fill) and len(each.pieces) == 1:
                self._pass(each.node, each.pieces[0][2])
        self.cheap, self.rest = self._split(collapse.updates, across=True)
        found = self._order()
        if found is None:  # states that feed each other: only what stays within a state is cheap
            self.cheap, self.rest = self._split(collapse.updates, across=False)
            found = self._order()
            assert found is not None
        self.order = found

    def _pass(self, node: fx.Node, form: Form) -> None:
        """Remembers what a filled node is of the states' cotangents, where there are no products in between."""
        if not form.products and all(base in self._reached and shape(base) == shape(node) for base in form.terms):
            self._reached[node] = self._through(form.terms)

    def _through(self, terms: Coefficients) -> Coefficients:
        """Coefficients of the states' cotangents in a sum over bases that have such coefficients themselves."""
        found: Coefficients = {}
        for base, outer in terms.items():
            for state, inner in self._reached[base].items():
                whole = self._combined(aten.mul.Tensor, outer, inner) if outer and inner else outer or inner
                found[state] = self._sum(found[state], whole, base) if state in found else whole
        return found

    def _sum(self, left: fx.Node | None, right: fx.Node | None, like: fx.Node) -> fx.Node:
        if left is None or right is None:
            given = left or right
            return self._combined(aten.add.Tensor, given, 1) if given else self._two(like)
        return self._combined(aten.add.Tensor, left, right)

    def _two(self, like: fx.Node) -> fx.Node:
        value = like.meta["val"]
        end = self._joint.root.graph.output_node()
        options = {"dtype": value.dtype, "device": value.device}
        return self._noted(self._joint.add(end, aten.full.default, list(value.shape), 2, like=like, **options))

    def _combined(self, target: Any, left: fx.Node, right: Any) -> fx.Node:
        return self._noted(self._joint.add(self._joint.root.graph.output_node(), target, left, right, like=left))

    def _noted(self, node: fx.Node) -> fx.Node:
        self.added.append(node)
        return node

    def _split(self, updates: list[Form], across: bool) -> tuple[list[Coefficients], list[Form]]:
        cheap, rest = [], []
        for state, update in zip(self._joint.state_cotangents, updates, strict=True):
            own = {
                base: coefficient
                for base, coefficient in update.terms.items()
                if shape(base) == shape(state)
                and (across or set(self._reached.get(base, ())) == {state})
                and base in self._reached
            }
            cheap.append(self._through(own))
            others = {base: coefficient for base, coefficient in update.terms.items() if base not in own}
            rest.append(Form(others, update.constant, update.products))
        return cheap, rest

    def _order(self) -> tuple[int, ...] | None:
        """None where there is none."""
        states = self._joint.state_cotangents
        found: list[int] = []
        while len(found) < len(states):
            done = {states[index] for index in found}
            free = [
                index
                for index, state in enumerate(states)
                if index not in found and set(self.cheap[index]) <= {state, *done}
            ]
            if not free:
                return None
            found.append(free[0])
        return tuple(found)
