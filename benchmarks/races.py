"""Test accuracy at an equal number of rows evaluated by a frozen box, every method tuned alike.

    python benchmarks/races.py [--race A|B] [--rows 1e5] [--method NAME ...] [--again] [--quick]

Digits, 75/25 split, encoder 64-64-16 tanh -> frozen box 16 -> 12 in onnxruntime -> head 12-32-10, batches of 128, Adam
where a method leaves the step to an optimiser. Race A: the box is an MLP, at 1e5 and 1e6 rows. Race B: a random forest
(examples/random_forest.py), at 3e5 rows. The budget counts every row that the box evaluates in training, by wrapping
the box itself: forward passes, probes, set-up, capture. Each method has eight settings, all tried on seeds 100-102 at
the full budget; the best by mean accuracy runs on seeds 0-4, which share split, initial weights and batches.

Wherever Adam steps the network its rate falls as a cosine from the tuned value to 0 over the row budget, alike in every
method: with a constant rate the last step of a noisy method is judged, and results spread widely. Constant rates were
tried first; results/races.md says what came of them.

Runs are kept in benchmarks/results/races.json, so an interrupted race continues; the tables go to races.md beside it
after every method. --again forgets the chosen runs first. --quick is a small race that shows that the script runs and
writes nothing. The files in races/, beside this one, hold the tasks and the methods. Comparators, left out where
they are not installed: pip install evotorch==0.6.1 nevergrad==1.0.12 torchopt==0.7.3 "tesseract-core[runtime]==1.15.0"
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "races"))

import by_hand
import comparators_evotorch
import comparators_nevergrad
import comparators_tesseract
import comparators_torchopt
import ours
import surrogate
from method import DECAY, Method
from report import introduction, section, versions
from tasks import Race, races
from tuning import Runs, collect, compete, key_of

from rewriter.examples.random_forest import one_thread

RESULTS = Path(__file__).parent / "results"
METHODS: list[Method] = [
    *ours.METHODS,
    *by_hand.METHODS,
    *comparators_evotorch.METHODS,
    *comparators_tesseract.METHODS,
    *comparators_torchopt.METHODS,
    *comparators_nevergrad.METHODS,
    *surrogate.METHODS,  # the slowest
]


def say(line: str) -> None:
    print(line, flush=True)


def quick(race: Race) -> Race:
    """Small enough for a minute in all."""
    return replace(race, rows=20_000, tuning_seeds=(100,), seeds=(0, 1))


def run(race: Race, methods: list[Method], runs: Runs, after_each: Callable[[], None]) -> None:
    """Every method in one race."""
    with tempfile.TemporaryDirectory() as folder, one_thread():
        path = race.write_box(Path(folder) / "box.onnx")
        for method in methods:
            say(f"{race.key}: {method.name}")
            result = compete(method, race, path, runs, say)
            say(f"  {result.setting}: {', '.join(f'{accuracy:.3f}' for accuracy in result.accuracies)}")
            after_each()


def tables(held: list[Race], runs: Runs) -> str:
    """Of every race and method whose runs are all known."""
    sections = []
    for race in held:
        results = {method.name: collect(method, race, runs) for method in METHODS}
        found = [result for result in results.values() if result]
        if found:
            sections.append(section(race, found, [method for method in METHODS if not results[method.name]]))
    return "\n\n".join([introduction(METHODS), *sections])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--race", choices=["A", "B"], help="only this (default: both)")
    parser.add_argument("--rows", type=lambda text: int(float(text)), help="only at this budget")
    names = [method.name for method in METHODS]
    parser.add_argument("--method", action="append", choices=names, help="only these (default: all)")
    parser.add_argument("--again", action="store_true", help="run what is chosen again, not only what is missing")
    parser.add_argument("--quick", action="store_true", help="a small race that shows that the script runs")
    return parser.parse_args()


def installed(methods: list[Method]) -> list[Method]:
    """Those that can run here; the others are named. Exits where the tasks themselves cannot."""
    if not (find_spec("sklearn") and find_spec("skl2onnx")):
        raise SystemExit('the races need scikit-learn and skl2onnx: pip install -e ".[bench]"')
    for method in methods:
        if method.missing():
            say(f"left out, as {', '.join(method.missing())} is not installed: {method.name}")
    return [method for method in methods if not method.missing()]


def main() -> None:
    asked = parse()
    warnings.filterwarnings("ignore", module="evotorch")
    held = [race for race in races() if asked.race in (None, race.name) and asked.rows in (None, race.rows)]
    if not held:
        raise SystemExit("no race at this budget: A at 1e5 or 1e6 rows, B at 3e5")
    methods = installed([method for method in METHODS if not asked.method or method.name in asked.method])
    if asked.quick:
        held = [quick(race) for race in held if race.rows < 1_000_000]
    runs = Runs(None if asked.quick else RESULTS / "races.json", f"{versions()}; {DECAY}")
    every = held if asked.quick else races()

    def write() -> None:
        if not asked.quick:
            (RESULTS / "races.md").write_text(tables(every, runs) + "\n", encoding="utf-8")

    for race in held:
        if asked.again:
            for method in methods:
                runs.forget(key_of(race, method))
        run(race, methods, runs, write)
    say(f"\n{tables(held, runs)}")


if __name__ == "__main__":
    main()
