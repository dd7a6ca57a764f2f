"""A convolutional net trained without back-propagation through it: `UlrCut("**")` beside evolution strategies and SPSA.

    python benchmarks/ulr_layers.py [--steps N] [--only PART_OF_A_NAME ...]

scikit-learn's digits (1,400 rows to learn from, 397 unseen); three convolutions and a linear layer, 4,218 parameters.
Every method but back-propagation evaluates each row 32 times a step beside its clean forward: 8 copies at each of four
cuts, or 32 perturbations of all weights. Adam; each method's learning rate is chosen on a seed of its own, by the
accuracy on 200 of the rows to learn from. The table: three seeds, the same initial weights and batches for all.
Cosines are with back-propagation's gradient of the noiseless net on the same batch, at the weights of seed 0 and at
those that the hybrid has half-way. One thread, CPU time. Prints the tables of benchmarks/results/ulr_layers.md.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from ulr_layers_case import (
    LAYERS,
    ROWS,
    GradientStep,
    Run,
    Weights,
    convolutional,
    cosines,
    digits,
    held_back,
    train,
    weights_of,
)
from ulr_layers_weight_noise import WeightNoise, noise_of_each_row, noise_of_the_batch, orthogonal, signs

from rewriter import UlrCut, rewrite

COPIES = 8
FORWARDS = COPIES * len(LAYERS)
SEEDS, TUNING_SEED = (0, 1, 2), 10
RATES = (5e-3, 1.5e-2, 4e-2)
SIGMAS = (0.01, 0.1)


class Rewritten:
    """A `GradientStep` by the library: cut behind every layer, or without options not at all."""

    def __init__(self, model: nn.Module, seed: int, **options: Any) -> None:
        self.model = model
        plan = [UlrCut("**", **options)] if options else []
        self._step = rewrite(model, plan, loss=F.cross_entropy, example=(torch.zeros(ROWS, 64),), seed=seed)

    @property
    def state(self) -> list[nn.Parameter]:
        return list(self._step.parameters())

    @property
    def evaluated(self) -> int:
        return self._step.ledger.total("queries")

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self._step(x, target=y).backward()


Make = Callable[[nn.Module, int], GradientStep]


@dataclass(frozen=True)
class Method:
    """makes: by what is chosen with the learning rate, nothing mostly."""

    name: str
    makes: dict[str, Make]


def cut(name: str, noise: str, sigma: str = "auto", **options: str) -> Method:
    sigmas: tuple[float | str, ...] = SIGMAS if sigma == "fixed" else (sigma,)
    made = partial(Rewritten, noise=noise, copies=COPIES, **options)
    return Method(f"ULR, {name}", {str(size): partial(made, sigma=size) for size in sigmas})


def by_weights(name: str, estimate: Callable[..., tuple[Tensor, int]]) -> Method:
    return Method(name, {"auto": partial(WeightNoise, estimate=estimate)})


REFERENCE = cut("hybrid", "auto")
METHODS = (
    Method("back-propagation", {"": Rewritten}),
    *[cut(f"activations, {sigma} noise", "activation", sigma) for sigma in ("fixed", "learned")],
    cut("activations", "activation"),
    cut("hybrid, fixed noise", "auto", "fixed"),
    REFERENCE,
    *[cut(f"hybrid, rows by {rows}", "auto", allocation=rows) for rows in ("doubt", "running", "norm")],
    cut("hybrid, layers by Neyman", "auto", across="neyman"),
    by_weights("ES, a row's own noise, leave-one-out", noise_of_each_row(FORWARDS, antithetic=False)),
    by_weights("ES, a row's own noise, pairs", noise_of_each_row(FORWARDS, antithetic=True)),
    by_weights("ES, the batch's noise, orthogonal pairs", noise_of_the_batch(FORWARDS, orthogonal)),
    by_weights("SPSA, averaged", noise_of_the_batch(FORWARDS, signs)),
)


@dataclass(frozen=True)
class Chosen:
    method: Method
    kind: str
    rate: float

    def make(self, seed: int) -> GradientStep:
        return self.method.makes[self.kind](convolutional(seed), seed)

    def run(self, seed: int, steps: int) -> Run:
        return train(self.make(seed), digits(), seed, self.rate, steps)


def choose(method: Method, steps: int) -> Chosen:
    """The best of all rates and kinds on the rows held back, the smaller rate of equal ones."""
    found = [Chosen(method, kind, rate) for rate in RATES for kind in method.makes]
    runs = [train(each.make(TUNING_SEED), held_back(), TUNING_SEED, each.rate, steps) for each in found]
    return max(zip(found, runs, strict=True), key=lambda pair: pair[1].accuracy)[0]


def line(chosen: Chosen, steps: int) -> tuple[str, GradientStep]:
    """Of the table of accuracies; and the step object as it was half-way through the first seed's training."""
    runs = [chosen.run(seed, steps) for seed in SEEDS]
    accuracies = [run.accuracy for run in runs]
    error = statistics.stdev(accuracies) / len(runs) ** 0.5
    forwards, seconds = (statistics.mean(getattr(run, name) for run in runs) for name in ("forwards", "seconds"))
    sigma = chosen.kind or "none"
    shown = f"{statistics.mean(accuracies):.3f} ± {error:.3f} | {forwards:.1f} | {1000 * seconds:.0f}"
    return f"| {chosen.method.name} | {sigma} | {chosen.rate:g} | {shown} |", runs[0].half_way[0]


def compared(name: str, fresh: GradientStep, used: GradientStep, weights: Weights) -> str:
    found = (*cosines(fresh, weights_of(fresh.model)), *cosines(used, weights))
    return f"| {name} | " + " | ".join(f"{cosine:.2f}" for cosine in found) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=280, help="of each training (default: 280, 10 epochs)")
    parser.add_argument("--only", nargs="*", default=[""], help="methods whose names hold one of these")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    chosen = choose(REFERENCE, asked.steps)
    _, weights = chosen.run(SEEDS[0], asked.steps).half_way
    print("| method | sigma | learning rate | accuracy | forwards of a row and step | ms a step |")
    print("| --- | --- | --- | --- | --- | --- |")
    compare = []
    for method in METHODS:
        if any(part in method.name for part in asked.only):
            chosen = choose(method, asked.steps)
            shown, used = line(chosen, asked.steps)
            print(shown, flush=True)
            compare.append(compared(method.name, chosen.make(SEEDS[0]), used, weights))
    heads = [f"{layer}, {when}" for when in ("at first", "half-way") for layer in LAYERS]
    print("\n| cosine | " + " | ".join(heads) + " |\n|" + " --- |" * (1 + len(heads)))
    print("\n".join(compare))


if __name__ == "__main__":
    main()
