"""The one torch operator that every box is called through, so that fx, export and compile see a single node.

The operator is defined with `torch.library.Library` and a hand-written autograd kernel: the kernel that
`torch.library.custom_op` generates for lists of tensors costs about 60 us a call.
"""

import contextlib
import hashlib
import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rewriter.runtime.errors import BoxError

if TYPE_CHECKING:
    from .protocol import Box

_PLAIN = (Tensor, torch.nn.Parameter)
_BOXES: "weakref.WeakValueDictionary[int, Box]" = weakref.WeakValueDictionary()
_HANDLES = itertools.count(1)
_SURROGATE: ContextVar[bool] = ContextVar("surrogate_pullback", default=False)
_COUNTED: ContextVar[dict[int, int] | None] = ContextVar("counted_rows", default=None)
_MEMORY: ContextVar[dict[object, list[Tensor]] | None] = ContextVar("memoised", default=None)

_LIBRARY = torch.library.Library("rewriter", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "evaluate_box(int handle, Tensor[] inputs) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
)
_OPERATOR = torch.ops.rewriter.evaluate_box.default

with torch.inference_mode(False):
    _INCLUDED = torch._C._dispatch_tls_local_include_set()
    _EXCLUDED = torch._C._dispatch_tls_local_exclude_set()


def register(box: "Box") -> int:
    """The integer under which the operator finds this box, for as long as the box lives."""
    handle = next(_HANDLES)
    _BOXES[handle] = box
    return handle


def evaluate_box(handle: int, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Evaluate the box behind `handle`: what `Box.answer` returns. Raises `BoxError`."""
    if not torch.compiler.is_compiling() and _are_plain(inputs):
        return _run_taped(handle, inputs)
    outputs: list[Tensor] = _OPERATOR(handle, inputs)
    return outputs


def _are_plain(inputs: Sequence[Tensor]) -> bool:
    """Ordinary tensors and nobody looking on: the dispatcher would only lead to the kernels below, 10 us for each."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and all(type(tensor) in _PLAIN for tensor in inputs)
    )


@contextlib.contextmanager
def surrogate_pullback() -> Iterator[None]:
    """Boxes called inside get a fixed linear pullback instead of an error, to prove how gradients are wired.

    With cotangents v_k of the floating outputs k = 0, 1, ..., row r has the number
    s_r = sum_k sum(v_k[r]) / (k + 1). The cotangent of floating input i, of `width` elements per row, is s_r / ((i + 1)
    width) in every element of row r; of a shared input, sum_r s_r / ((i + 1) width). It is no derivative of the box.
    """
    token = _SURROGATE.set(True)
    try:
        yield
    finally:
        _SURROGATE.reset(token)


@contextlib.contextmanager
def memoised() -> Iterator[None]:
    """Boxes called inside return their remembered outputs for inputs that are equal bit for bit.

    The memory is dropped at the end of the context. Other threads and calls of `Box.evaluate` are unaffected.
    """
    token = _MEMORY.set({})
    try:
        yield
    finally:
        _MEMORY.reset(token)


@contextlib.contextmanager
def counted_rows() -> Iterator[dict[int, int]]:
    """Rows that boxes evaluate inside `memoised`, by handle, remembered answers left out."""
    counts: dict[int, int] = {}
    token = _COUNTED.set(counts)
    try:
        yield counts
    finally:
        _COUNTED.reset(token)


def count_rows(handle: int, rows: int) -> None:
    """Adds to what `counted_rows` counts, where it is active."""
    counts = _COUNTED.get()
    if counts is not None:
        counts[handle] = counts.get(handle, 0) + rows


@contextlib.contextmanager
def user_code() -> Iterator[None]:
    """Run a function of the user as if called from outside any operator: autograd works in it, and nothing is taped."""
    with torch._C._ForceDispatchKeyGuard(_INCLUDED, _EXCLUDED), torch.no_grad():
        yield


def _box(handle: int) -> "Box":
    box = _BOXES.get(handle)
    if box is None:
        raise BoxError(
            f"box number {handle} no longer exists",
            why="a captured, exported or compiled graph refers to its boxes by number, within one process",
            remedy="keep the model that holds the box alive; capture it again in a new process",
        )
    return box


def _run(handle: int, inputs: Sequence[Tensor]) -> list[Tensor]:
    box = _box(handle)
    memory = _MEMORY.get()
    if memory is None:
        return box.run(inputs)
    key = (handle, torch.get_default_dtype(), *map(_fingerprint, inputs))
    if key not in memory:
        memory[key] = box.run(inputs)
        count_rows(handle, len(memory[key][0]))
    return [output.clone() for output in memory[key]]


def _fingerprint(tensor: Tensor) -> tuple[object, ...]:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return tensor.shape, tensor.dtype, tensor.device, hashlib.blake2b(raw.numpy().data).digest()


def _run_fake(handle: int, inputs: list[Tensor]) -> list[Tensor]:
    return _box(handle).run_fake(inputs)


def _run_taped(handle: int, inputs: Sequence[Tensor]) -> list[Tensor]:
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        _refuse_transform(handle, inputs)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return list(_Taped.apply(handle, *inputs))  # type: ignore[no-untyped-call]
    return _run_below(handle, inputs)


def _run_below(handle: int, inputs: Sequence[Tensor]) -> list[Tensor]:
    if _are_plain(inputs):
        return _run(handle, inputs)
    with torch._C._AutoDispatchBelowAutograd():
        outputs: list[Tensor] = _OPERATOR(handle, inputs)
    return outputs


def _refuse_transform(handle: int, inputs: Sequence[Tensor]) -> None:
    """Under a transform of torch.func, or forward-mode tangents that would be dropped in silence."""
    if torch._C._are_functorch_transforms_active():
        _raise_transform(handle)
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in inputs):  # type: ignore[no-untyped-call]
        _raise_transform(handle)


def _raise_transform(handle: int) -> NoReturn:
    raise BoxError(
        f"the box {_box(handle).label} was called inside a transform of torch.func (vmap, grad, jvp, ...)",
        where=_box(handle).place,
        why="a box is evaluated on whole batches of numbers outside torch; it has no batching rule and no derivative",
        remedy="call the model on the whole batch, and leave gradients to rewrite(model, Plan([BlackBox(...)]))",
    )


def _run_batched(info: object, in_dims: object, handle: int, inputs: list[Tensor]) -> NoReturn:
    _raise_transform(handle)


class _Taped(torch.autograd.Function):
    """Puts the box on the tape: its pullback is an error, or the surrogate if the forward ran in that context."""

    @staticmethod
    def forward(ctx: Any, handle: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = _run_below(handle, inputs)
        ctx.box = _box(handle)
        ctx.surrogate = _SURROGATE.get()
        if ctx.surrogate:
            ctx.layout = [(tensor.shape, tensor.dtype, tensor.device) for tensor in inputs]
        ctx.set_materialize_grads(False)
        integers = [output for output in outputs if not output.is_floating_point()]
        if integers:
            ctx.mark_non_differentiable(*integers)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        if ctx.surrogate:
            return None, *_surrogate(ctx, cotangents)
        raise BoxError(
            f"the box {ctx.box.label} lies on a differentiable path, and a box has no gradient",
            where=ctx.box.place,
            why="backward reached its outputs; PyTorch cannot see inside a box",
            remedy="estimate it: rewrite(model, Plan([BlackBox('<name of this module>')])); or cut the path on purpose "
            "with .detach() on the inputs of the box; a rewritten model runs as it is in eval(): "
            "call .train()",
        )


def _surrogate(ctx: Any, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    weighted = [
        cotangent.flatten(1).sum(1) / (k + 1) if cotangent.dim() > 1 else cotangent / (k + 1)
        for k, cotangent in enumerate(cotangents)
        if cotangent is not None
    ]
    per_row = torch.stack([part.to(weighted[0]) for part in weighted]).sum(0)
    gradients: list[Tensor | None] = []
    for i, (shape, dtype, device) in enumerate(ctx.layout):
        if not ctx.needs_input_grad[i + 1]:
            gradients.append(None)
            continue
        sums = per_row.sum() if i in ctx.box.shared else per_row.reshape(-1, *(1,) * (len(shape) - 1))
        width = shape.numel() if i in ctx.box.shared else shape[1:].numel()
        gradients.append((sums / ((i + 1) * width)).to(device, dtype).expand(shape))
    return gradients


_LIBRARY.impl("evaluate_box", _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_LIBRARY.impl("evaluate_box", _run_taped, "Autograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("rewriter::evaluate_box", _run_fake, lib=_LIBRARY)
torch.library.register_vmap("rewriter::evaluate_box", _run_batched, lib=_LIBRARY)
