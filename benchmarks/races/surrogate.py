"""A learned surrogate alone, after EstiNet: the box forward, a net fitted to its queries backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from method import FEW_RATES, AdamTrainer, Method, grid
from tasks import Task
from torch import Tensor, nn

from rewriter.examples.random_forest import INPUTS, OUTPUTS

WIDTH = 128
KEPT = 8192  # queries: the latest
FITTED = 256  # queries a fit


class Surrogate(AdamTrainer):
    """Spends one row a sample: the forward pass is the training set of the surrogate."""

    def __init__(self, task: Task, rate: float, fits: int) -> None:
        super().__init__(task, rate)
        self.fits = fits
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(task.seed)
            self.surrogate = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, OUTPUTS))
        self.fitter = torch.optim.Adam(self.surrogate.parameters(), lr=3e-3, fused=True)
        self.inputs, self.outputs, self.queries = torch.empty(KEPT, INPUTS), torch.empty(KEPT, OUTPUTS), 0

    def differentiate(self, images: Tensor, labels: Tensor) -> None:
        values = self.network.encoder(images)
        inputs = values.detach().requires_grad_()
        outputs = self.task.evaluate(inputs)
        self._remember(inputs.detach(), outputs)
        cotangent = self.task.differentiate_head(outputs.clone(), labels)
        for _ in range(self.fits):
            self._fit()
        (gradient,) = torch.autograd.grad(self.surrogate(inputs), inputs, cotangent)
        torch.autograd.backward(values, gradient)

    def _remember(self, inputs: Tensor, outputs: Tensor) -> None:
        places = (self.queries + torch.arange(len(inputs))) % KEPT
        self.inputs[places], self.outputs[places] = inputs, outputs
        self.queries += len(inputs)

    def _fit(self) -> None:
        chosen = torch.randint(min(self.queries, KEPT), (FITTED,), generator=self.task.generator)
        self.fitter.zero_grad()
        torch.autograd.backward(F.mse_loss(self.surrogate(self.inputs[chosen]), self.outputs[chosen]))
        self.fitter.step()


METHODS = [
    Method(
        "learned surrogate alone",
        Surrogate,
        lambda race: grid(rate=FEW_RATES, fits=(1, 4)),
        surrogate=True,
        note="net 16-128-12 fitted to the forward queries, differentiated in place of the box; its own fit at 3e-3",
    )
]
