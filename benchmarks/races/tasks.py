"""What is raced: digits through a frozen box, and the count of what the box evaluates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter import OnnxBox
from rewriter.examples.random_forest import INPUTS, OUTPUTS, Digits, fit_forest

HIDDEN = 64  # of the MLP in ONNX


def write_mlp(path: Path) -> Path:
    """Write y = tanh(x A + a) C with random A (16, 64), a, C (64, 12) to `path` as ONNX, float32.

    Entries of A are of N(0, 1/16), of a N(0, .01), of C N(0, 1/64), so that unit inputs give outputs near unit size.
    """
    from onnx import TensorProto, checker, helper, numpy_helper

    random = np.random.default_rng(0)
    weights = {
        "A": random.normal(0, INPUTS**-0.5, (INPUTS, HIDDEN)),
        "a": random.normal(0, 0.1, HIDDEN),
        "C": random.normal(0, HIDDEN**-0.5, (HIDDEN, OUTPUTS)),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "A", "a"], ["inner"]),
            helper.make_node("Tanh", ["inner"], ["bent"]),
            helper.make_node("MatMul", ["bent", "C"], ["y"]),
        ],
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", OUTPUTS])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


@dataclass(frozen=True)
class Race:
    """A task at a budget: `rows` is every row that the box evaluates in training."""

    name: str
    title: str
    write_box: Callable[[Path], Path]
    rows: int
    tuning_seeds: tuple[int, ...] = (100, 101, 102)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    @property
    def key(self) -> str:
        return f"{self.name} {self.rows:.0e}".replace("e+0", "e")


def races() -> list[Race]:
    """In the order in which they are run."""
    smooth = "smooth box: a frozen MLP 16-64-12 in ONNX"
    return [
        Race("A", smooth, write_mlp, 100_000),
        Race("B", "rough box: a frozen random forest 16 -> 12 in ONNX (60 trees, depth 8)", fit_forest, 300_000),
        Race("A", smooth, write_mlp, 1_000_000),
    ]


class Network(nn.Module):
    """Encoder 64-64-16 (tanh, 5,200 parameters), frozen box 16 -> 12, head 12-32-10 (746 parameters)."""

    def __init__(self, path: Path, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, INPUTS), nn.Tanh())
            self.box = OnnxBox(path, threads=1)
            self.head = nn.Sequential(nn.Linear(OUTPUTS, 32), nn.Tanh(), nn.Linear(32, 10))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.box(self.encoder(images)))
        return logits


class RowCounter:
    """Counts the rows that a box computes, whoever asks for them, by standing around its `compute`."""

    def __init__(self, box: OnnxBox) -> None:
        self.rows, self.calls, self._on = 0, 0, True
        compute = box.compute

        def counted(arrays: list[Any], rows: int) -> list[Any]:
            if self._on:
                self.rows += rows
                self.calls += 1
            return compute(arrays, rows)

        vars(box)["compute"] = counted

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Where the test set is evaluated."""
        self._on = False
        try:
            yield
        finally:
            self._on = True


class Task:
    """One network to train, and all that a method may use.

    Split, initial weights and batches depend on the seed alone, so methods share them.
    """

    def __init__(self, race: Race, path: Path, seed: int) -> None:
        self.race, self.seed = race, seed
        self.digits = Digits.load(seed)
        self.network = Network(path, seed)
        self.counter = RowCounter(self.network.box)
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def evaluate(self, values: Tensor) -> Tensor:
        """The box on values (n, 16), tape-free: (n, 12)."""
        outputs: Tensor = self.network.box(values)
        return outputs

    def differentiate_head(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Back-propagate through the head alone; returns dL/dy of the box's outputs, (n, 12)."""
        loss = F.cross_entropy(self.network.head(outputs.requires_grad_()), labels)
        torch.autograd.backward(loss)
        assert outputs.grad is not None
        return outputs.grad

    @torch.no_grad()
    def accuracy(self) -> float:
        """Share of the test images that the network reads correctly; the box's rows here are not counted."""
        with self.counter.paused():
            found = self.network(self.digits.test_images).argmax(1) == self.digits.test_labels
        return float(found.float().mean())
