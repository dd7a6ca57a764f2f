"""Gradients of windows over blocks, written by hand for `chains.Stack`; and training steps to compare with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rewriter import Horizon, Plan, Rewritten, rewrite

Loss = Callable[[Tensor, Tensor], Tensor]
Named = dict[str, Tensor]


def by_hand(model: Any, x: Tensor, y: Tensor, loss: Loss, horizon: int, stride: int) -> Named:
    """Of parameters and the input, by name: early windows on detached values, the last one and the head exact."""
    given = x.detach().clone().requires_grad_(x.is_floating_point())
    blocks, last = list(model.blocks), len(model.blocks) - horizon
    names = {id(p): name for name, p in model.named_parameters()}
    found: Named = {}

    def add(value: Tensor, wanted: list[Tensor]) -> None:
        gradients = torch.autograd.grad(value, wanted, allow_unused=True, retain_graph=True)
        for parameter, gradient in zip(wanted, gradients, strict=True):
            if gradient is not None:
                name = names.get(id(parameter), "input")
                found[name] = found[name] + gradient if name in found else gradient

    before = [given, *model.embed.parameters()]
    values = [model.embed(given)]
    for block in blocks:
        values.append(block(values[-1].detach()))
    for start in range(0, last, stride):
        value = values[start] if start == 0 else values[start].detach()
        for block in blocks[start : start + horizon]:
            value = block(value)
        own = [p for block in blocks[start : min(start + stride, last)] for p in block.parameters()]
        add(loss(model.head(value), y), own + (before if start == 0 else []))
    value = values[last] if last == 0 else values[last].detach()
    for block in blocks[last:]:
        value = block(value)
    own = [p for block in blocks[last:] for p in block.parameters()] + list(model.head.parameters())
    add(loss(model.head(value), y), own + (before if last == 0 else []))
    return found


def built(model: nn.Module, x: Tensor, loss: Any, horizon: int, target: str = "blocks", **options: Any) -> Rewritten:
    """The model under one `Horizon`."""
    return rewrite(model, Plan([Horizon(target, horizon, **options)]), loss=loss, example=(x,))


def of_step(step: Any, model: nn.Module, x: Tensor, y: Tensor | None, factor: float = 1.0, seed: int = 7) -> Named:
    """Gradients of a call's loss by name, of parameters and the input; heads of the step among them."""
    given = x.detach().clone().requires_grad_(x.is_floating_point())
    wanted = {name: p for name, p in step.named_parameters() if p.requires_grad}
    if given.requires_grad:
        wanted["input"] = given
    torch.manual_seed(seed)
    value = step(given, target=y) if y is not None else step(given)
    found = torch.autograd.grad(factor * value, list(wanted.values()), allow_unused=True)
    return {name: g for name, g in zip(wanted, found, strict=True) if g is not None}


class Eager(nn.Module):
    """A model and its loss, called as a step is."""

    def __init__(self, model: nn.Module, loss: Any) -> None:
        super().__init__()
        self.__dict__["model"], self.loss = model, loss
        self._modules, self._parameters = model._modules, model._parameters

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        output = self.__dict__["model"](x)
        value: Tensor = self.loss(output) if target is None else self.loss(output, target)
        return value
