"""Bytes of all storages that operations made and that are still alive."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts at the level of the dispatcher, backward included; what was there before (parameters, inputs) is left out.

    peak: the most bytes alive after any operation; now: bytes alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._upper = 0  # bytes alive, and those found dead since the last look
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._older: list[StorageWeakRef] = []
        self._old: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._storages:
                self._known(leaf)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._made(leaf)
        if self._upper > self.peak:
            self.peak = max(self.peak, self.now)
        return result

    def _known(self, tensor: Tensor) -> None:
        """Of a storage that no operation under this mode made: its weak reference keeps its address from reuse."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._old:
            self._old.add(storage._cdata)
            self._older.append(StorageWeakRef(storage))

    def _made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._old and key not in self._storages:
            self._storages[key] = StorageWeakRef(storage), storage.nbytes()
            self._upper += storage.nbytes()

    @property
    def now(self) -> int:
        for key in [key for key, (reference, _) in self._storages.items() if reference.expired()]:
            del self._storages[key]
        self._upper = sum(size for _, size in self._storages.values())
        return self._upper
