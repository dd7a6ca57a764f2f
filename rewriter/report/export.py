"""`step.export(folder)`: the program as files."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from .describe import describe
from .dot import dot

if TYPE_CHECKING:
    from rewriter.rewritten import Rewritten

log = logging.getLogger("rewriter")


def export(step: Rewritten, folder: str | Path) -> Path:
    """Write into `folder`, and nowhere else:

    program.json    nodes, segments, regions, rules, costs (versioned; the same model and plan give the same bytes)
    program.dot     the graph, regions as clusters coloured by rule; program.svg beside it where `dot` is installed
    step.py         the emitted step, segments/NAME.py the code of each segment, plan.txt the plan where it has text

    Returns the folder. Raises RewriteError before the first capture.
    """
    program = describe(step)
    place = Path(folder)
    (place / "segments").mkdir(parents=True, exist_ok=True)
    _remove_former(place)
    _write(place / "program.json", json.dumps(program, indent=1, ensure_ascii=False) + "\n")
    drawing = dot(program)
    _write(place / "program.dot", drawing.source)
    if shutil.which("dot"):
        (place / "program.svg").write_bytes(drawing.pipe(format="svg"))
    else:
        log.info("program.svg is left out: the `dot` program of Graphviz is not installed")
    for name, source in step.latest.emitted.sources.items():
        _write(place / "step.py" if name == "step" else place / "segments" / f"{name}.py", source)
    if all(isinstance(entry.target, str) for entry in step.plan):
        _write(place / "plan.txt", step.plan.text())
    return place


def _remove_former(place: Path) -> None:
    """Segments that an earlier export wrote here, as its program.json names them; other files stay."""
    try:
        former = json.loads((place / "program.json").read_text(encoding="utf-8"))["segments"]
        names = [str(segment["name"]) for segment in former]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for name in names:
        if name.isidentifier():
            (place / "segments" / f"{name}.py").unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
