"""`BlackBox`: the pullback of a part comes from finite-difference probes of it."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import fx, nn

from rewriter.runtime.black_box import BlackBoxRule
from rewriter.runtime.boxes import Box
from rewriter.runtime.boxes.box_call import BoxCall, is_box_operator
from rewriter.runtime.errors import RewriteWarning
from rewriter.runtime.estimators.options import Options
from rewriter.runtime.evaluator import Evaluator, ModuleEvaluator
from rewriter.runtime.ledger import Ledger
from rewriter.runtime.rule import Rule
from rewriter.runtime.segment import Segment

from .base import Entry, Refused
from .program import Program, Region, Value, holds_box
from .regions import inputs_of, outputs_of, regions_at
from .rowwise import why_not_rowwise
from .targets import Place, Target, resolve


@dataclass(frozen=True)
class BlackBox(Entry):
    """Differentiate a box by probes, contracted per row with the cotangent of its output (zeroth order).

    target: a box (`OnnxBox`, `CallableBox`) or any module without trainable parameters; rows in dimension 0.
    probes: directions per row and backward; `probes` = width is exact up to the step's bias for smooth boxes.
    directions: "orthogonal" (Haar), "rademacher", "gaussian" or "coordinate"; drawn independently for every row.
    difference: "forward" reuses the y of the forward pass, one query per probe; "central" takes two; "auto": central
        for boxes declared noisy.
    step_size: in units of the input's running scale, or "auto": measured per box.
    clip: "auto" clips each row of rough boxes at a running 90 % quantile of |g_i| / mean_j |v_j|; a number in (0, 1]
        sets the quantile; None never clips.
    reconstruction: "least_squares" (minimum norm, unbiased by width / probes) or "average".
    input_scale: scale of the inputs (a number, or one per element of a row); None: their running standard deviation.
    max_rows: rows per call of the box (memory); max_failed: share of failed queries above which backward raises.
    allocation: "uniform", or "norm": the same number of probes in all, more for rows with a larger cotangent.

    Refuses modules with trainable parameters, random or batch-coupled modules, and values without rows in dimension 0.
    Spall 1992 (SPSA); Nesterov and Spokoiny 2017; Chen et al. 2023 (DeepZero).
    """

    name: ClassVar[str] = "black-box"

    target: Target
    probes: int = 1
    directions: str = "orthogonal"
    difference: str = "auto"
    step_size: float | str = "auto"
    clip: float | str | None = "auto"
    reconstruction: str = "least_squares"
    input_scale: float | Sequence[float] | None = None
    max_rows: int | None = None
    max_failed: float = 0.5
    allocation: str = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._options()

    def _options(self) -> Options:
        chosen = {field.name: getattr(self, field.name) for field in fields(Options)}
        return Options(**chosen)

    def wholes(self, model: nn.Module) -> frozenset[str]:
        return frozenset(place.module for place in resolve(self.target, model))

    def apply(self, program: Program) -> Program | Refused:
        regions: list[Region] = []
        for place in resolve(self.target, program.model):
            found = _unsuitable(place, program.module(place.module)) or regions_at(self, place, program)
            if isinstance(found, Refused):
                return found
            regions += found
        for region in regions:
            refused = _check_values(region, program) or _check_rowwise(region, program)
            if refused:
                return refused
        for target in {region.target for region in regions}:
            if not holds_box(program.module(target)):
                _warn_exact_is_free(self, target)
        return program.with_(regions=(*program.regions, *regions))

    def rule(
        self, program: Program, region: Region, segment: Segment, ledger: Ledger, known: Rule | None
    ) -> BlackBoxRule:
        evaluator = _evaluator(program, region, segment)
        if isinstance(known, BlackBoxRule):
            rule = copy.copy(known)  # the estimators, and so what they learn, are one and the same
            rule.evaluator = evaluator
            return rule
        return BlackBoxRule(evaluator, **vars(self._options()), ledger=ledger)

    def returned(self, program: Program, region: Region) -> tuple[int, ...] | None:
        """The items of a box's outputs that the graph reads, which may be fewer than it has."""
        if not isinstance(program.module(region.target), Box):
            return None
        outputs = outputs_of(program, region)
        return tuple([int(node.args[1]) if node.target is operator.getitem else 0 for node in outputs])  # type: ignore[arg-type]


def _unsuitable(place: Place, module: nn.Module) -> Refused | None:
    where = place.module
    if place.border:
        return Refused(where, "BlackBox rules a module, not the value at its border", f"write the target as `{where}`")
    if isinstance(module, Box):
        return None
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    if trained:
        return Refused(
            where,
            f"it holds trainable parameters ({', '.join(trained[:3])}) that probes of its input do not reach",
            "leave it to automatic differentiation, or freeze it with requires_grad_(False)",
        )
    for name, child in module.named_modules():
        if child.training and isinstance(child, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
            coupled = isinstance(child, nn.modules.batchnorm._BatchNorm)
            reason = "couples the rows of a batch" if coupled else "draws random numbers at every evaluation"
            return Refused(where, f"{name or 'it'} ({type(child).__name__}) {reason}", "put that part into eval()")
    return None


def _warn_exact_is_free(entry: BlackBox, module: str) -> None:
    warnings.warn(
        f"{entry}: {module} is an ordinary module; automatic differentiation of it is exact and needs no probes. "
        "Take the entry out unless you mean to smooth it.",
        RewriteWarning,
        stacklevel=2,
    )


def _check_values(region: Region, program: Program) -> Refused | None:
    """What crosses a region's border is tensors; where they are floating and have rows, these lie in dimension 0."""
    inputs, outputs = inputs_of(program, region), outputs_of(program, region)
    for node in (*inputs, *outputs):
        where, value = f"{region.name}: {node.name}", program.values.get(node.name)
        if not isinstance(value, Value):
            return Refused(
                where,
                f"a {'tuple as a whole' if isinstance(value, tuple) else 'value that is no tensor'} crosses its border",
                "take tuples apart where they are returned, and compute sizes inside the module that uses them",
            )
        if value.dtype.is_floating_point and value.rows is not None and value.rows.dimension != 0:
            return Refused(
                where,
                f"the rows of a value {list(value.shape)} lie in dimension {value.rows.dimension}",
                "transpose it so that rows come first, inside the model, before the box",
            )
    taken, given = _tensors(inputs, program), _tensors(outputs, program)
    if any(value.differentiable for value in taken) and not any(value.dtype.is_floating_point for value in given):
        return Refused(
            region.name,
            "it returns whole numbers only, which carry no cotangent to contract its probes with",
            "return floating numbers (`.astype(float)`), or detach its input if no gradient should cross it",
        )
    return _check_rows(region, taken, given)


def _check_rows(region: Region, inputs: list[Value], outputs: list[Value]) -> Refused | None:
    rows = next((value.shape[0] for value in inputs if value.rows is not None), None)
    if rows is None:
        return None
    for verb, values in (("takes", [v for v in inputs if v.rows is not None]), ("returns", outputs)):
        for value in values:
            if value.shape[:1] != (rows,):
                return Refused(
                    region.name,
                    f"it {verb} {list(value.shape)} where its first input has {rows} rows",
                    "name a part that returns one row for each row, and leave what sums over rows to autograd",
                )
    return None


def _check_rowwise(region: Region, program: Program) -> Refused | None:
    """A box is one by contract and may be costly; what an ordinary module does can be seen."""
    if isinstance(program.module(region.target), Box):
        return None
    reason = why_not_rowwise(region, program)
    remedy = "leave it to automatic differentiation, or name a part that treats each row alone"
    return Refused(region.name, reason, remedy) if reason else None


def _tensors(nodes: list[fx.Node], program: Program) -> list[Value]:
    return [value for value in (program.values.get(node.name) for node in nodes) if isinstance(value, Value)]


def _evaluator(program: Program, region: Region, segment: Segment) -> Evaluator:
    module = program.module(region.target)
    inputs = inputs_of(program, region)
    if not isinstance(module, Box):
        shared = (i for i, value in enumerate(_tensors(inputs, program)) if value.rows is None)
        return ModuleEvaluator(segment, region.name, shared)
    calls = [program.node(name) for name in region.owned]
    arguments = next(found for found in map(_box_arguments, calls) if found is not None)
    positions = tuple(inputs.index(argument) for argument in arguments)
    return module if positions == tuple(range(len(inputs))) else BoxCall(module, positions)


def _box_arguments(node: fx.Node) -> tuple[Any, ...] | None:
    """The arguments of a box's call: of its module in an fx graph, of its operator in an exported one."""
    if node.op == "call_module":
        return (*node.args, *node.kwargs.values())
    if node.op == "call_function" and is_box_operator(node.target):
        return tuple(node.args[1])  # type: ignore[arg-type]
    return None
