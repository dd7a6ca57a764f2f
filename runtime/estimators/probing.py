"""The stacked evaluations of one backward: which values are perturbed, and what one query costs.

Two layouts share one interface. `RowProbes`: every live row is perturbed on its own and all queries are one call.
`BatchProbes`: inputs of fixed shape without rows are perturbed, so the whole batch is one row and every query evaluates it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from rewriter.runtime.evaluator import Evaluator, repeat_shared
from rewriter.runtime.random import Key

from .directions import draw


class Probed(Protocol):
    """What an estimator sees. n rows of width d with outputs of width m.

    base: (n, d); outputs, cotangents: (n, m); norms: (n,) float64 norms of the cotangents; epsilon: coarsest rounding of the dtypes the values are evaluated in
    """

    base: Tensor
    outputs: Tensor
    cotangents: Tensor
    norms: Tensor

    @property
    def epsilon(self) -> float: ...

    def directions(self, kind: str, key: Key, count: int) -> Tensor:
        """(n, count, d), each row's own."""
        ...

    def evaluate(self, points: Tensor, **purposes: int) -> Tensor:
        """Outputs (n, k, m) at points (n, k, d); purposes: how many of the k queries of a row each purpose pays for."""
        ...

    def sample(self, count: int) -> "Probed":
        """`count` rows of the batch, enough to measure a step size on."""
        ...


@dataclass(frozen=True)
class Batch:
    """The live rows of one backward.

    inputs: of the box, live rows only; contracted: positions of the outputs with a cotangent; outputs, cotangents: (n, m)
    these side by side, in the dtype of all arithmetic; rows: indices of the live rows, None for all; total_rows, first_row: of the whole local batch, for
    the random numbers; spend: adds amounts to the ledger by name
    """

    evaluator: Evaluator
    inputs: tuple[Tensor, ...]
    contracted: tuple[int, ...]
    outputs: Tensor
    cotangents: Tensor
    norms: Tensor
    rows: Tensor | None
    total_rows: int
    first_row: int
    max_rows: int | None
    spend: Callable[..., None]

    def call(self, arguments: Sequence[Tensor], rows: int, fixed: frozenset[int], purposes: dict[str, int]) -> Tensor:
        """Contracted outputs side by side, (rows, m), in chunks of at most `max_rows`.

        fixed: arguments without rows to cut; purposes: queries each purpose pays for, as the ledger names them
        """
        chunk = self.max_rows or rows
        pieces = []
        for start in range(0, rows, chunk):
            part = arguments
            if chunk < rows:
                part = [a if i in fixed else a[start : start + chunk] for i, a in enumerate(arguments)]
            found = self.evaluator.evaluate(*part)
            pieces.append(side_by_side([found[i] for i in self.contracted], self.outputs.dtype))
        self.spend(calls=len(pieces), **purposes)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def side_by_side(values: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(rows, sum of widths) from tensors with rows in dimension 0."""
    flat = [
        value if value.dim() == 2 else value.reshape(value.shape[0], math.prod(value.shape[1:])) for value in values
    ]
    flat = [value.to(dtype) for value in flat]
    return flat[0] if len(flat) == 1 else torch.cat(flat, 1)


class RowProbes:
    """Values with rows, and shared values repeated per row, perturbed independently in every row."""

    def __init__(self, batch: Batch, positions: tuple[int, ...]) -> None:
        self.batch, self.positions, self.work = batch, positions, batch.outputs.dtype
        self.outputs, self.cotangents, self.norms = batch.outputs, batch.cotangents, batch.norms
        count = batch.outputs.shape[0]
        self._values = repeat_shared(batch.evaluator, batch.inputs, count)
        self._dtypes = batch.evaluator.dtypes(*batch.inputs)
        self.base = side_by_side([self._values[i] for i in positions], self.work)
        self._widths = [math.prod(self._values[i].shape[1:]) for i in positions]

    @property
    def epsilon(self) -> float:
        return max(torch.finfo(self._dtypes[i]).eps for i in self.positions)

    def directions(self, kind: str, key: Key, count: int) -> Tensor:
        batch = self.batch
        drawn = draw(kind, key, batch.total_rows, count, self.base.shape[1], batch.first_row, self.work)
        drawn = drawn.to(self.base.device)
        return drawn if batch.rows is None else drawn[batch.rows]

    def evaluate(self, points: Tensor, **purposes: int) -> Tensor:
        rows, count, _ = points.shape
        stacked = rows * count
        perturbed = dict(zip(self.positions, divided(points.reshape(stacked, -1), self._widths), strict=True))
        fixed = frozenset() if self.batch.evaluator.repeats_shared else self.batch.evaluator.shared
        arguments = []
        for i, value in enumerate(self._values):
            if i in perturbed:
                arguments.append(perturbed[i].reshape(stacked, *value.shape[1:]).to(self._dtypes[i]))
            elif i in fixed or count == 1:
                arguments.append(value)
            else:
                arguments.append(value.repeat_interleave(count, 0))
        spent = {purpose: rows * amount for purpose, amount in purposes.items()}
        return self.batch.call(arguments, stacked, fixed, spent).view(rows, count, -1)

    def sample(self, count: int) -> "RowProbes":
        """`count` of the rows, evenly spread; a short batch gives some of its rows several times."""
        batch = self.batch
        chosen = torch.linspace(0, self.base.shape[0] - 1, count, device=self.base.device).round_().long()
        return RowProbes(_subset(batch, chosen), self.positions)


class BatchProbes:
    """Shared values of fixed shape: one row whose outputs are those of the whole batch."""

    def __init__(self, batch: Batch, positions: tuple[int, ...]) -> None:
        self.batch, self.positions, self.work = batch, positions, batch.outputs.dtype
        self.outputs, self.cotangents = batch.outputs.reshape(1, -1), batch.cotangents.reshape(1, -1)
        self.norms = torch.linalg.vector_norm(batch.norms).reshape(1)
        self.base = side_by_side([batch.inputs[i].unsqueeze(0) for i in positions], self.work)
        self._widths = [batch.inputs[i].numel() for i in positions]
        self._dtypes = batch.evaluator.dtypes(*batch.inputs)

    @property
    def epsilon(self) -> float:
        return max(torch.finfo(self._dtypes[i]).eps for i in self.positions)

    def directions(self, kind: str, key: Key, count: int) -> Tensor:
        """The same on every rank, so that the mean over ranks is an estimate along one set of directions."""
        return draw(kind, key, 1, count, self.base.shape[1], 0, self.work).to(self.base.device)

    def evaluate(self, points: Tensor, **purposes: int) -> Tensor:
        """One call of the whole batch for each of the k points."""
        batch, rows = self.batch, self.batch.outputs.shape[0]
        outputs = []
        for point in points[0]:
            arguments = list(batch.inputs)
            for i, values in zip(self.positions, divided(point.unsqueeze(0), self._widths), strict=True):
                arguments[i] = values.view(batch.inputs[i].shape).to(self._dtypes[i])
            outputs.append(batch.call(arguments, rows, batch.evaluator.shared, {}).reshape(-1))
        batch.spend(**{purpose: rows * amount for purpose, amount in purposes.items()})
        return torch.stack(outputs).unsqueeze(0)

    def sample(self, count: int) -> "BatchProbes":
        """The same values with a batch of `count` rows."""
        rows = self.batch.outputs.shape[0]
        chosen = torch.linspace(0, rows - 1, count, device=self.base.device).round_().long()
        return BatchProbes(_subset(self.batch, chosen), self.positions)


def divided(values: Tensor, widths: Sequence[int]) -> Sequence[Tensor]:
    """(rows, sum of widths) -> one (rows, width) for each."""
    return (values,) if len(widths) == 1 else torch.split_with_sizes(values, widths, 1)


def _subset(batch: Batch, chosen: Tensor) -> Batch:
    shared = batch.evaluator.shared
    return replace(
        batch,
        inputs=tuple(v if i in shared else v[chosen] for i, v in enumerate(batch.inputs)),
        outputs=batch.outputs[chosen],
        cotangents=batch.cotangents[chosen],
        norms=batch.norms[chosen],
        rows=None,
        total_rows=len(chosen),
        first_row=0,
    )
