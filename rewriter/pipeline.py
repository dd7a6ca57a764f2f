"""capture -> normalise -> annotate -> unpack -> the plan's entries -> partition -> emit, for one call signature."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from rewriter.passes.annotate import Annotate
from rewriter.passes.base import Step, run
from rewriter.passes.cover import Cover
from rewriter.passes.emit import Emitted, emit
from rewriter.passes.normalise import Normalise
from rewriter.passes.partition import Partition
from rewriter.passes.program import Program
from rewriter.passes.unpack import Unpack
from rewriter.runtime.ambient import Ambient
from rewriter.runtime.boxes import Box
from rewriter.runtime.boxes.operator import counted_rows
from rewriter.runtime.errors import RewriteError
from rewriter.runtime.ledger import Ledger
from rewriter.runtime.region import Clock

from .capture import Capture, capture
from .plan import Plan
from .shadow import examples, preserved, trial_run
from .state import Rules

log = logging.getLogger("rewriter")
Result = TypeVar("Result")

# Capture patches torch and builtins for as long as it runs; other threads are passed by, other captures wait.
_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True)
class Variant:
    """One captured call signature: the program, what each pass did to it, and the code that runs."""

    captured: Capture
    program: Program
    history: tuple[Step, ...]
    emitted: Emitted


def build(
    model: nn.Module,
    plan: Plan,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    clock: Clock,
    ledger: Ledger,
    rules: Rules,
    again: bool = False,
) -> Variant:
    """Capture the model for these arguments and emit what the plan says. The model is left as it was found.

    again: there are captures already that did not fit; this one leaves as many sizes open as it can.
    """
    with counted_rows() as rows:
        captured, program, history = analysed(model, plan, args, kwargs, again)
    emitted = emit(program, clock, ledger, rules)
    for region in program.regions:
        part = model.get_submodule(region.target)
        if isinstance(part, Box):
            ledger.add(region.name, capture=rows.pop(part._handle, 0))
    return Variant(captured, program, tuple(history), emitted)


def analysed(
    model: nn.Module, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any], again: bool = False
) -> tuple[Capture, Program, list[Step]]:
    """The model as a program: captured, annotated, with the plan's regions, and partitioned."""
    wholes = frozenset(name for entry in plan for name in entry.wholes(model))
    try:
        captured = capture(
            model, args, kwargs, leaves=lambda module, name: name in wholes, sizes="all" if again else "rows"
        )
    except RewriteError:
        _run_once(model, args, kwargs)
        raise
    program = Program(model, captured.graph, captured.constants, opaque=captured.opaque)
    first, second, batches = examples(model, args, kwargs, captured.guards)
    entries = sorted(plan, key=lambda entry: not entry.cuts)
    with preserved(model), trial_run(), torch.enable_grad():
        annotate = Annotate(first, second, batches)
        program, history = run([Normalise(), annotate, Unpack(), *entries, Cover(), Partition()], program)
    captured.guards.add(program.conditions)
    log.info(
        "captured by %s in %.2f s: %d nodes, %d segments, %d regions",
        captured.front_end,
        captured.seconds,
        len(program.graph.nodes),
        len(program.segments),
        len(program.regions),
    )
    return captured, program, history


def _run_once(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises what the model itself raises on these arguments: then that is the news, not that it was not captured."""
    with preserved(model), trial_run(), torch.enable_grad():
        model.forward(*args, **kwargs)


def undisturbed(make: Callable[[], Result]) -> Result:
    """Run `make` alone, without the caller's saved-tensor hooks (checkpoint, offloading), outside any running backward.

    Both are states of a thread, so a fresh thread is free of them; autocast is taken along.
    """
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    if not hooked and torch._C._current_graph_task_id() == -1:
        with _ONE_AT_A_TIME:
            return make()
    ambient = Ambient.now()

    def run() -> Result:
        with _ONE_AT_A_TIME, ambient.enter(), torch.enable_grad():
            return make()

    with ThreadPoolExecutor(1) as fresh:
        return fresh.submit(run).result()
