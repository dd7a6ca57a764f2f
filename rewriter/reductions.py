"""Torch's own losses, reduced per row instead of over the batch."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rewriter.runtime.errors import RewriteError
from rewriter.runtime.objective import Copied

_MODULES: dict[type[nn.Module], tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    nn.L1Loss: (F.l1_loss, ()),
    nn.MSELoss: (F.mse_loss, ()),
    nn.SmoothL1Loss: (F.smooth_l1_loss, ("beta",)),
    nn.HuberLoss: (F.huber_loss, ("delta",)),
    nn.PoissonNLLLoss: (F.poisson_nll_loss, ("log_input", "full", "eps")),
    nn.KLDivLoss: (F.kl_div, ("log_target",)),
    nn.BCELoss: (F.binary_cross_entropy, ("weight",)),
    nn.BCEWithLogitsLoss: (F.binary_cross_entropy_with_logits, ("weight", "pos_weight")),
    nn.HingeEmbeddingLoss: (F.hinge_embedding_loss, ("margin",)),
    nn.SoftMarginLoss: (F.soft_margin_loss, ()),
    nn.MultiLabelMarginLoss: (F.multilabel_margin_loss, ()),
    nn.MultiLabelSoftMarginLoss: (F.multilabel_soft_margin_loss, ("weight",)),
    nn.MultiMarginLoss: (F.multi_margin_loss, ("p", "margin", "weight")),
    nn.NLLLoss: (F.nll_loss, ("weight", "ignore_index")),
    nn.CrossEntropyLoss: (F.cross_entropy, ("weight", "ignore_index", "label_smoothing")),
}
_PER_CLASS = {F.nll_loss, F.cross_entropy, F.multi_margin_loss, F.multilabel_margin_loss, F.multilabel_soft_margin_loss}
_FUNCTIONS = {function for function, _ in _MODULES.values()} | {F.gaussian_nll_loss}
_IGNORE_INDEX = -100  # torch's default


@dataclass(frozen=True)
class TorchLoss:
    """One of torch's losses with its options; `reduction` is among them."""

    function: Callable[..., Tensor]
    options: dict[str, Any]

    def contributions(self, output: Tensor, target: Any, copied: Copied | None = None) -> Tensor:
        """The entries of reduction="none", summed inside each row and divided as the reduction divides.

        output: rows in dim 0; copied: which rows of the batch, whose target and divisor count. Returns (B,), float32
        or wider, adding up to the reduced loss; with reduction="none" the (B,) or (B, T) entries themselves.
        Raises RewriteError where the entries are not those of the output's rows (no row dimension, a target that
        broadcasts over the output).
        """
        options = {name: value for name, value in self.options.items() if name != "reduction"}
        output, target, options = tree_map(widened, (output, target, options))
        given, own = (target, options) if copied is None else tree_map(_like(output, copied), (target, options))
        entries = self.function(output, given, reduction="none", **own)
        self._check_rows(output, entries)
        reduction = self.options.get("reduction", "mean")
        if reduction == "none":
            return as_contributions(entries, len(output))
        per_row = entries.flatten(1).sum(1) if entries.ndim > 1 else entries
        if reduction == "sum":
            return per_row
        whole = output if copied is None else widened(copied.clean)
        return per_row / self._divisor(reduction, whole, target, entries, options)

    def of_logits(self, output: Tensor) -> tuple["TorchLoss", Tensor]:
        """The same loss of what the output is the logarithm or the sigmoid of, where it takes one of these."""
        if self.function is F.nll_loss:
            return TorchLoss(F.cross_entropy, self.options), output  # logarithms of probabilities are logits, too
        if self.function is F.binary_cross_entropy:
            return TorchLoss(F.binary_cross_entropy_with_logits, self.options), torch.logit(output, 1e-6)
        return self, output

    def _check_rows(self, output: Tensor, entries: Tensor) -> None:
        if self.function in _PER_CLASS:
            fits = entries.ndim > 0 and output.ndim > 1 and len(entries) == len(output)
        else:
            # An entry of the output's own shape belongs to that output entry; any other shape means broadcasting,
            # and then dim 0 may be the target's.
            fits = output.ndim > 0 and entries.shape == output.shape
        if not fits:
            raise RewriteError(
                f"{self.function.__name__} gives no contributions of rows here",
                why=f"an output of shape {tuple(output.shape)} has loss entries of shape {tuple(entries.shape)}",
                remedy="give output and target the same shape, with the rows in dim 0",
            )

    def _divisor(
        self, reduction: str, output: Tensor, target: Tensor, entries: Tensor, options: dict[str, Any]
    ) -> Tensor | int:
        if reduction == "batchmean":
            return len(output)
        by_index = self.function is F.nll_loss or (self.function is F.cross_entropy and target.shape != output.shape)
        if not by_index:
            return entries[0].numel() * len(output)
        kept: Tensor = target != options.get("ignore_index", _IGNORE_INDEX)
        weight: Tensor | None = options.get("weight")
        return kept.sum() if weight is None else (weight[target.where(kept, 0)] * kept).sum()


def recognise(function: Callable[..., Any]) -> TorchLoss | None:
    """`function` as one of torch's losses: an nn.*Loss, an F.* function or a functools.partial of one; else None.

    A module's options are read now, so that a weight moved between calls is seen.
    """
    if isinstance(function, nn.Module):
        return _from_module(function)
    options: dict[str, Any] = {}
    if isinstance(function, functools.partial) and not function.args:
        options = function.keywords
        function = function.func
    legacy = {"size_average", "reduce"} & options.keys()
    known = any(function is candidate for candidate in _FUNCTIONS)  # `in` would ask for a hash
    return TorchLoss(function, options) if known and not legacy else None


def _from_module(module: nn.Module) -> TorchLoss | None:
    if type(module) not in _MODULES or module._forward_hooks or module._forward_pre_hooks:
        return None
    function, names = _MODULES[type(module)]
    return TorchLoss(function, {name: getattr(module, name) for name in ("reduction", *names)})


def _like(output: Tensor, copied: Copied) -> Callable[[Any], Any]:
    """What a target or an option is for the copied rows; one that has no rows is the same for all."""

    def taken(value: Any) -> Any:
        has_rows = isinstance(value, Tensor) and value.ndim > 0 and len(value) == copied.rows
        per_class = has_rows and value.ndim < min(2, output.ndim) and value.is_floating_point()
        return value[copied.source] if has_rows and not per_class else value

    return taken


def as_contributions(entries: Tensor, rows: int) -> Tensor:
    """`entries` themselves, where their shape is (B,) or (B, T); else RewriteError."""
    if entries.ndim not in (1, 2) or len(entries) != rows:
        raise RewriteError(
            "the loss returns neither one number nor contributions of rows",
            why=f"its shape is {tuple(entries.shape)} for {rows} rows; contributions are ({rows},) or ({rows}, T)",
            remedy="sum the entries inside each row, for instance `entries.flatten(1).sum(1)`",
        )
    return entries


def widened(value: Any) -> Any:
    """A floating tensor in float32 or wider; anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < torch.float32.itemsize:
        return value.float()
    return value
