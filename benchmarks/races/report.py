"""What the runs say, as Markdown."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from importlib import metadata

from method import Method
from tasks import Race
from tuning import Result

HEADER = "| method | mean ± s.e. | median | worst | behind rewriter | setting | steps | rows | seconds |"
OURS = "rewriter"
CONSTANT_RATES = [
    "Wherever Adam steps the network, its rate falls as a cosine from the tuned value to 0 over the row budget, in",
    "every method alike (in PGPE too; the other population methods have no such rate and stay as they are). With a",
    "constant rate the last step of a noisy method is judged, and results spread widely. Constant rates were tried",
    "first, with every method in race A at 1e5 and with ten of the sixteen in race B, and the rule was changed after",
    "seeing the results: in race A at 1e5 rows rewriter had 0.918 (median 0.911, worst 0.904), one probe by hand",
    "0.918 (median 0.927), the surrogate 0.961; in race B rewriter had 0.870 (median 0.893, worst 0.740; rate 0.03",
    "chosen), one probe by hand 0.911, the surrogate 0.967. The falling rate does not help everyone: without it,",
    "coordinate differences had 0.802, end-to-end SPSA 0.524, PGPE 0.381 and the surrogate 0.961 in race A at 1e5,",
    "and in race B end-to-end SPSA 0.586 and PGPE 0.576, all more than below. Comparators that chose the highest rate",
    "offered were then offered higher ones (frozen encoder, coordinate differences, end-to-end SPSA, sparse",
    "coordinates, PGPE); those offered to rewriter are as they were.",
]
GOALS = {  # median of rewriter; worst, or None where the goal is to be first
    "A 1e5": (0.94, None),
    "B 3e5": (0.93, 0.89),
}


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 for a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def versions() -> str:
    """What the numbers depend on."""
    found = {distribution.metadata["Name"]: distribution.version for distribution in metadata.distributions()}
    names = ["torch", "onnxruntime", "onnxruntime-gpu", "scikit-learn"]
    names += ["evotorch", "nevergrad", "cma", "torchopt", "tesseract-core"]
    return ", ".join(
        [f"Python {platform.python_version()}", *(f"{name} {found[name]}" for name in names if name in found)]
    )


def introduction(methods: Sequence[Method]) -> str:
    """What the tables have in common."""
    return "\n".join(
        [
            "# Races",
            "",
            f"`python benchmarks/races.py`; one CPU thread of a shared machine; {versions()}.",
            "",
            "Digits, 75/25 split, encoder 64-64-16 -> frozen box 16 -> 12 -> head 12-32-10, batches of 128. Rows are",
            "what the box evaluated in training, counted by wrapping it; a method stops after the step that reaches",
            "the budget. Each method has eight settings, all tried on seeds 100-102 at the full budget; the best runs",
            "on seeds 0-4, which share split, initial weights and batches. Behind rewriter: mean ± s.e. of the paired",
            "differences. What each setting scored is below each table. A method is shown with all its settings",
            "and seeds or not at all; what is listed as not run was left out for want of time. Seconds are wall time",
            "beside other work on the machine, several times more in some rows than in others: not to be compared.",
            "",
            *CONSTANT_RATES,
            "",
            *(f"- {method.name}: {method.note}" for method in methods if method.note),
        ]
    )


def section(race: Race, results: Sequence[Result], missing: Sequence[Method]) -> str:
    """One race: table, verdict, tuning; `missing` was not run or not to its end."""
    ordered = sorted(results, key=lambda result: -statistics.mean(result.accuracies))
    ours = next((result for result in results if result.method.name == OURS), None)
    seeds = ", ".join(map(str, race.seeds))
    lines = [
        f"## Race {race.name} at {race.rows:,} rows",
        "",
        f"{race.title[0].upper()}{race.title[1:]}. Test accuracy on seeds {seeds}.",
        "",
        HEADER,
        "| --- " * HEADER.count(" | ") + "| --- |",
        *(_row(result, ours) for result in ordered),
        "",
        *_verdict(race, ordered, ours),
        f"- not run: {', '.join(method.name for method in missing) or 'none'}",
        "",
        f"Mean accuracy of every setting on seeds {', '.join(map(str, race.tuning_seeds))}:",
        "",
    ]
    lines += [f"- {result.method.name}: {_tuning(result)}" for result in results]
    return "\n".join(lines)


def _row(result: Result, ours: Result | None) -> str:
    scores, runs = result.accuracies, result.runs
    behind = ""
    if ours is not None and result is not ours:
        mean, error = difference(ours, result)
        behind = f"{mean:+.3f} ± {error:.3f}"
    name = f"**{result.method.name}**" if result is ours else result.method.name
    return (
        f"| {name} | {statistics.mean(scores):.3f} ± {standard_error(scores):.3f} | {statistics.median(scores):.3f}"
        f" | {min(scores):.3f} | {behind} | {result.setting} | {statistics.mean(run.steps for run in runs):.0f}"
        f" | {statistics.mean(run.rows for run in runs):,.0f} | {statistics.mean(run.seconds for run in runs):.1f} |"
    )


def difference(ours: Result, other: Result) -> tuple[float, float]:
    """Mean and standard error of ours minus other, seed by seed."""
    pairs = [mine - theirs for mine, theirs in zip(ours.accuracies, other.accuracies, strict=True)]
    return statistics.mean(pairs), standard_error(pairs)


def _verdict(race: Race, ordered: Sequence[Result], ours: Result | None) -> list[str]:
    if ours is None or len(ordered) == 1:
        return []  # nothing to compare
    others = [result for result in ordered if result is not ours]
    ahead = [result for result in others if difference(ours, result)[0] < 0]
    ties = [result for result in others if abs(difference(ours, result)[0]) <= 2 * difference(ours, result)[1]]
    lines = [
        f"- ahead of rewriter by the mean: {_names(ahead)}",
        f"- ties, within two standard errors: {_names(ties)}",
    ]
    if race.key in GOALS:
        median, worst = statistics.median(ours.accuracies), min(ours.accuracies)
        wanted, floor = GOALS[race.key]
        lines.append(f"- goal: median at least {wanted}: {_met(median, wanted)}")
        if floor is not None:
            return [*lines, f"- goal: worst at least {floor}: {_met(worst, floor)}"]
        better = [result for result in ahead if result not in ties and not result.method.surrogate]
        equal = [result for result in ties if not result.method.surrogate]
        lines.append(f"- goal: first of all that use no surrogate: {_place(better, equal)}")
    return lines


def _place(better: Sequence[Result], equal: Sequence[Result]) -> str:
    """First, tie or behind, at two standard errors."""
    if better:
        return f"**missed**, behind {_names(better)}"
    return f"tie with {_names(equal)}, ahead of the rest" if equal else "reached, first"


def _met(found: float, wanted: float) -> str:
    return f"{'reached' if found >= wanted else '**missed**'} ({found:.3f})"


def _names(results: Sequence[Result]) -> str:
    return ", ".join(result.method.name for result in results) or "none"


def _tuning(result: Result) -> str:
    return "; ".join(f"{words}: {accuracy:.3f}" for words, accuracy in result.tuning.items())
