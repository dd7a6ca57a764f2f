"""What one writes without a library: differences at the box, or of the loss as a function of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from method import FEW_RATES, HIGH_RATES, HIGHEST_RATES, AdamTrainer, Method, Setting, grid
from population import encode_each, fill_gradients, losses, losses_of_outputs, trained, weights_of
from tasks import Race, Task
from torch import Tensor


class FrozenEncoder(AdamTrainer):
    """Only the head learns."""

    def differentiate(self, images: Tensor, labels: Tensor) -> None:
        with torch.no_grad():
            values = self.network.encoder(images)
        self.task.differentiate_head(self.task.evaluate(values), labels)


class CoordinateDifferences(AdamTrainer):
    """Central differences along every coordinate of the box's input, all in one call; exact in the limit."""

    def __init__(self, task: Task, rate: float, step_size: float) -> None:
        super().__init__(task, rate)
        self.step_size = step_size

    def differentiate(self, images: Tensor, labels: Tensor) -> None:
        values = self.network.encoder(images)
        inputs = values.detach()
        cotangent = self.task.differentiate_head(self.task.evaluate(inputs), labels)
        offsets = self.step_size * torch.eye(inputs.shape[1])[:, None]
        probes = torch.cat([inputs + offsets, inputs - offsets])
        plus, minus = self.task.evaluate(probes.flatten(0, 1)).view(2, inputs.shape[1], len(inputs), -1)
        gradient = ((plus - minus) * cotangent).sum(2).T / (2 * self.step_size)
        torch.autograd.backward(values, gradient)


class OneProbe(AdamTrainer):
    """A forward difference along one Gaussian direction per row, contracted per row: ours with a step set by hand."""

    def __init__(self, task: Task, rate: float, step_size: float) -> None:
        super().__init__(task, rate)
        self.step_size = step_size

    def differentiate(self, images: Tensor, labels: Tensor) -> None:
        values = self.network.encoder(images)
        inputs = values.detach()
        outputs = self.task.evaluate(inputs)
        cotangent = self.task.differentiate_head(outputs, labels)
        directions = torch.randn(inputs.shape, generator=self.task.generator)
        difference = self.task.evaluate(inputs + self.step_size * directions) - outputs.detach()
        change = (difference * cotangent).sum(1, keepdim=True) / self.step_size
        torch.autograd.backward(values, change * directions)


class Spsa(AdamTrainer):
    """All weights at once along one direction of random signs, central; two batches of rows a step. Spall 1992.

    With `exact_head` the head is back-propagated on the outputs of the two perturbed encoders, at no further rows.
    """

    def __init__(self, task: Task, rate: float, step_size: float, exact_head: bool) -> None:
        super().__init__(task, rate)
        self.step_size, self.exact_head = step_size, exact_head
        self.moved = task.network.encoder if exact_head else trained(task)

    def differentiate(self, images: Tensor, labels: Tensor) -> None:
        point = weights_of(self.moved)
        signs = torch.randint(0, 2, point.shape, generator=self.task.generator).float() * 2 - 1
        pair = torch.stack([point + self.step_size * signs, point - self.step_size * signs])
        if self.exact_head:
            outputs = encode_each(self.task, pair, images)
            plus, minus = losses_of_outputs(weights_of(self.network.head)[None], outputs, labels)
            self.task.differentiate_head(outputs.flatten(0, 1), labels.repeat(2))
        else:
            plus, minus = losses(self.task, pair, images, labels)
        fill_gradients(self.moved, signs * (plus - minus) / (2 * self.step_size))


class SparseCoordinates(AdamTrainer):
    """DeepZero's estimator: forward differences along a random subset of the encoder's weights, head exact.

    Chen et al. 2024: coordinate-wise estimate, mu = 5e-3, fresh random masks with fixed ratios per layer; the ratios
    are equal here, where the paper takes them from a pruning score that costs queries of its own.
    """

    STEP = 5e-3

    def __init__(self, task: Task, rate: float, kept: float) -> None:
        super().__init__(task, rate)
        sizes = [parameter.numel() for parameter in self.network.encoder.parameters()]
        self.layers = list(zip([sum(sizes[:i]) for i in range(len(sizes))], sizes, strict=True))
        self.kept = kept

    def differentiate(self, images: Tensor, labels: Tensor) -> None:
        point = weights_of(self.network.encoder)
        chosen = self._choose()
        probes = point.repeat(len(chosen) + 1, 1)
        probes[torch.arange(len(chosen)) + 1, chosen] += self.STEP
        outputs = encode_each(self.task, probes, images)
        found = losses_of_outputs(weights_of(self.network.head)[None], outputs, labels)
        self.task.differentiate_head(outputs[0].clone(), labels)
        gradient = torch.zeros_like(point)
        gradient[chosen] = (found[1:] - found[0]) / self.STEP
        fill_gradients(self.network.encoder, gradient)

    def _choose(self) -> Tensor:
        """Coordinates of this step: of each layer its share, rounded at random so that the mean is kept."""
        chosen = []
        for start, size in self.layers:
            share = self.kept * size
            count = int(share) + int(torch.rand((), generator=self.task.generator) < share % 1)
            chosen.append(start + torch.randperm(size, generator=self.task.generator)[:count])
        return torch.cat(chosen)


def _steps_at_the_box(race: Race) -> list[Setting]:
    return grid(rate=FEW_RATES, step_size=(5e-3, 0.2))


def _spsa(race: Race, rates: Sequence[float]) -> list[Setting]:
    return grid(rate=rates, step_size=(1e-2, 3e-2))


METHODS = [
    Method("one probe by hand", OneProbe, _steps_at_the_box, note="our estimator, Gaussian, at a step set by hand"),
    Method(
        "coordinate differences by hand",
        CoordinateDifferences,
        lambda race: grid(rate=HIGH_RATES, step_size=(5e-3, 0.2)),
        note="central, 33 rows a sample",
    ),
    Method("end-to-end SPSA, exact head", partial(Spsa, exact_head=True), partial(_spsa, rates=FEW_RATES)),
    Method("end-to-end SPSA", partial(Spsa, exact_head=False), partial(_spsa, rates=HIGH_RATES)),
    Method(
        "sparse coordinates of the encoder, exact head",
        SparseCoordinates,
        lambda race: grid(rate=HIGHEST_RATES, kept=(1e-2, 1e-3)),
        note="DeepZero's estimator, reimplemented",
    ),
    Method(
        "frozen encoder",
        FrozenEncoder,
        lambda race: grid(rate=(3e-3, 6e-3, 1e-2, 2e-2, 3e-2, 6e-2, 0.1, 0.2)),
        note="only the head learns",
    ),
]
