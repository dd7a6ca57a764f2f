"""The automatic step against a high-effort reference, on boxes from real packages and boxes it was not made for.

    python benchmarks/step_size.py [--group "named" ...] [--box NAME ...] [--write]

Each box stands in a model of its own, rewritten with `BlackBox("box", probes=d)`: every direction is probed, so that
what is left is the error of the step. An error is that of one row's gradient in units of the inputs' spread, relative
to that row's gradient. The reference is autograd where the function is written in torch, else Ridders' method on
central differences of the clean function in float64, with its own estimate of its error.

Needs: pip install sgp4 CoolProp QuantLib mujoco gymnasium scipy onnxscript
"""

import argparse
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from step_size_case import Array, Case
from step_size_fresh import FRESH
from step_size_kept_back import KEPT_BACK
from step_size_made_up import MADE_UP
from step_size_named import NAMED
from step_size_reference import cotangents, norms, reference
from torch import Tensor, nn

from rewriter import BlackBox, Plan, RewriteError, rewrite

RESULTS = Path(__file__).parent / "results" / "step_size.md"
PACKAGES = ("sgp4", "CoolProp", "QuantLib", "mujoco", "scipy", "onnxruntime")
SETTINGS = [(d, k) for d in ("forward", "central") for k in ("orthogonal", "coordinate")]
FIXED = tuple(10.0 ** (-k / 2) for k in range(19))
GROUPS = {
    "named": ("The boxes that the goal names", NAMED),
    "made up": ("Boxes made up against the rule", MADE_UP),
    "kept back": (
        "Boxes kept back at first; the ReLU network among them was looked at, too, when the rule was changed",
        KEPT_BACK,
    ),
    "fresh": (
        "Boxes written after the rule; from them followed dense directions for sweeps of coordinate probes",
        FRESH,
    ),
}
WHY = {
    "pipes, 5 digits": "one row, whose gradient is small beside the last digit; central differences suffice",
    "pipes, 4 digits": (
        "rows whose gradients are small beside the last digit: forward, no fixed step suffices; central, .3 does, "
        "which the rows of the sweep, with larger gradients, do not show"
    ),
    "kinks, noise 1e-6": (
        "few rows have a kink within a step, and the rows of the sweep have none; 1e-3 would nearly do"
    ),
    "ONNX ReLU float32": "few rows have a kink within a step",
    "saturated": "rows in which every output rounds to 0 or 1, with gradients below 1e-8 of the others'",
    "curvature 1 to 1e4": "the stiffest input needs a step at which float32 has some two digits left",
    "declared noise 1e-4": "noise, at nearly the best step there is; central differences, the default here, suffice",
    "declared noise 1e-2": "noise, at nearly the best step there is: it takes more probes, which average it",
}


class Model(nn.Module):
    """Nothing but the box."""

    def __init__(self, box: nn.Module) -> None:
        super().__init__()
        self.box = box

    def forward(self, x: Tensor) -> Tensor:
        return self.box(x)


@dataclass
class Result:
    """Of one setting on one box.

    differences: (rows, d) found less true gradient, in units of the spread, over the norm of the row's true gradient;
    step: what the rule says of its step; rows: queries that its measurement took
    """

    differences: Array
    step: dict[str, Any]
    rows: int
    failure: str = ""

    @property
    def errors(self) -> Array:
        """(rows,)"""
        return norms(self.differences)

    def words(self, goal: float) -> str:
        """Median and worst error, and how many rows miss the goal."""
        if self.failure:
            return self.failure
        missed = int((self.errors > goal).sum())
        words = f"{np.median(self.errors):.0e} / {self.errors.max():.0e}"
        return words + (f", **{missed} of {len(self.errors)} miss**" if missed else "")


def measure(case: Case, v: Tensor, true: Array, spread: Array, **options: Any) -> Result:
    """One backward of a fresh rewritten model."""
    step = rewrite(Model(case.box), Plan([BlackBox("box", probes=case.x.shape[1], **options)]))
    leaf = case.x.clone().requires_grad_()
    try:
        y = step(leaf)
        (y * v.to(y.dtype)).sum().backward()
    except RewriteError as error:
        return Result(np.full(tuple(case.x.shape), np.inf), {}, 0, f"refused: {error.what}"[:60])
    assert leaf.grad is not None
    differences = (leaf.grad.double().numpy() - true) * spread / norms(true * spread)[:, None]
    (region,) = step.latest.emitted.regions.values()
    return Result(differences, region.rule.get_state()["rows"]["step"], step.ledger.total("step_size"))


@dataclass
class Line:
    """All results of one box: by setting, by fixed step along coordinates, and the doubt about the reference itself."""

    name: str
    case: Case
    doubt: float
    automatic: dict[tuple[str, str], Result]
    fixed: list[Result]


def run(name: str, case: Case) -> Line:
    """One box at every setting."""
    v = cotangents(case)
    x = case.x.double().numpy()
    spread = np.maximum(x.std(0), 0.1 * np.abs(x.mean(0)))
    true, doubt = reference(case, v, spread)

    def backward(difference: str, kind: str, **rest: Any) -> Result:
        return measure(case, v, true, spread, difference=difference, directions=kind, **rest)

    automatic = {setting: backward(*setting) for setting in SETTINGS}
    fixed = [backward("central", "coordinate", step_size=step, clip=None) for step in FIXED]
    return Line(name, case, doubt, automatic, fixed)


def heading(*titles: str) -> list[str]:
    """The first two lines of a table."""
    return ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]


def row_of(*cells: object) -> str:
    """One line of a table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def short(value: float | None, form: str = ".0e") -> str:
    """A number, or a dash."""
    return "-" if value is None else format(value, form)


def error_table(lines: list[Line]) -> list[str]:
    """Errors of the automatic step."""
    rows = heading("box", "rows x d", "goal", *(f"{d}, {k}" for d, k in SETTINGS), "set-up rows", "reference")
    for line in lines:
        goal, results = line.case.tolerance, line.automatic.values()
        size = " x ".join(map(str, line.case.x.shape))
        most = max(result.rows for result in results)
        words = [result.words(goal) for result in results]
        rows.append(row_of(line.name, size, f"{goal:.0%}", *words, most, short(line.doubt)))
    return rows


def fact_table(lines: list[Line]) -> list[str]:
    """What the rule says of the box and its step."""
    rows = heading("box", "kind", "steps", "noise floor", "order", "error the rule expects, forward", "central")
    for line in lines:
        facts = [result.step for result in line.automatic.values() if result.step]
        if not facts:
            continue
        forward, central = line.automatic["forward", "orthogonal"].step, line.automatic["central", "orthogonal"].step
        steps = " / ".join(short(fact["value"]) for fact in facts)
        expected = [short(forward["error"]), short(central["error"])]
        noise, order = short(central["noise_floor"]), short(central["order"], ".1f")
        rows.append(row_of(line.name, "/".join(sorted({f["kind"] for f in facts})), steps, noise, order, *expected))
    return rows


def fixed_table(lines: list[Line]) -> list[str]:
    """What fixed steps do, and what one step for each dimension could gain."""
    shown = (2, 6, 10, 14)
    rows = heading(
        "box", "automatic", "best common step", "best step per dimension", *(f"{FIXED[k]:.0e}" for k in shown)
    )
    for line in lines:
        squares = np.stack([result.differences**2 for result in line.fixed])  # (steps, rows, d)
        squares = np.where(np.isfinite(squares), squares, np.inf).mean(1)
        common = float(np.sqrt(squares.sum(1).min()))
        single = float(np.sqrt(squares.min(0).sum()))
        automatic = line.automatic["central", "coordinate"].errors
        fixed = [short(float(np.median(line.fixed[k].errors))) for k in shown]
        rows.append(
            row_of(line.name, short(float(np.sqrt((automatic**2).mean()))), short(common), short(single), *fixed)
        )
    return rows


def reasons(lines: list[Line]) -> list[str]:
    """Of the boxes with rows that miss the goal."""
    missing = [line for line in lines if any((r.errors > line.case.tolerance).any() for r in line.automatic.values())]
    return [f"- {line.name}: {WHY.get(line.name, 'not known')}." for line in missing]


def page(groups: dict[str, list[Line]]) -> str:
    """The whole result as Markdown."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    text = [
        f"`python benchmarks/step_size.py --write`: {versions}.",
        'Error of a row\'s gradient, median / worst of the rows, with every direction probed and `step_size="auto"`; '
        '`difference="auto"` is forward, but for boxes declared noisy. Set-up rows: what the measurement of the step '
        "took, from the ledger. Reference: its own estimate of its worst row's error, zero for autograd.",
    ]
    for group, lines in groups.items():
        text += [f"## {GROUPS[group][0]}", "\n".join(error_table(lines))]
        if found := reasons(lines):
            text.append("\n".join(["Rows that miss the goal:", "", *found]))
        text += ["What the rule says (steps in the order above):", "\n".join(fact_table(lines))]
        text += [
            "Central differences along coordinates, root mean square over rows: the automatic step, the best of "
            f"{len(FIXED)} fixed steps, the best for each dimension on its own; then the median error of fixed steps:",
            "\n".join(fixed_table(lines)),
        ]
    return "\n\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", action="append", choices=list(GROUPS), help="default: all")
    parser.add_argument("--box", action="append", help="only the boxes of these names")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {RESULTS.name}")
    asked = parser.parse_args()
    groups: dict[str, list[Line]] = {}
    for group in asked.group or GROUPS:
        for name, make in GROUPS[group][1].items():
            if not asked.box or name in asked.box:
                lines = groups.setdefault(group, [])
                lines.append(run(name, make()))
                print(error_table(lines)[-1], flush=True)
    text = page(groups)
    print(text)
    if asked.write:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
