"""What the demo shows: a line of progress, a table, a figure."""

import sys
from pathlib import Path
from typing import TextIO

from rewriter.examples.random_forest import BATCH, Curve

_WIDTH = 24  # of a progress bar
_NAME = 20
_LEGEND = {
    "rewriter": "this library: one random probe of the forest per row, gradient of the encoder from the probe",
    "frozen encoder": "the encoder stays as it was drawn, the head learns by back-propagation",
    "finite differences": "by hand: central, step 0.005, one coordinate of the forest's input after the other",
    "end-to-end SPSA": "by hand: all encoder weights at once along one random direction, head by back-propagation",
}


class Progress:
    """One line per method: rewritten in place on a terminal, printed at every quarter elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = sys.stdout if stream is None else stream
        self.in_place = self.stream.isatty()
        self._quarters = 0

    def __call__(self, curve: Curve) -> None:
        done = min(curve.rows[-1] / curve.budget, 1.0)
        last = done == 1.0
        if self.in_place:
            self.stream.write("\r" + self.line(curve, done) + ("\n" if last else ""))
        elif last or int(done * 4) > self._quarters:
            self.stream.write(self.line(curve, done) + "\n")
        self._quarters = 0 if last else int(done * 4)
        self.stream.flush()

    @staticmethod
    def line(curve: Curve, done: float) -> str:
        bar = ("#" * round(done * _WIDTH)).ljust(_WIDTH, ".")
        quality = "" if curve.quality is None else f"  gradient quality {curve.quality:.2f}"
        return (
            f"{curve.method:<{_NAME}}[{bar}] {done:>4.0%}  {curve.rows[-1]:>7,} rows"
            f"  accuracy {curve.accuracy[-1]:.3f}{quality}"
        )


def table(curves: list[Curve]) -> str:
    """The last point of every curve, the best first, and what each method is."""
    lines = [f"{'method':<{_NAME}}{'accuracy':>10}{'steps':>8}{'rows a step':>13}{'seconds':>9}"]
    lines.append("-" * len(lines[0]))
    for curve in sorted(curves, key=lambda curve: -curve.accuracy[-1]):
        lines.append(
            f"{curve.method:<{_NAME}}{curve.accuracy[-1]:>10.3f}{curve.steps:>8,}"
            f"{curve.rows[-1] / curve.steps:>13,.0f}{curve.seconds:>9.1f}"
        )
    lines += ["", *(f"{curve.method:<{_NAME}}{_LEGEND[curve.method]}" for curve in curves)]
    return "\n".join(lines)


def draw(curves: list[Curve], path: Path) -> Path:
    """Write the learning curves to `path` as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for curve in curves:
        axes.plot([0, *curve.rows], [0.1, *curve.accuracy], label=curve.method, linewidth=2)
    axes.set(
        xlabel="rows evaluated by the forest (forward passes, probes and set-up)",
        ylabel="test accuracy",
        title=f"Digits through a random forest of 60 trees, batches of {BATCH}",
        xlim=(0, curves[0].budget),
        ylim=(0, 1),
    )
    axes.xaxis.set_major_formatter(lambda rows, _: f"{rows / 1000:.0f}k")
    axes.axhline(0.1, color="grey", linewidth=1, linestyle=":")
    axes.annotate("chance", (curves[0].budget, 0.1), (-4, 3), textcoords="offset points", ha="right", color="grey")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.13))
    figure.savefig(path, dpi=140)
    return path
