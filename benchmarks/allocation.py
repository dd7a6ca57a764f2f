"""What sharing copies out among rows gains: variance of the mean gradient over that of equal shares, at equal cost.

    python benchmarks/allocation.py > benchmarks/results/allocation.md

Rows of made-up lengths; then the digits of scikit-learn along a training, by formula and by the estimator itself.
"""

import math
import platform
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from rewriter.runtime.estimators.allocation import copy_counts, pilot_norms, pilot_shares
from rewriter.runtime.estimators.arrays import Array
from rewriter.runtime.estimators.copies import Batch, Estimation, estimate_by
from rewriter.runtime.estimators.cut_estimator import CutEstimator
from rewriter.runtime.estimators.cut_options import CutOptions
from rewriter.runtime.estimators.learned_allocation import LEARNED
from rewriter.runtime.random import Key

ROWS, COPIES, PILOT, WIDTH = 128, 20, 4, 32
STAGES = (0, 20, 50, 100, 200, 400)
AVERAGED = 20  # batches of a stage
SEEDS = 2
REPEATS = 10


def relative(norms: Array, counts: Array) -> float:
    """Rows err by |g|^2 / a, up to a factor."""
    return float((norms**2 / counts).sum() / (norms**2 / COPIES).sum())


def with_pilot(norms: Array, degrees: int, generator: np.random.Generator, plain: bool = False) -> float:
    """A pilot of 4 copies finds |g|^2 with so many degrees of freedom; its copies count, and are used.

    plain: what it finds is taken as it is, and pilot and rest are averaged in proportion to their copies.
    """
    squares = norms**2 * generator.chisquare(degrees, len(norms)) / degrees
    rest = COPIES - PILOT
    counts = copy_counts(np.sqrt(squares) if plain else pilot_norms(squares, degrees), rest)
    share = PILOT / COPIES if plain else pilot_shares(squares, PILOT, rest)
    error = norms**2 * (share**2 / PILOT + (1 - share) ** 2 / counts)
    return float(error.sum() / (norms**2 / COPIES).sum())


def made_up() -> list[str]:
    lines = []
    for tau in (0.25, 0.5, 1.0, 1.5):
        generator, found = np.random.default_rng(0), []
        for _ in range(400):
            norms = np.exp(tau * generator.standard_normal(ROWS))
            found.append(
                (
                    norms.mean() ** 2 / (norms**2).mean(),
                    relative(norms, copy_counts(norms, COPIES)),
                    with_pilot(norms, PILOT, generator, plain=True),
                    with_pilot(norms, PILOT, generator),
                    with_pilot(norms, 16 * PILOT, generator),
                )
            )
        lines.append(row(f"{tau}", math.exp(-(tau**2)), *np.mean(found, 0)))
    return lines


class Digits:
    """A tanh network over digits, cut behind its first layer, and what each allocator has learnt along its training."""

    def __init__(self, noise: float, seed: int) -> None:
        torch.manual_seed(seed)
        x, y = (torch.from_numpy(each) for each in load_digits(return_X_y=True))
        self.x, self.y = x / 16, y.long()
        self.y = torch.where(torch.rand(len(y)) < noise, torch.randint(0, 10, y.shape), self.y)
        self.encoder = nn.Sequential(nn.Linear(64, WIDTH), nn.Tanh()).double()
        self.tail = nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, 10)).double()
        self.optimizer = torch.optim.Adam([*self.encoder.parameters(), *self.tail.parameters()], 3e-3)
        self.learned = {name: kind() for name, kind in LEARNED.items()}
        self.generator = np.random.default_rng(seed)
        self.steps = 0

    def losses(self, z: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy(self.tail(z), self.y[rows], reduction="none")

    @torch.no_grad()
    def doubts(self, z: Tensor, rows: Tensor) -> Tensor:
        """|p - y|, the loss's gradient in the logits, which allocation="doubt" goes by."""
        return (self.tail(z).softmax(1) - F.one_hot(self.y[rows], 10)).norm(dim=1)

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows, values at the cut, losses and their gradients there, of the next batch."""
        rows = torch.randint(0, len(self.y), (ROWS,))
        z = self.encoder(self.x[rows])
        losses = self.losses(z, rows)
        (gradient,) = torch.autograd.grad(losses.sum(), z, retain_graph=True)
        return rows, z, losses, gradient

    def step(self) -> list[float]:
        """One step of training; ratios to equal shares there."""
        rows, z, losses, gradient = self.batch()
        norms, clean = gradient.norm(dim=1).numpy(), losses.detach().numpy()
        doubt = -np.expm1(-clean)
        known = (norms, clean, np.sqrt(clean), doubt, self.doubts(z, rows).numpy())
        found = [float(clean.mean()), *(relative(norms, copy_counts(each, COPIES)) for each in known)]
        found.append(with_pilot(norms, PILOT, self.generator))
        for name, allocator in self.learned.items():
            shares = allocator.shares(clean, Key(0, self.steps, name), 0, allocator.parameters)
            counts = copy_counts(shares, COPIES)
            found.append(relative(norms, counts))
            allocator.learn(clean, shares, counts, norms**2 * self.generator.chisquare(counts) / counts)
        found.append(self.misled(z, losses, copy_counts(doubt, COPIES)))
        self.optimizer.zero_grad()
        losses.mean().backward()
        self.optimizer.step()
        self.steps += 1
        return found

    def misled(self, z: Tensor, losses: Tensor, counts: Array) -> float:
        """Cosine of the encoder's gradient with rows weighted a_i / N, as published, with that of the mean loss."""
        weights, both = torch.from_numpy(counts / counts.sum()), []
        for loss in (losses @ weights, losses.mean()):
            both.append(torch.cat([g.flatten() for g in self.gradients(loss)]))
        return float(F.cosine_similarity(both[0], both[1], dim=0))

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, list(self.encoder.parameters()), retain_graph=True)

    def measured(self, directions: str) -> list[float]:
        """Squared errors of the estimator itself over those of equal shares, after the training so far."""
        rows, z, losses, gradient = self.batch()
        value, clean = z.detach(), losses.detach() / ROWS
        found = []
        for name in ("uniform", "oracle", "doubt", "norm", *LEARNED):
            options = CutOptions(COPIES, 1e-3, directions, "clean", allocation="uniform" if name == "oracle" else name)
            cut, error = CutEstimator(options, 1.0, name), 0.0
            if cut.allocator is not None:
                cut.allocator.parameters = self.learned[name].parameters
            settings = cut.settle(value, value, [WIDTH])
            doubts = self.doubts(value, rows) if name == "doubt" else None
            for repeat in range(REPEATS):
                key = Key(0, repeat, name)
                estimation = cut.estimation(value, clean, 0, settings, key, doubts)
                if name == "oracle":
                    batch = Batch(value, clean, 0, settings.sigma)
                    estimation = estimate_by(batch, options, COPIES, key, gradient.norm(dim=1).numpy())
                estimate = answered(estimation, lambda source, noisy: self.losses(noisy, rows[source]) / ROWS)
                error += float((estimate - gradient / ROWS).square().sum())
            found.append(error)
        return [error / found[0] for error in found[1:]]


def answered(estimation: Estimation, losses: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The estimate, once its requests are answered; every way asks for as many copies."""
    request, asked = next(estimation), 0
    while True:
        asked += len(request[0])
        with torch.no_grad():
            answer = losses(*request)
        try:
            request = estimation.send(answer)
        except StopIteration as stop:
            assert asked == ROWS * COPIES
            found: Tensor = stop.value.gradient
            return found


def row(*cells: object) -> str:
    return "| " + " | ".join(cell if isinstance(cell, str) else f"{cell:.3f}" for cell in cells) + " |"


def head(*cells: str) -> str:
    return row(*cells) + "\n" + row(*("---" for _ in cells))


def training() -> tuple[list[str], list[str]]:
    """Rows of the second and of the third table."""
    along, through = [], []
    for noise in (0.0, 0.1):
        runs = [Digits(noise, seed) for seed in range(SEEDS)]
        for start in STAGES:
            found: list[list[float]] = []
            for run in runs:
                while run.steps < start:
                    run.step()
                found += [run.step() for _ in range(AVERAGED)]
            along.append(row(f"{noise:.0%}, {start}", *np.mean(found, 0)))
            if start in (0, 100, 400):
                for directions in ("gaussian", "orthogonal"):
                    measured = np.mean([run.measured(directions) for run in runs], 0)
                    through.append(row(f"{noise:.0%}, {start + AVERAGED}, {directions}", *measured))
    return along, through


def main() -> None:
    torch.set_num_threads(1)
    print(
        "# Copies shared out among rows\n\n`python benchmarks/allocation.py > benchmarks/results/allocation.md`, torch "
        f"{torch.__version__}, {platform.machine()}, one thread.\n"
    )
    print(TEXT_1 + "\n" + head("deviation of ln s", "theory", "exact", "whole", "plain pilot", "pilot", "pilot, 64"))
    print("\n".join(made_up()))
    along, through = training()
    learnt = ("running", "Gaussian", "Bernoulli")
    names = ("best", "loss", "sqrt(loss)", "1 - p_y", "doubt", "pilot", *learnt)
    print("\n" + TEXT_2 + "\n" + head("wrong labels, step", "loss", *names, "cosine of a_i / N"))
    print("\n".join(along))
    print("\n" + TEXT_3 + "\n" + head("wrong labels, step", "best", "doubt", "pilot", *learnt))
    print("\n".join(through))


TEXT_1 = f"""Variance of the mean gradient over that of equal shares, {ROWS} rows, {COPIES} copies each on average.

Lengths s of rows' gradients with normal logarithms, means of 400 batches. theory: exp(-tau^2); exact: (mean s)^2 /
mean s^2; whole: whole numbers of at least 2. A pilot of {PILOT} copies counts and is used; it knows s^2 with 4 degrees
of freedom, or 64. plain: taken as it is, pilot and rest averaged by their numbers; the others draw what the pilot says
towards the mean and give it the part that other rows' pilots suggest.
"""
TEXT_2 = f"""A classifier of digits, {WIDTH} tanh units at the cut, batches of {ROWS}, Adam 3e-3; means of {AVERAGED}
batches from that step on and of {SEEDS} seeds, from the exact gradients' lengths. best: in proportion to these, at
least 2 copies; loss: what FLOPS's mean is linear in; doubt: |p - y|. What learns does so from the noisy squares of its
own copies. The last column is the encoder's gradient, exact, with rows weighted a_i / N for 1 - p_y instead of equally.
"""
TEXT_3 = f"""The estimator itself at the same points: squared error of the rows' gradients over that of equal shares,
{REPEATS} estimates of a batch and of {SEEDS} seeds, sigma 1e-3, {COPIES} copies of a row on average for every way.
"""

if __name__ == "__main__":
    main()
