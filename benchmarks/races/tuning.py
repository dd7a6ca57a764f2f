"""Runs one training, remembers it, and chooses among a method's settings."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from method import Method, Setting
from tasks import Race, Task


@dataclass(frozen=True)
class Run:
    """One training: test accuracy at its end, rows that the box evaluated, steps, seconds."""

    accuracy: float
    rows: int
    steps: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """One method in one race: tuning (setting in words -> mean accuracy), the setting chosen, the runs by seed."""

    method: Method
    tuning: dict[str, float]
    setting: str
    runs: list[Run]

    @property
    def accuracies(self) -> list[float]:
        return [run.accuracy for run in self.runs]


class Runs:
    """Every run that was made, by what it was; kept in a file so that a race may be interrupted and continued.

    A file of another definition (versions and rules that all runs share) is left aside. Without a path nothing is kept.
    """

    def __init__(self, path: Path | None, definition: str) -> None:
        self.path, self.definition = path, definition
        self._known: dict[str, list[float]] = {}
        if path is not None and path.exists():
            record = json.loads(path.read_text(encoding="utf-8"))
            if record.get("definition") == definition:
                self._known = record["runs"]
            else:
                print(f"{path.name} was made under another definition: starting anew", flush=True)

    def get(self, key: str) -> Run | None:
        found = self._known.get(key)
        return Run(found[0], int(found[1]), int(found[2]), found[3]) if found else None

    def put(self, key: str, run: Run) -> None:
        self._known[key] = [round(run.accuracy, 5), run.rows, run.steps, round(run.seconds, 2)]

    def forget(self, start: str) -> None:
        """Everything whose key starts so."""
        self._known = {key: run for key, run in self._known.items() if not key.startswith(start)}

    def save(self) -> None:
        if self.path is None:
            return
        runs = ",\n".join(f"  {json.dumps(key)}: {json.dumps(run)}" for key, run in sorted(self._known.items()))
        columns = '["accuracy", "rows", "steps", "seconds"]'
        text = f'{{\n"definition": {json.dumps(self.definition)},\n"columns": {columns},\n"runs": {{\n{runs}\n}}\n}}\n'
        fresh = self.path.with_suffix(".new")
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(self.path)


def key_of(race: Race, method: Method) -> str:
    return f"{race.key} | {method.name} | "


def in_words(setting: Setting) -> str:
    """`rate=0.006, step_size=0.2`."""
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in setting.items()
    )


def train(method: Method, setting: Setting, race: Race, path: Path, seed: int) -> Run:
    """Train until the box has evaluated the race's rows; every method stops after the step that reaches them."""
    start = perf_counter()
    task = Task(race, path, seed)
    trainer = method.build(task, **setting)
    steps = 0
    for images, labels in task.digits.batches(seed):
        trainer.step(images, labels)
        steps += 1
        if task.counter.rows >= race.rows:
            break
        if task.counter.rows == 0:
            raise AssertionError(f"{method.name} makes steps without the box, or its rows are not counted")
    trainer.settle()
    return Run(task.accuracy(), task.counter.rows, steps, perf_counter() - start)


def compete(method: Method, race: Race, path: Path, runs: Runs, progress: Callable[[str], None]) -> Result:
    """Choose the method's setting by mean accuracy on the tuning seeds, then race it; what is known is not repeated."""
    for setting in method.settings(race):
        for seed in race.tuning_seeds:
            _ensure(method, setting, race, path, seed, runs)
        runs.save()
        words = in_words(setting)
        progress(f"    {words}: {_tuned(method, race, runs)[words]:.3f}")
    tuned = _tuned(method, race, runs)
    best = max(method.settings(race), key=lambda setting: tuned[in_words(setting)])
    for seed in race.seeds:
        _ensure(method, best, race, path, seed, runs)
    runs.save()
    result = collect(method, race, runs)
    assert result is not None
    return result


def collect(method: Method, race: Race, runs: Runs) -> Result | None:
    """What is known of a method in a race; None while a run is missing."""
    tuned = _tuned(method, race, runs)
    if len(tuned) < len(method.settings(race)):
        return None
    best = max(tuned, key=lambda words: tuned[words])
    found = [runs.get(_key(method, best, race, seed)) for seed in race.seeds]
    complete = [run for run in found if run is not None]
    return Result(method, tuned, best, complete) if len(complete) == len(found) else None


def _tuned(method: Method, race: Race, runs: Runs) -> dict[str, float]:
    """Mean accuracy by setting, of those whose tuning runs are all known."""
    tuned = {}
    for words in map(in_words, method.settings(race)):
        found = [runs.get(_key(method, words, race, seed)) for seed in race.tuning_seeds]
        if all(found):
            tuned[words] = statistics.mean(run.accuracy for run in found if run is not None)
    return tuned


def _ensure(method: Method, setting: Setting, race: Race, path: Path, seed: int, runs: Runs) -> None:
    key = _key(method, in_words(setting), race, seed)
    if runs.get(key) is None:
        runs.put(key, train(method, setting, race, path, seed))


def _key(method: Method, words: str, race: Race, seed: int) -> str:
    return f"{key_of(race, method)}{words} | {seed}"
