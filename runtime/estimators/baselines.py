"""What is subtracted from the losses of noisy copies before they are multiplied with their scores."""

import torch
from torch import Tensor

from rewriter.runtime.errors import RewriteError

BASELINES = ("none", "clean", "leave-one-out", "constant")


def check_baseline(baseline: str, directions: str) -> None:
    """Raises RewriteError for a baseline that would make the estimate biased."""
    if directions == "sobol" and baseline in ("leave-one-out", "constant"):
        raise RewriteError(
            f'baseline="{baseline}" makes estimates from Sobol sets biased',
            why="the other points of the set say something about each point",
            remedy='baseline="clean"',
        )


def weights(baseline: str, losses: Tensor, clean: Tensor, valid: Tensor, squares: Tensor, antithetic: bool) -> Tensor:
    """Weights w, (rows, copies), with which sum_k w_k score_k / sigma is the estimate; zero where not `valid`.

    losses: (rows, copies); clean: (rows,), of the row without noise; squares: (rows, copies), squared lengths of the
    noise. Every baseline is independent of the noise it is used with, so none biases the estimate: "clean" the loss
    without noise, "leave-one-out" the mean of the other copies, "constant" sum_j |e_j|^2 f_j / sum_j |e_j|^2 of the
    others, which estimates the constant of least variance. Antithetic pairs cancel any of them; a pair counts only
    whole. A row with too few copies has weights zero.
    """
    if antithetic:
        valid = valid.view(len(valid), -1, 2).all(2).repeat_interleave(2, 1)
        baseline = "clean"  # cancels, but small numbers keep their digits
    count = valid.sum(1, keepdim=True).to(losses.dtype)
    if baseline == "none":
        return torch.where(valid, losses, 0) / count.clamp(min=1)
    # Only differences matter from here on.
    shifted = torch.where(valid, losses - clean[:, None], 0)
    if baseline == "clean":
        return shifted / count.clamp(min=1)
    if baseline == "leave-one-out":
        mean = shifted.sum(1, keepdim=True) / count.clamp(min=1)
        return torch.where(valid & (count > 1), shifted - mean, 0) / (count - 1).clamp(min=1)
    squares = torch.where(valid, squares, 0)
    others = squares.sum(1, keepdim=True) - squares
    weighted = shifted * squares
    constant = (weighted.sum(1, keepdim=True) - weighted) / torch.where(others > 0, others, 1)
    return torch.where(valid & (count > 1), shifted - constant, 0) / count.clamp(min=1)
