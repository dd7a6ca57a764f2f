"""Nevergrad: ask and tell over all weights of encoder and head, 32 candidates on one mini-batch."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from method import Method, Setting, grid
from population import losses, trained, weights_of
from tasks import Race, Task
from torch import Tensor, nn

BATCH = 128
ASKED = 32


def _optimizer(name: str) -> Any:
    import nevergrad

    makers = nevergrad.optimizers
    if name == "DiagonalCMA":
        return makers.ParametrizedCMA(diagonal=True, popsize=ASKED)
    if name == "TBPSA":  # its own population, 4 x dimension, would exceed the budget before the first update
        return makers.ParametrizedTBPSA(naive=False, initial_popsize=ASKED)
    return makers.registry[name]


class Asked:
    """Nevergrad's optimiser of one name, told that scores are noisy, started at the network's weights."""

    def __init__(self, task: Task, optimizer: str, sigma: float) -> None:
        import nevergrad

        self.task, self.moved = task, trained(task)
        array = nevergrad.p.Array(init=weights_of(self.moved).numpy()).set_mutation(sigma=sigma)
        array.function.deterministic = False
        array.random_state.seed(task.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.search = _optimizer(optimizer)(array, budget=task.race.rows // BATCH, num_workers=ASKED)

    def step(self, images: Tensor, labels: Tensor) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            candidates = [self.search.ask() for _ in range(ASKED)]
            vectors = np.stack([candidate.value for candidate in candidates]).astype(np.float32)
            scores = losses(self.task, torch.from_numpy(vectors), images, labels).tolist()
            for candidate, score in zip(candidates, scores, strict=True):
                self.search.tell(candidate, score)

    def settle(self) -> None:
        found = torch.from_numpy(self.search.provide_recommendation().value).float()
        nn.utils.vector_to_parameters(found, self.moved.parameters())


def _settings(race: Race) -> list[Setting]:
    return grid(optimizer=("NGOpt", "DiagonalCMA", "TBPSA", "OptimisticNoisyOnePlusOne"), sigma=(0.03, 0.1))


METHODS = [
    Method("nevergrad", Asked, _settings, ("nevergrad",), note="all weights; optimiser and initial deviation chosen")
]
