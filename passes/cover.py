"""Every box on a differentiable path has a source of its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from .base import Pass, Refused
from .program import Program, Value, is_box_call


@dataclass(frozen=True)
class Cover(Pass):
    """Refuses a box that gradients must cross and that no plan entry rules; names the entry to add."""

    name: ClassVar[str] = "cover"

    def apply(self, program: Program) -> Program | Refused:
        owned = {name for region in program.regions for name in region.owned}
        for node in program.graph.nodes:
            if node.name in owned or not is_box_call(node, program) or not _differentiable(node, program):
                continue
            block = node.meta.get("block", ())
            name = block[-1][0] if block else str(node.target)
            return Refused(
                name,
                "gradients must cross it, it cannot be differentiated, and no plan entry rules it",
                f'add BlackBox("{name}") to the plan, or detach its input',
                "a box has no source of its gradient",
            )
        return program


def _differentiable(node: fx.Node, program: Program) -> bool:
    def followed(value: Any) -> bool:
        return isinstance(value, Value) and value.differentiable

    return any(followed(program.values.get(source.name)) for source in node.all_input_nodes)
