"""Row gradients from the losses of noisy copies, a few rows at a time."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rewriter.runtime.random import Key

from .allocation import block_counts, copy_counts, pilot_norms, pilot_shares
from .arrays import Array
from .cut_options import CutOptions
from .likelihood_ratio import along, row_gradients, size_gradients
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
    """gradient: (rows, width); squares: (rows,), mean squares of a row's copies' differences from its clean loss;
    spread, size: mean squares of all differences and of the losses; changed: share of copies whose loss differs; heard:
    share of copies in rows of which some copy's differs; failed, total: copies without a finite loss, and all; both,
    predicted: means of the differences times what the surrogate predicts of them, and of its squares; sizes: (width,),
    gradient in the logarithm of sigma, summed over rows, where that is learnt."""

    gradient: Tensor
    squares: Tensor
    spread: float = 0.0
    size: float = 0.0
    changed: float = 0.0
    heard: float = 0.0
    failed: int = 0
    total: int = 0
    both: float = 0.0
    predicted: float = 0.0
    sizes: Tensor | None = None


def estimate(batch: Batch, options: CutOptions, copies: int, key: Key) -> Estimation:
    """Every row from as many copies; "norm" spends a quarter of them on a pilot that says which rows get the rest."""
    if options.allocation != "norm" or copies < 8:
        return (yield from _of_counts(batch, options, np.full(batch.rows, copies), key))
    # The pilot says how many copies a row gets, so within a row its estimate may not be weighted by that number:
    # each of the two is unbiased given the parts in which they are mixed.
    pilot = max(4, copies // 4 // 2 * 2)
    first = yield from _of_counts(batch, options, np.full(batch.rows, pilot), key.named("pilot"))
    squares = first.squares.cpu().numpy()
    unit = 2 if options.antithetic else 1  # opposite copies say the same of a length
    norms = pilot_norms(squares, pilot // unit)
    rest = yield from estimate_by(batch, options, copies - pilot, key.named("rest"), norms)
    share = torch.from_numpy(pilot_shares(squares, pilot // unit, (copies - pilot) // unit)).to(first.gradient)[:, None]
    gradient = share * first.gradient + (1 - share) * rest.gradient
    return _joined(gradient, rest.squares, [first, rest], (pilot / copies, 1 - pilot / copies))


def estimate_by(batch: Batch, options: CutOptions, copies: int, key: Key, norms: Array) -> Estimation:
    """`copies` for each row on average, in proportion to what is known of its gradient's length, (rows,)."""
    return (yield from _of_counts(batch, options, counts_by(norms, options, copies, batch.value.shape[1]), key))


def counts_by(norms: Array, options: CutOptions, copies: int, width: int) -> Array:
    """Copies of rows, (n,), from what is known of their gradients' lengths, as the directions ask for."""
    if options.directions == "orthogonal":
        return block_counts(norms, copies, width, even=options.antithetic)
    return copy_counts(norms, copies, even=options.antithetic)


def _joined(gradient: Tensor, squares: Tensor, parts: list[Found], shares: Sequence[float] | None = None) -> Found:
    """shares: with which parts that estimate the same are mixed; without them they are of different rows."""
    total = sum(part.total for part in parts)

    def mean(name: str) -> float:
        return float(sum(getattr(part, name) * part.total for part in parts) / total)

    failed = sum(part.failed for part in parts)
    weighed = zip(parts, shares or [1.0] * len(parts), strict=True)
    sizes = [share * part.sizes for part, share in weighed if part.sizes is not None]
    learnt = torch.stack(sizes).sum(0) if sizes else None
    named = {name: mean(name) for name in ("spread", "size", "changed", "heard", "both", "predicted")}
    return Found(gradient, squares, failed=failed, total=total, sizes=learnt, **named)


def _of_counts(batch: Batch, options: CutOptions, counts: Array, key: Key) -> Estimation:
    """Row i from counts[i] copies."""
    found = Found(torch.zeros_like(batch.value), batch.clean.new_zeros(batch.rows, dtype=torch.float64))
    parts = []
    for most, rows in _alike(counts):
        step = max(1, _AT_ONCE // (most * batch.value.shape[1]))
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            parts.append((yield from _some(batch, options, counts, key, most, some, found)))
    return _joined(found.gradient, found.squares, parts)


def _alike(counts: Array) -> list[tuple[int, Array]]:
    """Rows in groups that draw the same number of copies: the next power of two where rows differ.

    What a row draws must depend on its own count alone.
    """
    if (counts == counts[0]).all():
        return [(int(counts[0]), np.arange(len(counts)))]
    drawn = 2 ** np.ceil(np.log2(counts)).astype(np.int64)
    return [(int(most), np.flatnonzero(drawn == most)) for most in np.unique(drawn)]


def _some(
    batch: Batch, options: CutOptions, counts: Array, key: Key, most: int, rows: Array, into: Found
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
    gradients = _gradients(losses, clean, noise, batch.sigma, options, most, valid, control)
    into.gradient[source] = gradients.to(into.gradient.dtype)
    learns = options.sigma == "learned"
    total = int(counts[rows].sum())
    differences = torch.where(valid, losses - clean[:, None], 0).double()
    into.squares[source] = differences.square().sum(1) / valid.sum(1).clamp(min=1)
    predicted = torch.zeros_like(differences)
    if batch.surrogate is not None:
        predicted = torch.where(valid, _predicted(batch.surrogate[source], noise, batch.sigma), 0).double()
    return Found(
        into.gradient,
        into.squares,
        spread=float(differences.square().sum()) / total,
        size=float(torch.where(valid, losses, 0).double().square().sum()) / total,
        changed=float((differences != 0).sum()) / total,
        heard=float((valid & (differences != 0).any(1, keepdim=True)).sum()) / total,
        failed=int((existing & ~valid).sum()),
        total=total,
        both=float((differences * predicted).sum()) / total,
        predicted=float(predicted.square().sum()) / total,
        sizes=_sizes(losses, clean, noise, options, most, valid) if learns else None,
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


@full_precision
def _sizes(losses: Tensor, clean: Tensor, noise: Tensor, options: CutOptions, copies: int, valid: Tensor) -> Tensor:
    found = size_gradients(
        losses,
        clean,
        noise,
        directions=options.directions,
        baseline=options.baseline_for(copies),
        valid=valid,
        antithetic=options.antithetic,
    )
    return found.nan_to_num(0, 0, 0).sum(0)  # a row that has diverged says nothing of sizes


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
