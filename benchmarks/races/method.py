"""What a method is: something that makes training steps, and the eight settings among which it is tuned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from math import cos, pi
from typing import Any, Protocol

import torch
from tasks import Race, Task
from torch import Tensor

Setting = Mapping[str, Any]

RATES = (1e-3, 2e-3, 3e-3, 6e-3, 1e-2, 2e-2, 3e-2, 6e-2)  # of Adam, where it is all there is to choose
FEW_RATES = (1e-3, 3e-3, 1e-2, 3e-2)  # where a second number is chosen too
LOW_RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # where estimates are so noisy that the others saturate the encoder
HIGH_RATES = (3e-3, 1e-2, 3e-2, 1e-1)  # where steps are few, or those above chose their highest
HIGHEST_RATES = (1e-2, 3e-2, 1e-1, 3e-1)  # where these did
DECAY = "Adam's rate falls as a cosine"  # part of what a run was; runs made without it are not comparable


class Trainer(Protocol):
    """One training under way."""

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Learn from one batch."""

    def settle(self) -> None:
        """Leave in the network the weights that are to be judged."""


@dataclass(frozen=True)
class Method:
    """A competitor.

    build:     makes a trainer from a task and a setting
    settings:  the eight it is tuned among, by race
    needs:     modules that must be installed
    surrogate: whether a learned model of the box supplies its gradients
    note:      what the reader of a table should know
    """

    name: str
    build: Callable[..., Trainer]
    settings: Callable[[Race], Sequence[Setting]]
    needs: tuple[str, ...] = ()
    surrogate: bool = False
    note: str = ""

    def missing(self) -> list[str]:
        return [name for name in self.needs if find_spec(name) is None]


def decay(optimizer: torch.optim.Optimizer, rate: float, task: Task) -> None:
    """Set the rate of the step to come: rate (1 + cos(pi f)) / 2 with f the share of the row budget spent so far."""
    spent = min(1.0, task.counter.rows / task.race.rows)
    for group in optimizer.param_groups:
        group["lr"] = rate * (1 + cos(pi * spent)) / 2


class AdamTrainer(ABC):
    """What fills gradients and leaves the step to Adam, whose rate falls from `rate` to 0 over the budget."""

    def __init__(self, task: Task, rate: float) -> None:
        self.task, self.network, self.rate = task, task.network, rate
        self.optimizer = torch.optim.Adam(task.network.parameters(), lr=rate, fused=True)

    @abstractmethod
    def differentiate(self, images: Tensor, labels: Tensor) -> None:
        """Fill the gradients of the network's parameters; what is left None stays as it is."""

    def step(self, images: Tensor, labels: Tensor) -> None:
        decay(self.optimizer, self.rate, self.task)
        self.optimizer.zero_grad()
        self.differentiate(images, labels)
        self.optimizer.step()

    def settle(self) -> None:
        """The network holds its weights already; the last gradients go."""
        self.optimizer.zero_grad()


def rates_alone(race: Race) -> list[Setting]:
    """The eight learning rates."""
    return [{"rate": rate} for rate in RATES]


def grid(**choices: Sequence[Any]) -> list[Setting]:
    """Every combination."""
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]
