"""Row gradients from the losses of noisy copies, a few rows at a time."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rewriter.runtime.random import Key

from .allocation import copy_counts, pilot_norms
from .arrays import Array
from .cut_options import CutOptions
from .likelihood_ratio import along, row_gradients
from .noise import draw_noise
from .precision import full_precision

# Asks for the losses, (n,), of rows, (n,), with these values, (n, width); ends with what it found.
Estimation = Generator[tuple[Tensor, Tensor], Tensor, "Found"]

_AT_ONCE = 2**24  # numbers of noise held at a time


@dataclass(frozen=True)
class Batch:
    """What is estimated: value (rows, width) and clean (rows,), the losses there; first_row: of the whole batch, for
    the random numbers; sigma: a number or (width,); surrogate, control: (rows, width), of the gradient, as it is and as
    far as it is used."""

    value: Tensor
    clean: Tensor
    first_row: int
    sigma: float | Tensor
    surrogate: Tensor | None = None
    control: Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.value)


@dataclass
class Found:
    """gradient: (rows, width); spread, size: mean squares of the copies' differences from the clean losses and of the
    losses; changed: share of copies whose loss differs; failed, total: copies without a finite loss, and all;
    both, predicted: means of the differences times what the surrogate predicts of them, and of its squares."""

    gradient: Tensor
    spread: float = 0.0
    size: float = 0.0
    changed: float = 0.0
    failed: int = 0
    total: int = 0
    both: float = 0.0
    predicted: float = 0.0


def estimate(batch: Batch, options: CutOptions, copies: int, key: Key) -> Estimation:
    """Every row from as many copies; "norm" spends a quarter of them on a pilot that says which rows get the rest."""
    if options.allocation != "norm" or copies < 8:
        return (yield from _of_counts(batch, options, np.full(batch.rows, copies), key))
    # The pilot says how many copies a row gets, so within a row its estimate may not be weighted by that number:
    # pilot and rest are mixed in fixed shares, and each is unbiased given the other.
    pilot = max(4, copies // 4 // 2 * 2)
    halves = []
    for half in (0, 1):
        counts = np.full(batch.rows, pilot // 2)
        halves.append((yield from _of_counts(batch, options, counts, key.named(f"pilot{half}"))))
    products = (halves[0].gradient * halves[1].gradient).sum(1)
    norms = pilot_norms(products.double().nan_to_num().cpu().numpy())
    counts = copy_counts(norms, copies - pilot, even=options.antithetic)
    rest = yield from _of_counts(batch, options, counts, key.named("rest"))
    share = pilot / copies
    gradient = share / 2 * (halves[0].gradient + halves[1].gradient) + (1 - share) * rest.gradient
    return _joined(gradient, [*halves, rest])


def estimate_by(batch: Batch, options: CutOptions, copies: int, key: Key, norms: Array) -> Estimation:
    """`copies` for each row on average, in proportion to what is known of its gradient's length, (rows,)."""
    return (yield from _of_counts(batch, options, copy_counts(norms, copies, even=options.antithetic), key))


def _joined(gradient: Tensor, parts: list[Found]) -> Found:
    total = sum(part.total for part in parts)

    def mean(name: str) -> float:
        return float(sum(getattr(part, name) * part.total for part in parts) / total)

    failed = sum(part.failed for part in parts)
    named = {name: mean(name) for name in ("spread", "size", "changed", "both", "predicted")}
    return Found(gradient, failed=failed, total=total, **named)


def _of_counts(batch: Batch, options: CutOptions, counts: Array, key: Key) -> Estimation:
    """Row i from counts[i] copies."""
    found = Found(torch.zeros_like(batch.value))
    parts = []
    for most, rows in _alike(counts):
        step = max(1, _AT_ONCE // (most * batch.value.shape[1]))
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            parts.append((yield from _some(batch, options, counts, key, most, some, found.gradient)))
    return _joined(found.gradient, parts)


def _alike(counts: Array) -> list[tuple[int, Array]]:
    """Rows in groups that draw the same number of copies: the next power of two where rows differ.

    What a row draws must depend on its own count alone.
    """
    if (counts == counts[0]).all():
        return [(int(counts[0]), np.arange(len(counts)))]
    drawn = 2 ** np.ceil(np.log2(counts)).astype(np.int64)
    return [(int(most), np.flatnonzero(drawn == most)) for most in np.unique(drawn)]


def _some(
    batch: Batch, options: CutOptions, counts: Array, key: Key, most: int, rows: Array, into: Tensor
) -> Estimation:
    noise = _noise(batch, options, key, most, rows)
    source = torch.from_numpy(rows).to(batch.value.device)
    existing = torch.arange(most) < torch.from_numpy(counts[rows])[:, None]
    existing = existing.to(source.device)
    # Copies of the same number next to each other: evaluations then hold whole batches, as far as they fit.
    row, copy = existing.T.nonzero().flip(1).unbind(1)
    values = batch.value[source[row]] + batch.sigma * noise[row, copy]
    losses = batch.clean.new_zeros(existing.shape)
    answered = yield source[row], values
    losses[row, copy] = answered.to(losses.dtype)
    clean = batch.clean[source]
    valid = existing & (losses.isfinite() | ~clean.isfinite()[:, None])
    control = None if batch.control is None else batch.control[source]
    into[source] = _gradients(losses, clean, noise, batch.sigma, options, most, valid, control).to(into.dtype)
    total = int(counts[rows].sum())
    differences = torch.where(valid, losses - clean[:, None], 0).double()
    predicted = torch.zeros_like(differences)
    if batch.surrogate is not None:
        predicted = torch.where(valid, _predicted(batch.surrogate[source], noise, batch.sigma), 0).double()
    return Found(
        into,
        spread=float(differences.square().sum()) / total,
        size=float(torch.where(valid, losses, 0).double().square().sum()) / total,
        changed=float((differences != 0).sum()) / total,
        failed=int((existing & ~valid).sum()),
        total=total,
        both=float((differences * predicted).sum()) / total,
        predicted=float(predicted.square().sum()) / total,
    )


@full_precision
def _gradients(
    losses: Tensor,
    clean: Tensor,
    noise: Tensor,
    sigma: float | Tensor,
    options: CutOptions,
    copies: int,
    valid: Tensor,
    control: Tensor | None,
) -> Tensor:
    return row_gradients(
        losses,
        clean,
        noise,
        sigma,
        directions=options.directions,
        baseline=options.baseline_for(copies),
        valid=valid,
        antithetic=options.antithetic,
        control=control,
    )


_predicted = full_precision(along)


def _noise(batch: Batch, options: CutOptions, key: Key, copies: int, rows: Array) -> Tensor:
    first, last = int(rows[0]), int(rows[-1]) + 1
    value = batch.value
    drawn = draw_noise(
        options.directions,
        key,
        last - first,
        copies,
        value.shape[1],
        antithetic=options.antithetic,
        first_row=batch.first_row + first,
        dtype=np.float64 if value.dtype is torch.float64 else np.float32,
    )
    if len(rows) < last - first:
        drawn = drawn[rows - first]
    return torch.from_numpy(np.ascontiguousarray(drawn)).to(value.device)
