"""Fashion-MNIST, flattened, through 24 pre-norm residual blocks."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from problem import Batch, Problem
from torch import Tensor, nn
from torch.nn import functional as F

FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
BLOCKS, WIDTH, HIDDEN, BATCH = 24, 96, 192, 512


class ResidualBlock(nn.Module):
    """x + W2 gelu(W1 norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Classifier(nn.Module):
    """784 -> width, the blocks, norm, 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(784, WIDTH)
        self.blocks = nn.Sequential(*(ResidualBlock() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(images))))


@dataclass(frozen=True)
class FashionMnist:
    """The four files in `folder`. Pixels stay bytes until a batch is made."""

    folder: Path
    steps: int

    @cached_property
    def training(self) -> Batch:
        return self._read("train")

    @cached_property
    def test(self) -> Batch:
        return self._read("t10k")

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Classifier()

    def batches(self, seed: int) -> Iterator[Batch]:
        images, labels = self.training
        order = torch.Generator().manual_seed(seed)
        for number in range(self.steps):
            place = number * BATCH % (len(images) // BATCH * BATCH)
            if place == 0:
                shuffled = torch.randperm(len(images), generator=order)
            rows = shuffled[place : place + BATCH]
            yield _scaled(images[rows]), labels[rows]

    def measure(self, model: nn.Module) -> tuple[float, float]:
        images, labels = self.test
        with torch.no_grad():
            logits = torch.cat([model(_scaled(part)) for part in images.split(1000)])
        right = (logits.argmax(1) == labels).double().mean()
        return float(F.cross_entropy(logits, labels)), 100 * float(right)

    def held(self) -> list[Batch]:
        images, labels = self.test
        return [(_scaled(images[rows]), labels[rows]) for rows in torch.arange(1024).split(512)]

    def _read(self, part: str) -> Batch:
        pixels = _bytes(self.folder / f"{part}-images-idx3-ubyte.gz", 16)
        labels = _bytes(self.folder / f"{part}-labels-idx1-ubyte.gz", 8)
        return torch.from_numpy(pixels.reshape(-1, 784)), torch.from_numpy(labels.astype(np.int64))


def _bytes(path: Path, header: int) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header).copy()


def _scaled(pixels: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the training images, as is usual for this set."""
    return (pixels.float() / 255 - 0.286) / 0.353


def require(folder: Path) -> None:
    """Raises SystemExit with where to get the data if it is not in `folder`."""
    if not (folder / "train-images-idx3-ubyte.gz").exists():
        raise SystemExit(
            f"no Fashion-MNIST in {folder}: apt-get install dataset-fashion-mnist (Debian; the four .gz files are in"
            f" {FOLDER}), or pass --data FOLDER with train-images-idx3-ubyte.gz and the other three"
        )


def problem(folder: Path, steps: int, seeds: tuple[int, ...]) -> Problem:
    data = FashionMnist(folder, steps)
    return Problem(
        name="images",
        title="Fashion-MNIST, 24 residual blocks",
        definition=f"{BLOCKS} blocks, width {WIDTH}, hidden {HIDDEN}, batch {BATCH}, {steps} steps",
        chain="blocks",
        blocks=BLOCKS,
        build=data.build,
        batches=data.batches,
        steps=steps,
        loss=F.cross_entropy,
        measure=data.measure,
        held=data.held,
        rates=(5e-4, 1e-3, 2e-3),
        seeds=seeds,
    )
