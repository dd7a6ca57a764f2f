"""`UlrCut`: the gradient of a value comes from losses of noisy copies of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar

from torch import Tensor, fx, nn

from rewriter.runtime.errors import RewriteError
from rewriter.runtime.estimators.cut_options import CutOptions
from rewriter.runtime.learned_noise import channels_of, learned_sizes
from rewriter.runtime.ledger import Ledger
from rewriter.runtime.rule import Rule
from rewriter.runtime.segment import Segment
from rewriter.runtime.ulr_cut import UlrCutRule

from .apart import Apart
from .base import Entry, Refused, check_choice
from .behind import behind, behind_all
from .checkpoint import is_count
from .course import course_of, handing, outline_of
from .cutting import beside_of, cut_at, cuts_of
from .layers import crosses_levels, is_pattern, layer_calls
from .program import Program, Region, Value
from .reach import check_course, check_reach, within
from .regions import inputs_of
from .row_weights import NOISES, row_weights
from .sub_chains import Link, links
from .tail_facts import before_cuts, check_reached, facts_of
from .targets import Place, Target, resolve


@dataclass(frozen=True)
class UlrCut(Entry):
    """Cut the tape at a value: what follows is evaluated on noisy copies, forward only (likelihood ratio).

    target: the module whose result is cut, `encoder` or `encoder:out`; `cell@5` cuts a loop behind its sixth call. A
        pattern or predicate cuts behind every module that it names in which something is trained; `**` behind every
        layer, which is a module that owns trained parameters itself: then each layer's gradient is its own vjp of an
        estimate, the last one's too. All cuts of an entry share one evaluation of what follows.
    copies: of each row; "auto" sets them from the measured noise and the costs of the tail and of the rest.
    sigma: of the noise, one number or one for each element of a row; "auto": a tenth of the deviation of the value, or
        of the weights, more where the losses of copies would not differ by more than rounding; "learned": a parameter
        for each element of a vector, each channel of a feature map (N, C, ...) or a sequence (N, T, C), under
        `rewriter.noise`, that starts there: it lowers the smoothed loss, which is not the estimate's variance.
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
    pass's masks, and what is detached there is a constant. Copies run in backward: the target, and what lies behind,
    must not change before. The loss given to `rewrite` must have rows. Refuses what couples rows behind the cut
    (BatchNorm in training), random numbers that cannot be replayed, and trainable parameters whose only way to the loss
    has no derivative. Source: arXiv 2305.08960 (ULR); 2410.05966 (allocation).
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
    noise: str = "activation"
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
        check_choice(self, "noise", NOISES)
        if self.noise != "activation" and self.sigma == "learned":
            raise RewriteError(
                f'sigma="learned" is of noise in activations, and noise="{self.noise}"',
                where="UlrCut",
                remedy='noise="activation", or another sigma',
            )
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
        if self.every is None or crosses_levels(self.target):
            return self._layers(program)
        for place in resolve(self.target, program.model):
            changed = self._along(place, self.every, program)
            if isinstance(changed, Refused):
                return changed
            program = changed
        return program

    def _layers(self, program: Program) -> Program | Refused:
        found = layer_calls(self, self.every, program)
        if isinstance(found, Refused):
            return found
        program, calls = found
        pattern = is_pattern(self.target)
        name = _text(self.target) if pattern else calls[0].name if len(calls) == 1 else calls[0].target
        return cut_at(self, [Link(call) for call in calls], name, program, self.noise, pattern)

    def _along(self, place: Place, every: int, program: Program) -> Program | Refused:
        found = links(self, place, every, program)
        if isinstance(found, Refused):
            return found
        changed = cut_at(self, found.ends(), place.module, found.program, self.noise)
        if isinstance(changed, Refused):
            return changed
        passed = {cut.name: cut.passed for cut in changed.regions[-1].parts}
        starts, ends = [], []
        for before, own in found.groups():
            read = [changed.node(name) for name in passed.get(before, ())]
            starts.append(tuple(node.name for each in read for node in handing(each)))
            ends.append(own)
        at_once = self.at_once if isinstance(self.at_once, int) else None
        return Apart(place.module, tuple(starts), tuple(ends), at_once).apply(changed)

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
        check_reached(program, region, whole)
        given = inputs_of(program, region)
        places = {node.name: place for place, node in enumerate(given)}
        # What is read behind a cut are the same numbers as before it.
        before = [given.index(node) for node in before_cuts(program, region)]
        places |= dict(zip((node.name for cut in cuts for node in cut), before, strict=True))
        course = course_of(program, cuts, outline, places, region.name)
        parameters = list(segment.parameters().values())
        layers = {
            number: row_weights(program, cut.layer, cut.passed, parameters)
            for number, cut in enumerate(region.parts)
            if cut.layer
        }
        names = tuple([cut.name for cut in region.parts])
        course = replace(course, layers=layers, names=names, window=self.window)
        run = [tails[n].nodes if self.window is None else within(outline, n, self.window) for n in range(len(cuts))]
        facts = facts_of(program, cuts, tails, whole, run, before_cuts(program, region))
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
        # Frozen weights too, so that each keeps its place.
        return lambda: (*segment.parameters().values(), *rule.trainable())

    def supplies(self, program: Program, region: Region) -> frozenset[int]:
        """The values at the cuts; and what a layer with noise in its weights reads, only to refuse what needs it."""
        given, before = inputs_of(program, region), iter(before_cuts(program, region))
        values = [(cut, next(before)) for cut in region.parts for _ in cut.passed]
        read = [node for node in beside_of(program, region) if node in given]
        return frozenset(given.index(node) for node in (*(n for cut, n in values if not cut.layer), *read))


def _text(target: Target) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)


def _row_shape(program: Program, node: fx.Node) -> tuple[int, ...]:
    """(multiplicity, the other dimensions)."""
    value = program.values[node.name]
    assert isinstance(value, Value)
    assert value.rows is not None
    dimension = value.rows.dimension
    return (value.rows.multiplicity, *value.shape[:dimension], *value.shape[dimension + 1 :])
