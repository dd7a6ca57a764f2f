"""Whether a part of a graph does to each row what it does to the row alone: what probing a batch of rows rests on."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from .annotate import Runner
from .program import Program, Region, Rows, Value
from .regions import inputs_of, outputs_of

_TOLERANCE = 1e3  # in units of the dtype's eps


def why_not_rowwise(region: Region, program: Program) -> str | None:
    """Runs a region on random rows, and on all but the last: a reason against it, or None.

    Seen are writes into its inputs, random draws, and rows that change with the others. None too where it does not
    take random numbers at all, which proves nothing.
    """
    seen = (program.values[node.name] for node in inputs_of(program, region))
    values = [value for value in seen if isinstance(value, Value)]
    runner = Runner(program, _alone(region, program))
    inputs = _random(values)
    versions = [value._version for value in inputs]
    with torch.no_grad():
        try:
            before = torch.get_rng_state()
            outputs = runner.run(*inputs)
        except Exception:
            return None
        if not torch.equal(before, torch.get_rng_state()):
            return "it draws random numbers at every evaluation"
        if versions != [value._version for value in inputs]:
            return "it writes into its input"
        try:
            fewer = runner.run(*map(_but_the_last, inputs, values))
        except Exception as error:
            return f"it takes no other number of rows ({type(error).__name__}: {str(error).splitlines()[0][:80]})"
    same = all(map(_same_rows, outputs, fewer))
    return None if same else "it couples the rows of a batch: a row's output changes with the other rows"


def _alone(region: Region, program: Program) -> fx.Graph:
    graph = fx.Graph()
    mapping = {node: graph.placeholder(node.name) for node in inputs_of(program, region)}
    for name in region.owned:
        mapping[program.node(name)] = graph.node_copy(program.node(name), mapping.__getitem__)
    graph.output(tuple(mapping[node] for node in outputs_of(program, region)))
    return graph


def _random(values: list[Value]) -> list[Tensor]:
    """Of the shapes and dtypes of the example, with two rows where it has one; whole numbers are zero."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for value in values:
        first, *rest = value.shape or (1,)
        shape = (2 * first, *rest) if value.rows == Rows(0) and first == 1 else value.shape
        numbers = torch.randn(shape, generator=generator) if value.dtype.is_floating_point else torch.zeros(shape)
        found.append(numbers.to(value.dtype))
    return found


def _but_the_last(tensor: Tensor, value: Value) -> Tensor:
    return tensor if value.rows is None else tensor[: -value.rows.multiplicity]


def _same_rows(output: Tensor, fewer: Tensor) -> bool:
    if not output.dtype.is_floating_point:
        return torch.equal(output[: len(fewer)], fewer)
    limit = _TOLERANCE * torch.finfo(output.dtype).eps
    scale = float(output.nan_to_num().abs().max()) if output.numel() else 0.0
    return torch.allclose(output[: len(fewer)], fewer, rtol=0, atol=limit * scale, equal_nan=True)
