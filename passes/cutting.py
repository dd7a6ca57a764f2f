"""A value taken off the tape: what follows it reads a detached copy, and a region behind all supplies its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from rewriter.runtime.ulr_cut import anchor

from .base import Entry, Refused
from .behind import CUT, against, behind_all, dropouts, trainable_of, with_masks
from .course import origin_of, outline_of, read_by
from .program import Program, Region, Value, reach
from .regions import calls_at, outputs_of
from .row_weights import perturbed, trained_by
from .structure.operations import writes
from .sub_chains import Link, read_onward
from .targets import Place


@dataclass(frozen=True)
class Cut:
    """name: of the call; passed: names of what is read behind it; layer: of its nodes, where its weights are perturbed
    in place of its value."""

    name: str
    passed: tuple[str, ...]
    layer: tuple[str, ...] = ()


def cut_at(
    entry: Entry, links: Sequence[Link], name: str, program: Program, noise: str = "activation", pattern: bool = False
) -> Program | Refused:
    """The program cut behind each of some calls, with one region that supplies the gradients there.

    links: in graph order, inner calls first. noise: as `perturbed` says. pattern: calls that return nothing to cut are
    passed by.
    """
    severed: list[tuple[Region, tuple[str, ...]]] = []
    for link in links:
        if link.onward is None:
            link = _renewed(entry, link, program)
        if pattern and not _cuttable(link, program):
            program = _passed_by(link, program)
            continue
        found = _values(link, program)
        if isinstance(found, Refused):
            return found
        program, names = _severed(link, found, program)
        severed.append((link.call, names))
    if not severed:
        return Refused(name, "nothing before any of the cuts is trained", "take the entry out, or name other modules")
    cuts: list[Cut] = []
    for call, names in severed:
        layer = perturbed(noise, program, call, names)
        if isinstance(layer, Refused):
            return layer
        cuts.append(Cut(call.name, names, layer))
    return _anchored(Region(name, entry, links[0].call.target, (), tuple(cuts)), program)


def _renewed(entry: Entry, link: Link, program: Program) -> Link:
    """With the nodes that the call has now: cuts within it are new."""
    module, _, number = link.call.name.partition("@")
    calls = calls_at(entry, Place(module, int(number or 0)), program)
    assert not isinstance(calls, Refused)
    return replace(link, call=calls[0])


def _cuttable(link: Link, program: Program) -> bool:
    """Whether a call returns something that has rows and that what is trained before it reaches."""
    return any(
        _followed(value) and value.rows is not None
        for node in outputs_of(program, link.call)
        for value in _flat(program.values.get(node.name))
    )


def _passed_by(link: Link, program: Program) -> Program:
    """With a note where that leaves something to the next cut."""
    found = [v for node in outputs_of(program, link.call) for v in _flat(program.values.get(node.name))]
    if not any(map(_followed, found)):
        return program
    note = f"{link.call.name} returns nothing with rows: its gradient comes from the next cut"
    return program.with_(notes=(*program.notes, note))


def _severed(link: Link, found: Sequence[str], program: Program) -> tuple[Program, tuple[str, ...]]:
    """The program with detached copies of values, and their names."""
    call = link.call
    graph = program.edit()
    own = {node.name: node for node in graph.nodes}
    values = dict(program.values)
    passed: list[str] = []
    for name in found:
        node = own[name]
        users = read_onward(node, call.owned, link.onward)
        copied = _written(node, program)
        last = own[call.owned[-1]]
        with graph.inserting_after(last):
            new = graph.call_method("detach", (node,))
        new.meta[CUT] = True
        if copied:  # a write in place, perhaps through a view, must not reach the value that is kept
            with graph.inserting_after(new):
                new = graph.call_method("clone", (new,))
        for each in {new, new.all_input_nodes[0]} - {node}:
            each.meta["block"] = _around(node, call.target)
            values[each.name] = _detached(program.values[name])
        for user in users:
            user.replace_input_with(node, new)
        passed.append(new.name)
    return _blocked(program.with_(graph=graph, values=values), passed), tuple(passed)


def _written(node: fx.Node, program: Program) -> bool:
    """Whether something that follows may write into a value: into it, or into what is no later layer's own result."""
    after = {node, *reach([node])}
    for each in after:
        if writes(each, program.module) and each.all_input_nodes:
            source = each.all_input_nodes[0]
            fresh = source is not node and source.op == "call_module" and [*trainable_of(source, program)]
            if source in after and not fresh:
                return True
    return False


def _values(link: Link, program: Program) -> list[str] | Refused:
    """Names of the floating tensors that a call returns, and that the next one needs where there is one."""
    found: list[str] = []
    constant = False
    call = link.call
    for node in outputs_of(program, call):
        users = [user for user in read_onward(node, call.owned, link.onward) if user.target is not anchor]
        if not users:
            continue
        refused = _against(node, users, program)
        if refused is not None:
            return replace(refused, node=f"{call.name}: {node.name}")
        value = program.values[node.name]
        assert isinstance(value, Value)
        if value.dtype.is_floating_point and value.differentiable:
            found.append(node.name)
        constant |= value.dtype.is_floating_point  # noise there would only add variance
    if not found and constant:
        return Refused(
            call.name, "nothing before the cut is trained", "take the entry out, or cut where something before it is"
        )
    if not found:
        return Refused(call.name, "it returns no floating tensor that anything reads", "cut behind another module")
    return found


def _against(node: fx.Node, users: Sequence[fx.Node], program: Program) -> Refused | None:
    """Why a value cannot be cut."""
    if node.meta.get(CUT) or any(user.meta.get(CUT) for user in users):
        return Refused("", "another UlrCut cuts it already", "take one of the two out of the plan")
    within = next((r for r in program.regions for user in users if {node.name, user.name} <= {*r.owned}), None)
    if within is not None:
        return Refused("", f"it lies inside {within.entry}", "cut before or behind that")
    value = program.values.get(node.name)
    if not isinstance(value, Value):
        reason = "a tuple as a whole, or a number, crosses the cut"
        return Refused("", reason, "take tuples apart where they are returned")
    if value.dtype.is_floating_point and value.differentiable and value.rows is None:
        reason = (
            f"no row index was found in the value {value}: it did not change with the batch size, or the model takes "
            "one batch size only"
        )
        return Refused("", reason, "cut where every row has its own value")
    return None


def _anchored(region: Region, program: Program) -> Program | Refused:
    """With the region: one node behind everything that it reads, and the weights whose gradient it supplies."""
    tail = behind_all(program, cuts_of(program, region))
    if isinstance(tail, Refused):
        return tail
    masked = with_masks(program, dropouts(tail, program))
    if isinstance(masked, Refused):
        return masked
    program = masked
    cuts = cuts_of(program, region)
    before = [origin_of(node) for cut in cuts for node in cut]  # a dropout among them is a product by now
    tail, outline = behind_all(program, cuts), outline_of(program, cuts, beside_of(program, region))
    if isinstance(tail, Refused) or isinstance(outline, Refused):
        return tail if isinstance(tail, Refused) else outline  # type: ignore[return-value]
    passed = [node for cut in cuts for node in cut]
    refused = against(tail, passed, program)
    if refused is not None:
        return refused
    asked = {source for node in tail.nodes for source in node.all_input_nodes}
    if asked.isdisjoint(passed) and not set(passed) & set(program.graph.output_node().all_input_nodes):
        return Refused(region.name, "nothing that the outputs need reads it but through detach()", "take detach() out")
    graph = program.edit()
    own = {node.name: node for node in graph.nodes}
    values = tuple([own[node.name] for node in before])
    sides = tuple([own[side.name] for side in outline.sides])
    known = dict(program.values)
    weights: list[fx.Node] = []
    with graph.inserting_before(graph.output_node()):
        for path in trained_by(program, [name for cut in region.parts for name in cut.layer]):
            weights.append(graph.get_attr(path))
            weight = program.attribute(path)
            known[weights[-1].name] = Value(tuple(weight.shape), weight.dtype, None, True)
        read = (values, sides, tuple(graph.output_node().all_input_nodes), *([tuple(weights)] if weights else []))
        node = graph.call_function(anchor, read)
    for each in (*weights, node):
        each.meta["block"] = ()
    like = program.values[before[0].name]
    assert isinstance(like, Value)
    known[node.name] = Value((), like.dtype, None, True)
    region = replace(region, owned=tuple([each.name for each in (*weights, node)]))
    return program.with_(graph=graph, values=known, regions=(*program.regions, region))


def cuts_of(program: Program, region: Region) -> list[list[fx.Node]]:
    """The nodes read behind each cut."""
    return [[program.node(name) for name in cut.passed] for cut in region.parts]


def beside_of(program: Program, region: Region) -> list[fx.Node]:
    """What the layers read whose weights are perturbed."""
    layers = [[program.node(name) for name in cut.layer] for cut in region.parts if cut.layer]
    return list(dict.fromkeys(node for layer in layers for node in read_by(program, layer)))


def _around(node: fx.Node, module: str) -> tuple[Any, ...]:
    """The calls that a node behind the module's call belongs to."""
    block = node.meta.get("block", ())
    names = [name for name, _ in block]
    return tuple(block[: names.index(module)]) if module in names else tuple(block)


def _detached(value: Any) -> Any:
    return Value(value.shape, value.dtype, value.rows, False)


def _blocked(program: Program, passed: Sequence[str]) -> Program:
    """With what is differentiable behind the cut only through it marked as no longer so."""
    values = dict(program.values)
    after = set(reach([program.node(name) for name in passed]))
    for node in program.graph.nodes:
        if node not in after or not any(map(_followed, _flat(values.get(node.name)))):
            continue
        sources = any(_followed(v) for source in node.all_input_nodes for v in _flat(values.get(source.name)))
        if not sources and not any(trainable_of(node, program)):
            value = values[node.name]
            values[node.name] = (
                tuple(None if v is None else _detached(v) for v in value)
                if isinstance(value, tuple)
                else _detached(value)
            )
    return program.with_(values=values)


def _flat(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _followed(value: Any) -> bool:
    return isinstance(value, Value) and value.differentiable
