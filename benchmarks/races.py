"""The forest race: test accuracy at an equal number of forest evaluations, every method tuned alike.

    python benchmarks/races.py [--method NAME ...] [--quick] [--write]

Task, methods and training are those of examples/random_forest.py: digits, 75/25 split, encoder 64-64-16 tanh, a frozen
forest (60 trees, depth 8, fitted on 4,000 N(0, 1) rows to tanh(x A) C), head 12-32-10, Adam, batches of 128. The budget
counts every row that the forest evaluates in training: forward passes, probes, set-up. A method's learning rate is the
best of four by mean accuracy on seeds 100-102; what is printed are seeds 0-4, which share split, initial weights and
batches between methods. --quick is a smaller race that shows that the script runs. --write puts the table into
benchmarks/results/.
"""

import argparse
import json
import platform
import statistics
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rewriter.examples.random_forest import BUDGET, METHODS, fit_forest, train

RATES = (1e-3, 3e-3, 6e-3, 1e-2)
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Race:
    """What a race is run at."""

    budget: int = BUDGET
    tuning_seeds: tuple[int, ...] = (100, 101, 102)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


QUICK = Race(budget=20_000, tuning_seeds=(100,), seeds=(0, 1))


@dataclass(frozen=True)
class Result:
    """One method: the tuning (mean accuracy by rate), then accuracy and rows by seed."""

    method: str
    tuning: dict[float, float]
    rate: float
    accuracies: list[float]
    rows: list[int]
    seconds: float


def run(method: str, forest: Path, race: Race) -> Result:
    """Choose the method's learning rate, then race it."""
    tuning = {}
    for rate in RATES:
        curves = [train(method, forest, seed, rate=rate, budget=race.budget)[0] for seed in race.tuning_seeds]
        tuning[rate] = statistics.mean(curve.accuracy[-1] for curve in curves)
    rate = max(tuning, key=lambda rate: tuning[rate])
    curves = [train(method, forest, seed, rate=rate, budget=race.budget)[0] for seed in race.seeds]
    return Result(
        method,
        tuning,
        rate,
        [curve.accuracy[-1] for curve in curves],
        [curve.rows[-1] for curve in curves],
        statistics.mean(curve.seconds for curve in curves),
    )


def standard_error(values: list[float]) -> float:
    """Of the mean; 0 for a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def markdown(results: list[Result], race: Race) -> str:
    """The results as a table, with the pairwise difference to the first method."""
    lines = [
        f"Test accuracy after {race.budget:,} forest rows, seeds {', '.join(map(str, race.seeds))}; {versions()}.",
        "",
        f"| method | rate | mean ± s.e. | median | worst | behind {results[0].method} | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        behind = [first - own for first, own in zip(results[0].accuracies, result.accuracies, strict=True)]
        difference = "" if result is results[0] else f"{statistics.mean(behind):.3f} ± {standard_error(behind):.3f}"
        scores = result.accuracies
        lines.append(
            f"| {result.method} | {result.rate:g} | {statistics.mean(scores):.3f} ± {standard_error(scores):.3f}"
            f" | {statistics.median(scores):.3f} | {min(scores):.3f} | {difference} | {result.seconds:.1f} |"
        )
    lines += ["", f"Learning rates: best mean accuracy on seeds {', '.join(map(str, race.tuning_seeds))}."]
    for result in results:
        tried = ", ".join(f"{rate:g}: {accuracy:.3f}" for rate, accuracy in result.tuning.items())
        lines.append(f"- {result.method}: {tried}")
    return "\n".join(lines)


def versions() -> str:
    """What the numbers depend on."""
    wheels = {distribution.metadata["Name"] for distribution in metadata.distributions()}
    runtimes = [name for name in ("onnxruntime", "onnxruntime-gpu") if name in wheels]
    names = ["torch", *runtimes, "scikit-learn"]
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {metadata.version(name)}" for name in names)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", action="append", choices=list(METHODS), help="only these (default: all)")
    parser.add_argument("--quick", action="store_true", help="a small race that shows that the script runs")
    parser.add_argument("--write", action="store_true", help="also write results/forest.md and results/forest.json")
    chosen = parser.parse_args()
    race = QUICK if chosen.quick else Race()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        forest = fit_forest(Path(folder) / "forest.onnx")
        for method in chosen.method or METHODS:
            results.append(run(method, forest, race))
            seeds = ", ".join(f"{accuracy:.3f}" for accuracy in results[-1].accuracies)
            print(f"{method}: learning rate {results[-1].rate:g}, accuracies {seeds}", flush=True)
    table = markdown(results, race)
    print(f"\n{table}")
    if chosen.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "forest.md").write_text(table + "\n", encoding="utf-8")
        record: dict[str, Any] = {"versions": versions(), **asdict(race), "results": [asdict(each) for each in results]}
        (RESULTS / "forest.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
