"""Which rows a loss could still move: in the same units for all rows, whatever the reduction, weights or masks."""

import functools

import cuts
import pytest
import torch
import torch.nn.functional as F
from cuts import Net, X, Y
from torch import nn

from rewriter import RewriteError, UlrCut
from rewriter.loss import Loss
from rewriter.runtime.estimators import copies

GENERATOR = torch.Generator().manual_seed(2)
LOGITS = 3 * torch.randn(9, 4, generator=GENERATOR, dtype=torch.float64)
CLASS = torch.randint(0, 4, (9,), generator=GENERATOR)
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
BITS = torch.randint(0, 2, (9, 4), generator=GENERATOR).double()
DOUBT = 1 - LOGITS.softmax(1).gather(1, CLASS[:, None])[:, 0]


def doubts(function, output=LOGITS, target=CLASS):
    found = Loss(function).doubts(output, target)
    assert found.shape == (len(output),)
    return found


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_doubts_what_it_gives_no_probability(reduction):
    """|p - y| / (1 - p_y) lies between 1 and sqrt(2)."""
    found = doubts(functools.partial(F.cross_entropy, reduction=reduction)) * (9 if reduction == "mean" else 1)
    ratio = found / DOUBT
    assert float(ratio.min()) >= 1
    assert float(ratio.max()) <= 2**0.5
    of_losses = -torch.expm1(-F.cross_entropy(LOGITS, CLASS, reduction="none") / 9)
    assert float((of_losses / DOUBT).max() / (of_losses / DOUBT).min()) > 2  # negative control: losses in other units


def test_class_weights_and_masks_are_the_rows():
    plain = doubts(functools.partial(F.cross_entropy, reduction="sum"))
    weighted = doubts(nn.CrossEntropyLoss(WEIGHT, ignore_index=int(CLASS[0]), reduction="sum").double())
    expected = torch.where(CLASS[0] == CLASS, 0, plain * WEIGHT[CLASS])
    torch.testing.assert_close(weighted, expected)


def test_logarithms_and_sigmoids_are_taken_as_the_logits_they_come_from():
    torch.testing.assert_close(doubts(F.nll_loss, LOGITS.log_softmax(1)), doubts(F.cross_entropy))
    found = doubts(F.binary_cross_entropy, LOGITS.sigmoid(), BITS)
    torch.testing.assert_close(found, doubts(F.binary_cross_entropy_with_logits, LOGITS, BITS), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found, (LOGITS.sigmoid() - BITS).norm(dim=1) / 36, rtol=1e-4, atol=1e-9)


def test_any_other_loss_by_its_gradient():
    own = doubts(lambda output, target: F.cross_entropy(output, target, label_smoothing=0.1))
    torch.testing.assert_close(own, doubts(functools.partial(F.cross_entropy, label_smoothing=0.1)))
    torch.testing.assert_close(doubts(F.mse_loss, LOGITS, BITS), 2 * (LOGITS - BITS).norm(dim=1) / 36)
    tokens = LOGITS.view(3, 3, 4).transpose(1, 2)
    found = doubts(functools.partial(F.cross_entropy, reduction="sum"), tokens, CLASS.view(3, 3))
    plain = doubts(functools.partial(F.cross_entropy, reduction="sum"))
    torch.testing.assert_close(found, plain.view(3, 3).norm(dim=1))
    assert Loss(lambda output, target: (output.argmax(1) != target).double()).doubts(LOGITS, CLASS) is None


def test_copies_do_not_depend_on_the_scale_of_the_loss():
    found = {}
    for reduction in ("mean", "sum", "none"):
        loss = functools.partial(F.cross_entropy, reduction=reduction)
        net = Net()
        with torch.no_grad():
            net.tail[2].weight *= 6
        step = cuts.cut(net, UlrCut("encoder", copies=6, sigma=1e-3, allocation="doubt"), loss=loss)
        value = step(X, target=Y)
        (found[reduction],) = torch.autograd.grad(value, net.encoder[0].weight, torch.ones_like(value))
    torch.testing.assert_close(found["sum"], len(X) * found["mean"])
    torch.testing.assert_close(found["none"], found["sum"])
    uniform = cuts.cut(net, UlrCut("encoder", copies=6, sigma=1e-3))
    assert not torch.allclose(cuts.gradients(uniform, X, Y)[1]["encoder.0.weight"], found["mean"])


def test_rows_that_do_not_count_get_the_fewest_copies(monkeypatch):
    seen = []
    own = copies.counts_by
    monkeypatch.setattr(copies, "counts_by", lambda *args: seen.append(own(*args)) or seen[-1])
    loss = functools.partial(F.cross_entropy, reduction="none")
    step = cuts.cut(Net(), UlrCut("encoder", copies=6, directions="gaussian", allocation="doubt"), loss=loss)
    weight = torch.ones(len(X), dtype=torch.float64)
    weight[:4] = 0
    step(X, target=Y).backward(weight)
    assert seen[0][:4].tolist() == [2] * 4
    assert seen[0][4:].min() > 2
    assert seen[0].sum() == 6 * len(X)


def test_a_loss_without_a_gradient_says_nothing_of_rows():
    def wrong(output, target):
        return (output.argmax(1) != target).double()

    step = cuts.cut(Net(), UlrCut("encoder", copies=4, sigma=0.5, allocation="doubt"), loss=wrong)
    value = step(X, target=Y)
    with pytest.raises(RewriteError, match="found no gradient of the loss"):
        value.sum().backward()
