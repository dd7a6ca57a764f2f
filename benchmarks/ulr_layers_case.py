"""The problem of ulr_layers.py: a small convolutional net on scikit-learn's digits, its training and its gradients."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import process_time
from typing import Protocol

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
Weights = dict[str, Tensor]

ROWS = 50
LAYERS = ("conv1", "conv2", "conv3", "linear")
_LEARNT, _HELD_BACK = 1400, 200
_DRAWS = 56  # batches, each with noise of its own, over which a cosine is averaged


class GradientStep(Protocol):
    """Fills `.grad` of the model's parameters.

    model: a plain module; state: all that an optimizer is given; evaluated: rows beside the clean forwards so far.
    """

    model: nn.Module

    @property
    def state(self) -> list[nn.Parameter]: ...

    @property
    def evaluated(self) -> int: ...

    def __call__(self, x: Tensor, y: Tensor) -> None: ...


@dataclass(frozen=True)
class Run:
    """accuracy: share of right answers; forwards: of each row and step, the clean one among them; seconds: CPU time of
    a step; half_way: the step object and the model's weights after half of the steps."""

    accuracy: float
    forwards: float
    seconds: float
    half_way: tuple[GradientStep, Weights]


def convolutional(seed: int) -> nn.Module:
    """4,218 parameters; rows of 64 pixels to 10 logits."""
    torch.manual_seed(seed)
    parts: list[tuple[str, nn.Module]] = [
        *[("image", nn.Unflatten(1, (1, 8, 8))), ("conv1", nn.Conv2d(1, 8, 3, padding=1)), ("relu1", nn.ReLU())],
        *[("pool1", nn.MaxPool2d(2)), ("conv2", nn.Conv2d(8, 16, 3, padding=1)), ("relu2", nn.ReLU())],
        *[("conv3", nn.Conv2d(16, 16, 3, padding=1)), ("relu3", nn.ReLU()), ("pool3", nn.MaxPool2d(2))],
        *[("flat", nn.Flatten()), ("linear", nn.Linear(64, 10))],
    ]
    return nn.Sequential(OrderedDict(parts))


def digits() -> tuple[Batch, Batch]:
    """What is learnt from, 1,400 rows, and the 397 others: pixels from 0 to 1 with their labels."""
    data = load_digits()
    x, y = torch.from_numpy(data.data).float() / 16, torch.from_numpy(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return (x[order[:_LEARNT]], y[order[:_LEARNT]]), (x[order[_LEARNT:]], y[order[_LEARNT:]])


def held_back() -> tuple[Batch, Batch]:
    """The same of the rows that are learnt from, to choose learning rates by: 1,200 and 200."""
    (x, y), _ = digits()
    return (x[:-_HELD_BACK], y[:-_HELD_BACK]), (x[-_HELD_BACK:], y[-_HELD_BACK:])


def batches(data: Batch, seed: int) -> Iterator[Batch]:
    """Without end: every row once, in another order, and again."""
    x, y = data
    order = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(x), generator=order).split(ROWS):
            if len(rows) == ROWS:
                yield x[rows], y[rows]


def train(step: GradientStep, parts: tuple[Batch, Batch], seed: int, rate: float, steps: int) -> Run:
    """Adam, the rate falling as a cosine to 0; accuracy on the second part."""
    learnt, (unseen, truth) = parts
    optimizer = torch.optim.Adam(step.state, rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    seconds, half_way = 0.0, (step, weights_of(step.model))
    for number, (x, y) in zip(range(steps), batches(learnt, seed), strict=False):
        if number == steps // 2:
            half_way = copy.deepcopy(step), weights_of(step.model)
        start = process_time()
        optimizer.zero_grad()
        step(x, y)
        optimizer.step()
        seconds += process_time() - start
        falling.step()
    with torch.no_grad():
        right = (step.model(unseen).argmax(1) == truth).float().mean()
    return Run(float(right), 1 + step.evaluated / (steps * ROWS), seconds / steps, half_way)


def weights_of(model: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def cosines(step: GradientStep, weights: Weights) -> list[float]:
    """With back-propagation's gradient of the noiseless net on the same batch, of each of `LAYERS`; means."""
    step.model.load_state_dict(weights)

    def exact_step(x: Tensor, y: Tensor) -> None:
        F.cross_entropy(step.model(x), y).backward()

    total = torch.zeros(len(LAYERS))
    for _, (x, y) in zip(range(_DRAWS), batches(digits()[0], 1), strict=False):
        found, exact = _layers(step.model, step, x, y), _layers(step.model, exact_step, x, y)
        total += torch.stack([torch.cosine_similarity(a, b, dim=0) for a, b in zip(found, exact, strict=True)])
    return (total / _DRAWS).tolist()


def _layers(model: nn.Module, step: Callable[[Tensor, Tensor], None], x: Tensor, y: Tensor) -> list[Tensor]:
    """The gradient of each layer in one piece; of nothing, zeros."""
    model.zero_grad()
    step(x, y)
    layers = [list(model.get_submodule(name).parameters()) for name in LAYERS]
    return [torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in own]) for own in layers]
