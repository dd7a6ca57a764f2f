"""Calls of a box for the same vjp: contracted per row, against tesseract-core, which takes a batch as one long vector.

    python benchmarks/contracted_vjp.py [--write]

The box: y = tanh(x A) C and z = sin(x D) in float64, on 32 rows of width 16; autograd on the same function gives the
exact vjp. Calls are counted inside the box, each with 32 rows: ours is told max_rows=32, or it would stack all probes
in one call. First the exact vjp. Then 32 calls of each, random directions of signs, mean over 20 seeds; averages of
signs have an expected cosine near sqrt(q / (q + n - 1)) with q = 16, and n = 16 per row or 512 per batch.

Needs: pip install "tesseract-core[runtime]==1.15.0"
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rewriter import BlackBox, CallableBox, Plan, rewrite

ROWS, WIDTH, SEEDS, EPS = 32, 16, 20, 1e-4
RESULT = Path(__file__).parent / "results" / "contracted_vjp.md"
Array = NDArray[np.float64]


class Counted:
    """The box's function; counts its calls, all of 32 rows."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.inner, self.outer, self.other = (random.normal(0, 0.25, (WIDTH, n)) for n in (WIDTH, 12, 8))
        self.calls = 0

    def __call__(self, x: Array) -> tuple[Array, Array]:
        assert len(x) == ROWS
        self.calls += 1
        return np.tanh(x @ self.inner) @ self.outer, np.sin(x @ self.other)

    def exact(self, x: Tensor, cotangents: tuple[Tensor, Tensor]) -> Tensor:
        """The vjp by autograd."""
        x = x.clone().requires_grad_()
        inner, outer, other = map(torch.from_numpy, (self.inner, self.outer, self.other))
        (found,) = torch.autograd.grad((torch.tanh(x @ inner) @ outer, torch.sin(x @ other)), x, cotangents)
        return found


class Boxed(nn.Module):
    def __init__(self, function: Counted) -> None:
        super().__init__()
        self.box = CallableBox(function)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, z = self.box(x)
        return y, z


Vjp = Callable[[Counted, Tensor, tuple[Tensor, Tensor], int], Tensor]


def ours(**options: Any) -> Vjp:
    """Through a rewritten model, its second step: the first, like one in 50, spends one more probe on its quality."""

    def vjp(function: Counted, x: Tensor, cotangents: tuple[Tensor, Tensor], seed: int) -> Tensor:
        plan = Plan([BlackBox("box", max_rows=ROWS, step_size=EPS, input_scale=1.0, clip=None, **options)])
        step = rewrite(Boxed(function), plan, example=(x,), seed=seed)
        x = x.clone().requires_grad_()
        for _ in range(2):
            function.calls = 0
            (found,) = torch.autograd.grad(step(x), x, cotangents)
        return found

    return vjp


def tesseract(**options: Any) -> Vjp:
    """tesseract-core's finite_difference_vjp as its endpoint calls it, in process."""
    from pydantic import BaseModel
    from tesseract_core.runtime import Array as Field
    from tesseract_core.runtime import Differentiable, Float64
    from tesseract_core.runtime.experimental import finite_difference_vjp

    field = Differentiable[Field[(None, None), Float64]]
    inputs: Any = type("Inputs", (BaseModel,), {"__annotations__": {"x": field}})
    outputs: Any = type("Outputs", (BaseModel,), {"__annotations__": {"y": field, "z": field}})

    def vjp(function: Counted, x: Tensor, cotangents: tuple[Tensor, Tensor], seed: int) -> Tensor:
        def apply(given: Any) -> Any:
            y, z = function(np.asarray(given.x))
            return outputs(y=y, z=z)

        function.calls = 0
        y, z = (cotangent.numpy() for cotangent in cotangents)
        names = ({"x"}, {"y", "z"}, {"y": y, "z": z})
        found = finite_difference_vjp(apply, inputs(x=x.numpy()), *names, eps=EPS, seed=seed, **options)
        return torch.from_numpy(np.asarray(found["x"]))

    return vjp


@dataclass(frozen=True)
class Line:
    """What one way of asking cost and gave: cosine and slope <estimate, exact> / <exact, exact>."""

    what: str
    calls: int
    cosine: float
    slope: float


def measure(what: str, vjp: Vjp, seeds: int) -> Line:
    """Mean over seeds, each with its own rows and cotangents."""
    cosines, slopes, calls = [], [], set()
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        x, *pair = (torch.randn(ROWS, n, generator=generator, dtype=torch.float64) for n in (WIDTH, 12, 8))
        cotangents = (pair[0], pair[1])
        function = Counted()
        exact = function.exact(x, cotangents)
        found = vjp(function, x, cotangents, seed)
        calls.add(function.calls)
        inner = float((found * exact).sum())
        cosines.append(inner / float(found.norm() * exact.norm()))
        slopes.append(inner / float(exact.norm() ** 2))
    (count,) = calls
    return Line(what, count, statistics.mean(cosines), statistics.mean(slopes))


def table(lines: list[Line]) -> str:
    rows = ["| vjp | calls of 32 rows | cosine | slope |", "| --- | --- | --- | --- |"]
    rows += [f"| {line.what} | {line.calls:,} | {line.cosine:.6g} | {line.slope:.6g} |" for line in lines]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"also write results/{RESULT.name}")
    asked = parser.parse_args()
    signs = {"directions": "rademacher", "reconstruction": "average"}
    lines = [
        measure("rewriter, central, 16 probes", ours(probes=16, difference="central"), 3),
        measure("rewriter, forward, 16 probes", ours(probes=16), 3),
        measure("tesseract-core, central", tesseract(algorithm="central"), 3),
        measure("tesseract-core, forward", tesseract(algorithm="forward"), 3),
        measure("rewriter, central, 16 averages of signs", ours(probes=16, difference="central", **signs), SEEDS),
        measure("tesseract-core, stochastic, 16 samples", tesseract(algorithm="stochastic", num_samples=16), SEEDS),
    ]
    title = "`python benchmarks/contracted_vjp.py`: batch 32, width 16, two outputs;"
    note = "Calls of rewriter include the forward pass; one step in 50, the first among them, spends one probe more."
    text = f"{title} tesseract-core {metadata.version('tesseract-core')}.\n\n{table(lines)}\n\n{note}\n"
    print(text)
    if asked.write:
        RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
