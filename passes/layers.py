"""The calls behind which a target cuts: of one module, or of every layer that a pattern names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .base import Entry, Refused
from .pieces import in_pieces
from .program import Program, Region
from .regions import calls_at
from .targets import Place, Target, resolve


def is_pattern(target: Target) -> bool:
    """Whether a target may name several modules: then what cannot be cut among them is passed by."""
    return any(sign in target for sign in "*[") if isinstance(target, str) else not isinstance(target, nn.Module)


def crosses_levels(target: Target) -> bool:
    """Whether a target names modules and their parts alike."""
    return isinstance(target, str) and "**" in target


def layer_calls(entry: Entry, every: int | None, program: Program) -> tuple[Program, list[Region]] | Refused:
    """All calls that the entry's target means, in graph order, inner ones first.

    Of a pattern: of the modules in which something is trained; where it crosses levels, of those that own a trained
    parameter themselves or stay one call. every: an `nn.RNN`, `nn.GRU` or `nn.LSTM` counts as called once for so many
    steps.
    """
    places = resolve(entry.target, program.model)
    if is_pattern(entry.target):
        places = _layers(entry.target, places, program)
        if not places:
            return Refused(str(entry.target), "it names no module with a trained parameter", "name one that has some")
    for place in places:
        if every is not None and isinstance(program.module(place.module), nn.RNNBase):
            changed = in_pieces(place, every, program)
            if isinstance(changed, Refused):
                return changed
            program = changed
    found: list[Region] = []
    for place in places:
        calls = calls_at(entry, place, program)
        if not isinstance(calls, Refused):
            found += calls
        elif not is_pattern(entry.target) or not _passed_by(place, places, program):
            return calls
    order = {node.name: number for number, node in enumerate(program.graph.nodes)}
    return program, sorted(found, key=lambda call: (order[call.owned[-1]], -_depth(call, program)))


def _depth(call: Region, program: Program) -> int:
    """How many calls its last node lies in, down to this one."""
    around = [name for name, _ in program.node(call.owned[-1]).meta["block"]]
    return around.index(call.target)


def _layers(target: Target, places: Sequence[Place], program: Program) -> tuple[Place, ...]:
    wholes = _wholes(program)
    found = []
    for place in places:
        module = program.module(place.module)
        owned = module.parameters(recurse=not crosses_levels(target) or place.module in wholes)
        if any(parameter.requires_grad for parameter in owned):
            found.append(place)
    return tuple(found)


def _passed_by(place: Place, places: Sequence[Place], program: Program) -> bool:
    """Of a module without nodes: it is not called, or what it lies in is cut as a whole."""
    around = {name for name in (*program.opaque, *_wholes(program)) if place.module.startswith(f"{name}.")}
    return not around or any(other.module in around for other in places)


def _wholes(program: Program) -> frozenset[str]:
    return frozenset(str(node.target) for node in program.graph.nodes if node.op == "call_module")
