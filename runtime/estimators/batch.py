"""The live rows of one backward, and the calls of the box that they share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewriter.runtime.evaluator import Evaluator

from .arrays import Array, host, side_by_side
from .rows import LiveRows

_SINGLE, _DOUBLE = np.dtype(np.float32), np.dtype(np.float64)


@dataclass
class Batch:
    """The live rows of one backward.

    like: the tensors that the forward got; inputs: their live rows on the host; contracted: positions of the outputs
    with a cotangent; outputs, cotangents: (n, m) these side by side; work: dtype of all arithmetic; rows: indices of
    the live rows, None for all; total_rows, first_row: of the whole local batch, for the random numbers; spend: adds
    amounts to the ledger by name
    """

    evaluator: Evaluator
    like: Sequence[Tensor]
    inputs: Sequence[Array]
    contracted: tuple[int, ...]
    outputs: Array
    cotangents: Array
    work: np.dtype[Any]
    rows: Array | None
    total_rows: int
    first_row: int
    spend: Callable[..., None]
    max_rows: int | None

    def call(self, arguments: Sequence[Array], rows: int, fixed: frozenset[int], purposes: dict[str, int]) -> Array:
        """Contracted outputs side by side, (rows, m), in chunks of at most `max_rows`.

        fixed: arguments without rows to cut; purposes: queries that each purpose pays for, as the ledger names them
        """
        chunk = self.max_rows or rows
        pieces = []
        for start in range(0, rows, chunk):
            part = arguments
            if chunk < rows:
                part = [a if i in fixed else a[start : start + chunk] for i, a in enumerate(arguments)]
            found = self.evaluator.query(part, self.like)
            pieces.append(side_by_side([found[i] for i in self.contracted], self.work))
        self.spend(calls=len(pieces), **purposes)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def subset(self, count: int) -> "Batch":
        """`count` of the rows, evenly spread, numbered anew."""
        chosen = np.linspace(0, len(self.outputs) - 1, count).round().astype(np.int64)
        shared = self.evaluator.shared
        return replace(
            self,
            inputs=[v if i in shared else v[chosen] for i, v in enumerate(self.inputs)],
            outputs=self.outputs[chosen],
            cotangents=self.cotangents[chosen],
            rows=None,
            total_rows=count,
            first_row=0,
        )


def batch_of(
    evaluator: Evaluator,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    contracted: tuple[int, ...],
    rank: int,
    spend: Callable[..., None],
    max_rows: int | None,
    finite: bool,
) -> tuple[Batch, LiveRows]:
    """The batch that the tensors of one forward and the cotangents of its outputs make, and which rows of it live.

    rank: of this process, whose rows follow those of the ranks before; finite: the outputs are known to be finite
    """
    wide = torch.float64 in evaluator.dtypes(*inputs) or any(outputs[k].dtype is torch.float64 for k in contracted)
    work = _DOUBLE if wide else _SINGLE
    incoming = side_by_side([host(v) for k in contracted if (v := cotangents[k]) is not None], work)
    found = side_by_side([host(outputs[k]) for k in contracted], work)
    rows = LiveRows(incoming, found, finite)
    batch = Batch(
        evaluator=evaluator,
        like=inputs,
        inputs=[host(v) if i in evaluator.shared else rows.take(host(v)) for i, v in enumerate(inputs)],
        contracted=contracted,
        outputs=rows.take(found),
        cotangents=rows.take(incoming),
        work=work,
        rows=rows.index,
        total_rows=rows.total,
        first_row=rank * rows.total,
        spend=spend,
        max_rows=max_rows,
    )
    return batch, rows
