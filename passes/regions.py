"""From a target's places to regions: which nodes of the graph one call of a module is."""

from __future__ import annotations

from torch import fx, nn

from .base import Entry, Refused
from .program import Program, Region
from .targets import Place


def regions_at(entry: Entry, place: Place, program: Program) -> list[Region] | Refused:
    """One region per call of the module at `place`; named after the module, with `@k` from the second call on."""
    return hooked(place, program) or calls_at(entry, place, program)


def calls_at(entry: Entry, place: Place, program: Program) -> list[Region] | Refused:
    """As `regions_at`, whatever hooks the module has."""
    calls: dict[int, list[str]] = {}
    for node in program.graph.nodes:
        for name, index in node.meta.get("block", ()):
            if name == place.module and node.op != "placeholder":
                calls.setdefault(index, []).append(node.name)
    if not calls:
        return unseen(place, program)
    if place.call is not None and place.call not in calls:
        return Refused(
            place.module, f"it is called {len(calls)} times; there is no call {place.call}", "calls count from 0"
        )
    wanted = sorted(calls) if place.call is None else [place.call]
    return [
        Region(place.module if index == 0 else f"{place.module}@{index}", entry, place.module, tuple(calls[index]))
        for index in wanted
    ]


def inputs_of(program: Program, region: Region) -> list[fx.Node]:
    """The distinct nodes that a region reads from outside, in the order its partitioned submodule takes them."""
    owned = set(region.owned)
    nodes = [program.node(name) for name in region.owned]
    return list(dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source.name not in owned))


def outputs_of(program: Program, region: Region) -> list[fx.Node]:
    """The nodes of a region that are read outside, in the order its partitioned submodule returns them."""
    owned = set(region.owned)
    nodes = [program.node(name) for name in region.owned]
    return [node for node in nodes if any(user.name not in owned for user in node.users)]


def hooked(place: Place, program: Program) -> Refused | None:
    """Why a region cannot run the operations of a module, or of a part of it."""
    for name, part in program.module(place.module).named_modules():
        hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        spread = any(type(parameter).__name__ == "DTensor" for parameter in part.parameters(recurse=False))
        if any(hooks) or spread or "FSDP" in type(part).__name__ or "FullySharded" in type(part).__name__:
            return Refused(
                f"{place.module}.{name}".rstrip("."),
                "it has hooks (or is wrapped by FSDP or holds a DTensor), and a region runs its operations elsewhere",
                "take the hooks off inside the region, or put them on a module outside it",
            )
    return None


def unseen(place: Place, program: Program) -> Refused:
    """Why no node of the graph belongs to a place."""
    around = [name for name in program.opaque if place.module.startswith(f"{name}.")]
    if around:
        return Refused(
            place.module,
            f"it lies inside {around[0]}, which stays whole: {program.opaque[around[0]]}",
            f"call it outside {around[0]}, or change what keeps that whole; naming {around[0]} itself helps only if "
            "nothing in it is trained",
        )
    whole = [name for name in _called(program) if place.module.startswith(f"{name}.")]
    if whole and _is_torchs_own(program.module(whole[0])) and all(r.target != whole[0] for r in program.regions):
        return Refused(
            place.module,
            f"it lies inside {whole[0]}, a module of torch's own, which stays one call inside another model",
            f"rewrite {whole[0]} itself, or write its forward as a module of your own that calls its parts",
        )
    if whole:
        return Refused(
            place.module,
            f"it lies inside {whole[0]}, which another entry of the plan rules as a whole",
            "take one of the two entries out of the plan",
        )
    return Refused(
        place.module, "the model's forward does not call it on this example", "check the name against the forward"
    )


def _is_torchs_own(module: nn.Module) -> bool:
    """Whether fx keeps a module as one call whoever asks; containers are taken apart."""
    own = type(module).__module__.startswith("torch.nn.")
    return own and not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)


def _called(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_module"]
