"""Which modules stay one call in a captured graph, and why."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules import module as module_globals
from torch.nn.utils import parametrize

from rewriter.runtime.boxes import Box

LeafPredicate = Callable[[nn.Module, str], bool]
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def never(module: nn.Module, name: str) -> bool:
    """The predicate that declares no leaf."""
    return False


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in HOOKS)


def why_leaf(module: nn.Module, name: str, leaves: LeafPredicate) -> str | None:
    """None where the module is traced through, "" where it is a leaf by nature, else the reason it stays whole."""
    if leaves(module, name):
        return ""
    if not isinstance(module, _CONTAINERS) and (isinstance(module, Box) or _is_torchs_own(module)):
        return ""
    return "has hooks, which only run when the module is called" if has_hooks(module) else _why_whole(module)


def why_not_root(model: nn.Module) -> str | None:
    """Why a model cannot be captured at all, None where it can. The root's own hooks are its caller's business."""
    if any(getattr(module_globals, f"_global{name}") for name in HOOKS):
        return "global module hooks are registered; they would not run inside a graph"
    if isinstance(model, Box):
        return "the model itself is a box: there is nothing around it to train"
    lazy = next((name for name, value in model.named_parameters() if nn.parameter.is_lazy(value)), None)
    if lazy is not None:
        return f"the parameter `{lazy}` has no shape yet: run the model once first"
    return _why_whole(model)


def _why_whole(module: nn.Module) -> str | None:
    reasons = (
        (parametrize.is_parametrized(module), "is parametrized"),
        (isinstance(module, torch.jit.ScriptModule), "is a ScriptModule"),
        (module._compiled_call_impl is not None, "is compiled"),
        (_is_wrapper(module), f"is wrapped ({type(module).__name__})"),
    )
    return next((reason for holds, reason in reasons if holds), None)


def _is_torchs_own(module: nn.Module) -> bool:
    owner = type(module).__module__
    own = owner.startswith(("torch.nn.", "torch.ao.nn."))
    return own and not _is_wrapper(module) and not parametrize.is_parametrized(module)


def _is_wrapper(module: nn.Module) -> bool:
    """Whether it wraps another module whose calls it must see: torch.compile's, FSDP's, DDP's."""
    owner = type(module).__module__
    if owner.startswith(("torch._dynamo", "torch.nn.parallel", "torch.distributed")):
        return True
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, getattr(fsdp, "FSDPModule", ()))
