"""Estimator arithmetic stays float32 or wider under autocast, and the same to the bit wherever a row lies in memory."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def full_precision(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Runs `function` with autocast off; costs a flag look-up where it is off already."""

    @wraps(function)
    def wrapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        active = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
        if not active:
            return function(*args, **kwargs)
        with torch.autocast(active[0], enabled=False), torch.autocast(active[-1], enabled=False):
            return function(*args, **kwargs)

    return wrapped


def aligned(size: int) -> int:
    """The size to pad small square matrices to: factorisations round by where a matrix begins in memory."""
    return -(-size // 8) * 8
