"""The command `rewriter`."""

import argparse
import logging
import platform
import sys
from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path

from rewriter.runtime.boxes.onnx_runtime import onnxruntime_report
from rewriter.runtime.errors import RewriteError

_QUICK = 30_000  # rows per method


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    chosen = _parser().parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        return demo(chosen.folder, chosen.seed, chosen.quick) if chosen.command == "demo" else version()
    except RewriteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def version() -> int:
    """Print what a report of a problem should name."""
    print(f"rewriter {metadata.version('rewriter')}")
    print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"torch {metadata.version('torch')}")
    print(onnxruntime_report())
    return 0


def demo(folder: Path, seed: int, quick: bool) -> int:
    """Train through a random forest in four ways; write a figure and the rewritten program into `folder`."""
    missing = [name for name in ("sklearn", "skl2onnx", "matplotlib") if util.find_spec(name) is None]
    if missing:
        print(f"the demo needs {', '.join(missing)}: pip install 'rewriter[demo]'", file=sys.stderr)
        return 1
    from rewriter.examples import display, random_forest

    budget = _QUICK if quick else random_forest.BUDGET
    print("Digits -> encoder -> random forest (ONNX, no gradient) -> head -> ten classes.")
    print(
        f"Each method trains until the forest has evaluated {budget:,} rows, whatever for. Test rows are not counted."
    )
    print(
        "Gradient quality: measured cosine between the estimated and the true gradient of one row. One random probe of"
    )
    print("16 inputs can reach 0.25; it is right on average, and a step averages over the rows of its batch.\n")
    forest = random_forest.fit_forest(folder / "forest.onnx")
    curves = []
    for name in random_forest.METHODS:
        curve, method = random_forest.train(name, forest, seed, budget=budget, report=display.Progress())
        curves.append(curve)
        if isinstance(method, random_forest.Rewritten):
            step = method.step
    print(f"\n{display.table(curves)}\n")
    print(f"Where the rows of `rewriter` went:\n{step.ledger}\n")
    print(f"What the rewritten model says of itself:\n{step.explain()}\n")
    figure = display.draw(curves, folder / "learning_curves.png")
    step.export(folder)
    print(f"Learning curves: {figure}\nThe rewritten program: {folder / 'program.json'}, {folder / 'program.dot'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rewriter", description="Say where each gradient of a PyTorch model comes from."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("demo", help="train a network through a random forest, against three other ways")
    shown.add_argument(
        "--quick", action="store_true", help=f"stop after {_QUICK:,} rows per method: seconds, poor accuracy"
    )
    shown.add_argument("--folder", type=Path, default=Path("demo"), help="where files go (default: %(default)s)")
    shown.add_argument("--seed", type=int, default=0, help="of weights, batches and probes (default: %(default)s)")
    commands.add_parser("version", help="print versions, for reports of problems")
    return parser


if __name__ == "__main__":
    sys.exit(main())
