"""The thread-local state that decides what an operation does, recorded once and entered again elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch

_KINDS = ("cpu", "cuda")
_HAS_CUDA = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Ambient:
    """Autocast, deterministic flags and CUDA device at one moment.

    autocast: None where it is off; else per device kind (enabled, dtype), and whether casts are cached.
    The autograd engine runs backward without the autocast that its forward had, and worker threads inherit none of it;
    whatever a region evaluates there must run as it would have in forward.
    """

    autocast: tuple[tuple[tuple[bool, torch.dtype], ...], bool] | None
    deterministic: bool
    warn_only: bool
    device: int | None

    @property
    def half(self) -> bool:
        """Whether autocast computes in float16 somewhere."""
        return self.autocast is not None and any(on and dtype == torch.float16 for on, dtype in self.autocast[0])

    @staticmethod
    def now() -> Ambient:
        autocast = None
        if torch._C._is_any_autocast_enabled():
            kinds = tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _KINDS)
            autocast = kinds, torch.is_autocast_cache_enabled()
        deterministic = torch._C._get_deterministic_algorithms()
        device = None
        if _HAS_CUDA and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            device = torch.cuda.current_device()
        if autocast is None and device is None and not deterministic:
            return PLAIN
        warn_only = deterministic and torch._C._get_deterministic_algorithms_warn_only()
        return Ambient(autocast, deterministic, warn_only, device)

    def enter(self) -> AbstractContextManager[None]:
        """Re-enter the recorded state; next to free where nothing differs."""
        current = Ambient.now()
        return nullcontext() if current is self or current == self else self._enter(current)

    @contextmanager
    def _enter(self, current: Ambient) -> Iterator[None]:
        with ExitStack() as stack:
            if self.autocast != current.autocast:
                kinds, cached = self.autocast or (tuple((False, torch.get_autocast_dtype(k)) for k in _KINDS), True)
                for kind, (enabled, dtype) in zip(_KINDS, kinds, strict=True):
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cached))
            if (self.deterministic, self.warn_only) != (current.deterministic, current.warn_only):
                torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
                stack.callback(torch.use_deterministic_algorithms, current.deterministic, warn_only=current.warn_only)
            if self.device is not None and self.device != current.device:
                stack.enter_context(torch.cuda.device(self.device))
            yield


PLAIN = Ambient(None, False, False, None)  # the usual case costs no object
