"""The loop over time, written as code: products and additions into buffers, nothing else where everything collapsed."""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from .all_steps import Values
from .collapse import Collapse
from .forms import Apply, Fill, Form, width
from .joint import STATIC, Joint, shape

_serial = itertools.count()


@dataclass(frozen=True)
class _Read:
    """Something read or written step by step. node: whose; repeats: groups of columns, 0 for the value as it is.

    kind: "value" of the node; "base": with a dimension in which it is repeated; "target": the state's buffer one step
    earlier. columns: the part of it that is meant, None for all.
    """

    node: fx.Node
    kind: str = "value"
    repeats: int = 0
    columns: tuple[int, int] | None = None

    @property
    def width(self) -> int:
        return width(self.node) if self.columns is None else self.columns[1] - self.columns[0]


class Loop:
    """`loop(values, targets)` runs backward through time; `source` is its code, `reads` the nodes it needs.

    values: what has been evaluated for all steps, buffers of filled nodes and the states' cotangents included; targets:
    per state, the buffer of the cotangents one step earlier, to which the loop adds. What the loop carries out as it
    stands is added to `values`.
    """

    def __init__(self, joint: Joint, collapse: Collapse) -> None:
        self._joint = joint
        self._names: dict[_Read, str] = {}
        self._statics: dict[fx.Node, str] = {}
        self._constants: dict[str, Any] = {"torch": torch}
        self.applied: list[fx.Node] = []
        self.filled = [each.node for each in collapse.instructions if isinstance(each, Fill)]
        body: list[str] = []
        for each in collapse.instructions:
            if isinstance(each, Apply):
                body += self._carried_out(each)
                continue
            for start, end, form in each.pieces:
                whole = end - start == width(each.node)
                body += self._filled(_Read(each.node, columns=None if whole else (start, end)), form)
        for state, update in zip(joint.state_cotangents, collapse.updates, strict=True):
            body += self._added(_Read(state, "target"), update)
        self.reads = [*dict.fromkeys(read.node for read in self._names), *self._statics]
        self.source = self._source(body)
        self._function = self._compiled()

    def _source(self, body: list[str]) -> str:
        names = list(self._names.values())
        results = [f"r{index}_all" for index, _ in enumerate(self.applied)]
        arguments = ", ".join([*(f"{name}_all" for name in names), *self._statics.values(), *results])
        if not body:
            return f"def loop({arguments}):\n    pass\n"
        kept = [f"r{index}_all.append(r{index})" for index, _ in enumerate(self.applied)]
        head = f"    for ({', '.join(names)},) in zip({', '.join(f'{name}_all' for name in names)}):"
        return "\n".join([f"def loop({arguments}):", head, *(f"        {line}" for line in [*body, *kept])]) + "\n"

    def _compiled(self) -> Callable[..., None]:
        filename = f"<rewriter recurrence {next(_serial)}>"
        scope = dict(self._constants)
        exec(compile(self.source, filename, "exec"), scope)
        linecache.cache[filename] = (len(self.source), None, self.source.splitlines(keepends=True), filename)
        function: Callable[..., None] = scope["loop"]
        return function

    def __call__(self, values: Values, targets: dict[fx.Node, Tensor]) -> None:
        steps = [_steps(read, targets if read.kind == "target" else values) for read in self._names]
        results: list[list[Any]] = [[] for _ in self.applied]
        self._function(*steps, *[values[node] for node in self._statics], *results)
        for node, found in zip(self.applied, results, strict=True):
            if shape(node) is not None:
                values[node] = torch.stack(found[::-1])

    # Code of one instruction.

    def _filled(self, to: _Read, form: Form) -> list[str]:
        terms, products = list(form.terms.items()), form.products
        scaled = next(((base, coefficient) for base, coefficient in terms if coefficient is not None), None)
        if scaled is not None:
            terms.remove(scaled)
            repeats, left, right = self._term(to, *scaled)
            first = f"{left}, {right}, out={self._name(_grouped(to, repeats))}"
            if form.constant is not None:
                line = f"torch.addcmul({self._spread(form.constant, repeats)}, {first})"
            elif not repeats and terms and terms[-1][1] is None:
                line = f"torch.addcmul({self._value(terms.pop()[0])}, {first})"
            else:
                line = f"torch.mul({first})"
            return [line, *self._added(to, Form(dict(terms), None, products))]
        out = self._name(to)
        if terms or form.constant is not None:
            start = self._value(form.constant if form.constant is not None else terms.pop(0)[0])
            return [f"{out}.copy_({start})", *self._added(to, Form(dict(terms), None, products))]
        if products:
            factor, weight = products[0]
            line = f"torch.mm({self._value(factor)}, {self._value(weight)}, out={out})"
            return [line, *self._added(to, Form({}, None, products[1:]))]
        return [f"{out}.zero_()"]

    def _added(self, to: _Read, form: Form) -> list[str]:
        """Code that adds a form to what a buffer holds."""
        lines = []
        for base, coefficient in form.terms.items():
            if coefficient is None:
                lines.append(f"{self._name(to)}.add_({self._value(base)})")
            else:
                repeats, left, right = self._term(to, base, coefficient)
                lines.append(f"{self._name(_grouped(to, repeats))}.addcmul_({left}, {right})")
        if form.constant is not None:
            lines.append(f"{self._name(to)}.add_({self._value(form.constant)})")
        lines += [f"{self._name(to)}.addmm_({self._value(u)}, {self._value(w)})" for u, w in form.products]
        return lines

    def _term(self, to: _Read, base: fx.Node, coefficient: fx.Node) -> tuple[int, str, str]:
        """Groups of columns, 0 for none; the coefficient's and the base's code."""
        repeats = to.width // max(1, width(base))
        if repeats == 1:
            return 0, self._value(coefficient), self._value(base)
        local = self._local(base)
        spread = f"{local}.unsqueeze(-2)" if local else self._name(_Read(base, "base"))
        return repeats, self._spread(coefficient, repeats), spread

    def _spread(self, node: fx.Node, repeats: int) -> str:
        """A value that does not run, in groups of columns."""
        if repeats and self._joint.kinds[node] == STATIC:
            return f"{self._value(node)}.unflatten(-1, ({repeats}, -1))"
        return self._name(_Read(node, "value", repeats)) if repeats else self._value(node)

    def _carried_out(self, each: Apply) -> list[str]:
        node = each.node
        target = self._constant(node.target)
        arguments = [self._written(argument) for argument in node.args]
        arguments += [f"{key}={self._written(value)}" for key, value in node.kwargs.items()]
        self.applied.append(node)
        return [f"r{len(self.applied) - 1} = {target}({', '.join(arguments)})"]

    def _written(self, argument: Any) -> str:
        if isinstance(argument, fx.Node):
            return self._value(argument)
        if isinstance(argument, list | tuple):
            return f"[{', '.join(map(self._written, argument))}]"
        return self._constant(argument)

    def _constant(self, value: Any) -> str:
        name = f"c{len(self._constants)}"
        self._constants[name] = value
        return name

    def _local(self, node: fx.Node) -> str | None:
        return f"r{self.applied.index(node)}" if node in self.applied else None

    def _value(self, node: fx.Node) -> str:
        if self._joint.kinds[node] == STATIC:
            return self._statics.setdefault(node, f"w{len(self._statics)}")
        return self._local(node) or self._name(_Read(node))

    def _name(self, read: _Read) -> str:
        return self._names.setdefault(read, f"{read.kind[0]}{len(self._names)}")


def _grouped(read: _Read, repeats: int) -> _Read:
    return replace(read, repeats=repeats)


def _steps(read: _Read, values: Values) -> Iterable[Tensor]:
    """One tensor a step, the last step first."""
    tensor = values[read.node]
    if read.columns is not None:
        tensor = tensor[..., slice(*read.columns)]
    if read.kind == "base":
        tensor = tensor.unsqueeze(-2)
    elif read.repeats:
        tensor = torch.unflatten(tensor, -1, (read.repeats, tensor.shape[-1] // read.repeats))
    return reversed(tensor.unbind(0))
