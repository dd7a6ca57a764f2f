"""What the examples that run by `python -m rewriter.examples.NAME` share: options, progress, means, a figure."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Chosen:
    """folder: where files go, made if not there; seed: of data, weights and probes; quick: a smaller run."""

    folder: Path
    seed: int
    quick: bool


def chosen(arguments: Sequence[str] | None, description: str, name: str, needed: Sequence[str]) -> Chosen:
    """The options; exits with what to install where one of the packages `needed` is missing."""
    parser = argparse.ArgumentParser(prog=f"python -m rewriter.examples.{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="a smaller run: seconds, worse fits")
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where files go (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and probes (default: %(default)s)")
    found = parser.parse_args(arguments)
    missing = [package for package in needed if util.find_spec(package) is None]
    if missing:
        parser.exit(1, f"this example needs {', '.join(missing)}: pip install 'rewriter[demo]'\n")
    found.folder.mkdir(parents=True, exist_ok=True)
    return Chosen(found.folder, found.seed, found.quick)


def progress(line: str) -> None:
    """One line, at once."""
    print(line, file=sys.stdout, flush=True)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, which is nan for a single value."""
    mean = sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values)
    return mean, (spread / (len(values) - 1) / len(values)) ** 0.5 if len(values) > 1 else float("nan")


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A matplotlib figure that needs no display, and its axes (rows, columns)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)
