"""The stand-ins that flow through the user's forward while the fx front end traces it."""

from __future__ import annotations

import dis
import operator
import re
import sys
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute, TraceError

if TYPE_CHECKING:
    from .tracer import CaptureTracer

_ASSERTION = "LOAD_ASSERTION_ERROR"
_SKIPPED = ("CACHE", "TO_BOOL", "PRECALL")
_SLOTS = frozenset({"tracer", "node", "root", "attr", "_node", "name", "value"})


class Value(fx.Proxy):
    """A value of the graph. Writes in place stay writes in place; what a graph would lose raises TraceError."""

    tracer: CaptureTracer

    def __getattr__(self, name: str) -> AttributeOf:  # type: ignore[override]
        return AttributeOf(self, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _SLOTS:
            raise TraceError(f"sets the attribute `{name}` of a tensor")
        object.__setattr__(self, name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __bool__(self) -> bool:
        frame = sys._getframe(1)
        if _is_assertion(frame):
            message = f"the model's own assertion failed ({frame.f_code.co_name}, line {frame.f_lineno})"
            self.tracer.create_proxy("call_function", torch._assert, (self, message), {})
            return True
        raise TraceError("branches on a value that is only known when the model runs")

    def __iter__(self) -> Iterator[Any]:
        frame = sys._getframe(1)
        instruction = next(_instructions_from(frame))
        if instruction.opname == "UNPACK_SEQUENCE":
            return iter([operator.getitem(self, index) for index in range(int(instruction.argval))])
        length = self.tracer.length_of(self)
        if length is None:
            raise TraceError("iterates over a value whose length is only known when the model runs")
        return iter([operator.getitem(self, index) for index in range(length)])

    def __len__(self) -> int:
        raise TraceError("takes len() of a value that is only known when the model runs; of a tensor write x.shape[0]")

    def __contains__(self, item: object) -> bool:
        raise TraceError("searches in a value that is only known when the model runs")


def _write_in_place(name: str) -> None:
    target = getattr(operator, name)

    def write(self: Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    setattr(Value, f"__{name}__", write)


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    _write_in_place(_name)


class AttributeOf(Value):
    """An attribute of a value; becomes a node when it is used, a method call when it is called."""

    def __init__(self, root: fx.Proxy, attr: str) -> None:
        self.root, self.attr, self.tracer = root, attr, root.tracer  # type: ignore[assignment]
        self._node: fx.Node | None = None

    node = Attribute.node
    __call__ = Attribute.__call__


class Held(Value):
    """A tensor the model holds. Every use is one `get_attr`, made where it is used, so it is always the live one."""

    def __init__(self, tracer: CaptureTracer, name: str, value: Tensor) -> None:
        self.tracer, self.name, self.value = tracer, name, value

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        return self.tracer.create_node("get_attr", self.name, (), {})

    def __repr__(self) -> str:
        return f"Held({self.name})"


class HeldParameter(Held):
    """A parameter: its sizes do not change, so Python may branch on them."""

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    @property
    def ndim(self) -> int:
        return self.value.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.value.size() if dim is None else self.value.size(dim)

    def dim(self) -> int:
        return self.value.dim()

    def numel(self) -> int:
        return self.value.numel()


class Input(Value):
    """A tensor argument. What the call's signature fixes (dimensions, dtype, device) Python may branch on.

    Where the tracer fixes sizes, so it may on every size but the first, which guards then hold.
    """

    def __init__(self, node: fx.Node, tracer: CaptureTracer, value: Tensor) -> None:
        self.node, self.tracer, self.value = node, tracer, value

    @property
    def ndim(self) -> int:
        return self.value.ndim

    def dim(self) -> int:
        return self.value.dim()

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        return self.value.device

    def is_floating_point(self) -> bool:
        return self.value.is_floating_point()

    @property
    def shape(self) -> Any:
        return self._sizes() if self.tracer.fix_sizes else AttributeOf(self, "shape")

    def size(self, dim: Any = None) -> Any:
        if not self.tracer.fix_sizes:
            return self.tracer.create_proxy("call_method", "size", (self,) if dim is None else (self, dim), {})
        return self._sizes() if dim is None else self._sizes()[dim]

    def _sizes(self) -> tuple[Any, ...]:
        if not self.value.ndim:
            return ()
        self.tracer.fixed_inputs.add(self.node)
        rows = self.tracer.create_proxy("call_method", "size", (self, 0), {})
        return (rows, *self.value.shape[1:])


_ARITHMETIC = frozenset(
    (operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.matmul, operator.neg)
)
_TENSOR_TO_TENSOR = re.compile(
    "relu|gelu|silu|tanh|sigmoid|softmax|log_softmax|exp|sqrt|dropout|linear|layer_norm|matmul|bmm|cat|stack|where|view"
    "|reshape|transpose|permute|contiguous|flatten|squeeze|unsqueeze|float|to|mean|clone|detach|expand"
).fullmatch
_TENSOR_MODULE = re.compile(
    r"torch\.nn\.modules\.(activation|batchnorm|conv|dropout|flatten|instancenorm|linear|normalization|padding|sparse)"
).fullmatch


def is_surely_tensor(kind: str, target: Any, args: Any, known: AbstractSet[fx.Node], leaf: nn.Module | None) -> bool:
    """Whether a node's value is one tensor without having run it, given the nodes known to be."""
    if kind in ("placeholder", "get_attr"):
        return True
    if kind == "call_module":
        return bool(_TENSOR_MODULE(type(leaf).__module__)) and not isinstance(leaf, nn.MultiheadAttention)
    name = target if kind == "call_method" else getattr(target, "__name__", "")
    if target not in _ARITHMETIC and not _TENSOR_TO_TENSOR(name):
        return False
    first = args[0] if args else None
    candidates = first if isinstance(first, (list, tuple)) else args
    return any(isinstance(candidate, fx.Node) and candidate in known for candidate in candidates)


def kind_of(value: Value) -> type | None:
    """The class a proxy stands for, None where only a run can tell."""
    if isinstance(value, HeldParameter):
        return nn.Parameter
    if isinstance(value, Held):
        return Tensor
    return Tensor if value.node in value.tracer.surely_tensors else None


def _instructions_from(frame: FrameType) -> Iterator[dis.Instruction]:
    """The instruction a frame is at and those after it, without the interpreter's fillers."""
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset >= frame.f_lasti and instruction.opname not in _SKIPPED:
            yield instruction


def _is_assertion(frame: FrameType) -> bool:
    instructions = _instructions_from(frame)
    jump = next(instructions, None)
    follower = next(instructions, None)
    return (
        jump is not None
        and "JUMP" in jump.opname
        and "IF_TRUE" in jump.opname
        and follower is not None
        and follower.opname == _ASSERTION
    )
