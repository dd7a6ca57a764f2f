"""The peers of ulr_layers.py: evolution strategies and SPSA, all weights of a model perturbed at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SHARE = 0.1  # of the deviation of a layer's weights, as `UlrCut` takes it

Rows = Callable[[Tensor, Tensor, Tensor], Tensor]
Estimate = Callable[[Rows, Tensor, Tensor, Tensor, Tensor, torch.Generator], tuple[Tensor, int]]


class WeightNoise:
    """Estimates a gradient from losses under perturbed weights, and adds it to `.grad`.

    estimate: (losses under weights, the weights side by side, noise per weight, x, y, generator) -> gradient and the
    number of evaluated rows. Noise: a tenth of the deviation of a layer's weights, other for each layer.
    """

    def __init__(self, model: nn.Module, seed: int, estimate: Estimate) -> None:
        self.model, self.evaluated = model, 0
        self._estimate = estimate
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def state(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def __getstate__(self) -> dict[str, Any]:
        """A generator cannot be copied as it is."""
        return {**vars(self), "_generator": self._generator.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._generator = torch.Generator()
        self._generator.set_state(state["_generator"])

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor) -> None:
        parameters = self.state
        weights = torch.cat([parameter.reshape(-1) for parameter in parameters])
        gradient, evaluated = self._estimate(self._rows, weights, self._noise(), x, y, self._generator)
        self.evaluated += evaluated
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, part in zip(parameters, gradient.split(sizes), strict=True):
            own = part.view_as(parameter)
            parameter.grad = own.clone() if parameter.grad is None else parameter.grad + own

    def _rows(self, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """(rows,): losses under weights side by side, (numbers,)."""
        known = dict(self.model.named_parameters())
        parts = weights.split([parameter.numel() for parameter in known.values()])
        own = {name: part.view(known[name].shape) for name, part in zip(known, parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(self.model, own, (x,)), y, reduction="none")

    def _noise(self) -> Tensor:
        """(numbers,)."""
        layers = [list(module.parameters(recurse=False)) for module in self.model.modules()]
        sides = [torch.cat([parameter.flatten() for parameter in own]) for own in layers if own]
        return torch.cat([(_SHARE * side.std()).expand(len(side)) for side in sides])


def noise_of_each_row(copies: int, antithetic: bool) -> Estimate:
    """Every copy of every row under weights of its own, with its own loss: what `UlrCut` does, for all layers at once.

    Pairs of opposite noise, or the mean loss of a row's other copies subtracted.
    """

    def estimate(
        rows: Rows, weights: Tensor, sigma: Tensor, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, int]:
        drawn = torch.randn(copies // 2 if antithetic else copies, len(x), len(weights), generator=generator)
        noise = torch.cat((drawn, -drawn)) if antithetic else drawn
        one = torch.func.vmap(lambda own, a, b: rows(own, a[None], b[None])[0])
        losses = torch.func.vmap(one, in_dims=(0, None, None))(weights + sigma * noise, x, y)
        centred = losses / copies if antithetic else (losses - losses.mean(0)) / (copies - 1)
        return torch.einsum("kr,krp->p", centred, noise) / (sigma * len(x)), copies * len(x)

    return estimate


def noise_of_the_batch(copies: int, draw: Callable[[int, int, torch.Generator], Tensor]) -> Estimate:
    """Pairs of opposite perturbations, each of the weights under which the whole batch is evaluated.

    draw: (pairs, numbers, generator) -> (pairs, numbers) of unit variance.
    """

    def estimate(
        rows: Rows, weights: Tensor, sigma: Tensor, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, int]:
        drawn = draw(copies // 2, len(weights), generator)
        noise = torch.cat((drawn, -drawn))
        losses = torch.func.vmap(rows, in_dims=(0, None, None))(weights + sigma * noise, x, y).mean(1)
        return losses @ noise / (sigma * copies), copies * len(x)

    return estimate


def orthogonal(pairs: int, numbers: int, generator: torch.Generator) -> Tensor:
    """Orthogonal directions with the lengths of Gaussian vectors."""
    lengths = torch.randn(pairs, numbers, generator=generator).norm(dim=1, keepdim=True)
    return torch.linalg.qr(torch.randn(numbers, pairs, generator=generator))[0].T * lengths


def signs(pairs: int, numbers: int, generator: torch.Generator) -> Tensor:
    """Simultaneous perturbation (SPSA; Spall 1992)."""
    return torch.randint(0, 2, (pairs, numbers), generator=generator).float() * 2 - 1
