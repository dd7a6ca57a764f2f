"""Losses: eager's number, and contributions of rows that add up to it."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.loss import Loss
from rewriter.runtime.errors import RewriteError

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using a target size", "ignore:reduction. 'mean'", "ignore:There is a perf"
)

ROWS, CLASSES, TIMES = 7, 5, 4
REDUCTIONS = ("mean", "sum")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def indices(*shape: int, high: int = CLASSES, seed: int = 1) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = numbers(CLASSES, seed=2).abs() + 0.1
LOGITS, TOKENS = numbers(ROWS, CLASSES), numbers(ROWS, CLASSES, TIMES)
CLASS, TOKEN = indices(ROWS), indices(ROWS, TIMES)
SOFT, SOFT_TOKEN = numbers(ROWS, CLASSES, seed=3).softmax(1), numbers(ROWS, CLASSES, TIMES, seed=3).softmax(1)
SIGNS = indices(ROWS, CLASSES, high=2) * 2.0 - 1
BITS = indices(ROWS, CLASSES, high=2).double()


def ignored(target: Tensor, index: int) -> Tensor:
    target = target.clone()
    target.flatten()[::3] = index
    return target


CASES: list[tuple[Callable[..., Tensor], dict[str, Any], Tensor, Tensor]] = [
    (F.l1_loss, {}, TOKENS, numbers(ROWS, CLASSES, TIMES, seed=4)),
    (F.mse_loss, {}, LOGITS, SOFT),
    (F.mse_loss, {}, numbers(ROWS), numbers(ROWS, seed=4)),
    (F.mse_loss, {}, LOGITS, torch.tensor(0.5, dtype=torch.float64)),
    (F.smooth_l1_loss, {"beta": 0.3}, LOGITS, SOFT),
    (F.huber_loss, {"delta": 0.3}, LOGITS, SOFT),
    (F.poisson_nll_loss, {"log_input": False, "full": True}, SOFT, indices(ROWS, CLASSES).double()),
    (F.kl_div, {}, LOGITS.log_softmax(1), SOFT),
    (F.kl_div, {"log_target": True}, LOGITS.log_softmax(1), SOFT.log()),
    (F.binary_cross_entropy, {"weight": WEIGHT}, LOGITS.sigmoid(), BITS),
    (F.binary_cross_entropy_with_logits, {"weight": WEIGHT, "pos_weight": WEIGHT.flip(0)}, LOGITS, BITS),
    (F.hinge_embedding_loss, {"margin": 0.7}, LOGITS, SIGNS),
    (F.soft_margin_loss, {}, LOGITS, SIGNS),
    (F.multilabel_margin_loss, {}, LOGITS, torch.tensor([[0, 2, -1, 0, 0], *[[3, -1, 0, 0, 0]] * (ROWS - 1)])),
    (F.multilabel_soft_margin_loss, {"weight": WEIGHT}, LOGITS, BITS),
    (F.multi_margin_loss, {"p": 2, "margin": 0.5, "weight": WEIGHT}, LOGITS, CLASS),
    (F.nll_loss, {}, LOGITS.log_softmax(1), CLASS),
    (F.nll_loss, {"weight": WEIGHT, "ignore_index": -1}, TOKENS.log_softmax(1), ignored(TOKEN, -1)),
    (F.cross_entropy, {}, LOGITS, CLASS),
    (F.cross_entropy, {}, TOKENS, ignored(TOKEN, -100)),
    (F.cross_entropy, {"weight": WEIGHT}, LOGITS, CLASS),
    (F.cross_entropy, {"ignore_index": 2}, LOGITS, ignored(CLASS, 2)),
    (F.cross_entropy, {"weight": WEIGHT, "ignore_index": 2}, TOKENS, TOKEN),
    (F.cross_entropy, {"weight": WEIGHT, "ignore_index": -7, "label_smoothing": 0.2}, TOKENS, ignored(TOKEN, -7)),
    (F.cross_entropy, {"label_smoothing": 0.2}, LOGITS, ignored(CLASS, -100)),
    (F.cross_entropy, {}, LOGITS, SOFT),
    (F.cross_entropy, {"weight": WEIGHT, "label_smoothing": 0.1}, TOKENS, SOFT_TOKEN),
]
MODULES = {
    F.l1_loss: nn.L1Loss,
    F.mse_loss: nn.MSELoss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.huber_loss: nn.HuberLoss,
    F.poisson_nll_loss: nn.PoissonNLLLoss,
    F.kl_div: nn.KLDivLoss,
    F.binary_cross_entropy: nn.BCELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.hinge_embedding_loss: nn.HingeEmbeddingLoss,
    F.soft_margin_loss: nn.SoftMarginLoss,
    F.multilabel_margin_loss: nn.MultiLabelMarginLoss,
    F.multilabel_soft_margin_loss: nn.MultiLabelSoftMarginLoss,
    F.multi_margin_loss: nn.MultiMarginLoss,
    F.nll_loss: nn.NLLLoss,
    F.cross_entropy: nn.CrossEntropyLoss,
}
NAMES = [f"{case[0].__name__}-{'-'.join(case[1]) or 'plain'}-{case[2].ndim}d" for case in CASES]


def assert_adds_up(loss: Loss, output: Tensor, target: Any) -> Tensor:
    """The oracle: sum and gradient of the contributions are those of the eager loss."""
    output = output.clone().requires_grad_()
    eager, parts = loss.function(output, target), loss.contributions(output, target)
    assert parts.shape == (len(output),)
    torch.testing.assert_close(parts.sum(), eager, rtol=1e-12, atol=1e-14)
    (expected,) = torch.autograd.grad(eager, output)
    (gradient,) = torch.autograd.grad(parts.sum(), output, retain_graph=True)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    (first,) = torch.autograd.grad(parts[0], output)
    assert first[1:].count_nonzero() == 0
    return parts


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("function", "options", "output", "target"), CASES, ids=NAMES)
def test_torch_losses_add_up(
    function: Callable[..., Tensor], options: dict[str, Any], output: Tensor, target: Tensor, reduction: str
) -> None:
    as_function = Loss(functools.partial(function, reduction=reduction, **options))
    as_module = Loss(MODULES[function](reduction=reduction, **options))
    assert torch.equal(as_function(output, target), function(output, target, reduction=reduction, **options))
    assert torch.equal(as_module(output, target), as_function(output, target))
    parts = assert_adds_up(as_function, output, target)
    assert torch.equal(assert_adds_up(as_module, output, target), parts)


def test_bare_function_and_batchmean() -> None:
    assert_adds_up(Loss(F.cross_entropy), LOGITS, CLASS)
    assert_adds_up(Loss(nn.KLDivLoss(reduction="batchmean")), TOKENS.log_softmax(1), SOFT_TOKEN)
    assert_adds_up(Loss(functools.partial(F.gaussian_nll_loss, var=numbers(ROWS, 1).abs())), LOGITS, SOFT)


def test_a_divisor_without_weights_would_be_seen() -> None:
    """Negative control: the mean over entries, the usual mistake, does not add up."""
    cases = [case for case in CASES if case[0] is F.cross_entropy and case[1] and case[2].shape != case[3].shape]
    for function, options, output, target in cases:
        wrong = function(output, target, reduction="none", **options).mean()
        assert (wrong - function(output, target, **options)).abs() > 1e-3
    assert len(cases) == 5


def test_all_rows_ignored_is_what_eager_says() -> None:
    target = torch.full((ROWS,), -100)
    assert F.cross_entropy(LOGITS, target).isnan()
    assert Loss(F.cross_entropy).contributions(LOGITS, target).sum().isnan()


def test_unreduced_losses_are_their_own_contributions() -> None:
    loss = Loss(nn.CrossEntropyLoss(reduction="none"))
    assert torch.equal(loss.contributions(TOKENS, TOKEN), loss(TOKENS, TOKEN))
    assert loss.contributions(TOKENS, TOKEN).shape == (ROWS, TIMES)
    with pytest.raises(RewriteError, match="sum the entries inside each row"):
        Loss(nn.MSELoss(reduction="none")).contributions(TOKENS, SOFT_TOKEN)


def test_targets_that_broadcast_over_the_output_are_refused() -> None:
    """(B,) against (B, 1) is (B, B) entries: dim 0 is the target's rows."""
    with pytest.raises(RewriteError, match="same shape"):
        Loss(F.mse_loss).contributions(numbers(ROWS), numbers(ROWS, 1))
    with pytest.raises(RewriteError, match="same shape"):
        Loss(F.cross_entropy).contributions(LOGITS[0], CLASS[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    loss = Loss(nn.CrossEntropyLoss(weight=WEIGHT.to(dtype)))
    parts = loss.contributions(LOGITS.to(dtype), CLASS)
    assert parts.dtype == torch.float32
    torch.testing.assert_close(parts.sum().to(dtype), loss(LOGITS.to(dtype), CLASS), rtol=2e-2, atol=0)
    custom = Loss(lambda output, target: (output - target).square().mean())
    assert custom.contributions(LOGITS.to(dtype), SOFT.to(dtype)).dtype == torch.float32


def test_options_of_a_module_are_read_live() -> None:
    module = nn.CrossEntropyLoss(weight=WEIGHT)
    loss = Loss(module)
    before = loss.contributions(LOGITS, CLASS)
    module.weight = WEIGHT.flip(0)
    assert not torch.equal(assert_adds_up(loss, LOGITS, CLASS), before)


@pytest.mark.parametrize(
    "function",
    [
        lambda output, target: F.cross_entropy(output, target),
        lambda output, target: F.cross_entropy(output, target, reduction="sum"),
        lambda output, target: (output.logsumexp(1) - output.gather(1, target[:, None])[:, 0]).mean() + 0.25,
        lambda output, target: F.cross_entropy(output, target) + 0.1 * output.square().mean(),
        lambda output, target: F.cross_entropy(output, target, reduction="sum") / 64,
        lambda output, target: F.multi_margin_loss(output, target, weight=WEIGHT),
    ],
)
def test_custom_losses_add_up(function: Callable[..., Tensor]) -> None:
    loss = Loss(function)
    for rows in (ROWS, 4, 1, ROWS):
        assert_adds_up(loss, LOGITS[:rows], CLASS[:rows])


def test_token_losses_flattened_by_the_user() -> None:
    loss = Loss(lambda output, target: F.cross_entropy(output.flatten(0, 1), target.flatten()))
    assert_adds_up(loss, numbers(ROWS, TIMES, CLASSES), TOKEN)
    with_padding = Loss(lambda output, target: F.cross_entropy(output.flatten(0, 1), target.flatten()))
    with pytest.raises(RewriteError, match="sum of its rows"):  # the count of kept tokens couples rows
        with_padding.contributions(numbers(ROWS, TIMES, CLASSES), ignored(TOKEN, -100))
    own = Loss(lambda output, target: F.cross_entropy(output.transpose(1, 2), target, reduction="none") / 9)
    assert own.contributions(numbers(ROWS, TIMES, CLASSES), ignored(TOKEN, -100)).shape == (ROWS, TIMES)


def test_one_row_settles_nothing() -> None:
    loss = Loss(lambda output, target: F.cross_entropy(output, target, reduction="sum"))
    assert_adds_up(loss, LOGITS[:1], CLASS[:1])
    assert_adds_up(loss, LOGITS, CLASS)


def contrastive(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output @ output.T, torch.arange(len(output)))


COUPLED = [
    contrastive,
    lambda output, target: F.mse_loss(output, F.one_hot(target, CLASSES).double()).sqrt(),
    lambda output, target: output.sum().square(),
    lambda output, target: ((output - output.mean(0)) / output.std(0, correction=0)).square()[:, target].mean(),
    lambda output, target: (output.square().sum(1) / output.square().sum()).log().sum(),
    lambda output, target: F.cross_entropy(output, target, weight=WEIGHT),
    lambda output, target: F.cross_entropy(output @ output.T, torch.arange(len(output)), reduction="none"),
    lambda output, target: (rows := output.square().sum(1)) - rows.mean(),
]


@pytest.mark.parametrize("function", COUPLED)
def test_losses_that_couple_rows_are_refused(function: Callable[..., Tensor]) -> None:
    with pytest.raises(RewriteError, match="shape \\(B,\\) or \\(B, T\\)"):
        Loss(function).contributions(LOGITS, CLASS)


def test_coupling_is_seen_when_all_rows_are_alike() -> None:
    """A head that starts at zero: the root of the mean is the mean of the roots, in value and gradient."""
    rows = torch.ones(ROWS, CLASSES, dtype=torch.float64)

    def root(output: Tensor, target: None) -> Tensor:
        return output.square().mean().sqrt()

    alike = torch.stack([root(row, None) for row in rows]).mean()
    assert torch.equal(alike, root(rows, None))  # what a check of this batch alone would accept
    with pytest.raises(RewriteError, match="no sum of its rows"):
        Loss(root).contributions(rows, None)


def test_a_coupling_that_starts_on_the_second_batch_is_seen() -> None:
    loss = Loss(lambda output, target: output.sum().clamp(min=40).log() + output.sum(1).mean())
    loss.contributions(0.01 * torch.ones(ROWS, CLASSES), None)
    with pytest.raises(RewriteError, match="no sum of its rows"):
        loss.contributions(30.0 * torch.ones(ROWS, CLASSES), None)


def test_losses_that_cannot_be_split_say_why() -> None:
    masked = Loss(lambda output, target: output[target > 2].square().mean())
    with pytest.raises(RewriteError, match="row by row") as caught:
        masked.contributions(LOGITS, CLASS)
    assert caught.value.__cause__ is not None
    with pytest.raises(RewriteError, match="row by row"):
        Loss(lambda output, target: F.dropout(output, 0.5).mean()).contributions(LOGITS, None)
    with pytest.raises(RewriteError, match="returns a float"):
        Loss(lambda output, target: output.mean().item()).contributions(LOGITS, None)


def test_trees() -> None:
    def function(output: dict[str, Tensor], target: tuple[Tensor, dict[str, Any]]) -> Tensor:
        classes, rest = target
        score = F.cross_entropy(output["logits"], classes) * rest["scale"]
        return score + F.mse_loss(output["value"], rest["value"]) + (0 if rest["none"] is None else 1)

    output = {"logits": LOGITS.clone().requires_grad_(), "value": numbers(ROWS, seed=8).requires_grad_()}
    target = (CLASS, {"scale": torch.tensor(2.0), "value": numbers(ROWS, seed=9), "none": None})
    parts = Loss(function).contributions(output, target)
    torch.testing.assert_close(parts.sum(), function(output, target), rtol=1e-12, atol=0)
    gradient = torch.autograd.grad(parts.sum(), [*output.values()])
    torch.testing.assert_close(gradient, torch.autograd.grad(function(output, target), [*output.values()]))


def test_an_output_without_rows_is_refused() -> None:
    """A balance term made inside the model depends on all rows, though it adds up."""
    loss = Loss(lambda output, target: F.cross_entropy(output[0], target) + output[1])
    with pytest.raises(RewriteError, match="per row, shape \\(B,\\)"):
        loss.contributions((LOGITS, LOGITS.square().mean()), CLASS)
    with pytest.raises(RewriteError, match="no floating tensor"):
        loss.contributions((CLASS, None), CLASS)


def test_diverged_batches() -> None:
    loss = Loss(lambda output, target: F.cross_entropy(output, target))
    assert_adds_up(loss, LOGITS, CLASS)
    assert not loss.contributions(LOGITS * torch.inf, CLASS).isfinite().all()
    with pytest.raises(RewriteError, match="nan"):
        Loss(lambda output, target: F.cross_entropy(output, target)).contributions(LOGITS * torch.inf, CLASS)


def test_global_random_numbers_are_untouched() -> None:
    state = torch.random.get_rng_state()
    Loss(lambda output, target: F.cross_entropy(output, target)).contributions(LOGITS, CLASS)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_losses_of_the_output_alone() -> None:
    loss = Loss(lambda output: output.loss)
    assert not loss.takes_target

    class Output:
        loss = torch.tensor(3.0)

    assert loss(Output()) is Output.loss
    with pytest.raises(RewriteError, match="predictions"):
        loss.contributions(Output())


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (F.cross_entropy, True),
        (nn.MSELoss(), True),
        (functools.partial(F.mse_loss, reduction="sum"), True),
        (functools.partial(F.mse_loss, target=SOFT), False),
        (lambda *arguments: arguments[0], True),
        (lambda output, target=None: output, True),
        (lambda output, *, scale=2: output, False),
        (torch.dist, True),
    ],
)
def test_takes_target(function: Callable[..., Any], expected: bool) -> None:
    assert Loss(function).takes_target is expected


def test_a_loss_that_cannot_be_called_is_refused_at_once() -> None:
    with pytest.raises(RewriteError, match="wrap it"):
        Loss(nn.GaussianNLLLoss())
    with pytest.raises(RewriteError, match="wrap it"):
        Loss(lambda: 0)
