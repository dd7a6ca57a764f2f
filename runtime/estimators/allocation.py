"""How many probes or copies each row of a batch gets: whole numbers that spend a budget exactly."""

import math

import numpy as np

from .arrays import Array

ALLOCATIONS = ("uniform", "norm")


def integer_counts(weights: Array, budget: int, floor: int, ceiling: int) -> Array:
    """Counts (n,) int64 in proportion to weights (n,), between floor and ceiling, that sum to `budget`.

    Largest remainders, after what the bounds cut off has been given to the others. The budget must lie between
    n x floor and n x ceiling. Weights that are zero or not finite get the floor, unless the others are full.
    """
    rows = len(weights)
    if not rows * floor <= budget <= rows * ceiling:
        raise ValueError(f"a budget of {budget} does not lie between {floor} and {ceiling} for each of {rows} rows")
    sound = np.where(np.isfinite(weights) & (weights > 0), weights, 0.0).astype(np.float64)
    counts = np.full(rows, floor, dtype=np.int64)
    while (rest := budget - int(counts.sum())) > 0:
        free = counts < ceiling
        share = np.where(free, sound, 0.0)
        if not share.any():
            share = free.astype(np.float64)  # nobody left that asks for more
        exact = share / share.sum() * rest
        added = np.minimum(np.floor(exact).astype(np.int64), ceiling - counts)
        if not added.any():
            order = np.argsort(-np.where(free, exact, -1.0), kind="stable")[:rest]
            added[order] = free[order]
        counts += added
    return counts


def neyman_counts(norms: Array, probes: int, width: int) -> Array:
    """Probes for each row, (n,), n x `probes` in all, in proportion to the norm of its cotangent, at least one.

    The squared error of a row with q orthogonal probes is |g|^2 (d / q - 1), and |g| grows with |v|: the sum over rows
    is least for q in proportion to |g| (Neyman 1934).
    """
    return integer_counts(norms, len(norms) * probes, 1, max(probes, width))


def copy_counts(norms: Array, copies: int, floor: int = 2, even: bool = False) -> Array:
    """Copies for each row, (n,) int64, n x `copies` in all, in proportion to `norms`, at least `floor` each.

    norms: lengths of the rows' gradients, or what stands for them: 1 - p_y under a cross-entropy, `pilot_norms`, or
    what was learnt of earlier batches.
    Where nothing is known of any row (all zero or not finite), all get the same. even: whole pairs.
    """
    unit = 2 if even else 1
    rows, share, least = len(norms), copies // unit, max(1, -(-floor // unit))
    return unit * integer_counts(norms, rows * share, min(least, share), rows * share)


def cut_counts(noises: Array, costs: Array, budget: float, floor: int = 2, even: bool = False) -> Array:
    """Copies for each cut of a chain, (n,) int64, in proportion to sqrt(noise / cost), at least `floor` each.

    noises: (n,), variance of an estimate from one copy; costs: (n,), of one copy. The sum of counts x costs does not
    exceed `budget`, nor does it leave out a copy that still fits. even: whole pairs. Where the floors alone cost more,
    they are what is returned; where nothing is known of any cut, all get the same. The variance sum_s noise_s / K_s is
    least so (Neyman 1934, with costs).
    """
    unit = 2 if even else 1
    least = unit * -(-floor // unit)
    sound = np.where(np.isfinite(noises) & (noises > 0), noises, 0.0).astype(np.float64)
    wanted = np.sqrt(sound / costs) if sound.any() else np.ones(len(costs))
    counts = np.full(len(costs), least, dtype=np.int64)
    free = np.ones(len(costs), dtype=bool)
    while free.any():  # the others share what cuts at the floor leave
        rest = budget - float(counts[~free] @ costs[~free])
        spent = float(wanted[free] @ costs[free])
        share = wanted * (rest / spent if spent > 0 else 0.0)
        below = free & (share < least)
        if not below.any():
            counts[free] = share[free] // unit * unit
            break
        free &= ~below
    return _topped_up(counts, wanted**2 * costs, costs, budget, unit)


def _topped_up(counts: Array, noises: Array, costs: Array, budget: float, unit: int) -> Array:
    """Counts with what the budget still holds, one copy or pair at a time, to where it lowers the variance most."""
    while True:
        fits = counts @ costs + unit * costs <= budget * (1 + 1e-12)
        if not fits.any():
            return counts
        gain = noises / counts - noises / (counts + unit)
        counts[np.argmax(np.where(fits, gain / costs, -1.0))] += unit


def block_counts(norms: Array, copies: int, width: int, floor: int = 2, even: bool = False) -> Array:
    """As `copy_counts`, for orthogonal blocks of `width` directions, whose error does not fall evenly with copies.

    Up to `width` copies it is (width + 2) / a - 1, then it falls again only with every further whole block (2 / width
    over the number of blocks): the steps of this convex function that bring most for their copies are taken first.
    Where copies left over at the end would make that worse than equal shares, the shares are equal.
    """
    unit = 2 if even else 1
    rows, share, least = len(norms), copies // unit, max(1, -(-floor // unit))
    if least > width:
        least += -least % width  # whole blocks
    sound = np.where(np.isfinite(norms) & (norms > 0), norms, 0.0).astype(np.float64)
    if share <= least or not sound.any():
        return copy_counts(norms, copies, floor, even)
    squares = np.square(sound / sound.max())
    budget = rows * (share - least)
    single = np.arange(least, min(width, least + budget))
    blocks = np.arange(max(1, least // width), least // width + budget // width + 1)
    # What a copy gains in each step of one row, and how many copies the step takes.
    gains = np.concatenate(((width + 2) / (single * (single + 1.0)), 2.0 / width**2 / (blocks * (blocks + 1.0))))
    sizes = np.repeat((1, width), (len(single), len(blocks)))
    order = np.argsort(-np.outer(squares, gains), axis=None, kind="stable")
    spent = np.cumsum(sizes[order % len(sizes)])
    whole = int(np.searchsorted(spent, budget, side="right"))
    spare = budget - (int(spent[whole - 1]) if whole else 0)
    later = order[whole:]
    taken = np.concatenate((order[:whole], later[sizes[later % len(sizes)] == 1][:spare]))
    counts = least + np.bincount(taken // len(sizes), sizes[taken % len(sizes)], rows).astype(np.int64)
    counts[squares.argmin()] += rows * share - int(counts.sum())
    equal = np.full(rows, share)
    better = squares @ block_variance(counts, width) < squares @ block_variance(equal, width)
    return unit * (counts if better else equal)


def block_variance(counts: Array, width: int) -> Array:
    """Squared error of rows over |g|^2, from that many copies of each in orthogonal blocks of `width` directions.

    Blocks of m directions err by (width + 2) / m - 1 and count in proportion to m.
    """
    full, part = counts // width, counts % width
    found: Array = (full * width**2 * (2 / width) + part * (width + 2.0 - part)) / np.square(counts)
    return found


def pilot_norms(squares: Array, copies: int) -> Array:
    """Lengths of rows' gradients from a pilot, (n,), drawn towards the batch's mean as far as the pilot is noise.

    squares: (n,), mean squares of a row's differences from its clean loss over `copies` copies: |g|^2 times chi-squared
    over its degrees of freedom, where the loss is linear over the noise. How much rows differ beyond that is read
    off the batch (best linear prediction of |g| from the root).
    """
    roots = np.sqrt(squares)
    mean = float(roots.mean())
    if not (math.isfinite(mean) and mean > 0):
        return np.zeros(len(squares))
    kept = _root_mean(copies) ** 2
    differing = max(kept * float(squares.mean()) / mean**2 - 1, 0.0)  # squared coefficient of variation of |g|
    norms: Array = np.maximum(mean + differing * kept / (1 + differing - kept) * (roots - mean), 0.0)
    return norms


def pilot_shares(squares: Array, pilot: int, rest: int) -> Array:
    """The part, (n,), that the pilot has in each row's estimate; the rest of the copies has the other.

    pilot, rest: copies of a row, of the rest on average. The parts that err least if the rest is spent by Neyman's
    rule, from what the pilot found in the *other* rows: a row's own pilot must not say how much it counts.
    """
    rows = len(squares)
    if rows < 2 or not (np.isfinite(squares).all() and squares.any()):
        return np.full(rows, pilot / (pilot + rest))
    roots, others = np.sqrt(squares) / _root_mean(pilot), rows - 1
    ours = np.maximum(squares.sum() - squares, 0.0) / pilot
    theirs = np.square(roots.sum() - roots) / (rest * others)
    shares: Array = np.where(ours + theirs > 0, theirs / np.where(ours + theirs > 0, ours + theirs, 1), 0.5)
    return shares


def _root_mean(degrees: int) -> float:
    """E sqrt(chi-squared / degrees)."""
    return math.sqrt(2 / degrees) * math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
