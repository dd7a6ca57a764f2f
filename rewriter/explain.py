"""`step.explain()`: where every gradient comes from, what it costs, and what it is worth."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from rewriter.passes.program import Cost, Program, Region, Value, holds_box
from rewriter.passes.regions import inputs_of

if TYPE_CHECKING:
    from .rewritten import Rewritten


def explain(step: Rewritten) -> str:
    """One paragraph per region, one for the rest. Raises RewriteError before the first capture."""
    variant = step.latest
    program = variant.program
    parts = [_head(step)]
    parts += [_region(region, step) for region in program.regions]
    parts.append(_rest(program))
    return "\n".join(parts)


def _head(step: Rewritten) -> str:
    captured = step.latest.captured
    lines = [f"{type(step.model).__name__}, captured by {captured.front_end}"]
    lines += [f"  {name} stays whole: {reason}" for name, reason in sorted(captured.opaque.items())]
    lines += [f"  {note}" for note in (*captured.notes, *step.latest.program.notes)]
    return "\n".join(lines)


def _region(region: Region, step: Rewritten) -> str:
    program = step.latest.program
    facts = step.latest.emitted.regions[region.name].rule.describe()
    lines = [f"{region.name}: {facts['rule']} ({region.entry})"]
    values = [program.values.get(node.name) for node in inputs_of(program, region)]
    alike = Counter(str(value) for value in values if isinstance(value, Value))
    shown = ", ".join(text if count == 1 else f"{count} x {text}" for text, count in alike.items())
    lines.append(f"  inputs: {shown}")
    if facts["rule"] == "black-box":
        lines += _black_box(facts, holds_box(program.module(region.target)), facts["width"] or _width(values))
    elif facts["rule"] == "ulr-cut":
        lines += _ulr_cut(facts)
    elif facts["rule"] == "sub-chains":
        stacked = f", up to {facts['alike']} of them stacked" if facts["alike"] > 1 and facts["at_once"] != 1 else ""
        lines.append(f"  {facts['sub_chains']} sub-chains, run again in backward{stacked}: exact within each")
    elif facts["rule"] == "horizon":
        lines += _horizon(facts, region, program)
    elif facts["rule"] == "checkpoint":
        lines.append(
            f"  {facts['blocks']} blocks, run again {facts['every']} at a time in backward: exact, one forward more"
        )
    elif facts["rule"] == "highway":
        lines += _highway(facts)
    counts = step.ledger[region.name]
    if facts["rule"] not in ("black-box", "ulr-cut"):
        lines.append(f"  spent so far: {counts.vjps:,} vjps, {counts.forwards:,} forwards of parts run again")
    else:
        lines.append(f"  spent so far: {counts.queries:,} queries in {counts.calls:,} calls, {counts.failed:,} failed")
    return "\n".join(lines)


def _width(values: list[Any]) -> int:
    """Of a row of the box: rows of the model that were folded into its dimension 0 are rows of their own."""
    floating = [value for value in values if isinstance(value, Value) and value.dtype.is_floating_point]
    return sum(math.prod(value.shape[1:] if value.rows else value.shape) for value in floating)


def _black_box(facts: dict[str, Any], is_box: bool, width: int) -> list[str]:
    probes, measured = facts["probes"], facts["measured_cosine"]
    lines = [f"  {probes} {facts['directions']} probe(s) per row of width {width}, {facts['difference']} difference"]
    if facts["step_size"] is None:
        lines.append("  step size: not measured yet; the first backward that asks for its gradient does")
    else:
        lines.append(
            f"  step size: {facts['step_size']:.3g} of the input scale, {facts['absolute_step']:.3g} in its units; "
            f"the box looks {facts['kind']}"
        )
        if facts["step_error"] is not None:
            noise = facts["noise_floor"]
            floor = "" if noise is None else f"; noise of the outputs {noise:.0e} of their size"
            power = facts["step_order"]
            order = "" if power is None else f"; grows with power {power:.1f} of larger steps"
            lines.append(f"  error of the step: {facts['step_error']:.0e} of a directional derivative{floor}{order}")
        lines.append(
            f"  row cosine: predicted {facts['predicted_cosine']:.2f}, "
            f"measured {'not yet' if measured is None else f'{measured:.2f}'}; left out: {facts['bias']}"
        )
        if facts["parameter_cosine"] is not None:
            lines.append(f"  parameter cosine: {facts['parameter_cosine']:.2f}, as if this region alone were estimated")
        rows = facts["rows_per_backward"]
        if rows is not None:  # known from the last forward
            lines.append(f"  cost: {rows:,} queries per backward beside the forward's own")
    if not is_box:
        lines.append(
            "  simpler: this is an ordinary module; without the entry its gradient is exact and costs no probes"
        )
    elif probes < width <= 4 * probes:
        lines.append(
            f"  simpler: probes={width} would be exact up to the step's bias, at {width / probes:.1f} x the queries"
        )
    return lines


_TAILS = {
    "box": "what follows holds a box: there is no derivative to take instead",
    "steps": "every way to the loss meets an operation without a derivative: the ordinary tape would give zero",
    "frozen": "what follows is frozen: its backward and what it would keep are saved",
    "trainable": "what follows is trained: its parameters get the exact gradient of the clean loss",
    "layers": "what follows is trained behind cuts of its own: no parameter sees the loss on the ordinary tape",
}


def _ulr_cut(facts: dict[str, Any]) -> list[str]:
    cuts = f"{facts['cuts']} cuts, each with " if facts["cuts"] > 1 else ""
    shared = f", across cuts {facts['across']}" if facts["cuts"] > 1 else ""
    pairs = " in antithetic pairs" if facts["antithetic"] else ""
    lines = [
        f"  {cuts}{facts['copies']} copies per row{pairs}, {facts['directions']} noise, baseline {facts['baseline']}, "
        f"allocation {facts['allocation']}{shared}",
        *_layers(facts["layers"]),
        f"  {_TAILS[facts['tail']]}",
    ]
    if facts["window"] is not None:
        lines.append(f"  copies run through {facts['window']} sub-chains; what comes later is left out of the gradient")
    if facts["control"] != "none":
        lines.append(_control(facts))
    if facts["width"] is None:
        lines.append("  nothing measured yet; the first backward does")
    else:
        measured = facts["measured_cosine"]
        sigma = f"{facts['sigma']:.3g}"
        if facts["learned"]:
            sigma = "learned, {:.3g} to {:.3g}".format(*facts["learned"])
        size = "" if facts["cuts"] > 1 else f"width {facts['width']}, sigma {sigma}; "
        lines.append(
            f"  {size}row cosine: predicted "
            f"{facts['predicted_cosine']:.2f}, measured {'not yet' if measured is None else f'{measured:.2f}'}; "
            f"left out: {facts['bias']}"
        )
        if facts["parameter_cosine"] is not None:
            lines.append(f"  parameter cosine: {facts['parameter_cosine']:.2f}, as if this cut alone were estimated")
        lines.append(
            f"  cost: {facts['rows_per_backward']:,} rows forward through what follows the cut per backward; "
            "what is kept does not grow with copies"
        )
    if facts["tail"] in ("frozen", "trainable", "layers"):
        lines.append(
            "  simpler: without the entry the gradient is exact, for about two forwards of what follows instead of "
            f"{facts['copies']}; the cut pays where its activations do not fit, or to train under noise"
        )
    return lines


def _control(facts: dict[str, Any]) -> str:
    correlation = facts["control_correlation"]
    if correlation is None:
        return f"  control variate {facts['control']}: not measured yet"
    return (
        f"  control variate {facts['control']}: correlation {correlation:.2f}, so 1 - r^2 = {1 - correlation**2:.2f} "
        f"of the variance is left where it is used; used at {facts['controlled']} of {facts['cuts']} cuts"
    )


def _layers(layers: list[dict[str, Any]]) -> list[str]:
    """A line for each layer with cuts, where there are several: calls of one module are one line."""
    by_module: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        by_module.setdefault(layer["name"].partition("@")[0], []).append(layer)
    if len(by_module) < 2 and all(layer["noise"] == "activation" for layer in layers):
        return []
    return [f"    {name}: {_calls(calls)}" for name, calls in by_module.items()]


def _calls(calls: list[dict[str, Any]]) -> str:
    copies = sorted({call["copies"] for call in calls})
    shown = [f"{calls[0]['noise']} noise" if len(calls) == 1 else f"{len(calls)} calls, {calls[0]['noise']} noise"]
    if calls[0]["width"] is not None:
        shown.append(f"width {calls[0]['width']}, sigma {calls[0]['sigma']:.2g}")
    shown.append(f"{' to '.join(map(str, (copies[0], copies[-1])[: len(copies)]))} copies")
    for kind in ("predicted", "measured"):
        found = [call[f"{kind}_cosine"] for call in calls if call[f"{kind}_cosine"] is not None]
        if found:
            shown.append(f"{kind} row cosine {sum(found) / len(found):.2f}")
    return ", ".join(shown)


def _highway(facts: dict[str, Any]) -> list[str]:
    kinds = {"identity": "identity", "mapped": "mapped, each a vjp of its own at every scan", "none": "no skip"}
    skips = "; ".join(f"{count} {kinds[kind]}" for kind, count in facts["skips"].items() if count)
    lines = [f"  {facts['blocks']} blocks in {facts['units']} units, exact inside each; skips: {skips}"]
    lines.append(f"  iterations: {facts['iterations']}; {facts['units'] - 1} are exact")
    if facts["terms"]:
        error, terms = facts["error"], facts["terms"]
        shown = ", ".join(f"{length:.2g}" for length in terms[-3:])
        sizes = f"  last terms, by length: {shown}"
        if len(terms) > 1:
            sizes += ", shrinking" if terms[-1] < terms[-2] else ", growing"
        known = error is not None and math.isfinite(error)
        lines.append(f"{sizes}; predicted error: " + (f"{error:.1g} of the cotangents" if known else "not known"))
    cost = "each adds a vjp of nearly all units to its inputs"
    if facts["count"] is not None:
        how = "measured" if facts["measured"] else "predicted from counts of vjps"
        cost = f"forward and backward {facts['cost']:.2f} x those of the tape with {facts['count']} ({how})"
    lines.append(
        f"  on one device: {cost}; the ordinary tape is exact and faster there, and iterations pay only where each "
        "unit has a device of its own and micro-batches cannot fill them"
    )
    return lines


def _horizon(facts: dict[str, Any], region: Region, program: Program) -> list[str]:
    blocks, horizon, stride, windows = (facts[name] for name in ("blocks", "horizon", "stride", "windows"))
    when = "while the model runs" if facts["when"] == "forward" else "in backward, from a second run"
    lines = [
        f"  {blocks} blocks in {windows} window(s) of {horizon}, one every {stride}; {facts['head']} head",
        f"  exact: the last {horizon} block(s) and what follows them; others see a loss at most {horizon} on, {when}",
        f"  cost: {facts['vjps']} block vjps per step, {blocks} on the tape",
    ]
    if windows > 1 and stride < horizon:
        lines.append(f"  simpler: stride={horizon} takes {blocks} vjps or few more, and was found to train better")
    kept = sum(program.costs[name].saved for name in region.owned if name in program.costs)
    lines.append(
        f"  simpler: Checkpoint is exact at one more forward; the blocks' tapes keep {kept / 2**20:.3g} MiB in all, "
        "and memory_plan(model, example) compares the two"
    )
    return lines


def _rest(program: Program) -> str:
    exact = [segment for segment in program.segments if segment.region is None]
    cost = sum((segment.cost for segment in exact), Cost())
    return (
        f"everything else: exact, on the ordinary tape, {len(exact)} segment(s), "
        f"{cost.flops / 1e6:.3g} MFLOP forward, {cost.saved / 2**20:.3g} MiB kept for backward"
    )
