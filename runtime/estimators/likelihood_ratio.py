"""Likelihood-ratio estimates of row gradients from losses of noisy copies alone."""

from torch import Tensor

from .baselines import weights
from .noise import score, size_score


def row_gradients(
    losses: Tensor,
    clean: Tensor,
    noise: Tensor,
    sigma: float | Tensor,
    *,
    directions: str,
    baseline: str,
    valid: Tensor,
    antithetic: bool = False,
    control: Tensor | None = None,
) -> Tensor:
    """Estimates g, (rows, width), of the gradient of F(z) = E f(z + sigma e) in z.

    losses: (rows, copies), f(z + sigma e); clean: (rows,), f(z); noise: (rows, copies, width), the e; sigma: one number
    or (width,); valid: (rows, copies), False where a copy does not exist or its loss is not finite. Rows may have
    different numbers of copies: each is the mean over its own, so sums over rows stay unbiased.
    control: (rows, width), anything independent of the noise and close to the gradient c: the estimate becomes
    c + mean (f - sigma c.e) score / sigma, unbiased, its variance times 1 - rho^2.
    g = mean_k (f_k - b_k) score(e_k) / sigma (Rubinstein's push-out; arXiv 2305.08960).
    """
    if control is not None:
        losses = losses - along(control, noise, sigma)
    found = weights(baseline, losses, clean, valid, noise.square().sum(2), antithetic)
    gradient = (found.to(noise.dtype).unsqueeze(1) @ score(directions, noise)).squeeze(1) / sigma
    return gradient if control is None else gradient + control


def size_gradients(
    losses: Tensor,
    clean: Tensor,
    noise: Tensor,
    *,
    directions: str,
    baseline: str,
    valid: Tensor,
    antithetic: bool = False,
) -> Tensor:
    """Estimates, (rows, width), of the gradient of F(z) = E f(z + sigma e) in the logarithm of each entry's sigma.

    Arguments as those of `row_gradients`. mean_k (f_k - b_k) (e_k^2 - 1), unbiased. Directions of an orthogonal block
    say something about each other's squares, so that the loss without noise takes the place of other copies there.
    """
    if directions == "orthogonal" and baseline != "none":
        baseline = "clean"
    found = weights(baseline, losses, clean, valid, noise.square().sum(2), antithetic)
    return (found.to(noise.dtype).unsqueeze(1) @ size_score(directions, noise)).squeeze(1)


def along(direction: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """(rows, copies): how much a loss with that gradient, (rows, width), changes over the noise."""
    return (noise @ (direction * sigma).unsqueeze(2)).squeeze(2)
