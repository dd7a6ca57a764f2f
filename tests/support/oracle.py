"""Eager against a captured graph, over several training steps, bit by bit."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rewriter.capture import Capture
from rewriter.interpret import interpret
from rewriter.signature import flatten, signature


def run_captured(model: nn.Module, captured: Capture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the graph returns for this call, in the model's own structure."""
    _, tensors = signature(args, kwargs)
    return captured.rebuild(interpret(model, captured.graph, captured.constants, tensors))


def train(model: nn.Module, forward: Any, args: Any, kwargs: Any, steps: int = 2) -> list[dict[str, Any]]:
    """Per step: outputs, gradients (inputs' too), buffers and scalar attributes; parameters move in between."""
    records = []
    for step in range(steps):
        torch.manual_seed(step)
        random.seed(step)
        np.random.seed(step)
        tensors, tree = flatten((args, kwargs))
        leaves = [t.detach().clone().requires_grad_(t.dtype.is_floating_point) for t in tensors]
        given = [leaf * 1 if leaf.requires_grad else leaf for leaf in leaves]  # a model may write into its inputs
        own_args, own_kwargs = tree.rebuild(given)
        outputs, shape = flatten(forward(own_args, own_kwargs))
        wanted = dict(model.named_parameters())
        torch.manual_seed(99)
        loss = sum((out * torch.randn(out.shape)).sum() for out in outputs if out.requires_grad)
        if isinstance(loss, Tensor):
            loss.backward()
        records.append(
            {
                "structure": shape.outline(),
                "outputs": [out.detach().clone() for out in outputs],
                "gradients": {name: _copy(p.grad) for name, p in wanted.items()},
                "inputs": [_copy(leaf.grad) for leaf in leaves],
                "state": _state(model),
            }
        )
        with torch.no_grad():
            for parameter in wanted.values():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
                parameter.grad = None
    return records


def compare(model: nn.Module, captured: Capture, args: Any, kwargs: Any, steps: int = 2) -> str | None:
    """None where the graph trains exactly as eager does, else where they differ first. The model is not changed."""
    eager, own = copy.deepcopy(model), copy.deepcopy(model)
    theirs = train(eager, lambda a, k: eager(*a, **k), args, kwargs, steps)
    ours = train(own, lambda a, k: run_captured(own, captured, a, k), args, kwargs, steps)
    for step, (left, right) in enumerate(zip(theirs, ours, strict=True)):
        for what in left:
            if not equal(left[what], right[what]):
                return f"{what} of step {step}"
    return None


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and torch.equal(left.nan_to_num(), right.nan_to_num())
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(value, right[key]) for key, value in left.items())
    if isinstance(left, list):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything capture must leave alone."""
    return {
        "state": _state(model),
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "gradients": {name: _copy(p.grad) for name, p in model.named_parameters()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "random": [torch.get_rng_state(), repr(random.getstate()), repr(np.random.get_state())],
    }


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _state(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if type(value) in (bool, int, float, str):
                state[f"{prefix}.{name}"] = value
            elif isinstance(value, Tensor):
                state[f"{prefix}.{name}"] = value.detach().clone()
    return state
