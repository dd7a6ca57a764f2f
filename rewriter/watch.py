"""What a graph would lose without a word, seen while the user's forward is traced."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx.proxy import TraceError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .proxies import Value, kind_of
from .traced import is_outside


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation that runs for real while tracing, and refuses those whose result must not be frozen."""

    def __init__(self, held: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held = held

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and importing the compiler takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise TraceError(f"draws random numbers outside the graph ({func})")
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and id(value) in self._held:
                raise TraceError(f"computes with `{self._held[id(value)]}` outside the graph ({func})")
        return func(*args, **(kwargs or {}))


@contextmanager
def watched_isinstance() -> Iterator[None]:
    """Answers isinstance(stand-in, ...) as the real value would, or raises where only a run can tell.

    fx's own proxies would answer False, and the user's forward would take the other branch without a word.
    """
    plain = builtins.isinstance
    is_tensor = torch.is_tensor.__code__

    def watched(value: Any, kinds: Any, /) -> bool:
        if not plain(value, Value):
            return plain(value, kinds)
        caller = sys._getframe(1)
        if is_outside(caller) and caller.f_code is not is_tensor:
            return plain(value, kinds)
        kind = kind_of(value)
        if kind is None:
            raise TraceError("asks for the type of a value that is only known when the model runs")
        return issubclass(kind, kinds)

    builtins.isinstance = watched
    try:
        yield
    finally:
        builtins.isinstance = plain


def modes() -> tuple[Any, ...]:
    """What surrounds an operation in eager and is not part of a graph."""
    enabled, target = torch.is_autocast_enabled, torch.get_autocast_dtype
    return (
        torch.is_grad_enabled(),
        torch._C._autograd._top_saved_tensors_default_hooks(True) is not None,
        enabled("cpu"),
        enabled("cuda"),
        target("cpu"),
        target("cuda"),
    )


_IN_PLACE = frozenset(
    ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")
)


def writes(kind: str, target: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call writes into its first argument."""
    if kind not in ("call_method", "call_function"):
        return False
    name = str(target) if kind == "call_method" else getattr(target, "__name__", "")
    if name.strip("_") in _IN_PLACE or kwargs.get("inplace") is True:
        return True
    return name.endswith("_") and not name.endswith("__")
