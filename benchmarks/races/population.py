"""Many networks at once: weights as rows of a matrix, one stacked call of the box for all of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tasks import Task
from torch import Tensor, nn

ENCODER = (64, 64, 16)
HEAD = (12, 32, 10)


def size(widths: tuple[int, int, int]) -> int:
    """Number of parameters of a net of two linear layers."""
    return widths[0] * widths[1] + widths[1] + widths[1] * widths[2] + widths[2]


def run_each(vectors: Tensor, widths: tuple[int, int, int], rows: Tensor) -> Tensor:
    """linear, tanh, linear with the weights vectors (n, size), in the order of nn.Module.parameters().

    rows: (n or 1, B, widths[0]). Returns (n, B, widths[2]).
    """
    first, middle, last = widths
    weight, bias, weight2, bias2 = torch.split(vectors, [first * middle, middle, middle * last, last], dim=1)
    rows = rows.expand(len(vectors), -1, -1)
    inner = torch.baddbmm(bias[:, None], rows, weight.view(-1, middle, first).mT).tanh()
    return torch.baddbmm(bias2[:, None], inner, weight2.view(-1, last, middle).mT)


@torch.no_grad()
def encode_each(task: Task, encoders: Tensor, images: Tensor) -> Tensor:
    """Outputs of the box behind each encoder, (n, B, 12), from one call of it."""
    values = run_each(encoders, ENCODER, images[None]).tanh()
    return task.evaluate(values.reshape(-1, ENCODER[2])).view(*values.shape[:2], -1)


@torch.no_grad()
def losses(task: Task, vectors: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Loss of each network of vectors (n, 5946), encoder before head, on one batch: (n,)."""
    encoders, heads = torch.split(vectors, [size(ENCODER), size(HEAD)], dim=1)
    return losses_of_outputs(heads, encode_each(task, encoders, images), labels)


@torch.no_grad()
def losses_of_outputs(heads: Tensor, outputs: Tensor, labels: Tensor) -> Tensor:
    """Loss of each head of heads (n or 1, 746) on its own outputs of the box (n, B, 12): (n,)."""
    logits = run_each(heads.expand(len(outputs), -1), HEAD, outputs)
    each = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(outputs)), reduction="none")
    return each.view(len(outputs), -1).mean(1)


def weights_of(module: nn.Module) -> Tensor:
    """All parameters as one vector, detached; a copy."""
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def fill_gradients(module: nn.Module, gradient: Tensor) -> None:
    """The gradient of all parameters, given as one vector, into their .grad."""
    sizes = [parameter.numel() for parameter in module.parameters()]
    for parameter, part in zip(module.parameters(), torch.split(gradient, sizes), strict=True):
        parameter.grad = part.view_as(parameter).clone()


def trained(task: Task) -> nn.Module:
    """Encoder and head without the box, so that their parameters come in the order of `losses`."""
    return nn.ModuleList([task.network.encoder, task.network.head])
