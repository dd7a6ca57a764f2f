"""Makes the runs that are not known yet, at most `jobs` at a time, and keeps them in a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path

from methods import EXACT, Method
from problem import Problem
from training import Run, train

Made = tuple[Method, float, int]  # method, learning rate, seed


class Runs:
    """Of all problems. A problem's runs made under another definition are left aside. Without a path none is kept."""

    def __init__(self, path: Path | None, versions: str) -> None:
        self.path, self.versions = path, versions
        self._known: dict[str, dict[str, Run]] = {}
        if path is not None and path.exists():
            for definition, runs in json.loads(path.read_text(encoding="utf-8")).items():
                self._known[definition] = {key: _run(found) for key, found in runs.items()}

    def get(self, problem: Problem, made: Made) -> Run | None:
        return self._of(problem).get(_key(made))

    def put(self, problem: Problem, made: Made, run: Run) -> None:
        self._of(problem)[_key(made)] = run
        if self.path is not None:
            parts = [f"{json.dumps(each)}: {_shown(runs)}" for each, runs in self._known.items() if runs]
            fresh = self.path.with_suffix(".new")
            fresh.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
            fresh.replace(self.path)

    def rate(self, problem: Problem) -> float | None:
        """The rate with which back-propagation has the lowest held-out loss; None while one was not tried."""
        tried = {rate: self.get(problem, (EXACT, rate, problem.tuning_seed)) for rate in problem.rates}
        losses = {rate: run.loss for rate, run in tried.items() if run is not None}
        return min(losses, key=losses.__getitem__) if len(losses) == len(tried) else None

    def of(self, problem: Problem, method: Method, rate: float) -> dict[int, Run]:
        """Those that are known, by seed."""
        found = {seed: self.get(problem, (method, rate, seed)) for seed in problem.seeds}
        return {seed: run for seed, run in found.items() if run is not None}

    def begun(self, problem: Problem) -> bool:
        """Whether there is anything to compare with."""
        rate = self.rate(problem)
        return rate is not None and bool(self.of(problem, EXACT, rate))

    def _of(self, problem: Problem) -> dict[str, Run]:
        return self._known.setdefault(f"{problem.name}: {problem.definition}; {self.versions}", {})


def _key(made: Made) -> str:
    method, rate, seed = made
    return f"{method.name} | rate {rate:g} | seed {seed}"


def _run(found: dict[str, object]) -> Run:
    return Run(**found)  # type: ignore[arg-type]


def _shown(runs: dict[str, Run]) -> str:
    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(asdict(run))}" for key, run in runs.items()) + "\n}"


@dataclass(frozen=True)
class Comparison:
    """source: makes the problem, in any process."""

    source: Callable[[], Problem]
    methods: tuple[Method, ...]

    @cached_property
    def problem(self) -> Problem:
        return self.source()


def make(comparison: Comparison, runs: Runs, jobs: int) -> Iterator[str]:
    """Tune, then compare, seed by seed, so that what an interruption leaves is paired. A line for each run made."""
    problem = comparison.problem
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        tuned = [(EXACT, rate, problem.tuning_seed) for rate in problem.rates]
        yield from _missing(comparison, tuned, runs, pool)
        rate = runs.rate(problem)
        assert rate is not None
        wanted = [(method, rate, seed) for seed in problem.seeds for method in comparison.methods]
        yield from _missing(comparison, wanted, runs, pool)


def _missing(comparison: Comparison, wanted: list[Made], runs: Runs, pool: ProcessPoolExecutor) -> Iterator[str]:
    problem, asked = comparison.problem, {}
    for method, rate, seed in wanted:
        if runs.get(problem, (method, rate, seed)) is None:
            compare = method.compare and seed in problem.seeds[:2]  # it takes a third of a run
            asked[pool.submit(train, comparison.source, method.name, rate, seed, compare)] = (method, rate, seed)
    for done in as_completed(asked):
        run = done.result()
        runs.put(problem, asked[done], run)
        yield f"{problem.name}: {_key(asked[done])}: {run.loss:.4f} nats, {run.accuracy:.2f} %, {run.seconds:.0f} s"
