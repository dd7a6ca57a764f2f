"""`UlrCut`: the gradient of a value comes from losses of noisy copies of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar

from torch import Tensor, fx, nn

from rewriter.runtime.boxes import Box
from rewriter.runtime.errors import RewriteError
from rewriter.runtime.estimators.cut_options import CutOptions
from rewriter.runtime.learned_noise import channels_of, learned_sizes
from rewriter.runtime.ledger import Ledger
from rewriter.runtime.rule import Rule
from rewriter.runtime.segment import Segment
from rewriter.runtime.ulr_cut import TailFacts, UlrCutRule

from .apart import Apart
from .base import Entry, Refused
from .behind import Behind, behind, obstacles, trainable_of
from .checkpoint import is_count
from .course import course_of, handing, outline_of
from .cutting import cut_at
from .program import Cost, Program, Region, Value, holds_box, is_box_call
from .reach import check_course, check_reach, within
from .regions import calls_at, inputs_of
from .sub_chains import Link, links
from .targets import Place, Target, resolve

_PREFIX_RATIO = 3.0  # forward and backward in units of the forward
_MOST_RATIO = 1e4


@dataclass(frozen=True)
class UlrCut(Entry):
    """Cut the tape at a value: what follows is evaluated on noisy copies, forward only (likelihood ratio).

    target: the module whose result is cut, `encoder` or `encoder:out`; `cell@5` cuts a loop behind its sixth call.
    copies: of each row; "auto" sets them from the measured noise and the costs of the tail and of the rest.
    sigma: of the noise, one number or one for each element of a row; "auto": a tenth of the value's deviation, more
        where the losses of copies would not differ by more than rounding; "learned": a parameter for each element of a
        vector, each channel of a feature map (N, C, ...) or a sequence (N, T, C), under `rewriter.noise`, that starts
        there: it lowers the smoothed loss, which is not the estimate's variance.
    directions: "orthogonal" (blocks of Haar frames with Gaussian lengths), "gaussian", "laplace", or "sobol" (refused
        below 16 points a dimension).
    baseline: "clean" (the loss without noise), "leave-one-out", "constant", "none"; "auto": leave-one-out from 8
        copies on.
    antithetic: copies in pairs of opposite noise; pays where curvature dominates slope.
    every: cut a chain into sub-chains of so many links: calls of a cell in a loop, children of a list of blocks, steps
        of an `nn.RNN`, `nn.GRU` or `nn.LSTM`. Only what hands the state on is cut: losses within a sub-chain are
        differentiated exactly, and the last sub-chain whole.
    allocation: "uniform"; "doubt": more copies for rows whose loss has a longer gradient in the model's outputs, which
        is about 1 - p_y under a cross-entropy; "running": for rows whose losses' ranks had longer gradients in earlier
        batches, under any loss; "norm": for rows whose gradient a pilot (a quarter of the copies, which count) finds
        longer, which gives up what orthogonal directions gain near as many copies as elements; "gaussian",
        "bernoulli": FLOPS's learned policies, for comparison.
    across: of several cuts of a chain, "uniform", or "neyman": in proportion to sqrt(noise / cost) once that is
        measured; `copies` is then the mean, each cut's weighed by what a copy there costs.
    at_once: sub-chains differentiated as one, their rows stacked (memory of so many); "auto": as many as 64 MiB hold.
        Forward keeps no tape of them: backward runs them again.
    window: sub-chains that copies run through, with every=; what comes later is taken from the clean pass, and so is
        left out of the gradient at the cut (a bias where the dependence is longer). None: up to the loss.
    control: a surrogate gradient that takes variance away without bias, as far as its measured correlation pays.
        "last": the mean gradient of earlier steps' rows (worth something only where rows agree); "truncated": of a
        chain, the exact gradient of what the next sub-chain adds to the loss; "distilled": the loss's gradient at the
        outputs, through a linear map from the value to them that is learnt from the copies.
    max_rows: rows of one evaluation (memory); max_failed: share of copies without a finite loss that is tolerated.

    Parameters before the cut get the gradient of the loss smoothed over the noise, without bias; those behind it the
    exact one of the clean loss. What lies behind may be a box, frozen, or discontinuous; dropout there keeps the clean
    pass's masks. The loss given to `rewrite` must have rows. Refuses what couples rows behind the cut (BatchNorm in
    training), random numbers that cannot be replayed, and trainable parameters whose only way to the loss has no
    derivative. Source: arXiv 2305.08960 (ULR); 2410.05966 (allocation).
    """

    name: ClassVar[str] = "ulr-cut"
    ahead: ClassVar[bool] = True
    cuts: ClassVar[bool] = True

    target: Target
    copies: int | str = "auto"
    sigma: float | Sequence[float] | str = "auto"
    directions: str = "orthogonal"
    baseline: str = "auto"
    antithetic: bool = False
    every: int | None = None
    allocation: str = "uniform"
    across: str = "uniform"
    max_rows: int | None = None
    max_failed: float = 0.5
    window: int | None = None
    control: str = "none"
    at_once: int | str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.sigma, list):
            object.__setattr__(self, "sigma", tuple(self.sigma))  # entries can be hashed
        self._options()
        if self.every is not None and not is_count(self.every):
            raise RewriteError(
                f"every={self.every!r} is no number of links", where="UlrCut", remedy="a whole number from 1"
            )
        if self.at_once != "auto" and not is_count(self.at_once):
            raise RewriteError(
                f"at_once={self.at_once!r} is no number of sub-chains",
                where="UlrCut",
                remedy='a whole number from 1, or "auto"',
            )
        check_reach(self.window, self.control, self.every is not None)

    @property
    def learns(self) -> bool:
        return self.sigma == "learned"

    def _options(self) -> CutOptions:
        chosen = {field.name: getattr(self, field.name) for field in fields(CutOptions)}
        return CutOptions(**chosen)

    def apply(self, program: Program) -> Program | Refused:
        for place in resolve(self.target, program.model):
            changed = self._at(place, program) if self.every is None else self._along(place, self.every, program)
            if isinstance(changed, Refused):
                return changed
            program = changed
        return program

    def _at(self, place: Place, program: Program) -> Program | Refused:
        calls = calls_at(self, place, program)
        if isinstance(calls, Refused):
            return calls
        for call in calls:
            outcome = cut_at(self, [Link(call)], call.name, program)
            if isinstance(outcome, Refused):
                return outcome
            program = outcome
        return program

    def _along(self, place: Place, every: int, program: Program) -> Program | Refused:
        found = links(self, place, every, program)
        if isinstance(found, Refused):
            return found
        changed = cut_at(self, found.ends(), place.module, found.program)
        if isinstance(changed, Refused):
            return changed
        cuts = changed.regions[-1].parts
        starts = [tuple(node.name for name in cut for node in handing(changed.node(name))) for cut in cuts]
        at_once = self.at_once if isinstance(self.at_once, int) else None
        return Apart(place.module, ((), *starts), tuple(found.groups()), at_once).apply(changed)

    def wholes(self, model: nn.Module) -> frozenset[str]:
        if self.every is None:
            return frozenset()
        named = {place.module for place in resolve(self.target, model)}
        return frozenset(name for name in named if isinstance(model.get_submodule(name), nn.RNNBase))

    def rule(
        self, program: Program, region: Region, segment: Segment, ledger: Ledger, known: Rule | None
    ) -> UlrCutRule:
        cuts = [[program.node(name) for name in names] for names in region.parts]
        outline = outline_of(program, cuts)
        tails = [tail for cut in cuts if not isinstance(tail := behind(program, cut), Refused)]
        assert not isinstance(outline, Refused)
        _check_reached(self, program, region, tails[0])
        given = inputs_of(program, region)
        places = {node.name: place for place, node in enumerate(given)}
        # What is read behind a cut are the same numbers as before it.
        places |= dict(zip((node.name for cut in cuts for node in cut), _values(program, region), strict=True))
        course = replace(course_of(program, cuts, outline, places, region.name), window=self.window)
        run = [tails[n].nodes if self.window is None else within(outline, n, self.window) for n in range(len(cuts))]
        facts = _facts(program, cuts, tails, run, _before(program, region))
        check_course(course, self.control, facts.kind, region.name)
        rule = UlrCutRule(course, self._options(), facts, ledger, region.name)
        if isinstance(known, UlrCutRule):
            rule.learn_with(known)
        if self.learns:
            shapes = [channels_of([_row_shape(program, node) for node in cut]) for cut in cuts]
            like = next(program.model.parameters()).detach()
            earlier = known.noise if isinstance(known, UlrCutRule) else None
            rule.noise = learned_sizes(earlier, shapes, like, region.name)
        return rule

    def trainable(self, rule: Rule, segment: Segment) -> Callable[[], tuple[Tensor, ...]]:
        assert isinstance(rule, UlrCutRule)
        return rule.trainable

    def supplies(self, program: Program, region: Region) -> frozenset[int]:
        return frozenset(_values(program, region))


def _row_shape(program: Program, node: fx.Node) -> tuple[int, ...]:
    """(multiplicity, the other dimensions)."""
    value = program.values[node.name]
    assert isinstance(value, Value)
    assert value.rows is not None
    dimension = value.rows.dimension
    return (value.rows.multiplicity, *value.shape[:dimension], *value.shape[dimension + 1 :])


def _values(program: Program, region: Region) -> list[int]:
    """Places of the values before the cuts among the region's inputs."""
    given = inputs_of(program, region)
    return [given.index(node) for node in _before(program, region)]


def _facts(
    program: Program,
    cuts: Sequence[Sequence[fx.Node]],
    tails: Sequence[Behind],
    run: Sequence[Sequence[fx.Node]],
    before: Sequence[fx.Node],
) -> TailFacts:
    """run: per cut, what copies there run through; before: the values at the cuts, on the tape."""
    first = tails[0]
    held = [program.module(str(node.target)) for node in first.nodes if node.op == "call_module"]
    boxed = any(is_box_call(node, program) for node in first.nodes) or any(map(holds_box, held))
    boxes = [part for module in held for part in module.modules() if isinstance(part, Box)]
    noisy = any(box.noisy or getattr(box, "seed", None) is not None for box in boxes)
    trained = any(name for node in first.nodes for name in trainable_of(node, program))
    # Copies go on through the chain's further cuts, which are detached for the tape alone.
    ends = [*program.graph.output_node().all_input_nodes, *before]
    stepped = any(_blocked(program, cut, tail, ends) for cut, tail in zip(cuts, tails, strict=True))
    kind = "box" if boxed else "steps" if stepped else "trainable" if trained else "frozen"
    ratios = [_ratio(program, tail, copied, trained) for tail, copied in zip(tails, run, strict=True)]
    return TailFacts(kind, tuple(ratios), _costs(program, run), noisy)


def _costs(program: Program, run: Sequence[Sequence[fx.Node]]) -> tuple[float, ...]:
    """Of one copy from each cut, in units of the first cut's, by FLOPs; by operations where none are known."""
    flops = [sum(program.costs.get(node.name, Cost()).flops for node in nodes) for nodes in run]
    spent = flops if min(flops) > 0 else [len(nodes) for nodes in run]
    return tuple([max(each, 1) / max(*spent, 1) for each in spent])


def _blocked(program: Program, cut: Sequence[fx.Node], tail: Behind, ends: Sequence[fx.Node]) -> bool:
    """Whether every way from a cut to the ends meets an operation without a derivative."""
    found, inside = obstacles(program, tail, ends), set(tail.nodes)
    users = [user for node in cut for user in node.users if user in inside]
    return bool(users) and all(user in found for user in users)


def _ratio(program: Program, tail: Behind, copied: Sequence[fx.Node], trained: bool) -> float:
    """Cost of a step without copies in units of one copy, which runs `copied`, by FLOPs."""
    inside = {node.name for node in tail.nodes}
    cost = sum((program.costs.get(name, Cost()) for name in inside), Cost()).flops
    copy = sum((program.costs.get(node.name, Cost()) for node in copied), Cost()).flops
    rest = sum((c for name, c in program.costs.items() if name not in inside), Cost()).flops
    return min((_PREFIX_RATIO * rest + (_PREFIX_RATIO if trained else 1) * cost) / max(1, copy), _MOST_RATIO)


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
    return list(program.node(region.owned[0]).args[0])  # type: ignore[arg-type]
