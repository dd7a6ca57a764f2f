"""Contributions of copies of rows: what each would contribute in place of the row it is a copy of."""

import functools

import pytest
import torch
import torch.nn.functional as F

from rewriter.loss import Loss
from rewriter.runtime.objective import Copied

ROWS, CLASSES = 5, 5  # equal, so that what has rows and what has classes must be told apart
INDEX = torch.tensor([3, 0, 3, 4, 1, 2, 0, 3])
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(ROWS, CLASSES, generator=GENERATOR, dtype=torch.float64)
COPIES = torch.randn(len(INDEX), CLASSES, generator=GENERATOR, dtype=torch.float64)
CLASS = torch.tensor([1, 0, -100, 4, 2])
SOFT = torch.rand(ROWS, CLASSES, generator=GENERATOR, dtype=torch.float64)
WEIGHT = torch.rand(CLASSES, generator=GENERATOR, dtype=torch.float64) + 0.1
MASK = torch.tensor([1.0, 0, 1, 1, 0], dtype=torch.float64)


def masked(output, target):
    """Contributions that share a divisor of the whole batch."""
    return MASK * (output - target).square().sum(1) / MASK.sum()


def per_position(output, target):
    return (output - target).square()


def mean_of_rows(output, target):
    return (output - target).abs().pow(3).sum(1).mean()


def sum_of_rows(output, target):
    return (output["a"] * target).sum() + output["b"].exp().sum()


CASES = [
    (F.cross_entropy, LOGITS, COPIES, CLASS),
    (functools.partial(F.cross_entropy, weight=WEIGHT, label_smoothing=0.1), LOGITS, COPIES, CLASS),
    (functools.partial(F.cross_entropy, reduction="sum"), LOGITS, COPIES, CLASS),
    (functools.partial(F.cross_entropy, reduction="none"), LOGITS, COPIES, CLASS),
    (F.mse_loss, LOGITS, COPIES, SOFT),
    (functools.partial(F.kl_div, reduction="batchmean"), LOGITS, COPIES, SOFT),
    (functools.partial(F.binary_cross_entropy_with_logits, weight=WEIGHT), LOGITS, COPIES, SOFT),
    (functools.partial(F.binary_cross_entropy_with_logits, weight=MASK[:, None]), LOGITS, COPIES, SOFT),
    (functools.partial(F.binary_cross_entropy_with_logits, weight=MASK), LOGITS[:, 0], COPIES[:, 0], SOFT[:, 0]),
    (masked, LOGITS, COPIES, SOFT),
    (per_position, LOGITS, COPIES, SOFT),
    (mean_of_rows, LOGITS, COPIES, SOFT),
    (sum_of_rows, {"a": LOGITS, "b": LOGITS[:, 1]}, {"a": COPIES, "b": COPIES[:, 1]}, SOFT),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_copy_counts_as_in_place_of_its_row(case):
    function, clean, copies, target = CASES[case]
    loss = Loss(function)
    loss.contributions(clean, target)
    found = loss.contributions(copies, target, Copied(INDEX, ROWS, clean))
    for place, row in enumerate(INDEX.tolist()):
        replaced = torch.utils._pytree.tree_map(
            lambda old, new, place=place, row=row: old.index_put((torch.tensor([row]),), new[place : place + 1]),
            clean,
            copies,
        )
        torch.testing.assert_close(found[place], loss.contributions(replaced, target)[row], rtol=1e-12, atol=1e-14)


def test_no_gradient_is_lost_and_no_copy_forgotten():
    loss = Loss(masked)
    loss.contributions(LOGITS, SOFT)
    copies = COPIES.clone().requires_grad_()
    loss.contributions(copies, SOFT, Copied(INDEX, ROWS, LOGITS)).sum().backward()
    assert ((copies.grad.abs().sum(1) > 0) == (MASK[INDEX] > 0)).all()
