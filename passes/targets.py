"""Targets: which calls of which modules a plan entry means.

`encoder.0` a module by name (every call), `encoder.0@2` its third call, the module itself, a predicate
`(module, name) -> bool`, or a pattern: `*` stays within one level, `**` crosses levels, `[a:b]` is half-open.
`name:out` means the value at a module's border, for entries that work on values.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from rewriter.runtime.errors import RewriteError

Target = str | nn.Module | Callable[[nn.Module, str], bool]

_RANGE = re.compile(r"\[(\d*):(\d*)\]")


@dataclass(frozen=True)
class Place:
    """A module by qualified name; call: which call of it (None: every call); border: the value there is meant."""

    module: str
    call: int | None = None
    border: bool = False


def resolve(target: Target, model: nn.Module) -> tuple[Place, ...]:
    """Places that a target names, in the order the model registers its modules; each module under its first name.

    Raises RewriteError with the three nearest names when nothing matches.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if isinstance(target, nn.Module):
        found = [Place(name) for name, module in modules.items() if module is target][:1]
    elif isinstance(target, str):
        found = _resolve_text(target, modules)
    else:
        found = [Place(name) for name, module in modules.items() if name and target(module, name)]
    if not found:
        shown = target if isinstance(target, str) else type(target).__name__
        raise _nothing(str(shown), modules)
    if any(place.module == "" for place in found):
        raise RewriteError(
            "a plan entry names the whole model",
            where=str(target if isinstance(target, str) else "the model itself"),
            why="a region lies inside the model that is rewritten",
            remedy="wrap the module in another one (nn.Sequential(model)) and name it `0`",
        )
    first = {id(module): name for name, module in reversed(modules.items())}
    places = (Place(first[id(modules[place.module])], place.call, place.border) for place in found)
    return tuple(dict.fromkeys(places))


def _resolve_text(target: str, modules: dict[str, nn.Module]) -> list[Place]:
    text, border = (target.removesuffix(":out"), True) if target.endswith(":out") else (target, False)
    name, at, call = text.rpartition("@")
    if not at:
        name, call = text, ""
    elif not call.isdecimal():
        raise RewriteError("a target could not be read", where=target, remedy="write `name@2` for the third call")
    wanted = int(call) if call else None
    if name in modules and name:
        return [Place(name, wanted, border)]
    match = pattern(name)
    return [Place(path, wanted, border) for path in modules if path and match(path)]


def pattern(text: str) -> Callable[[str], bool]:
    """`blocks.*.mlp`, `**.attn`, `blocks[2:5]` (half-open; means blocks.2, blocks.3, blocks.4) as a test of names."""
    bounds: list[tuple[int, int | None]] = []
    parts: list[str] = []
    for piece in re.split(r"(\[\d*:\d*\]|\*\*|\*)", text):
        ranged = _RANGE.fullmatch(piece)
        if ranged:
            low, high = ranged.groups()
            bounds.append((int(low or 0), int(high) if high else None))
            parts.append(r"\.(\d+)")
        else:
            parts.append({"**": ".*", "*": "[^.]*"}.get(piece, re.escape(piece)))
    expression = re.compile("".join(parts))

    def match(path: str) -> bool:
        found = expression.fullmatch(path)
        return found is not None and all(
            low <= int(index) and (high is None or int(index) < high)
            for index, (low, high) in zip(found.groups(), bounds, strict=True)
        )

    return match


def _nothing(target: str, modules: dict[str, nn.Module]) -> RewriteError:
    names = [name for name in modules if name]
    plain = re.split(r"[@:\[*]", target)[0] or target
    near = difflib.get_close_matches(plain, names, n=3, cutoff=0.0)
    return RewriteError(
        "a plan entry names nothing in the model",
        where=target,
        why="no module has that name",
        remedy=f"the nearest names are: {', '.join(near)}" if near else "the model has no submodules to name",
    )
