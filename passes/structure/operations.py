"""What an operation is, whichever front end wrote it: `x + y`, `torch.add`, `aten.add.Tensor`, `nn.ReLU`, `F.relu`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch._ops import OpOverload

Modules = Callable[[str], nn.Module]  # what a path names in the user's model

_SUMS = frozenset(("add", "iadd", "sub", "isub"))
_DIFFERENCES = frozenset(("sub", "isub"))
_PRODUCTS = frozenset(("mul", "imul", "multiply"))
_COPIES = frozenset(("to", "float", "half", "bfloat16", "double", "type_as", "clone", "alias", "contiguous"))
_INDEXING = frozenset(("getitem", "select", "slice", "narrow", "index", "index_select"))
_WRITING = frozenset(
    ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")
)
_KINDS = {
    "activation": (
        "relu", "relu6", "leaky_relu", "leakyrelu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish",
        "sigmoid", "log_sigmoid", "logsigmoid", "tanh", "tanhshrink", "softplus", "softshrink", "softsign",
        "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "threshold", "glu", "softmax", "log_softmax",
        "logsoftmax", "clamp", "clamp_min",
    ),
    "pointwise": (
        *_SUMS, *_PRODUCTS, "div", "truediv", "itruediv", "true_divide", "neg", "pow", "square", "sqrt", "rsqrt", "exp",
        "log", "log1p", "erf", "sin", "cos", "abs", "maximum", "minimum", "where", "rsub", "reciprocal",
    ),
    "layout": (
        *_COPIES, "view", "reshape", "permute", "transpose", "t", "flatten", "unflatten", "squeeze", "unsqueeze",
        "movedim", "swapaxes", "getitem",
    ),
}  # fmt: skip
_KIND = {name: kind for kind, names in _KINDS.items() for name in names}


def name_of(node: fx.Node, modules: Modules) -> str:
    """One name per operation: `add` for `+`, `+=`'s is `iadd`, `torch.add`, `Tensor.add_` and `aten.add.Tensor` too."""
    if node.op == "call_module":
        return type(modules(str(node.target))).__name__
    return _called(node)


def _called(node: fx.Node) -> str:
    """The function or method that a node calls, without the underscores of in-place and special ones; else ""."""
    if node.op not in ("call_function", "call_method"):
        return ""
    target: Any = node.target
    if isinstance(target, OpOverload):
        return target._schema.name.rpartition("::")[2].strip("_")
    return (target if isinstance(target, str) else getattr(target, "__name__", str(target))).strip("_")


def is_sum(node: fx.Node) -> bool:
    return _called(node) in _SUMS


def is_difference(node: fx.Node) -> bool:
    return _called(node) in _DIFFERENCES


def is_product(node: fx.Node) -> bool:
    return _called(node) in _PRODUCTS


def is_copy(node: fx.Node) -> bool:
    """Whether a node hands on the numbers it is given, in another type or place at most."""
    return _called(node) in _COPIES


def is_indexing(node: fx.Node) -> bool:
    return _called(node) in _INDEXING


def kind_of(node: fx.Node, modules: Modules) -> str:
    """`norm`, `activation`, `dropout`, `pointwise`, `layout`, or "" for whatever does more to a value than these."""
    if any(_is_norm(modules(path)) for path, _ in node.meta.get("block", ())):
        return "norm"
    name = name_of(node, modules).lower()
    for kind in ("norm", "dropout"):
        if kind in name:
            return kind
    return _KIND.get(name, "")


def _is_norm(module: nn.Module) -> bool:
    """torch's own, or one that somebody wrote and called so."""
    return "norm" in type(module).__name__.lower() and next(module.children(), None) is None


def writes(node: fx.Node, modules: Modules) -> bool:
    """Whether a call writes into its first argument."""
    if node.op == "call_module":
        return getattr(modules(str(node.target)), "inplace", False) is True
    target: Any = node.target
    if isinstance(target, OpOverload):
        return target._schema.is_mutable and target._schema.name.endswith("_")
    if node.op not in ("call_function", "call_method"):
        return False
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in _WRITING or node.kwargs.get("inplace") is True
