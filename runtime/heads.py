"""Heads: from a chain's value at the end of a window to what the loss takes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import RewriteError
from .objective import Objective
from .replay import generators
from .segment import Segment


class SharedHead:
    """The rest of the model, with its parameters as they are: their gradient comes from the model's own end alone.

    placeholders: positions of what it reads beside the chain's value, among the arguments of the forward pass.
    """

    def __init__(self, segment: Segment, placeholders: Sequence[int]) -> None:
        self._segment, self._placeholders = segment, tuple(placeholders)
        self._proven = False

    def trainable(self, window: int) -> tuple[Tensor, ...]:
        return ()

    def loss(self, window: int, value: Tensor, objective: Objective, parameters: Sequence[Tensor]) -> Tensor:
        """The loss that the model would have if its chain ended in `value`.

        Raises RewriteError where that draws random numbers, of which the model's own forward would then draw others.
        """
        fixed = {id(parameter): parameter.detach() for parameter in self._segment.trainable()}
        others = [objective.tensors[position].detach() for position in self._placeholders]
        before = () if self._proven else generators()
        loss = objective(self._segment.run((value, *others), fixed))
        if not all(map(torch.equal, before, generators() if before else ())):
            raise RewriteError(
                "what follows the blocks, or the loss, draws random numbers",
                where=self._segment.name,
                why="it is evaluated for every window, and the model would then draw other numbers than in eager",
                remedy='take that out of what follows the blocks; head="auxiliary" where it is not the loss',
            )
        self._proven = True
        return loss


class AuxiliaryHead(nn.Module):
    """Norm, mean over positions, one linear layer; trained by its own window's loss.

    value: (B, C), (B, T, C) or (B, C, H, W); the output is (B, width), or (B, T, width) where `each_token`.
    name: what its first weights are drawn from.
    """

    def __init__(self, channels: int, width: int, each_token: bool, name: str, like: Tensor) -> None:
        super().__init__()
        self.each_token = each_token
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(name.encode()).digest()[:4]))
        weight = torch.randn(width, channels, generator=generator) / math.sqrt(channels)
        self.scale = nn.Parameter(torch.ones(channels).to(like))
        self.shift = nn.Parameter(torch.zeros(channels).to(like))
        self.weight = nn.Parameter(weight.to(like))
        self.bias = nn.Parameter(torch.zeros(width).to(like))

    def forward(self, value: Tensor) -> Tensor:
        return self.run(value, list(self._parameters.values()))

    def run(self, value: Tensor, parameters: Sequence[Any]) -> Tensor:
        """The same on other tensors in the parameters' places."""
        scale, shift, weight, bias = parameters
        if value.dim() == 4:
            value = value.mean((2, 3))
        value = F.layer_norm(value, value.shape[-1:], scale, shift)
        if value.dim() == 3 and not self.each_token:
            value = value.mean(1)
        return F.linear(value, weight, bias)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint of the model alone has no heads, and nothing is missing from it.
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)


class AuxiliaryHeads:
    """One head per window. `modules` is what the rewritten model registers, and may put another in its place."""

    def __init__(self, modules: nn.ModuleList) -> None:
        self.modules = modules

    def trainable(self, window: int) -> tuple[Tensor, ...]:
        return tuple([p for p in self.modules[window]._parameters.values() if p is not None and p.requires_grad])

    def loss(self, window: int, value: Tensor, objective: Objective, parameters: Sequence[Tensor]) -> Tensor:
        """The loss of the window's own prediction. parameters: in the places of `trainable(window)`."""
        head = self.modules[window]
        assert isinstance(head, AuxiliaryHead)
        given = dict(zip(map(id, self.trainable(window)), parameters, strict=True))
        return objective([head.run(value, [given.get(id(p), p) for p in head._parameters.values()])])


Heads = SharedHead | AuxiliaryHeads
