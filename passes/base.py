"""Passes, plan entries, refusals, and the runner that keeps their history."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from rewriter.runtime.errors import RewriteError
from rewriter.runtime.ledger import Ledger
from rewriter.runtime.rule import Rule
from rewriter.runtime.segment import Segment as RuntimeSegment

from .program import Program, Region
from .targets import Target

log = logging.getLogger("rewriter.passes")

TAPES = ("auto", "never")  # whether an entry may leave its part on the ordinary tape


@dataclass(frozen=True)
class Refused:
    """A pass declines: at which node or block, why, and what would help. what: in place of "... does not apply"."""

    node: str
    reason: str
    remedy: str
    what: str = ""


class Pass(ABC):
    """Program -> Program, or a reasoned refusal. Subclasses are frozen dataclasses whose fields are the options."""

    name: ClassVar[str]

    @abstractmethod
    def apply(self, program: Program) -> Program | Refused: ...


class Entry(Pass):
    """A plan entry: says for a part of the model where its gradient comes from.

    `target` is its first field. `ahead`: its rules evaluate the loss themselves (`Call.objective`). `cuts`: it changes
    what others read, so it goes before those that do not. `learns`: they have parameters of their own, which the
    rewritten module registers. `wholes(model)` names the modules that capture must keep as one node; `rule(...)` builds
    what runs. Entries print as the text that makes them, and `Plan` reads that text back.
    """

    ahead: ClassVar[bool] = False
    cuts: ClassVar[bool] = False

    target: Target

    def __post_init__(self) -> None:
        if not isinstance(self.target, str | nn.Module) and not callable(self.target):
            raise RewriteError(
                f"{self.target!r} is not a target",
                where=type(self).__name__,
                remedy="a name or pattern (`encoder.0`, `blocks.*`), the module, or a predicate (module, name) -> bool",
            )

    def wholes(self, model: nn.Module) -> frozenset[str]:
        """Qualified names of modules that the entry needs as single nodes."""
        return frozenset()

    @abstractmethod
    def rule(
        self, program: Program, region: Region, segment: RuntimeSegment, ledger: Ledger, known: Rule | None
    ) -> Rule:
        """What runs in `segment`. known: the region's rule in another capture, with which it shares what it learns."""

    @property
    def learns(self) -> bool:
        return False

    def trainable(self, rule: Rule, segment: RuntimeSegment) -> Callable[[], tuple[Tensor, ...]]:
        """The parameters whose gradients the rule returns, by name at each call."""
        return segment.trainable

    def returned(self, program: Program, region: Region) -> tuple[int, ...] | None:
        """Which of its rule's outputs the region returns, where the rule has more than the graph reads."""
        return None

    def supplies(self, program: Program, region: Region) -> frozenset[int] | None:
        """Of a region that the loss reaches through an anchor: the inputs whose gradients it supplies, by position."""
        return None

    def __str__(self) -> str:
        first, *rest = fields(self)  # type: ignore[arg-type]
        shown = [repr(getattr(self, first.name))]
        shown += [f"{f.name}={getattr(self, f.name)!r}" for f in rest if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(shown)})"


def check_choice(entry: Entry, option: str, known: tuple[str, ...]) -> None:
    """Raises RewriteError where an option of an entry is none of what it may be."""
    value = getattr(entry, option)
    if value not in known:
        raise RewriteError(
            f"{option}={value!r} is not known", where=type(entry).__name__, remedy=f"one of {', '.join(known)}"
        )


@dataclass(frozen=True)
class Step:
    """One line of the runner's history: a pass, the graph's text after it, its size, and how long it took."""

    name: str
    text: str
    nodes: int
    seconds: float
    changed: bool


def run(passes: Iterable[Pass], program: Program, history: list[Step] | None = None) -> tuple[Program, list[Step]]:
    """Apply passes in order, verifying the program after each. Raises RewriteError on a refusal."""
    history = [] if history is None else history
    for each in passes:
        start = time.perf_counter()
        before = len(program.graph.nodes)
        outcome = each.apply(program)
        if isinstance(outcome, Refused):
            what = outcome.what or f"{_label(each)} does not apply"
            raise RewriteError(what, where=outcome.node, why=outcome.reason, remedy=outcome.remedy)
        outcome = _distinct(outcome, program)
        outcome.verify()
        seconds = time.perf_counter() - start
        count = len(outcome.graph.nodes)
        history.append(Step(_label(each), str(outcome), count, seconds, outcome is not program))
        log.debug("%s: %d -> %d nodes in %.1f ms", _label(each), before, count, 1e3 * seconds)
        program = outcome
    return program, history


def _distinct(program: Program, before: Program) -> Program:
    """With other names for new regions whose names are taken: two entries may rule neighbours in one module."""
    known = len(before.regions)
    taken = {region.name for region in program.regions[:known]}
    new = [
        replace(region, name=f"{region.name} ({region.entry.name})") if region.name in taken else region
        for region in program.regions[known:]
    ]
    return program if new == list(program.regions[known:]) else program.with_(regions=(*before.regions, *new))


def _label(each: Any) -> str:
    return str(each) if isinstance(each, Entry) else each.name
