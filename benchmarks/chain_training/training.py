"""One training run: what it scored, what it cost, how its loss fell, where its gradient points at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from time import process_time

import torch
from methods import BY_NAME, MOST, highway
from problem import Problem
from torch import Tensor, nn

from rewriter import rewrite

WARM_UP = 0.05  # of the steps; then the rate falls as a cosine to 0
POINTS = 40  # of a curve


@dataclass(frozen=True)
class Run:
    """A run's record.

    loss, accuracy:  held out, at the end; nats and percent
    seconds:         CPU time of the training steps, without set-up and measuring
    curve:           (steps made, CPU seconds so far, mean training loss since the last point)
    cosines:         mode -> cosine with the exact gradient, of the chain's parameters at the final weights, by count
    """

    loss: float
    accuracy: float
    seconds: float
    curve: list[tuple[int, float, float]]
    cosines: dict[str, list[float]] = field(default_factory=dict)


@lru_cache(maxsize=2)
def made(make: Callable[[], Problem]) -> Problem:
    """The problem, its data read once in a process."""
    return make()


def train(make: Callable[[], Problem], method: str, rate: float, seed: int, compare: bool) -> Run:
    """Train from the seed's weights on the seed's batches. `compare`: the final gradient with Highway's too."""
    torch.set_num_threads(1)
    problem = made(make)
    model = problem.build(seed)
    entries = BY_NAME[method].entries(problem)
    first = next(problem.batches(seed))
    step = rewrite(model, entries, loss=problem.loss, example=first[:1]) if entries else None

    def loss_of(inputs: Tensor, target: Tensor) -> Tensor:
        return problem.loss(model(inputs), target) if step is None else step(inputs, target=target)

    optimizer = torch.optim.AdamW(model.parameters(), rate, fused=True)
    curve: list[tuple[int, float, float]] = []
    seconds, losses = 0.0, []
    for number, (inputs, target) in enumerate(problem.batches(seed)):
        start = process_time()
        for group in optimizer.param_groups:
            group["lr"] = rate * factor(number, problem.steps)
        loss = loss_of(inputs, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds += process_time() - start
        losses.append(float(loss.detach()))
        if (number + 1) * POINTS // problem.steps > number * POINTS // problem.steps:
            curve.append((number + 1, round(seconds, 2), round(sum(losses) / len(losses), 4)))
            losses = []
    found, accuracy = problem.measure(model)
    cosines = {units: alignment(problem, model, units) for units in MOST} if compare else {}
    return Run(round(found, 5), round(accuracy, 3), round(seconds, 2), curve, cosines)


def factor(number: int, steps: int) -> float:
    """Of the learning rate at a step: a short linear rise, then a cosine to 0."""
    rising = max(1, round(WARM_UP * steps))
    if number < rising:
        return (number + 1) / rising
    return 0.5 * (1 + float(torch.tensor(torch.pi * (number - rising) / (steps - rising)).cos()))


def alignment(problem: Problem, model: nn.Module, units: str) -> list[float]:
    """Cosine of Highway's gradient, for 0, 1, ... iterations, with the exact one, summed over the held batches."""
    held = problem.held()
    chain = list(model.get_submodule(problem.chain).parameters())
    counts = range(MOST[units] + 1)
    # One capture for all counts: a schedule by forward pass.
    schedule = tuple((count * len(held), count) for count in counts)
    step = rewrite(model, highway(schedule, units)(problem), loss=problem.loss, example=held[0][:1])

    def gradient(loss_of: Callable[..., Tensor]) -> Tensor:
        total = [torch.zeros_like(parameter) for parameter in chain]
        for inputs, target in held:
            parts = torch.autograd.grad(loss_of(inputs, target=target), chain)
            total = [so_far + part for so_far, part in zip(total, parts, strict=True)]
        return torch.cat([part.flatten() for part in total]).double()

    exact = gradient(lambda inputs, target: problem.loss(model(inputs), target))
    found = [gradient(step) for _ in counts]
    return [round(float(torch.cosine_similarity(exact, each, dim=0)), 5) for each in found]
