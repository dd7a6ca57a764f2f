"""How many probes each row of a batch gets: whole numbers that spend a budget exactly."""

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
