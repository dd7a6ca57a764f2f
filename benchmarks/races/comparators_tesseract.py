"""tesseract-core's finite differences at the box, called as its vjp endpoint calls them, in process.

Its stochastic algorithm (SPSA) takes the batch as one long vector of 128 x 16 numbers; its central and forward
algorithms would take 4,096 and 2,048 calls of 128 rows a step, more than half of the smaller budgets.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from method import LOW_RATES, AdamTrainer, Method, Setting, grid
from tasks import Race, Task
from torch import Tensor


@cache
def schemas() -> tuple[Any, Any]:
    """Input and output of the box in the package's types."""
    from pydantic import BaseModel
    from tesseract_core.runtime import Array, Differentiable, Float32

    array = Differentiable[Array[(None, None), Float32]]
    inputs = type("Inputs", (BaseModel,), {"__annotations__": {"x": array}})
    outputs = type("Outputs", (BaseModel,), {"__annotations__": {"y": array}})
    return inputs, outputs


class FiniteDifferences(AdamTrainer):
    def __init__(self, task: Task, rate: float, eps: float, num_samples: int | None) -> None:
        super().__init__(task, rate)
        self.eps, self.num_samples, self.steps = eps, num_samples, 0

    def _apply(self, inputs: Any) -> Any:
        return schemas()[1](y=self.task.evaluate(torch.from_numpy(np.array(inputs.x, np.float32))).numpy())

    def differentiate(self, images: Tensor, labels: Tensor) -> None:
        from tesseract_core.runtime.experimental import finite_difference_vjp

        values = self.network.encoder(images)
        cotangent = self.task.differentiate_head(self.task.evaluate(values), labels)
        self.steps += 1
        found = finite_difference_vjp(
            self._apply,
            schemas()[0](x=values.detach().numpy()),
            {"x"},
            {"y"},
            {"y": cotangent.numpy()},
            algorithm="stochastic",
            eps=self.eps,
            num_samples=self.num_samples,
            seed=self.task.seed * 100_000 + self.steps,
        )
        torch.autograd.backward(values, torch.from_numpy(found["x"]).float())


def _settings(race: Race) -> list[Setting]:
    """One direction or the package's 45 on the smooth box; a step that crosses cells, or hardly any, on the rough."""
    if race.name == "A":
        return grid(rate=LOW_RATES, eps=(1e-2,), num_samples=(1, None))
    return grid(rate=LOW_RATES, eps=(3e-2, 0.2), num_samples=(4,))


METHODS = [
    Method(
        "tesseract-core finite differences",
        FiniteDifferences,
        _settings,
        ("tesseract_core", "fsspec"),
        note="its stochastic algorithm; learning rate, and directions or step, chosen",
    )
]
