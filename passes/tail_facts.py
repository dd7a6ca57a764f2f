"""What is known of what follows a chain's cuts before it runs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from rewriter.runtime.boxes import Box
from rewriter.runtime.cut_facts import TailFacts
from rewriter.runtime.errors import RewriteError

from .behind import Behind, obstacles, trainable_of
from .program import Cost, Program, Region, Value, holds_box, is_box_call

_PREFIX_RATIO = 3.0  # forward and backward in units of the forward
_MOST_RATIO = 1e4


def facts_of(
    program: Program,
    cuts: Sequence[Sequence[fx.Node]],
    tails: Sequence[Behind],
    whole: Behind,
    run: Sequence[Sequence[fx.Node]],
    before: Sequence[fx.Node],
) -> TailFacts:
    """whole: what follows any cut; run: per cut, what copies there run through; before: the values at the cuts."""
    held = [program.module(str(node.target)) for node in whole.nodes if node.op == "call_module"]
    boxed = any(is_box_call(node, program) for node in whole.nodes) or any(map(holds_box, held))
    boxes = [part for module in held for part in module.modules() if isinstance(part, Box)]
    noisy = any(box.noisy or getattr(box, "seed", None) is not None for box in boxes)
    trained = any(name for node in whole.nodes for name in trainable_of(node, program))
    outputs = program.graph.output_node().all_input_nodes
    # Copies go on through the chain's further cuts, which are detached for the tape alone.
    ends = [*outputs, *before]
    stepped = any(_blocked(program, cut, tail, ends) for cut, tail in zip(cuts, tails, strict=True))
    taped = any(isinstance(v := program.values.get(node.name), Value) and v.differentiable for node in outputs)
    smooth = "frozen" if not trained else "trainable" if taped else "layers"
    kind = "box" if boxed else "steps" if stepped else smooth
    ratios = [_ratio(program, tail, copied, trained) for tail, copied in zip(tails, run, strict=True)]
    return TailFacts(kind, tuple(ratios), _costs(program, run), noisy)


def _costs(program: Program, run: Sequence[Sequence[fx.Node]]) -> tuple[float, ...]:
    """Of one copy from each cut, in units of the first cut's, by FLOPs; by operations where none are known."""
    flops = [sum(program.costs.get(node.name, Cost()).flops for node in nodes) for nodes in run]
    spent = flops if min(flops) > 0 else [len(nodes) for nodes in run]
    return tuple([max(each, 1) / max(*spent, 1) for each in spent])


def _blocked(program: Program, cut: Sequence[fx.Node], tail: Behind, ends: Sequence[fx.Node]) -> bool:
    """Whether every way from a cut to the ends meets an operation without a derivative."""
    found, inside = obstacles(program, tail, ends), set(tail.nodes)
    users = [user for node in cut for user in node.users if user in inside]
    return bool(users) and all(user in found for user in users)


def _ratio(program: Program, tail: Behind, copied: Sequence[fx.Node], trained: bool) -> float:
    """Cost of a step without copies in units of one copy, which runs `copied`, by FLOPs."""
    inside = {node.name for node in tail.nodes}
    cost = sum((program.costs.get(name, Cost()) for name in inside), Cost()).flops
    copy = sum((program.costs.get(node.name, Cost()) for node in copied), Cost()).flops
    rest = sum((c for name, c in program.costs.items() if name not in inside), Cost()).flops
    return min((_PREFIX_RATIO * rest + (_PREFIX_RATIO if trained else 1) * cost) / max(1, copy), _MOST_RATIO)


def check_reached(program: Program, region: Region, tail: Behind) -> None:
    """Raises RewriteError where something trained lies behind a cut and no way from it to the loss has a derivative."""
    cuts = [node for each in program.regions if each.entry.cuts for node in before_cuts(program, each)]
    found = obstacles(program, tail, [*program.graph.output_node().all_input_nodes, *cuts])
    reached = {name for node in tail.nodes if node not in found for name in trainable_of(node, program)}
    for node, obstacle in found.items():
        for name in {*trainable_of(node, program)} - reached:
            raise RewriteError(
                f"{name} lies behind a cut and has no way to the loss that has a derivative",
                where=region.name,
                why=f"parameters behind {region.entry} get the exact gradient of the clean loss; {obstacle} has none",
                remedy="freeze it with requires_grad_(False), cut behind it, or add a UlrCut between the two",
            )


def before_cuts(program: Program, region: Region) -> list[fx.Node]:
    """The values at a region's cuts, on the tape."""
    return list(program.node(region.owned[-1]).args[0])  # type: ignore[arg-type]
