"""`rewrite(model, plan)`: the front door."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from rewriter.passes.base import Entry
from rewriter.passes.targets import resolve
from rewriter.runtime.errors import RewriteError

from .loss import Loss
from .plan import Plan
from .rewritten import Rewritten


def rewrite(
    model: nn.Module,
    plan: Plan | Entry | Iterable[Entry] = (),
    *,
    loss: Callable[..., Any] | None = None,
    example: Any = None,
    seed: int = 0,
) -> Rewritten:
    """Return a drop-in for `model` whose `backward()` takes each gradient from where `plan` says.

    model: any `nn.Module`, in training mode when it is captured; its parameters stay the user's own objects.
    plan: what it does not name stays with automatic differentiation.
    loss: `loss(output, target)`, or `loss(output)` where the model computes its own; `step(x, target=y)` then returns
        exactly its value.
    example: a tuple of positional arguments, a dict of keyword arguments, or `(args, kwargs)`; captures now. Without
        it the first call captures, and `explain()` and `export()` raise until then.
    seed: of every random number a rule draws; the model's own random numbers stay torch's.

    Raises RewriteError where a plan entry names nothing or does not apply, where the model cannot be captured by any
    front end, and where a captured graph does not behave like the model.
    """
    if not isinstance(model, nn.Module):
        raise RewriteError("rewrite() takes an nn.Module", why=f"got {type(model).__name__}")
    _refuse_wrapped(model)
    plan = plan if isinstance(plan, Plan) else Plan([plan] if isinstance(plan, Entry) else plan)
    for entry in plan:
        resolve(entry.target, model)
    if "rewriter" in model._modules:
        raise RewriteError(
            "the model has a child called `rewriter`",
            why="learnt state is kept under that name in state_dict()",
            remedy="rename the child",
        )
    learning = next((entry for entry in plan if entry.learns), None)
    if learning is not None and example is None:
        raise RewriteError(
            "the plan has parameters of its own, and their shapes are not known yet",
            where=str(learning),
            why="an optimizer made before the first call would not have them",
            remedy="rewrite(..., example=(x,))",
        )
    step = Rewritten(model, plan, None if loss is None else Loss(loss), seed)
    if example is not None:
        args, kwargs = arguments(example)
        step.capture(*args, **kwargs)
    return step


def _refuse_wrapped(model: nn.Module) -> None:
    if isinstance(model, Rewritten):
        raise RewriteError("the model is rewritten already", remedy="rewrite(step.model, plan) with one plan")
    kind = type(model).__name__
    if kind in ("OptimizedModule", "DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"):
        raise RewriteError(
            f"the model is wrapped in {kind}",
            why="its own forward does work that a graph does not show",
            remedy=f"rewrite the inner module and wrap the result: {kind}(rewrite(model, plan))",
        )


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example as (args, kwargs); raises RewriteError where it is none."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple):
        if len(example) == 2 and isinstance(example[0], tuple) and isinstance(example[1], Mapping):
            return example[0], dict(example[1])
        return example, {}
    raise RewriteError(
        "the example was not understood",
        why=f"got {type(example).__name__}",
        remedy="a tuple of positional arguments, a dict of keyword arguments, or (args, kwargs)",
    )
