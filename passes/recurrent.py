"""Recurrences as regions: torch's recurrent modules, and cells that a Python loop calls."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn

from rewriter.runtime.deferred import DeferredRule, Roles
from rewriter.runtime.iterations import Iterations
from rewriter.runtime.ledger import Ledger
from rewriter.runtime.recurrence.planner import Planner
from rewriter.runtime.segment import Segment
from rewriter.runtime.unrolled import UnrolledRule

from .base import Entry, Refused
from .program import Program, Region, Value
from .regions import inputs_of, outputs_of, regions_at
from .targets import Place, resolve
from .unrolled import Unrolled, emitted, gathered, read


def is_recurrence(place: Place, program: Program) -> bool:
    """Whether a place is a recurrent module, or a module without a border that the model calls more than once."""
    if isinstance(program.module(place.module), nn.RNNBase):
        return True
    calls = {
        index for node in program.graph.nodes for name, index in node.meta.get("block", ()) if name == place.module
    }
    return len(calls) > 1 and not place.border and place.call is None


def with_recurrences(entry: Entry, program: Program, tape: str) -> Program | Refused:
    """The program with each recurrence that the entry names as a region, or with a note where the tape keeps it.

    tape: "auto" leaves a loop on the ordinary tape where that is faster, "never" does not.
    """
    for place in resolve(entry.target, program.model):
        outcome = _with_recurrence(entry, place, program, tape)
        if isinstance(outcome, Refused):
            return outcome
        program = outcome
    return program


def _with_recurrence(entry: Entry, place: Place, program: Program, tape: str) -> Program | Refused:
    module = program.module(place.module)
    refused = _unsuitable(entry, place, module)
    if refused is not None:
        return refused
    return _modules(entry, place, program) if isinstance(module, nn.RNNBase) else _loop(entry, place, program, tape)


def recurrence_rule(
    program: Program,
    region: Region,
    segment: Segment,
    ledger: Ledger,
    tape: str,
    iterations: Iterations | None = None,
    shift: float = 0.0,
) -> DeferredRule | UnrolledRule:
    """What runs in a region of `with_recurrences`: exactly, or with iterations of Highway-BP through time."""
    always = tape == "never"
    module = program.module(region.target)
    if not isinstance(module, nn.RNNBase):
        unrolled = read(region, program)
        assert isinstance(unrolled, Unrolled)
        step = emitted(unrolled, region, program)
        return UnrolledRule(segment, step, ledger, unrolled.roles, always, iterations, shift)
    roles = _roles(program, region)
    assert isinstance(roles, Roles)
    rule = DeferredRule(segment, ledger, region.target, roles, always, iterations, shift)
    value = program.values.get(inputs_of(program, region)[roles.input].name)
    if isinstance(value, Value):  # so that `explain()` knows before the first step
        rule.choose(value.shape, value.dtype, _device(module), autocast=False)
    return rule


def _modules(entry: Entry, place: Place, program: Program) -> Program | Refused:
    found = regions_at(entry, place, program)
    if isinstance(found, Refused):
        return found
    for region in found:
        roles = _roles(program, region)
        if isinstance(roles, Refused):
            return roles
    return program.with_(regions=(*program.regions, *found))


def _loop(entry: Entry, place: Place, program: Program, tape: str) -> Program | Refused:
    found = gathered(entry, place, program)
    if isinstance(found, Refused):
        return found
    changed, region = found
    unrolled = read(region, changed)
    if isinstance(unrolled, Refused):
        return unrolled
    roles = unrolled.roles
    state = changed.values[inputs_of(changed, region)[roles.states[0]].name]
    assert isinstance(state, Value)
    planner = Planner(place.module, tape == "never")
    rows = state.shape[0] if state.shape else 1
    device = _device(changed.module(place.module))
    # Decided here: on the tape a region of many calls would cost more than the same calls outside any region.
    reason = planner.choose((roles.steps, rows), roles.steps, state.dtype, device, False, roles.against())
    if reason is not None:
        return program.with_(notes=(*program.notes, f"{entry}: {place.module} stays on the ordinary tape: {reason}"))
    return changed.with_(regions=(*changed.regions, region))


def _device(module: nn.Module) -> str:
    return next((parameter.device.type for parameter in module.parameters()), "cpu")


def _unsuitable(entry: Entry, place: Place, module: nn.Module) -> Refused | None:
    where = place.module
    if place.border:
        return Refused(
            where,
            f"{type(entry).__name__} rules a module, not the value at its border",
            f"write the target as `{where}`",
        )
    if not isinstance(module, nn.RNNBase):
        return None
    if type(module) not in (nn.GRU, nn.LSTM, nn.RNN):
        return Refused(
            where,
            f"{type(module).__name__} changes what nn.{type(module).__mro__[1].__name__} does",
            "name an nn.GRU, nn.LSTM or nn.RNN, or a cell called in a loop",
        )
    if module.proj_size:
        return Refused(where, "it projects its hidden state (proj_size)", "leave it to automatic differentiation")
    if any(name not in module._parameters for name in module._flat_weights_names):
        return Refused(
            where,
            "its weights are computed rather than held (weight norm, spectral norm, pruning)",
            "take the reparametrization off, or leave it to automatic differentiation",
        )
    return None


def _roles(program: Program, region: Region) -> Roles | Refused:
    """What the region's inputs and outputs are to the module's call."""
    call = program.node(region.owned[0])
    if call.op != "call_module" or call.target != region.target:
        return Refused(
            region.name,
            "it is not one call in the captured graph: the model had to go through torch.export, which takes it apart",
            "see `explain()` for what kept fx from capturing the model",
        )
    x, state = _arguments(call)
    given = inputs_of(program, region)
    if not isinstance(x, fx.Node) or not isinstance(program.values.get(x.name), Value):
        return Refused(
            region.name,
            "its input is not a tensor (a packed sequence?)",
            "pass padded sequences, or leave it to automatic differentiation",
        )
    states = [] if state is None else list(state) if isinstance(state, tuple | list) else [state]
    for each in states:
        if not isinstance(each, fx.Node) or not isinstance(program.values.get(each.name), Value):
            return Refused(
                region.name,
                "its initial states are passed as one tuple",
                "take the tuple apart where it is returned: `h, c = state`, then pass `(h, c)`",
            )
    outputs = [_output(node, call) for node in outputs_of(program, region)]
    if None in outputs:
        return Refused(
            region.name,
            "a tuple of its results crosses its border",
            "take the tuple apart where it is returned: `sequence, (h, c) = lstm(x)`",
        )
    return Roles(given.index(x), tuple(map(given.index, states)), tuple(each for each in outputs if each is not None))


def _arguments(call: fx.Node) -> tuple[Any, Any]:
    given = dict(zip(("input", "hx"), call.args, strict=False)) | dict(call.kwargs)
    return given.get("input"), given.get("hx")


def _output(node: fx.Node, call: fx.Node) -> int | None:
    """0 for the sequence, 1 for h_n, 2 for c_n, None for what is neither."""
    path: list[Any] = []
    while node is not call and node.target is operator.getitem:
        path.insert(0, node.args[1])
        node = node.args[0]  # type: ignore[assignment]
    return {(0,): 0, (1,): 1, (1, 0): 1, (1, 1): 2}.get(tuple(path)) if node is call else None
