"""TorchOpt's zero-order gradients at the box: the loss as a scalar function of the box's whole input batch.

The package differentiates scalar functions only, so box and head together are the function; it perturbs the batch as
one long vector. The head is back-propagated on the outputs of the package's own first evaluation, at no further rows.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from method import LOW_RATES, AdamTrainer, Method, Setting, grid
from tasks import Race, Task
from torch import Tensor


class ZeroOrder(AdamTrainer):
    def __init__(
        self, task: Task, rate: float, sigma: float, num_samples: int, method: Literal["antithetic", "forward", "naive"]
    ) -> None:
        from torchopt.diff.zero_order import zero_order

        super().__init__(task, rate)
        self.labels = torch.empty(0)
        self.first: Tensor | None = None
        draw = partial(torch.randn, generator=task.generator)
        self.function = zero_order(draw, method, num_samples=num_samples, sigma=sigma)(self._loss)

    def _loss(self, values: Tensor) -> Tensor:
        outputs = self.task.evaluate(values)
        if self.first is None:
            self.first = outputs
        with torch.no_grad():
            return F.cross_entropy(self.network.head(outputs), self.labels)

    def differentiate(self, images: Tensor, labels: Tensor) -> None:
        self.labels, self.first = labels, None
        torch.autograd.backward(self.function(self.network.encoder(images)))
        assert self.first is not None
        self.task.differentiate_head(self.first.clone(), labels)


def _settings(race: Race) -> list[Setting]:
    """Few against many samples on the smooth box; a step that crosses cells or hardly any on the rough one."""
    if race.name == "A":
        return grid(rate=LOW_RATES, sigma=(1e-2,), num_samples=(1, 8))
    return grid(rate=LOW_RATES, sigma=(3e-2, 0.2), num_samples=(4,))


METHODS = [
    Method(f"torchopt zero-order, {method}", partial(ZeroOrder, method=method), _settings, ("torchopt",))
    for method in ("antithetic", "forward", "naive")
]
