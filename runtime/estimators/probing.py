"""The stacked evaluations of one backward: which values are perturbed, and what one query costs.

Two layouts share one interface. `RowProbes`: every live row is perturbed on its own and all queries are one call.
`BatchProbes`: inputs of fixed shape without rows are perturbed; the whole batch is one row, which each query evaluates.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rewriter.runtime.evaluator import Evaluator, repeat_shared
from rewriter.runtime.random import Key

from .arrays import Array, divided, side_by_side
from .directions import draw


class Probed(Protocol):
    """What an estimator sees: n rows of width d with outputs of width m.

    base: (n, d); outputs, cotangents: (n, m); norms: (n,) float64 norms of the cotangents
    """

    base: Array
    outputs: Array
    cotangents: Array
    norms: Array

    @property
    def epsilon(self) -> float:
        """Coarsest rounding of the dtypes the values are evaluated in."""
        ...

    def directions(self, kind: str, key: Key, count: int) -> Array:
        """(n, count, d), each row's own."""
        ...

    def evaluate(self, points: Array, **purposes: int) -> Array:
        """Outputs (n, k, m) at points (n, k, d); purposes: how many of the k queries of a row each purpose pays for."""
        ...

    def sample(self, count: int) -> "Probed":
        """`count` rows of the batch, evenly spread; a short batch gives some of its rows several times."""
        ...


@dataclass
class Batch:
    """The live rows of one backward.

    inputs: of the box; contracted: positions of the outputs with a cotangent; outputs, cotangents: (n, m) these side by
    side; norms: (n,) of the cotangents; work: dtype of all arithmetic; rows: indices of the live rows, None for all;
    total_rows, first_row: of the whole local batch, for the random numbers; spend: adds amounts to the ledger by name
    """

    evaluator: Evaluator
    inputs: Sequence[Tensor]
    contracted: tuple[int, ...]
    outputs: Array
    cotangents: Array
    norms: Array
    work: torch.dtype
    rows: Array | None
    total_rows: int
    first_row: int
    max_rows: int | None
    spend: Callable[..., None]

    def call(self, arguments: Sequence[Tensor], rows: int, fixed: frozenset[int], purposes: dict[str, int]) -> Array:
        """Contracted outputs side by side, (rows, m), in chunks of at most `max_rows`.

        fixed: arguments without rows to cut; purposes: queries that each purpose pays for, as the ledger names them
        """
        chunk = self.max_rows or rows
        pieces = []
        for start in range(0, rows, chunk):
            part = arguments
            if chunk < rows:
                part = [a if i in fixed else a[start : start + chunk] for i, a in enumerate(arguments)]
            found = self.evaluator.evaluate(*part)
            pieces.append(side_by_side([found[i] for i in self.contracted], self.work))
        self.spend(calls=len(pieces), **purposes)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def subset(self, count: int) -> "Batch":
        """`count` of the rows, evenly spread, numbered anew."""
        chosen = np.linspace(0, len(self.outputs) - 1, count).round().astype(np.int64)
        index = torch.from_numpy(chosen)
        shared = self.evaluator.shared
        return replace(
            self,
            inputs=[v if i in shared else v[index.to(v.device)] for i, v in enumerate(self.inputs)],
            outputs=self.outputs[chosen],
            cotangents=self.cotangents[chosen],
            norms=self.norms[chosen],
            rows=None,
            total_rows=count,
            first_row=0,
        )


class RowProbes:
    """Values with rows, and shared values repeated per row, perturbed independently in every row."""

    def __init__(self, batch: Batch, positions: tuple[int, ...]) -> None:
        self.batch, self.positions = batch, positions
        self.outputs, self.cotangents, self.norms = batch.outputs, batch.cotangents, batch.norms
        self._values = repeat_shared(batch.evaluator, batch.inputs, len(batch.outputs))
        self._dtypes = batch.evaluator.dtypes(*batch.inputs)
        self.base = side_by_side([self._values[i] for i in positions], batch.work)
        self._widths = [math.prod(self._values[i].shape[1:]) for i in positions]

    @property
    def epsilon(self) -> float:
        """As `Probed` says."""
        return _coarsest(self._dtypes, self.positions)

    def directions(self, kind: str, key: Key, count: int) -> Array:
        """As `Probed` says; a live row's numbers do not depend on which others are alive."""
        batch = self.batch
        drawn = draw(kind, key, batch.total_rows, count, self.base.shape[1], batch.first_row, self.base.dtype)
        return drawn if batch.rows is None else drawn[batch.rows]

    def evaluate(self, points: Array, **purposes: int) -> Array:
        """As `Probed` says, in one stacked call."""
        rows, count, width = points.shape
        stacked = rows * count
        perturbed = dict(zip(self.positions, divided(points.reshape(stacked, width), self._widths), strict=True))
        fixed = frozenset() if self.batch.evaluator.repeats_shared else self.batch.evaluator.shared
        arguments = []
        for i, value in enumerate(self._values):
            if i in perturbed:
                moved = torch.from_numpy(perturbed[i])
                moved = moved if value.dim() == 2 else moved.reshape(stacked, *value.shape[1:])
                arguments.append(moved.to(value.device, self._dtypes[i]))
            elif i in fixed or count == 1:
                arguments.append(value)
            else:
                arguments.append(value.repeat_interleave(count, 0))
        spent = {purpose: rows * amount for purpose, amount in purposes.items()}
        return self.batch.call(arguments, stacked, fixed, spent).reshape(rows, count, -1)

    def sample(self, count: int) -> "RowProbes":
        """As `Probed` says."""
        return RowProbes(self.batch.subset(count), self.positions)


class BatchProbes:
    """Shared values of fixed shape: one row, whose outputs are those of the whole batch."""

    def __init__(self, batch: Batch, positions: tuple[int, ...]) -> None:
        self.batch, self.positions = batch, positions
        self.outputs, self.cotangents = batch.outputs.reshape(1, -1), batch.cotangents.reshape(1, -1)
        self.norms = np.linalg.norm(batch.norms).reshape(1)
        self._dtypes = batch.evaluator.dtypes(*batch.inputs)
        self.base = side_by_side([batch.inputs[i].unsqueeze(0) for i in positions], batch.work)
        self._widths = [batch.inputs[i].numel() for i in positions]

    @property
    def epsilon(self) -> float:
        """As `Probed` says."""
        return _coarsest(self._dtypes, self.positions)

    def directions(self, kind: str, key: Key, count: int) -> Array:
        """As `Probed` says; the same on every rank, so that the mean over ranks is along one set of directions."""
        return draw(kind, key, 1, count, self.base.shape[1], 0, self.base.dtype)

    def evaluate(self, points: Array, **purposes: int) -> Array:
        """As `Probed` says: one call of the whole batch for each of the k points."""
        batch, rows = self.batch, len(self.batch.outputs)
        outputs = []
        for point in points[0]:
            arguments = list(batch.inputs)
            for i, values in zip(self.positions, divided(point[None], self._widths), strict=True):
                moved = torch.from_numpy(values).reshape(batch.inputs[i].shape)
                arguments[i] = moved.to(batch.inputs[i].device, self._dtypes[i])
            outputs.append(batch.call(arguments, rows, batch.evaluator.shared, {}).reshape(-1))
        batch.spend(**{purpose: rows * amount for purpose, amount in purposes.items()})
        return np.stack(outputs)[None]

    def sample(self, count: int) -> "BatchProbes":
        """As `Probed` says."""
        return BatchProbes(self.batch.subset(count), self.positions)


def _coarsest(dtypes: Sequence[torch.dtype], positions: Sequence[int]) -> float:
    return max(torch.finfo(dtypes[i]).eps for i in positions)
