"""Which cuts get their noise in a layer's weights, and the layer as code with weights of its own for each row."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.runtime.row_weights import RowWeights
from rewriter.runtime.stacking import Layout

from .base import Refused
from .behind import CUT, not_replayable, trainable_of
from .course import code_of, layout_of, origin_of, read_by
from .emit import emit_segment
from .program import Program, Region, Value, is_box_call

NOISES = ("activation", "weight", "auto")


def perturbed(noise: str, program: Program, call: Region, passed: Sequence[str]) -> tuple[str, ...] | Refused:
    """The call's nodes where its weights are to be perturbed, else none. passed: what is read behind the cut.

    "auto": the weights, where they are fewer numbers than a row of the values, as the error of an estimate grows with
    the number of perturbed ones. Call it once everything is cut that is to be. Refused where "weight" cannot be.
    """
    if noise == "activation":
        return ()
    width = sum(_value(program, name).width for name in passed)
    names = trained_by(program, call.owned)
    if noise == "auto" and sum(program.attribute(name).numel() for name in names) >= width:
        return ()
    reason = _against(program, call, passed)
    if reason is None:
        return call.owned
    if noise == "auto":
        return ()
    return Refused(call.name, f"its weights cannot be perturbed row by row: {reason}", 'noise="activation"')


def trained_by(program: Program, nodes: Sequence[str]) -> list[str]:
    """Qualified names of the trained parameters that nodes read, themselves or through numbers; ties once."""
    own = [program.node(name) for name in nodes]
    attributes = [source for node in own for source in node.all_input_nodes if source.op == "get_attr"]
    found: dict[int, str] = {}
    for node in (*own, *attributes):
        for name in trainable_of(node, program):
            found.setdefault(id(program.attribute(name)), name)
    return list(found.values())


def row_weights(
    program: Program, nodes: Sequence[str], passed: Sequence[str], parameters: Sequence[Tensor] = ()
) -> RowWeights:
    """The layer that these nodes are; parameters: the region's."""
    own = [program.node(name) for name in nodes]
    reads = read_by(program, own)
    segment = emit_segment(
        f"{nodes[0]} by rows", code_of(program, own, reads, [origin_of(program.node(name)) for name in passed]), program
    )
    names = trained_by(program, nodes)
    positions = {id(parameter): place for place, parameter in enumerate(parameters)}
    returns = [layout_of(program, program.node(name)) for name in passed]
    return RowWeights(
        segment,
        tuple([node.name for node in reads]),
        tuple([layout_of(program, node) for node in reads]),
        tuple([layout for layout in returns if layout is not None]),
        tuple(names),
        tuple([positions[id(program.attribute(name))] for name in names]) if parameters else (),
    )


def _against(program: Program, call: Region, passed: Sequence[str]) -> str | None:
    nodes = [program.node(name) for name in call.owned]
    held = [program.module(str(node.target)) for node in nodes if node.op == "call_module"]
    if any(isinstance(part, nn.RNNBase | nn.RNNCellBase) for module in held for part in module.modules()):
        return "torch's recurrent operations take one set of weights for all rows"
    if any(node.meta.get(CUT) for node in nodes):
        return "another cut lies within it"
    if any(is_box_call(node, program) for node in nodes):
        return "it holds a box"
    if not trained_by(program, call.owned):
        return "nothing in it is trained"
    for node in read_by(program, nodes):
        if _value(program, node.name).differentiable:
            return f"something before it is trained that is not cut itself ({node.name}), and would get no gradient"
    for node in nodes:
        if (reason := not_replayable(node, nodes, program)) is not None:
            return f"{node.name}: {reason}"
    return _tried(program, call, passed)


def _tried(program: Program, call: Region, passed: Sequence[str]) -> str | None:
    """What goes wrong with two rows of zeros."""
    layer = row_weights(program, call.owned, passed)
    known = layer.segment.parameters()
    weights = [torch.stack([known[name].detach()] * 2) for name in layer.names]

    def zeros(name: str, layout: Layout | None) -> Tensor:
        value = _value(program, name)
        shape = _two_rows(value.shape, layout)
        return torch.zeros(shape, dtype=value.dtype, device=weights[0].device)

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "There is a performance drop")  # vmap would go row by row
            found = layer.run([zeros(*each) for each in zip(layer.reads, layer.layouts, strict=True)], weights)
    except Exception as error:  # whatever an operation without a rule for vmap raises
        return f"vectorised over rows it fails ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    shapes = [_two_rows(_value(program, n).shape, at) for n, at in zip(passed, layer.returns, strict=True)]
    return None if [y.shape for y in found] == shapes else "a row alone gives a value of another shape"


def _two_rows(shape: Sequence[int], layout: Layout | None) -> torch.Size:
    sizes = list(shape)
    if layout is not None:
        sizes[layout.dimension] = 2 * layout.multiplicity
    return torch.Size(sizes)


def _value(program: Program, name: str) -> Value:
    value: Any = program.values[name]
    assert isinstance(value, Value)
    return value
