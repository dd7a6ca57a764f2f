"""What follows a chain, as code from the chain's value to the model's flat outputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from rewriter.runtime.segment import Segment

from .base import Refused
from .behind import CUT, RANDOM, TRAINING, argument, off
from .emit import emit_segment
from .program import Program, Region, holds_box, is_box_call
from .regions import outputs_of
from .structure.operations import name_of, writes

_REMEDY = 'take it out of what follows the blocks, or use head="auxiliary"'


@dataclass(frozen=True)
class Tail:
    """segment: (the chain's value, *placeholders) -> flat outputs; placeholders: positions among the graph's own."""

    segment: Segment
    placeholders: tuple[int, ...]


def tail_of(program: Program, region: Region) -> Tail | Refused:
    """The tail of a chain; what it reads beside the chain's value is computed again from the placeholders.

    Refused where it cannot be evaluated beside the forward pass: random numbers, statistics, boxes, other regions.
    """
    (stream,) = outputs_of(program, region)
    nodes = _nodes(program, stream)
    for node in nodes:
        reason = _against(node, program, region)
        if reason is not None:
            return Refused(f"{region.name}: {node.name}, behind the blocks", reason, _REMEDY)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    read = [node for node in placeholders if node in nodes]
    graph = fx.Graph()
    copies = {stream: graph.placeholder(stream.name)}
    copies |= {node: graph.placeholder(node.name) for node in read}
    if any(writes(node, program.module) and node.all_input_nodes[:1] == [stream] for node in nodes):
        copies[stream] = graph.call_method("clone", (copies[stream],))
    for node in nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    results = program.graph.output_node().args[0]
    graph.output(fx.node.map_arg(results, copies.__getitem__))
    segment = emit_segment(f"{region.name} tail", graph, program)
    return Tail(segment, tuple(map(placeholders.index, read)))


def _nodes(program: Program, stream: fx.Node) -> list[fx.Node]:
    """What the outputs need apart from the stream's value, in graph order."""
    found: set[fx.Node] = set()
    stack = list(program.graph.output_node().all_input_nodes)
    while stack:
        node = stack.pop()
        if node is not stream and node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return [node for node in program.graph.nodes if node in found]


def _against(node: fx.Node, program: Program, region: Region) -> str | None:
    owner = next((each for each in program.regions if each is not region and node.name in each.owned), None)
    if owner is not None and owner.name != region.name:
        return f"it belongs to {owner.name}, which {owner.entry} rules"
    if node.name in region.owned:
        return "it lies inside the blocks and is read behind them"
    if node.meta.get(CUT):
        return "a UlrCut lies there, through which losses of windows do not reach the blocks"
    if is_box_call(node, program):
        return "it is a box"
    if node.op == "call_module":
        return _against_module(program.module(str(node.target)), program.opaque.get(str(node.target), ""))
    written = node.all_input_nodes[0] if node.all_input_nodes and writes(node, program.module) else None
    if written is not None and written.op in ("placeholder", "get_attr"):
        return f"it writes into {written.name}, and would do so for every window"
    return _against_call(node, name_of(node, program.module))


def _against_module(module: nn.Module, opaque: str) -> str | None:
    if holds_box(module):
        return "it holds a box"
    if "changes its attribute" in opaque or "draws from" in opaque:
        return f"it {opaque}"
    return next((reason for part in module.modules() if (reason := _of_part(part)) is not None), None)


def _of_part(part: nn.Module) -> str | None:
    if not part.training:
        return None
    drops = getattr(part, "p", 0) if isinstance(part, _DropoutNd) else getattr(part, "dropout", 0)
    if isinstance(part, nn.RReLU) or (isinstance(drops, float) and drops > 0):
        return "it draws random numbers in training"
    if isinstance(part, _NormBase):
        return "its statistics would advance with every window" if part.track_running_stats else None
    return None


def _against_call(node: fx.Node, name: str) -> str | None:
    if "dropout" in name and not off(node):
        return "it draws random numbers in training"
    if name in RANDOM:
        return "it draws random numbers"
    if "batch_norm" in name and argument(node, TRAINING, "training") is not False:
        return "its statistics would advance with every window"
    return None
