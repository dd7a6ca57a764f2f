"""The loss contract: the number a loss returns in eager, and the part each row has in it."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from rewriter.runtime.errors import RewriteError
from rewriter.runtime.objective import Copied

from .reductions import as_contributions, recognise, widened

_REMEDY = (
    "give one of torch's losses itself (options through functools.partial), or a loss that returns the contributions"
    " of the rows, shape (B,) or (B, T), instead of their sum"
)
_TOLERANCE = 1e3  # in units of the dtype's resolution
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Loss:
    """What a user gave to `rewrite(loss=...)`.

    takes_target: False where the function takes the output alone (a model that computes its own loss).
    Raises RewriteError at once where the function can be called neither as `f(output)` nor as `f(output, target)`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.takes_target = _takes_target(function)
        self._latest = ""  # type of the latest batch
        self._type = ""  # of a custom loss: "contributions", "mean" or "sum", found on the first batch
        self._proven: list[int] = []  # sizes of the batches on which that was seen to hold

    def __call__(self, output: Any, target: Any = None) -> Any:
        """Exactly what the user's function returns."""
        return self.function(output, target) if self.takes_target else self.function(output)

    def contributions(self, output: Any, target: Any = None, copied: Copied | None = None) -> Tensor:
        """The part each row has in the loss, differentiable in `output`; row i's part depends on output row i only.

        output, target: tensors or trees of them, rows in dim 0; target tensors with another dim 0 are the same for
        every row. Returns (B,) adding up to the loss, or the (B,) or (B, T) a custom loss itself returns; float32
        or wider.
        Torch's own losses are reduced per row. Any other loss is evaluated row by row (vmap) and its type, mean or
        sum, is the one that adds up; it must do so on the first two batches, on one of another size, on half of each
        of them and with its output changed.
        Raises RewriteError for a loss computed by the model, and for one that couples rows.
        """
        if not self.takes_target:
            raise RewriteError(
                "a loss computed by the model has no contributions of rows",
                why="it reads the output alone, so the model has already summed over the rows",
                remedy="let the model return its predictions and give loss=lambda output, target: ... with target=",
            )
        known = recognise(self.function)
        if known is not None and isinstance(output, Tensor):
            return known.contributions(output, target, copied)
        output, target = tree_map(widened, (output, target))
        if copied is not None:
            return self._of_copies(output, target, copied)
        rows = _count_rows(output)
        type_ = self._type
        if not type_ or self._wants_proof(rows):
            type_ = self._prove(_detached(output), target, rows)
        self._latest = type_
        if type_ == "contributions":
            return as_contributions(self.function(output, target), rows)
        values = self._row_values(output, target, _rowed((output, target), rows))
        return values / rows if type_ == "mean" else values

    def doubts(self, output: Any, target: Any = None) -> Tensor | None:
        """(B,): length of the gradient of each row's part in its output; None where the loss has none there.

        Cross-entropy: |p - y|, between 1 and sqrt(2) times 1 - p_y, the weight of the row beside it. In logits, whether
        the output is these, their log-softmax or their sigmoid.
        """
        known = recognise(self.function) if isinstance(output, Tensor) else None
        if known is not None:
            known, output = known.of_logits(output)
        leaves, structure = tree_flatten(output)
        rows = _count_rows(output)
        followed = [_has_rows(leaf, rows) and leaf.is_floating_point() for leaf in leaves]
        with torch.enable_grad():
            pairs = list(zip(leaves, followed, strict=True))
            given = [leaf.detach().requires_grad_() if follow else leaf for leaf, follow in pairs]
            own = tree_unflatten(given, structure)
            parts = self.contributions(own, target) if known is None else known.contributions(own, target)
            if not parts.requires_grad:
                return None
            wanted = [leaf for leaf, follow in zip(given, followed, strict=True) if follow]
            found = torch.autograd.grad(parts.sum(), wanted, allow_unused=True)
        squares = [each.double().reshape(rows, -1).square().sum(1) for each in found if each is not None]
        return torch.stack(squares).sum(0).sqrt()

    def _of_copies(self, output: Any, target: Any, copied: Copied) -> Tensor:
        index, rows = copied.source, copied.rows
        if self._latest != "contributions":
            rowed = [*_rowed(output, len(index)), *_rowed(target, rows)]
            given = tree_map(lambda leaf: leaf[index] if _has_rows(leaf, rows) else leaf, target)
            values = self._row_values(output, given, rowed)
            return values / rows if self._latest == "mean" else values
        # Such a loss may divide by something of the whole batch: copies take the place of their rows in it.
        found: list[tuple[Tensor, Tensor]] = []
        clean = _detached(tree_map(widened, copied.clean))
        for places in _without_repeats(index, rows):
            filled = tree_map(lambda old, new, places=places: _filled(old, new, index, places, rows), clean, output)
            found.append((places, as_contributions(self.function(filled, target), rows)[index[places]]))
        order = torch.cat([places for places, _ in found]).argsort()
        return torch.cat([values for _, values in found])[order]

    def _wants_proof(self, rows: int) -> bool:
        # One row adds up whatever the loss does, so it is no proof.
        return rows > 1 and (len(self._proven) < 2 or (len(set(self._proven)) == 1 and rows != self._proven[0]))

    def _row_values(self, output: Any, target: Any, rowed: Sequence[bool]) -> Tensor:
        """(B,): the loss of each row alone, as a batch of one; rowed: which leaves have rows."""
        leaves, structure = tree_flatten((output, target))
        places = [place for place, has_rows in enumerate(rowed) if has_rows]

        def one_row(*values: Tensor) -> Tensor:
            filled = list(leaves)
            for place, value in zip(places, values, strict=True):
                filled[place] = value.unsqueeze(0)
            result: Tensor = self.function(*tree_unflatten(filled, structure))
            return result.reshape(())

        try:
            return torch.vmap(one_row)(*(leaves[place] for place in places))
        except Exception as error:
            # Whatever a user's function raises on one row, the answer is the same: it cannot be split.
            raise RewriteError(
                "the loss cannot be evaluated row by row", why=f"{type(error).__name__}: {error}", remedy=_REMEDY
            ) from error

    @torch.no_grad()
    def _prove(self, output: Any, target: Any, rows: int) -> str:
        """The loss's type, seen to hold on this batch and remembered; raises where no type does."""
        value = self.function(output, target)
        if not isinstance(value, Tensor):
            raise RewriteError(f"the loss returns a {type(value).__name__}, not a tensor", remedy=_REMEDY)
        if value.ndim:
            self._prove_own(as_contributions(value, rows), output, target, rows)
            found = "contributions"
        elif self._type and not torch.isfinite(value):
            return self._type  # a diverged batch proves nothing, and is not ours to report
        else:
            found = self._find_type(output, target, rows)
        if rows > 1:
            self._type = found
            self._proven.append(rows)
        return found

    def _find_type(self, output: Any, target: Any, rows: int) -> str:
        batches = [
            (
                some_rows,
                self.function(some_output, some_target),
                self._row_values(some_output, some_target, _rowed((some_output, some_target), some_rows)),
            )
            for some_output, some_target, some_rows in _variants(output, target, rows)
        ]
        # Only the batch as it is must be finite: its variants may leave the loss's domain.
        batches = batches[:1] + [batch for batch in batches[1:] if torch.isfinite(batch[1])]
        for name in (self._type,) if self._type else ("mean", "sum"):
            if all(_adds_up(row_losses / (n if name == "mean" else 1), total) for n, total, row_losses in batches):
                return name
        reasons = [
            f"{n} rows together have the loss {total:.7g}; alone, their mean is {row_losses.mean():.7g}"
            f" and their sum {row_losses.sum():.7g}"
            for n, total, row_losses in batches
        ]
        raise _coupled("; ".join(reasons))

    def _prove_own(self, value: Tensor, output: Any, target: Any, rows: int) -> None:
        """Contributions a user returns may share a divisor, so only their independence is checked."""
        half = (rows + 1) // 2
        changed = tree_map(lambda old, new: _joined(old, new, half, rows), output, _mixed(output, rows))
        before, after = value[:half], self.function(changed, target)[:half]
        finite = torch.isfinite(before) & torch.isfinite(after)
        difference = (after - before)[finite].abs().sum()
        if difference > _TOLERANCE * torch.finfo(before.dtype).eps * before[finite].abs().sum():
            raise _coupled("the contributions of some rows change with the output of other rows")


def _takes_target(function: Callable[..., Any]) -> bool:
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):  # builtins without a signature
        return True
    parameters = signature.parameters.values()
    positional = [parameter for parameter in parameters if parameter.kind in _POSITIONAL]
    required = [parameter for parameter in positional if parameter.default is inspect.Parameter.empty]
    several = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    if len(required) > 2 or not (positional or several):
        raise RewriteError(
            "the loss can be called neither as f(output) nor as f(output, target)",
            why=f"its signature is {signature}",
            remedy="wrap it, for instance loss=lambda output, target: f(*output, target)",
        )
    return several or len(positional) > 1


def _count_rows(output: Any) -> int:
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not tensors:
        raise RewriteError(
            "the model's output holds no floating tensor, so no rows",
            why=f"it is a {type(output).__name__}",
            remedy="return a tensor, or a tuple, list or dict of tensors",
        )
    sizes = {len(leaf) if leaf.ndim else None for leaf in tensors}
    rows = len(tensors[0]) if tensors[0].ndim else None
    if rows is None or len(sizes) > 1:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in tensors)
        raise RewriteError(
            "the model's outputs do not all have the same rows in dim 0",
            why=f"their shapes are {shapes}; what has no rows may depend on all of them",
            remedy="return such terms per row, shape (B,), and add them up in the loss",
        )
    return rows


def _without_repeats(index: Tensor, rows: int) -> Iterator[Tensor]:
    """Places of the index, in groups none of which names a row twice."""
    order = index.argsort(stable=True)
    counts = torch.bincount(index, minlength=rows)
    nth = torch.arange(len(index), device=index.device) - (counts.cumsum(0) - counts)[index[order]]
    for number in range(int(counts.max())):
        yield order[nth == number]


def _filled(old: Any, new: Any, index: Tensor, places: Tensor, rows: int) -> Any:
    return old.index_put((index[places],), new[places].to(old.dtype)) if _has_rows(old, rows) else old


def _has_rows(leaf: Any, rows: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == rows


def _rowed(tree: Any, rows: int) -> list[bool]:
    return [_has_rows(leaf, rows) for leaf in tree_leaves(tree)]


def _detached(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def _variants(output: Any, target: Any, rows: int) -> Iterator[tuple[Any, Any, int]]:
    """The batch, half of it, and the batch with its output changed."""
    yield output, target, rows
    half = (rows + 1) // 2
    halved = tree_map(lambda leaf: leaf[:half] if _has_rows(leaf, rows) else leaf, (output, target))
    yield *halved, half
    yield _mixed(output, rows), target, rows


def _mixed(output: Any, rows: int) -> Any:
    """Every row of the output mixed, each in its own share, with random numbers of [0, 1/3].

    Outputs that happen to be alike (a head that starts at zero) hide a coupling. A convex mixture leaves no interval
    that holds [0, 1/3], so probabilities stay probabilities: torch's CUDA kernels abort on others.
    """
    generator = torch.Generator().manual_seed(0)

    def mix(leaf: Any) -> Any:
        if not (_has_rows(leaf, rows) and leaf.is_floating_point()):
            return leaf
        share = 0.6 * torch.rand(rows, *[1] * (leaf.ndim - 1), generator=generator)
        other = torch.rand(leaf.shape, generator=generator) / 3
        return leaf + share.to(leaf) * (other.to(leaf) - leaf)

    return tree_map(mix, output)


def _joined(old: Any, new: Any, half: int, rows: int) -> Any:
    return torch.cat((old[:half], new[half:])) if _has_rows(old, rows) else old


def _adds_up(parts: Tensor, total: Tensor) -> bool:
    tolerance = _TOLERANCE * torch.finfo(total.dtype).eps * parts.abs().sum()
    return bool((parts.sum() - total).abs() <= tolerance)


def _coupled(why: str) -> RewriteError:
    return RewriteError("the loss is no sum of its rows' contributions", why=why, remedy=_REMEDY)
