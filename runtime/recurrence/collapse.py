"""What the loop over time must do: sums of coefficients times running values, and products with weights.

Every running node of a step's vjp is linear in the running cotangents. Where the operations between two of them act
element by element, they collapse to coefficients, which do not depend on the cotangents and are evaluated for all steps
before the loop. What does not collapse is carried out in the loop as it stands.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .forms import Apply, Fill, Form, fits, is_last, keeps_dtype, width
from .joint import RUNNING, STATIC, Joint, cone, shape

aten: Any = torch.ops.aten

_SAME = (aten.clone.default, aten.detach.default, aten.alias.default, aten.view.default, aten.expand.default)

# Element by element and linear in the running argument at the given places.
_POINTWISE: dict[Any, tuple[int, ...]] = {
    aten.mul.Tensor: (0, 1),
    aten.mul.Scalar: (0,),
    aten.div.Tensor: (0,),
    aten.div.Scalar: (0,),
    aten.neg.default: (0,),
    aten.sigmoid_backward.default: (0,),
    aten.tanh_backward.default: (0,),
    aten.threshold_backward.default: (0,),
    aten.gelu_backward.default: (0,),
    aten.silu_backward.default: (0,),
    aten.elu_backward.default: (0,),
    aten.hardtanh_backward.default: (0,),
    aten.leaky_relu_backward.default: (0,),
    aten.softplus_backward.default: (0,),
}


class Collapse:
    """Visits the running nodes of a joint graph.

    instructions: what the loop does before the states' cotangents move on; updates: one form per state, added to the
    cotangent of the state before; forms: of every running node that has collapsed; parts: nodes that lie inside
    another's buffer, with the columns they take.
    """

    def __init__(self, joint: Joint, later: Sequence[fx.Node]) -> None:
        self.joint = joint
        self.instructions: list[Fill | Apply] = []
        self.forms: dict[fx.Node, Form] = {node: Form({node: None}) for node in joint.state_cotangents}
        self.parts: dict[fx.Node, tuple[fx.Node, int, int]] = {}
        self._bases = set(joint.state_cotangents)
        self._loop = cone(joint.state_gradients, [])
        self._uses = {node: sum(user in self._loop for user in node.users) for node in self._loop}
        for node in joint.state_gradients:
            self._uses[node] += 1
        wanted = self._loop | cone(later, [])
        for node in list(joint.root.graph.nodes):
            if node in wanted and joint.kinds[node] == RUNNING and node not in self._bases:
                self._visit(node)
        self.updates = [self._resolved(self._of(node)) for node in joint.state_gradients]

    def _visit(self, node: fx.Node) -> None:
        form = self._collapsed(node)
        if node not in self._loop:
            if form is not None and not form.products:
                self.forms[node] = form
        elif form is None:
            for source in node.all_input_nodes:
                if self.joint.kinds[source] == RUNNING:
                    self._base(source)
            self.instructions.append(Apply(node))
            self._bases.add(node)
            self.forms[node] = Form({node: None})
        else:
            self.forms[node] = form
            if self._uses[node] > 1 and form.size > 1:
                self._base(node)

    def _collapsed(self, node: fx.Node) -> Form | None:
        """None where the node has no form but itself."""
        running = [source for source in node.all_input_nodes if self.joint.kinds[source] == RUNNING]
        if any(source not in self.forms for source in running) or not keeps_dtype(node, running):
            return None
        if node.target in _SAME and shape(running[0]) == shape(node):
            return self._of(running[0])
        rule = _RULES.get(node.target)
        return rule(self, node) if rule is not None else self._pointwise(node, running)

    def _of(self, node: fx.Node) -> Form:
        return self.forms[node] if self.joint.kinds[node] == RUNNING else Form(constant=node)

    def _without_products(self, node: fx.Node) -> Form | None:
        """None for a node behind the loop: nothing is filled in for it."""
        form = self._of(node)
        if form.products and node not in self._loop:
            return None
        if form.products:
            self._base(node)
        return self._of(node)

    def _base(self, node: fx.Node) -> None:
        """From here on the node itself is a base, its form written into a buffer."""
        if node not in self._bases:
            form = self._resolved(self.forms[node])
            self.instructions.append(Fill(node, ((0, width(node), form),)))
            self._bases.add(node)
            self.forms[node] = Form({node: None})

    def _resolved(self, form: Form) -> Form:
        """Products of values that the loop holds; several of them as one."""
        merged = self._merged(form) if len(form.products) > 1 else None
        if merged is not None:
            return merged
        for factor, _ in form.products:
            self._base(factor)
        return form

    def _merged(self, form: Form) -> Form | None:
        """u1 @ W1 + u2 @ W2 as [u1 u2] @ [W1; W2], where that needs no further coefficients."""
        factors = [factor for factor, _ in form.products]
        bases = {frozenset(self.forms[factor].terms) for factor in factors}
        plain = all(not self.forms[f].products and self.forms[f].constant is None for f in factors)
        if len(set(factors)) < len(factors) or self._bases.intersection(factors) or len(bases) > 1 or not plain:
            return None
        order = list(self.joint.root.graph.nodes)
        last = max((node for pair in form.products for node in pair), key=order.index).next
        whole = self.joint.add(last, aten.cat.default, factors, 1)
        widths = [width(factor) for factor in factors]
        whole.meta["val"] = factors[0].meta["val"].new_empty((*shape(factors[0])[:-1], sum(widths)))  # type: ignore[index]
        found = self.joined(whole)
        if found is None:
            return None
        self.forms[whole] = found
        self._base(whole)
        for index, factor in enumerate(factors):
            start = sum(widths[:index])
            self.parts[factor] = (whole, start, start + widths[index])
        weight = self.joint.add(last, aten.cat.default, [each for _, each in form.products], 0)
        return Form(form.terms, form.constant, ((whole, weight),))

    # One rule per operation: the node's form from its arguments', or None.

    def _pointwise(self, node: fx.Node, running: list[fx.Node]) -> Form | None:
        places = [place for place, arg in enumerate(node.args) if arg in running]
        if len(places) != 1 or places[0] not in _POINTWISE.get(node.target, ()) or shape(running[0]) != shape(node):
            return None
        form = self._without_products(running[0])
        return None if form is None else self._mapped(form, node, lambda one: _replaced(node.args, places[0], one))

    def _mapped(self, form: Form, node: fx.Node, arguments: Callable[[fx.Node], tuple[Any, ...]]) -> Form:
        """The node's operation on every coefficient and on the constant: what it does to a one it does to all."""

        def on(coefficient: fx.Node | None, like: fx.Node) -> fx.Node:
            if coefficient is None:
                factor = _plain_factor(node, self.joint)
                if factor is not None:
                    return factor
                coefficient = self._ones(like, node)
            return self.joint.add(node, node.target, *arguments(coefficient), like=node, **node.kwargs)

        source = next(source for source in node.all_input_nodes if self.joint.kinds[source] == RUNNING)
        terms: dict[fx.Node, fx.Node | None] = {base: on(c, source) for base, c in form.terms.items()}
        return Form(terms, None if form.constant is None else on(form.constant, source))

    def _ones(self, like: fx.Node, before: fx.Node) -> fx.Node:
        value = like.meta["val"]
        options = {"dtype": value.dtype, "device": value.device}
        return self.joint.add(before, aten.ones.default, list(value.shape), like=like, **options)

    def _zeros(self, like: fx.Node, before: fx.Node) -> fx.Node:
        value = like.meta["val"]
        options = {"dtype": value.dtype, "device": value.device}
        return self.joint.add(before, aten.zeros.default, list(value.shape), like=like, **options)

    def summed(self, node: fx.Node) -> Form | None:
        first, second = node.args
        if node.kwargs or not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
            return None
        if shape(first) != shape(node) or shape(second) != shape(node):
            return None
        left, right = self._of(first), self._of(second)
        if node.target is aten.sub.Tensor:
            plain = self._without_products(second)
            if plain is None:
                return None
            right = self._negated(plain, node, second)
        terms = dict(left.terms)
        for base, coefficient in right.terms.items():
            terms[base] = self._plus(terms[base], coefficient, node) if base in terms else coefficient
        constants = [constant for constant in (left.constant, right.constant) if constant is not None]
        constant = constants[0] if len(constants) == 1 else None
        if len(constants) == 2:
            constant = self.joint.add(node, aten.add.Tensor, *constants, like=node)
        return Form(terms, constant, (*left.products, *right.products))

    def _plus(self, left: fx.Node | None, right: fx.Node | None, node: fx.Node) -> fx.Node:
        given: list[Any] = [each for each in (left, right) if each is not None]
        if len(given) < 2:
            given = [*(given or [self._ones(node, node)]), 1]
        return self.joint.add(node, aten.add.Tensor, *given, like=node)

    def _negated(self, form: Form, node: fx.Node, like: fx.Node) -> Form:
        def negative(value: fx.Node | None) -> fx.Node:
            return self.joint.add(node, aten.neg.default, value or self._ones(like, node), like=like)

        terms: dict[fx.Node, fx.Node | None] = {base: negative(c) for base, c in form.terms.items()}
        return Form(terms, None if form.constant is None else negative(form.constant))

    def joined(self, node: fx.Node) -> Form | None:
        parts, dimension = (*node.args, 0)[:2]
        nodes: list[fx.Node] = list(parts)  # type: ignore[arg-type]
        if not is_last(dimension, node):
            return None
        forms = [self._without_products(part) for part in nodes]
        found = [form for form in forms if form is not None]
        bases = dict.fromkeys(base for form in found for base in form.terms)
        borders = [sum(map(width, nodes[:index])) for index in range(len(nodes) + 1)]
        if len(found) < len(nodes) or not all(fits(base, node, borders) for base in bases):
            return None
        if node in self._loop and len({frozenset(form.terms) for form in found}) > 1:
            return self._assembled(node, nodes, found)

        def joined(pieces: list[fx.Node]) -> fx.Node:
            return self.joint.add(node, aten.cat.default, pieces, -1, like=node)

        terms: dict[fx.Node, fx.Node | None] = {}
        for base in bases:
            terms[base] = joined([self._share(base, f, p, node) for p, f in zip(nodes, found, strict=True)])
        constants = [form.constant or self._zeros(part, node) for part, form in zip(nodes, found, strict=True)]
        constant = joined(constants) if any(form.constant is not None for form in found) else None
        return Form(terms, constant)

    def _assembled(self, node: fx.Node, parts: list[fx.Node], forms: list[Form]) -> Form:
        """Parts of different bases go to their columns of a buffer, neighbours of the same bases at once."""
        groups = [list(group) for _, group in itertools.groupby(range(len(parts)), lambda i: frozenset(forms[i].terms))]
        pieces: list[tuple[int, int, Form]] = []
        start = 0
        for group in groups:
            own = [parts[index] for index in group]
            end = start + sum(map(width, own))
            form = forms[group[0]]
            if len(own) > 1:
                whole = self.joint.add(node, aten.cat.default, own, -1)
                whole.meta["val"] = node.meta["val"][..., start:end]
                joined = self.joined(whole)
                assert joined is not None  # it fits as a part of what fits
                form = joined
            pieces.append((start, end, form))
            start = end
        self.instructions.append(Fill(node, tuple(pieces)))
        self._bases.add(node)
        return Form({node: None})

    def _share(self, base: fx.Node, form: Form, part: fx.Node, before: fx.Node) -> fx.Node:
        if base not in form.terms:
            return self._zeros(part, before)
        return form.terms[base] or self._ones(part, before)

    def padded(self, node: fx.Node) -> Form | None:
        """slice_backward: zeros around a slice."""
        arguments: tuple[Any, ...] = node.args
        source, _, dimension, start, _, step = arguments
        form = self._without_products(source)
        if form is None or step != 1 or not is_last(dimension, node):
            return None
        low = slice(start, None).indices(width(node))[0]
        if not all(fits(base, node, [low, low + width(source), width(node)]) for base in form.terms):
            return None
        return self._mapped(form, node, lambda one: (one, *node.args[1:]))

    def sliced(self, node: fx.Node) -> Form | None:
        """A slice of products is products with a slice of the weights."""
        arguments: tuple[Any, ...] = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
        source, dimension, start, end, step = arguments
        if not is_last(dimension, node) or step != 1:
            return None
        form = self._of(source)
        if form.products and not form.terms and form.constant is None:
            add, columns = self.joint.add, aten.slice.Tensor
            return Form(products=tuple((u, add(node, columns, weight, 1, start, end)) for u, weight in form.products))
        return None

    def multiplied(self, node: fx.Node) -> Form | None:
        factor, weight = node.args
        kinds = self.joint.kinds
        if kinds[factor] == RUNNING and kinds[weight] == STATIC:  # type: ignore[index]
            return Form(products=((factor, weight),))  # type: ignore[arg-type]
        return None


_RULES: dict[Any, Callable[[Collapse, fx.Node], Form | None]] = {
    aten.add.Tensor: Collapse.summed,
    aten.sub.Tensor: Collapse.summed,
    aten.cat.default: Collapse.joined,
    aten.slice_backward.default: Collapse.padded,
    aten.slice.Tensor: Collapse.sliced,
    aten.mm.default: Collapse.multiplied,
}


def _replaced(args: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return (*args[:place], value, *args[place + 1 :])


def _plain_factor(node: fx.Node, joint: Joint) -> fx.Node | None:
    """What a product multiplies its running argument by, where that has the product's own shape and dtype."""
    if node.target is not aten.mul.Tensor:
        return None
    other = next((arg for arg in node.args if isinstance(arg, fx.Node) and joint.kinds[arg] != RUNNING), None)
    full = other is not None and shape(other) == shape(node) and keeps_dtype(node, [other])
    return other if full else None
