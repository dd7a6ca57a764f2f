"""What the runs say, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise

import torch
from methods import EXACT, Method
from runs import Comparison, Runs
from training import Run

SURE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # t distribution: 97.5 % lie below, by degrees of freedom
INTRODUCTION = """# Training a chain without back-propagation through it

`python benchmarks/chain_training.py`; {versions}; one CPU thread for a run, on a shared machine. A seed fixes initial
weights and batches for all methods alike; the learning rate was chosen for back-propagation, on seed 100, by held-out
loss. AdamW, a linear rise over the first twentieth of the steps, then a cosine to 0. Held-out figures: mean ± standard
error over the seeds. Behind: mean of the paired differences to back-propagation, with its two-sided 95 % interval
(Student's t); positive is worse than back-propagation. Seconds are CPU time of a run's training steps beside other work
on the machine, which adds up to half and not the same to each: their ratio says what a method costs, roughly.

Highway runs all its blocks on one thread here, so its iterations are extra work and nothing is gained by them: they pay
where every unit has a device of its own. The gradients are the same there. Horizon's windows are differentiated one
after the other on this thread; what they save is memory, which is not measured here. Its last row, overlapping windows,
is the published scheme.

![loss against steps and seconds](chain_training.png)"""

FIRST_TRIED = """Another setting was tried first and given up after one seed: 400 steps of 8 windows, units that do not
start small, positions that start at random, rate 0.008 (the highest offered, and chosen). All runs were leaving a
plateau at 2.5 to 2.6 nats when they ended, and the moment was chance: back-propagation 2.414, Highway k=0 2.593, k=1
2.402, k=3 2.496 (although its gradient had a cosine above 0.99), Horizon 6 2.506, Horizon 3 2.333. The present setting
was chosen by back-propagation's loss on seed 100 alone."""


def versions() -> str:
    """What the numbers depend on."""
    return f"torch {torch.__version__}"


def page(held: Sequence[Comparison], runs: Runs) -> str:
    return "\n\n".join([INTRODUCTION.format(versions=versions()), *(section(each, runs) for each in held)])


def section(comparison: Comparison, runs: Runs) -> str:
    """One problem: what each method scored and what it cost, goals, gradients, learning rates."""
    problem = comparison.problem
    rate = runs.rate(problem)
    assert rate is not None
    found = {method: runs.of(problem, method, rate) for method in comparison.methods}
    images = problem.name == "images"
    head = "accuracy, % | behind, points | 95 % interval" if images else "loss, nats | behind, nats | 95 % interval"
    lines = [
        f"## {problem.title}",
        "",
        f"{problem.definition}; learning rate {rate:g}.",
        "",
        f"| method | seeds | {head} | {'loss, nats' if images else 'accuracy, %'} | seconds | of back-propagation's |",
        "| --- " * 8 + "|",
        *(_row(method, own, found[EXACT], images) for method, own in found.items() if own),
        "",
        *_goals(found, images),
        "",
        *_gradients(found),
        "",
        "Learning rates tried for back-propagation, held-out loss and accuracy:",
        "",
        *_rates(comparison, runs),
        *(() if images else ("", FIRST_TRIED)),
    ]
    return "\n".join(lines)


def _score(run: Run, images: bool) -> float:
    """Of what is judged; lower is better."""
    return -run.accuracy if images else run.loss


def behind(own: dict[int, Run], exact: dict[int, Run], images: bool) -> list[float]:
    """Paired differences to back-propagation."""
    return [_score(run, images) - _score(exact[seed], images) for seed, run in own.items() if seed in exact]


def _mean(values: Sequence[float], digits: int) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


def _half_width(values: Sequence[float]) -> float:
    """Of the two-sided 95 % interval of the mean."""
    return SURE[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5


def _row(method: Method, own: dict[int, Run], exact: dict[int, Run], images: bool) -> str:
    digits = 2 if images else 3
    scores = [_mean([run.accuracy for run in own.values()], 2), _mean([run.loss for run in own.values()], 3)]
    pairs = behind(own, exact, images)
    compared = " | "
    if method is not EXACT and len(pairs) > 1:
        mean, half = statistics.mean(pairs), _half_width(pairs)
        compared = f"{mean:+.{digits}f} | {mean - half:+.{digits}f} .. {mean + half:+.{digits}f}"
    seconds = statistics.mean(run.seconds for run in own.values())
    share = statistics.mean(run.seconds / exact[seed].seconds for seed, run in own.items() if seed in exact)
    judged, other = scores if images else reversed(scores)
    return f"| {method.name} | {len(own)} | {judged} | {compared} | {other} | {seconds:.0f} | {share:.2f} |"


def _goals(found: dict[Method, dict[int, Run]], images: bool) -> list[str]:
    lines = []
    for method, own in found.items():
        pairs = behind(own, found[EXACT], images)
        if method.goal is None or len(pairs) < 2:
            continue
        upper = statistics.mean(pairs) + (_half_width(pairs) if images else 0.0)
        what = "upper end of the interval" if images else "mean"
        reached = "reached" if upper <= method.goal else "**missed**"
        lines.append(f"- goal: {method.name}, {what} at most {method.goal:g}: {reached} ({upper:+.3f})")
    return lines


def _gradients(found: dict[Method, dict[int, Run]]) -> list[str]:
    rows = []
    for method, own in found.items():
        measured = [run.cosines for run in own.values() if run.cosines]
        for units in measured[0] if measured else ():
            means = [statistics.mean(each) for each in zip(*(cosines[units] for cosines in measured), strict=True)]
            rising = all(lower <= higher for lower, higher in pairwise(means))
            shown = " | ".join(f"{mean:.4f}" for mean in means) + " | " * (6 - len(means))
            rows.append(f"| {method.name} | {units} | {shown} | {'yes' if rising else '**no**'} |")
    if not rows:
        return []
    return [
        "Cosine of Highway's gradient of the chain's parameters with the exact one, on held-out batches, at the final",
        "weights (mean over the first two seeds), by iterations k:",
        "",
        "| weights trained by | units | k=0 | 1 | 2 | 3 | 4 | 5 | rising |",
        "| --- " * 9 + "|",
        *rows,
    ]


def _rates(comparison: Comparison, runs: Runs) -> list[str]:
    problem = comparison.problem
    tried = {rate: runs.get(problem, (EXACT, rate, problem.tuning_seed)) for rate in problem.rates}
    return [f"- {rate:g}: {run.loss:.3f} nats, {run.accuracy:.2f} %" for rate, run in tried.items() if run is not None]
