"""The stacked evaluations of one backward: which values are perturbed, and what one query costs.

Two layouts share one interface. `RowProbes`: every live row is perturbed on its own and all queries are one call.
`BatchProbes`: inputs of fixed shape without rows are perturbed; the whole batch is one row, which each query evaluates.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from rewriter.runtime.random import Key

from .arrays import Array, divided, row_norms, side_by_side
from .batch import Batch
from .coordinates import Coordinates
from .directions import draw


class Probed(Protocol):
    """What an estimator sees: n rows of width d with outputs of width m.

    base: (n, d), in `coordinates` where an input has a domain; outputs, cotangents: (n, m); norms: (n,) float64 norms
    of the cotangents
    """

    base: Array
    outputs: Array
    cotangents: Array
    coordinates: Coordinates | None

    @property
    def norms(self) -> Array: ...

    @property
    def epsilon(self) -> float:
        """Coarsest rounding of the dtypes the values are evaluated in."""
        ...

    @property
    def rows_per_query(self) -> int:
        """Rows of the batch that one query evaluates."""
        ...

    def directions(self, kind: str, key: Key, count: int) -> Array:
        """(n, count, d), each row's own."""
        ...

    def evaluate(self, points: Array, counted: Array | None = None, **purposes: int) -> Array:
        """Outputs (n, k, m) at points (n, k, d); purposes: how many of the k queries of a row each purpose pays for.

        counted: (n, k) bool, the queries to make: the others get NaN, and the first purpose saves them.
        """
        ...

    def sample(self, count: int) -> "Probed":
        """`count` rows of the batch, evenly spread; a short batch gives some of its rows several times."""
        ...


class Probes:
    """What both layouts share: of `values` those at `positions`, side by side, and the coordinates they move in."""

    def __init__(
        self,
        batch: Batch,
        positions: tuple[int, ...],
        values: Sequence[Array],
        outputs: Array,
        cotangents: Array,
    ) -> None:
        self.batch, self.positions, self.outputs, self.cotangents = batch, positions, outputs, cotangents
        self._widths = [math.prod(values[i].shape[1:]) for i in positions]
        self._side_by_side = side_by_side([values[i] for i in positions], batch.work)
        evaluator = batch.evaluator
        self.coordinates = Coordinates.of(positions, self._widths, evaluator.domains, evaluator.label, batch.work)
        self.base = self._side_by_side
        if self.coordinates is not None:
            rounding = max(torch.finfo(batch.like[i].dtype).eps for i in positions)
            self.coordinates, self.base = self.coordinates.enter(self._side_by_side, rounding, evaluator.label)

    def pull_back(self, gradient: Array) -> Array:
        """From the gradient (n, d) in `coordinates` to that of the values."""
        return gradient if self.coordinates is None else self.coordinates.pull_back(gradient, self._side_by_side)

    @property
    def norms(self) -> Array:
        """As `Probed` says."""
        return row_norms(self.cotangents)

    @property
    def epsilon(self) -> float:
        """As `Probed` says."""
        dtypes = self.batch.evaluator.dtypes(*self.batch.like)
        return max(torch.finfo(dtypes[i]).eps for i in self.positions)


class RowProbes(Probes):
    """Values with rows, and shared values repeated per row, perturbed independently in every row."""

    rows_per_query = 1

    def __init__(self, batch: Batch, positions: tuple[int, ...]) -> None:
        rows, repeated = len(batch.outputs), batch.evaluator.shared if batch.evaluator.repeats_shared else ()
        self._values = [v[None].repeat(rows, 0) if i in repeated else v for i, v in enumerate(batch.inputs)]
        super().__init__(batch, positions, self._values, batch.outputs, batch.cotangents)

    def directions(self, kind: str, key: Key, count: int) -> Array:
        """As `Probed` says; a live row's numbers do not depend on which others are alive."""
        batch = self.batch
        drawn = draw(kind, key, batch.total_rows, count, self.base.shape[1], batch.first_row, self.base.dtype)
        return drawn if batch.rows is None else drawn[batch.rows]

    def evaluate(self, points: Array, counted: Array | None = None, **purposes: int) -> Array:
        """As `Probed` says, in one stacked call."""
        rows, count, width = points.shape
        if self.coordinates is not None:
            points = self.coordinates.leave(points)
        flat, repeats = points.reshape(rows * count, width), None
        if counted is not None:
            flat, repeats = flat[counted.reshape(-1)], np.count_nonzero(counted, 1)
        purposes = {purpose: rows * amount for purpose, amount in purposes.items()}
        purposes[next(iter(purposes))] -= rows * count - len(flat)
        stacked = len(flat)
        perturbed = dict(zip(self.positions, divided(flat, self._widths), strict=True))
        fixed = frozenset() if self.batch.evaluator.repeats_shared else self.batch.evaluator.shared
        arguments = []
        for i, value in enumerate(self._values):
            if i in perturbed:
                moved = perturbed[i]
                arguments.append(moved if value.ndim == 2 else moved.reshape(stacked, *value.shape[1:]))
            elif i in fixed or (count == 1 and repeats is None):
                arguments.append(value)
            else:
                arguments.append(value.repeat(count if repeats is None else repeats, 0))
        found = self.batch.call(arguments, stacked, fixed, purposes)
        if counted is None:
            return found.reshape(rows, count, -1)
        outputs = np.full((rows, count, found.shape[1]), math.nan, found.dtype)
        outputs[counted] = found
        return outputs

    def sample(self, count: int) -> "RowProbes":
        """As `Probed` says."""
        return RowProbes(self.batch.subset(count), self.positions)


class BatchProbes(Probes):
    """Shared values of fixed shape: one row, whose outputs are those of the whole batch."""

    def __init__(self, batch: Batch, positions: tuple[int, ...]) -> None:
        whole = [value[None] for value in batch.inputs]
        super().__init__(batch, positions, whole, batch.outputs.reshape(1, -1), batch.cotangents.reshape(1, -1))

    @property
    def rows_per_query(self) -> int:
        """As `Probed` says: a row that fails spoils the sum over all."""
        return len(self.batch.outputs)

    def directions(self, kind: str, key: Key, count: int) -> Array:
        """As `Probed` says; the same on every rank, so that the mean over ranks is along one set of directions."""
        return draw(kind, key, 1, count, self.base.shape[1], 0, self.base.dtype)

    def evaluate(self, points: Array, counted: Array | None = None, **purposes: int) -> Array:
        """As `Probed` says: one call of the whole batch for each of the k points."""
        assert counted is None, "a batch that is one row has no rows to choose among"
        batch, rows = self.batch, len(self.batch.outputs)
        if self.coordinates is not None:
            points = self.coordinates.leave(points)
        outputs = []
        for point in points[0]:
            arguments = list(batch.inputs)
            for i, values in zip(self.positions, divided(point[None], self._widths), strict=True):
                arguments[i] = values.reshape(batch.inputs[i].shape)
            outputs.append(batch.call(arguments, rows, batch.evaluator.shared, {}).reshape(-1))
        batch.spend(**{purpose: rows * amount for purpose, amount in purposes.items()})
        return np.stack(outputs)[None]

    def sample(self, count: int) -> "BatchProbes":
        """As `Probed` says."""
        return BatchProbes(self.batch.subset(count), self.positions)
