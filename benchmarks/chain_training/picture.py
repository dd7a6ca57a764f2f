"""Training loss against steps and against seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from runs import Comparison, Runs
from training import Run


def draw(held: Sequence[Comparison], runs: Runs, path: Path) -> None:
    """A row of two panels for each problem; curves are means over the seeds that a method has."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(held), 2, figsize=(11, 3.2 * len(held)), squeeze=False, sharey="row")
    for (left, right), comparison in zip(panels, held, strict=True):
        problem = comparison.problem
        rate = runs.rate(problem)
        assert rate is not None
        lowest, highest = np.inf, -np.inf
        for method in comparison.methods:
            found = list(runs.of(problem, method, rate).values())
            if not found:
                continue
            steps, seconds, losses = _curve(found)
            left.plot(steps, losses, label=method.name, linewidth=1)
            right.plot(seconds, losses, linewidth=1)
            lowest, highest = min(lowest, losses.min()), max(highest, losses[len(losses) // 8])
        left.set(xlabel="steps", ylabel="training loss, nats", title=problem.title)
        right.set(xlabel="CPU seconds, one thread", ylim=(lowest - 0.02, highest))
        figure.legend(
            *left.get_legend_handles_labels(),
            loc="center left",
            bbox_to_anchor=(1, 0.5),
            bbox_transform=right.transAxes,
            fontsize=7,
        )
    figure.tight_layout()
    figure.savefig(path, dpi=80, bbox_inches="tight")
    pyplot.close(figure)


def _curve(found: Sequence[Run]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    points = np.mean([run.curve for run in found], axis=0)
    return points[:, 0], points[:, 1], points[:, 2]
