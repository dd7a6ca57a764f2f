"""`Plan`: an ordered list of entries, as Python and as text."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from rewriter.passes.base import Entry
from rewriter.passes.black_box import BlackBox
from rewriter.passes.checkpoint import Checkpoint
from rewriter.passes.deferred import Deferred
from rewriter.passes.highway import Highway
from rewriter.passes.horizon import Horizon
from rewriter.passes.ulr_cut import UlrCut
from rewriter.runtime.errors import RewriteError

ENTRIES: dict[str, type[Entry]] = {
    "BlackBox": BlackBox,
    "Checkpoint": Checkpoint,
    "Deferred": Deferred,
    "Highway": Highway,
    "Horizon": Horizon,
    "UlrCut": UlrCut,
}

_LARGEST = 1 << 20  # bytes of a plan file; a plan is a page, not a data set


class Plan(Sequence[Entry]):
    """Says, for parts of a model, where their gradient comes from. What it does not name stays with autograd.

    `Plan([BlackBox("pricing")])`; `str(plan)` is one entry a line and `Plan.parse` reads it back; `save` and `load` do
    so with a file. Targets given as modules or predicates have no text: `save` and `text()` raise RewriteError then.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries = tuple(entries)
        for entry in self._entries:
            if not isinstance(entry, Entry):
                raise RewriteError(
                    f"a plan holds entries, not {type(entry).__name__}",
                    where=repr(entry)[:80],
                    remedy=f"use one of {', '.join(ENTRIES)}",
                )

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Entry, ...]: ...
    def __getitem__(self, index: int | slice) -> Entry | tuple[Entry, ...]:
        return self._entries[index]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._entries == other._entries

    def __hash__(self) -> int:
        return hash(self._entries)

    def __str__(self) -> str:
        return "\n".join(map(str, self._entries))

    def __repr__(self) -> str:
        return f"Plan([{', '.join(map(str, self._entries))}])"

    def text(self) -> str:
        """The plan as text that `parse` reads back; empty lines and `#` comments are allowed there."""
        for entry in self._entries:
            if not isinstance(entry.target, str):
                raise RewriteError(
                    "an entry's target has no text",
                    where=type(entry).__name__,
                    why="it is a module or a predicate",
                    remedy="name the module, or use a pattern such as `blocks[2:5].mlp`",
                )
        return "".join(f"{entry}\n" for entry in self._entries)

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read `text()` back. Only entry names and literals are understood; nothing is executed."""
        entries = []
        for number, line in enumerate(text.splitlines(), start=1):
            stripped = line.strip()
            if stripped and not stripped.startswith("#"):
                entries.append(_entry(stripped, number))
        return cls(entries)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.text(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        size = Path(path).stat().st_size
        if size > _LARGEST:
            raise RewriteError("a plan file is too large", where=str(path), why=f"{size} bytes, limit {_LARGEST}")
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RewriteError("a plan file is not text", where=str(path), why=str(error)) from error
        return cls.parse(text)


def _entry(line: str, number: int) -> Entry:
    where = f"line {number}: {line[:80]}"
    try:
        call = ast.parse(line, mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            raise ValueError("not of the form Name(target, option=value)")
        if any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("** is not understood")
        args = [ast.literal_eval(argument) for argument in call.args]
        options: dict[str, Any] = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise RewriteError("a line of a plan could not be read", where=where, why=str(error)) from error
    kind = ENTRIES.get(call.func.id)
    if kind is None:
        raise RewriteError(
            "a plan names an unknown entry", where=where, remedy=f"known entries: {', '.join(sorted(ENTRIES))}"
        )
    try:
        return kind(*args, **options)
    except TypeError as error:
        raise RewriteError("an entry was given options it does not have", where=where, why=str(error)) from error
