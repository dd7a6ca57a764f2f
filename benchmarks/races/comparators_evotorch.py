"""EvoTorch: evolution strategies over all weights of encoder and head at once, on one mini-batch per generation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from method import HIGHEST_RATES, Method, Setting, decay, grid
from population import losses, trained, weights_of
from tasks import Task
from torch import Tensor, nn


class Evolution:
    """A search that starts at the network's weights and is judged at the centre of its distribution."""

    def __init__(self, task: Task, make: Callable[..., Any], **options: Any) -> None:
        from evotorch import Problem

        logging.getLogger("evotorch.core").setLevel(logging.WARNING)
        self.task, self.moved = task, trained(task)
        self.batch: tuple[Tensor, Tensor] | None = None
        start = weights_of(self.moved)
        # The bounds are those of a first population that is asked for but replaced by one around `start`.
        problem = Problem(
            "min", self._score, solution_length=len(start), initial_bounds=(-1, 1), vectorized=True, seed=task.seed
        )
        self.search = make(problem, center_init=start, **options)

    def _score(self, vectors: Tensor) -> Tensor:
        assert self.batch is not None
        return losses(self.task, vectors.as_subclass(Tensor), *self.batch)

    def step(self, images: Tensor, labels: Tensor) -> None:
        self.batch = images, labels
        self.search.step()

    def settle(self) -> None:
        centre = self.search.status["center"]
        nn.utils.vector_to_parameters(centre.as_subclass(Tensor).clone(), self.moved.parameters())


def snes(task: Task, **setting: Any) -> Evolution:
    from evotorch.algorithms import SNES

    return Evolution(task, SNES, **setting)


class Pgpe(Evolution):
    """The one whose centre is stepped by Adam, so the one with a rate that falls."""

    def __init__(self, task: Task, center_learning_rate: float, stdev_init: float) -> None:
        from evotorch.algorithms import PGPE
        from evotorch.optimizers import Adam

        self.rate = center_learning_rate
        length = sum(parameter.numel() for parameter in trained(task).parameters())
        adam = Adam(solution_length=length, dtype="float32", stepsize=self.rate)
        self.optimizer = adam.contained_optimizer
        rates = {"center_learning_rate": self.rate, "stdev_learning_rate": 0.1}
        super().__init__(task, PGPE, popsize=32, optimizer=adam, stdev_init=stdev_init, **rates)

    def step(self, images: Tensor, labels: Tensor) -> None:
        decay(self.optimizer, self.rate, self.task)
        super().step(images, labels)


def separable_cma(task: Task, **setting: Any) -> Evolution:
    from evotorch.algorithms import CMAES

    return Evolution(task, CMAES, separable=True, **setting)


def _spread() -> list[Setting]:
    return grid(stdev_init=(0.01, 0.03, 0.1, 0.3), popsize=(16, 48))


NOTE = "all weights; initial deviation and population chosen"
METHODS = [
    Method("evotorch SNES", snes, lambda race: _spread(), ("evotorch",), note=NOTE),
    Method(
        "evotorch PGPE",
        Pgpe,
        lambda race: grid(center_learning_rate=HIGHEST_RATES, stdev_init=(0.03, 0.1)),
        ("evotorch",),
        note="all weights; with Adam, population 32; learning rate and initial deviation chosen",
    ),
    Method("evotorch CMA-ES, separable", separable_cma, lambda race: _spread(), ("evotorch",), note=NOTE),
]
