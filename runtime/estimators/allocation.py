"""How many probes or copies each row of a batch gets: whole numbers that spend a budget exactly."""

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

    norms: lengths of the rows' gradients, or what stands for them: 1 - p_y under a cross-entropy, `pilot_norms` else.
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


def pilot_norms(products: Array, shrinkage: float = 0.25) -> Array:
    """Lengths of rows' gradients from a pilot's split halves, drawn towards the batch's mean square.

    products: (n,), inner products of two independent estimates of each row; unbiased for |g|^2, often negative.
    """
    mean = max(float(products.mean()), 0.0)
    norms: Array = np.sqrt(np.maximum((1 - shrinkage) * products + shrinkage * mean, 0.0))
    return norms
