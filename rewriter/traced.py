"""What the two front ends share: what they hand back, how they give up, and how they name things."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType

from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from .signature import Tree

_OUTSIDE = ("torch", "rewriter")


class UnfitError(Exception):
    """A front end cannot represent the model. where: the submodule ("" is the root)."""

    def __init__(self, reason: str, where: str = "") -> None:
        super().__init__(reason)
        self.reason, self.where = reason, where


@dataclass
class Traced:
    """What a front end hands back. `outputs` describes the values in the output node's first argument."""

    graph: fx.Graph
    outputs: Tree
    constants: dict[str, Tensor]
    inlined: dict[str, nn.Module]
    opaque: dict[str, str] = field(default_factory=dict)
    failed: frozenset[str] = frozenset()
    fixed: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    conditions: tuple[str, ...] = ()


def names_of_tensors(model: nn.Module) -> dict[int, str]:
    """id -> qualified name of every parameter, buffer and plain tensor attribute; tied ones under their first name."""
    names: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for values in (module._parameters, module._buffers, vars(module)):
            for key, value in values.items():
                if isinstance(value, Tensor):
                    names.setdefault(id(value), f"{prefix}.{key}" if prefix else key)
    return names


def describe(error: BaseException) -> str:
    """An exception as a reason: its first line, and the user's line it came from."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if not isinstance(error, (TraceError, UnfitError)):
        text = f"{type(error).__name__}: {text}"
    place = ""
    trace = error.__traceback__
    while trace is not None:
        if not is_outside(trace.tb_frame):
            place = place_of(trace.tb_frame, trace.tb_lineno)
        trace = trace.tb_next
    return f"{text} ({place})" if place else text


def is_outside(frame: FrameType) -> bool:
    """Whether a frame is torch's or ours rather than the user's."""
    name = str(frame.f_globals.get("__name__", ""))
    return name.partition(".")[0] in _OUTSIDE and not name.startswith("rewriter.examples")


def place_of(frame: FrameType, line: int) -> str:
    return f"{os.path.basename(frame.f_code.co_filename)}:{line} in {frame.f_code.co_name}"
