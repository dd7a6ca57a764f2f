"""Train a network through a random forest: digits -> encoder -> forest in ONNX -> head.

A forest is piecewise constant, so autograd has nothing to say about it. `rewrite` with one plan entry trains the
encoder in front of it all the same; three things one would try otherwise get the same number of forest evaluations.

    rewriter demo                     or    python -m rewriter.examples.random_forest
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter import BlackBox, OnnxBox, Plan, rewrite

BUDGET = 300_000  # rows: evaluations of the forest on one sample, whatever they are for
BATCH = 128
INPUTS, OUTPUTS = 16, 12  # of the forest
POINTS = 40  # of a learning curve


def fit_forest(path: Path) -> Path:
    """Fit 60 trees of depth 8 to tanh(x A) C on 4,000 rows x ~ N(0, 1), and write them to `path` as ONNX.

    A (16, 16) and C (16, 12) have entries of N(0, 1/16), so that x A has unit variance.
    """
    from skl2onnx import to_onnx
    from sklearn.ensemble import RandomForestRegressor

    random = np.random.default_rng(0)
    rows = random.standard_normal((4000, INPUTS)).astype(np.float32)
    inner, outer = random.normal(0, 0.25, (INPUTS, INPUTS)), random.normal(0, 0.25, (INPUTS, OUTPUTS))
    forest = RandomForestRegressor(n_estimators=60, max_depth=8, random_state=0, n_jobs=-1)
    forest.fit(rows, np.tanh(rows @ inner) @ outer)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_onnx(forest, rows[:1]).SerializeToString())
    return path


@dataclass(frozen=True)
class Digits:
    """Images of 8 x 8 pixels in 0..1 as rows of 64, and their digits; a quarter is kept for testing."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, seed: int) -> "Digits":
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        parts = train_test_split(digits.data / 16, digits.target, test_size=0.25, random_state=seed)
        images, test_images, labels, test_labels = map(torch.from_numpy, parts)
        return cls(images.float(), labels, test_images.float(), test_labels)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random batches without end, the same for every method."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(self.images), (BATCH,), generator=generator)
            yield self.images[chosen], self.labels[chosen]


class Network(nn.Module):
    """An encoder and a head with a forest between them that cannot be differentiated."""

    def __init__(self, forest: Path, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, INPUTS), nn.Tanh())
            self.forest = OnnxBox(forest)
            self.head = nn.Sequential(nn.Linear(OUTPUTS, 32), nn.Tanh(), nn.Linear(32, 10))

    def forward(self, images: Tensor) -> Tensor:
        digits: Tensor = self.head(self.forest(self.encoder(images)))
        return digits


class Method(Protocol):
    """A way to fill the gradients of a network."""

    @property
    def rows(self) -> int: ...  # evaluated by the forest so far

    def differentiate(self, images: Tensor, labels: Tensor) -> None: ...

    @property
    def quality(self) -> float | None: ...  # cosine with the true gradient of each row, where the method knows it


class Rewritten:
    """Ours: two lines, and then PyTorch's own training loop."""

    def __init__(self, network: Network, seed: int) -> None:
        self.step = rewrite(network, Plan([BlackBox("forest")]), loss=F.cross_entropy, seed=seed)

    def differentiate(self, images: Tensor, labels: Tensor) -> None:
        self.step(images, target=labels).backward()

    @property
    def rows(self) -> int:
        return self.step.ledger.total("queries")

    @property
    def quality(self) -> float | None:
        return self.step.quality["forest"].measured_cosine


class _ByHand:
    """What the other methods share: a forest that counts its rows."""

    quality: float | None = None

    def __init__(self, network: Network, seed: int) -> None:
        self.network, self.rows = network, 0
        self.generator = torch.Generator().manual_seed(seed)

    def forest(self, values: Tensor) -> Tensor:
        self.rows += len(values)
        with torch.no_grad():
            outputs: Tensor = self.network.forest(values)
            return outputs

    def differentiate_head(self, values: Tensor, labels: Tensor) -> Tensor:
        """Back-propagate through the head alone; returns the cotangent of the forest's output, (B, 12)."""
        loss = F.cross_entropy(self.network.head(values.requires_grad_()), labels)
        torch.autograd.backward(loss)
        assert values.grad is not None
        return values.grad


class FrozenEncoder(_ByHand):
    """Only the head learns."""

    def differentiate(self, images: Tensor, labels: Tensor) -> None:
        with torch.no_grad():
            values = self.network.encoder(images)
        self.differentiate_head(self.forest(values), labels)


class FiniteDifferences(_ByHand):
    """Central differences with a step of 5e-3, one coordinate of the forest's input after the other."""

    STEP = 5e-3

    def differentiate(self, images: Tensor, labels: Tensor) -> None:
        values = self.network.encoder(images)
        inputs = values.detach()
        cotangent = self.differentiate_head(self.forest(inputs), labels)
        gradient = torch.zeros_like(inputs)
        for coordinate in range(INPUTS):
            offset = torch.zeros(INPUTS)
            offset[coordinate] = self.STEP
            difference = self.forest(inputs + offset) - self.forest(inputs - offset)
            gradient[:, coordinate] = (difference / (2 * self.STEP) * cotangent).sum(1)
        torch.autograd.backward(values, gradient)


class EndToEndSPSA(_ByHand):
    """The head by back-propagation; all the encoder's parameters at once along one random direction of signs.

    Spall 1992: gradient = direction * (loss(p + c direction) - loss(p - c direction)) / 2c.
    """

    STEP = 1e-2

    def differentiate(self, images: Tensor, labels: Tensor) -> None:
        encoder = self.network.encoder
        with torch.no_grad():
            values = encoder(images)
        self.differentiate_head(self.forest(values), labels)
        point = nn.utils.parameters_to_vector(encoder.parameters()).detach()
        direction = torch.randint(0, 2, point.shape, generator=self.generator).to(point) * 2 - 1
        losses = [self._loss(point + sign * self.STEP * direction, images, labels) for sign in (1, -1)]
        nn.utils.vector_to_parameters(point, encoder.parameters())
        gradient = direction * (losses[0] - losses[1]) / (2 * self.STEP)
        sizes = [parameter.numel() for parameter in encoder.parameters()]
        for parameter, part in zip(encoder.parameters(), torch.split(gradient, sizes), strict=True):
            parameter.grad = part.view_as(parameter).clone()

    @torch.no_grad()
    def _loss(self, point: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(point, self.network.encoder.parameters())
        return F.cross_entropy(self.network.head(self.forest(self.network.encoder(images))), labels)


METHODS: dict[str, Callable[[Network, int], Method]] = {
    "rewriter": Rewritten,
    "frozen encoder": FrozenEncoder,
    "finite differences": FiniteDifferences,
    "end-to-end SPSA": EndToEndSPSA,
}
RATES = {  # of Adam, constant, chosen among eight on other seeds
    "rewriter": 6e-3,
    "frozen encoder": 1e-2,
    "finite differences": 1e-2,
    "end-to-end SPSA": 3e-3,
}


@dataclass
class Curve:
    """How one training went: test accuracy after so many rows."""

    method: str
    budget: int
    rows: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    quality: float | None = None


def train(
    name: str,
    forest: Path,
    seed: int,
    *,
    rate: float | None = None,
    budget: int = BUDGET,
    report: Callable[[Curve], None] = lambda curve: None,
) -> tuple[Curve, Method]:
    """Train one network with one method until the forest has evaluated `budget` rows.

    Rows of forward passes, probes and set-up all count; those of the test set, evaluated to draw the curve, do not.
    `report` sees the curve whenever it grows.
    """
    with one_thread():
        return _train(name, forest, seed, RATES[name] if rate is None else rate, budget, report)


def _train(
    name: str, forest: Path, seed: int, rate: float, budget: int, report: Callable[[Curve], None]
) -> tuple[Curve, Method]:
    digits, network = Digits.load(seed), Network(forest, seed)
    method = METHODS[name](network, seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    curve, start = Curve(name, budget), perf_counter()
    for images, labels in digits.batches(seed):
        optimizer.zero_grad()
        method.differentiate(images, labels)
        optimizer.step()
        curve.steps += 1
        if method.rows * POINTS >= budget * (len(curve.rows) + 1):
            curve.rows.append(method.rows)
            curve.accuracy.append(accuracy(network, digits))
            curve.quality, curve.seconds = method.quality, perf_counter() - start
            report(curve)
        if method.rows >= budget:
            return curve, method
    raise AssertionError("batches have no end")


@contextmanager
def one_thread() -> Iterator[None]:
    """Operators this small lose by several threads, and more so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def accuracy(network: Network, digits: Digits) -> float:
    """Share of the test images that the network reads correctly."""
    return float((network(digits.test_images).argmax(1) == digits.test_labels).float().mean())


if __name__ == "__main__":
    from rewriter.cli import main

    main(["demo"])
