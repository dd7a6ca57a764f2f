"""Windows over a chain: one pass from its first block to its last, in which early windows give their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .chain import Chain, Run, Stream
from .checkpoint import Checkpointed
from .errors import RewriteError
from .heads import Heads
from .ledger import Ledger
from .replay import Recorder
from .rule import Call

Optional = Tensor | None
Gathered = dict[str | int, Tensor]  # gradients, by name of an input or id of a parameter

# Of a loss whose gradients pass through float16, whose largest number is just below 2^16.
_LARGEST_SCALE, _SMALLEST_SCALE, _SHRINK = 2.0**15, 2.0**-20, 2.0**-5


class Windows(NamedTuple):
    """A window starts at every `stride`-th block and looks at the value `horizon` blocks on; the last one is the end.

    An early window supplies the gradients of its first `stride` blocks; the last `horizon` blocks have theirs from the
    model's own end.
    """

    blocks: int
    horizon: int
    stride: int

    @property
    def last(self) -> int:
        """Where the last window starts."""
        return self.blocks - self.horizon

    @property
    def starts(self) -> range:
        """Of the windows before the last one."""
        return range(0, self.last, self.stride)

    def own(self, start: int) -> range:
        """The blocks whose gradients the window from `start` on supplies."""
        return range(start, min(start + self.stride, self.last))

    @property
    def vjps(self) -> int:
        """Of one backward, where every block has something to train."""
        return (len(self.starts) + 1) * self.horizon


class Passage:
    """One pass of a call through the chain. `run.gradients` is what early windows gave so far.

    blocks: what runs and pulls them: the run itself, on tapes, or with each block checkpointed (recorder given).
    """

    def __init__(
        self,
        windows: Windows,
        chain: Chain,
        call: Call,
        inputs: Sequence[Any],
        parameters: Sequence[Tensor],
        ledger: Ledger,
        recorder: Recorder | None,
    ) -> None:
        """parameters: the chain's, without the heads'."""
        needed = call.needed[: len(inputs) + len(parameters)]
        self.windows, self.chain, self.call, self.ledger = windows, chain, call, ledger
        self.run = Run(chain, call._replace(needed=needed), inputs, parameters)
        self.blocks = self.run if recorder is None else Checkpointed(self.run, recorder, call, ledger)
        self.reached = 0
        self._into = call.needed[chain.inputs.index(chain.stream[0])]
        # What is read beside the stream stays; the stream's values go with the block that reads them.
        self._stay = {name for block in chain.blocks for name in block.reads[1:]} | set(chain.outputs)

    def wanted(self, start: int) -> bool:
        """Whether the window from `start` on has gradients to supply."""
        return (start == 0 and self._into) or any(map(self.run.trains, self.windows.own(start)))

    def beside(self) -> dict[str, Any]:
        """What blocks read beside the stream, apart from the region's outputs, which would hold what holds them."""
        sides = {name for block in self.chain.blocks for name in block.reads[1:]}
        values = {name: value for name, value in self.run.values.items() if name in sides}
        return {name: value.detach() if isinstance(value, Tensor) else value for name, value in values.items()}

    def advance(self, goal: int, taped: bool = True) -> None:
        """Runs the blocks up to `goal`; taped: so that they can be pulled."""
        for number in range(self.reached, goal):
            if taped:
                self.blocks.block(number)
            else:
                self.run.block(number, taped=False)
            name = self.chain.stream[number]
            if name not in self._stay:
                del self.run.values[name]
        self.reached = max(self.reached, goal)

    def early(self, heads: Heads, parameters: Sequence[Sequence[Tensor]], weight: Optional) -> None:
        """Every early window in turn: its blocks run, give their gradients, and are freed.

        parameters: of each window's head; weight: cotangent of the loss, None for gradients of the bare loss.
        """
        for window, start in enumerate(self.windows.starts):
            end = start + self.windows.horizon
            self.advance(end)
            if self.wanted(start):
                before, self.run.gradients = self.run.gradients, {}
                scale = self._window(window, start, self.run.values[self.chain.stream[end]], heads, parameters, weight)
                found, self.run.gradients = self.run.gradients, before
                for key, gradient in found.items():
                    self.run.add(key, gradient if scale == 1.0 else gradient.float() / scale)
            for number in self.windows.own(start):
                self.blocks.free(number)

    def _window(
        self,
        window: int,
        start: int,
        value: Tensor,
        heads: Heads,
        parameters: Sequence[Sequence[Tensor]],
        weight: Optional,
    ) -> float:
        """Adds one window's gradients to `run.gradients`; returns the power of two they are multiplied by."""
        assert self.call.objective is not None
        objective = self.call.objective
        half = weight is None and (value.dtype == torch.float16 or self.call.ambient.half)
        alias = value.detach().requires_grad_()
        given = [parameter.detach().requires_grad_() for parameter in parameters[window]]
        with torch.enable_grad(), _own_tape():
            loss = _scalar(heads.loss(window, alias, objective, given), self.call.region)
            if not loss.requires_grad:
                return 1.0
            scale = _scale(loss, alias) if half else 1.0
            seed = torch.full_like(loss, scale) if weight is None else weight.to(loss).reshape(loss.shape)
            found = torch.autograd.grad(loss, (alias, *given), seed, allow_unused=True)
        for parameter, gradient in zip(heads.trainable(window), found[1:], strict=True):
            if gradient is not None:
                self.run.add(id(parameter), gradient)
        self._pull(start, found[0])
        return scale

    def _pull(self, start: int, cotangent: Optional) -> None:
        """The vjp of a window from the cotangent of its end: stream alone behind its own blocks."""
        own = self.windows.own(start)
        for number in reversed(range(start, start + self.windows.horizon)):
            if cotangent is None:
                return
            mine = number in own
            stream: Stream = "both" if number > start or start == 0 else "none"
            given = [cotangent, *[None] * (len(self.chain.blocks[number].writes) - 1)]
            cotangent = self.blocks.pull(number, given, self.ledger, keep=not mine, stream=stream, rest=mine)
        if start == 0 and cotangent is not None:
            self.run.add(self.chain.stream[0], cotangent)


def _scalar(loss: Any, region: str) -> Tensor:
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    shape = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
    raise RewriteError(
        "windows ahead of the model's end need a loss that is one number",
        where=region,
        why=f"it is {shape}",
        remedy="reduce it in the loss given to rewrite(loss=...)",
    )


def _scale(loss: Tensor, value: Tensor) -> float:
    """The power of two that brings the largest cotangent of the value close to one, as far as float16 goes."""
    scale = _LARGEST_SCALE
    while True:
        seed = torch.full_like(loss, scale)
        (cotangent,) = torch.autograd.grad(loss, (value,), seed, retain_graph=True, allow_unused=True)
        largest = 0.0 if cotangent is None else float(cotangent.abs().max())
        if math.isfinite(largest) or scale <= _SMALLEST_SCALE:
            break
        scale *= _SHRINK
    known = largest > 0 and math.isfinite(largest)
    return min(scale * 2.0 ** -math.frexp(largest)[1], _LARGEST_SCALE) if known else scale


def _own_tape() -> AbstractContextManager[Any]:
    """Keeps the caller's saved-tensor hooks (checkpoint, offloading) away from a tape that ends in this forward."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return nullcontext()
    return saved_tensors_hooks(torch.Tensor.detach, lambda kept: kept)
