"""`UlrCut`: the gradient of a value comes from losses of noisy copies of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar

from torch import Tensor, fx, nn

from rewriter.runtime.boxes import Box
from rewriter.runtime.errors import RewriteError
from rewriter.runtime.estimators.cut_options import CutOptions
from rewriter.runtime.ledger import Ledger
from rewriter.runtime.rule import Rule
from rewriter.runtime.segment import Segment
from rewriter.runtime.ulr_cut import TailFacts, UlrCutRule

from .base import Entry, Refused, check_choice
from .behind import Behind, behind, behind_all, obstacles, trainable_of
from .course import course_of, outline_of
from .cutting import beside_of, cut_at, cuts_of
from .layers import crosses_levels, is_pattern, layer_calls
from .program import Cost, Program, Region, Value, holds_box, is_box_call
from .regions import inputs_of
from .row_weights import NOISES, row_weights
from .sub_chains import Link, links
from .targets import Target, resolve

_PREFIX_RATIO = 3.0  # forward and backward in units of the forward
_MOST_RATIO = 1e4


@dataclass(frozen=True)
class UlrCut(Entry):
    """Cut the tape at a value: what follows is evaluated on noisy copies, forward only (likelihood ratio).

    target: the module whose result is cut, `encoder` or `encoder:out`; `cell@5` cuts a loop behind its sixth call. A
        pattern or predicate cuts behind every module that it names in which something is trained; `**` behind every
        layer, which is a module that owns trained parameters itself: then each layer's gradient is its own vjp of an
        estimate, the last one's too. All cuts of an entry share one evaluation of what follows.
    copies: of each row; "auto" sets them from the measured noise and the costs of the tail and of the rest.
    sigma: of the noise, one number or one for each element of a row; "auto": a tenth of the deviation of the value,
        or of the weights, more where the losses of copies would not differ by more than rounding.
    directions: "orthogonal" (blocks of Haar frames with Gaussian lengths), "gaussian", "laplace", or "sobol" (refused
        below 16 points a dimension).
    baseline: "clean" (the loss without noise), "leave-one-out", "constant", "none"; "auto": leave-one-out from 8
        copies on.
    antithetic: copies in pairs of opposite noise; pays where curvature dominates slope.
    every: cut a chain into sub-chains of so many links: calls of a cell in a loop, children of a list of blocks, steps
        of an `nn.RNN`, `nn.GRU` or `nn.LSTM`. Only what hands the state on is cut: losses within a sub-chain are
        differentiated exactly, and the last sub-chain whole. Under `**` it counts steps of recurrent modules, each
        piece a layer's call of its own.
    noise: in the "activation" at a cut, or in the "weight"s of the module before it, other ones for every copy of
        every row; its parameters then get sums over rows of the estimates themselves. "auto": in the weights where
        they are fewer numbers than a row of the activation.
    allocation: "uniform"; "doubt": more copies for rows with a larger 1 - exp(-loss), which is 1 - p_y for a mean
        cross-entropy; "norm": for rows whose gradient a pilot (a quarter of the copies, which count) finds longer.
    max_rows: rows of one evaluation (memory); max_failed: share of copies without a finite loss that is tolerated.

    Parameters before the cut get the gradient of the loss smoothed over the noise, without bias; those behind it the
    exact one of the clean loss. What lies behind may be a box, frozen, or discontinuous; dropout there keeps the clean
    pass's masks. The loss given to `rewrite` must have rows. Refuses what couples rows behind the cut (BatchNorm in
    training), random numbers that cannot be replayed, and trainable parameters whose only way to the loss has no
    derivative. Source: arXiv 2305.08960 (ULR); 2410.05966 (allocation).
    """

    name: ClassVar[str] = "ulr-cut"
    ahead: ClassVar[bool] = True

    target: Target
    copies: int | str = "auto"
    sigma: float | Sequence[float] | str = "auto"
    directions: str = "orthogonal"
    baseline: str = "auto"
    antithetic: bool = False
    every: int | None = None
    noise: str = "activation"
    allocation: str = "uniform"
    max_rows: int | None = None
    max_failed: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._options()
        check_choice(self, "noise", NOISES)
        if self.every is not None and (
            not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1
        ):
            raise RewriteError(
                f"every={self.every!r} is no number of links", where="UlrCut", remedy="a whole number from 1"
            )

    def _options(self) -> CutOptions:
        chosen = {field.name: getattr(self, field.name) for field in fields(CutOptions)}
        return CutOptions(**chosen)

    def apply(self, program: Program) -> Program | Refused:
        if self.every is None or crosses_levels(self.target):
            found = layer_calls(self, self.every, program)
            if isinstance(found, Refused):
                return found
            program, calls = found
            pattern = is_pattern(self.target)
            name = _text(self.target) if pattern else calls[0].name if len(calls) == 1 else calls[0].target
            return cut_at(self, [Link(call) for call in calls], name, program, self.noise, pattern)
        for place in resolve(self.target, program.model):
            chain = links(self, place, self.every, program)
            if isinstance(chain, Refused):
                return chain
            program, ends = chain
            outcome = cut_at(self, ends, place.module, program, self.noise)
            if isinstance(outcome, Refused):
                return outcome
            program = outcome
        return program

    def wholes(self, model: nn.Module) -> frozenset[str]:
        if self.every is None:
            return frozenset()
        named = {place.module for place in resolve(self.target, model)}
        return frozenset(name for name in named if isinstance(model.get_submodule(name), nn.RNNBase))

    def rule(
        self, program: Program, region: Region, segment: Segment, ledger: Ledger, known: Rule | None
    ) -> UlrCutRule:
        cuts = cuts_of(program, region)
        outline = outline_of(program, cuts, beside_of(program, region))
        tails = [tail for cut in cuts if not isinstance(tail := behind(program, cut), Refused)]
        whole = behind_all(program, cuts)
        assert not isinstance(outline, Refused)
        assert not isinstance(whole, Refused)
        _check_reached(self, program, region, whole)
        given = inputs_of(program, region)
        places = {node.name: place for place, node in enumerate(given)}
        # What is read behind a cut are the same numbers as before it.
        before = [given.index(node) for node in _before(program, region)]
        places |= dict(zip((node.name for cut in cuts for node in cut), before, strict=True))
        course = course_of(program, cuts, outline, places, region.name)
        parameters = list(segment.parameters().values())
        layers = {
            number: row_weights(program, cut.layer, cut.passed, parameters)
            for number, cut in enumerate(region.parts)
            if cut.layer
        }
        rule = UlrCutRule(
            replace(course, layers=layers, names=tuple([cut.name for cut in region.parts])),
            self._options(),
            _facts(program, cuts, tails, whole),
            ledger,
            region.name,
        )
        if isinstance(known, UlrCutRule):
            rule.learn_with(known)
        return rule

    def trainable(self, rule: Rule, segment: Segment) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: tuple(segment.parameters().values())  # frozen ones too, so that each keeps its place

    def supplies(self, program: Program, region: Region) -> frozenset[int]:
        """The values at the cuts; and what a layer with noise in its weights reads, only to refuse what needs it."""
        given, before = inputs_of(program, region), iter(_before(program, region))
        values = [(cut, next(before)) for cut in region.parts for _ in cut.passed]
        read = [node for node in beside_of(program, region) if node in given]
        return frozenset(given.index(node) for node in (*(n for cut, n in values if not cut.layer), *read))


def _text(target: Target) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)


def _facts(program: Program, cuts: Sequence[Sequence[fx.Node]], tails: Sequence[Behind], whole: Behind) -> TailFacts:
    held = [program.module(str(node.target)) for node in whole.nodes if node.op == "call_module"]
    boxed = any(is_box_call(node, program) for node in whole.nodes) or any(map(holds_box, held))
    boxes = [part for module in held for part in module.modules() if isinstance(part, Box)]
    noisy = any(box.noisy or getattr(box, "seed", None) is not None for box in boxes)
    trained = any(name for node in whole.nodes for name in trainable_of(node, program))
    outputs = program.graph.output_node().all_input_nodes
    stepped = any(_blocked(program, cut, tail, outputs) for cut, tail in zip(cuts, tails, strict=True))
    taped = any(isinstance(v := program.values.get(node.name), Value) and v.differentiable for node in outputs)
    smooth = "frozen" if not trained else "trainable" if taped else "layers"
    kind = "box" if boxed else "steps" if stepped else smooth
    return TailFacts(kind, tuple([_ratio(program, tail, trained) for tail in tails]), noisy)


def _blocked(program: Program, cut: Sequence[fx.Node], tail: Behind, outputs: Sequence[fx.Node]) -> bool:
    """Whether every way from a cut to the outputs meets an operation without a derivative."""
    found, inside = obstacles(program, tail, outputs), set(tail.nodes)
    users = [user for node in cut for user in node.users if user in inside]
    return bool(users) and all(user in found for user in users)


def _ratio(program: Program, tail: Behind, trained: bool) -> float:
    """Cost of a step without copies in units of one copy, by FLOPs."""
    inside = {node.name for node in tail.nodes}
    cost = sum((program.costs.get(name, Cost()) for name in inside), Cost()).flops
    rest = sum((c for name, c in program.costs.items() if name not in inside), Cost()).flops
    return min((_PREFIX_RATIO * rest + (_PREFIX_RATIO if trained else 1) * cost) / max(1, cost), _MOST_RATIO)


def _check_reached(entry: UlrCut, program: Program, region: Region, tail: Behind) -> None:
    cuts = [node for each in program.regions if isinstance(each.entry, UlrCut) for node in _before(program, each)]
    for node, obstacle in obstacles(program, tail, [*program.graph.output_node().all_input_nodes, *cuts]).items():
        for name in trainable_of(node, program):
            raise RewriteError(
                f"{name} lies behind a cut and has no way to the loss that has a derivative",
                where=region.name,
                why=f"behind {entry} parameters get the exact gradient of the clean loss, and {obstacle} has none",
                remedy="freeze it with requires_grad_(False), cut behind it, or add a UlrCut between the two",
            )


def _before(program: Program, region: Region) -> list[fx.Node]:
    return list(program.node(region.owned[-1]).args[0])  # type: ignore[arg-type]
