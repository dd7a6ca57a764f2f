"""Finding onnxruntime: imported only when an ONNX box needs it."""

import importlib
from importlib import metadata
from typing import Any

from rewriter.runtime.errors import BoxError

_WHEELS = ("onnxruntime", "onnxruntime-gpu")


def onnxruntime_module() -> Any:
    """The module `onnxruntime`. Raises `BoxError` where it cannot be imported."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise BoxError(
            "onnxruntime cannot be imported, and ONNX boxes run on it",
            why=str(error),
            remedy="pip install onnxruntime-gpu (Linux and Windows on x86-64) or pip install onnxruntime, never both",
        ) from error


def onnxruntime_report() -> str:
    """Version and providers of the installed onnxruntime; warns, with the repair, if both of its wheels are there."""
    wheels = {name: version for name in _WHEELS if (version := _version(name))}
    if not wheels:
        return "onnxruntime: not installed (pip install onnxruntime-gpu or onnxruntime, never both)"
    lines = [f"{name} {version}" for name, version in wheels.items()]
    try:
        lines.append("providers: " + ", ".join(onnxruntime_module().get_available_providers()))
    except (BoxError, AttributeError) as error:
        lines.append(f"cannot be used: {error}")
    if len(wheels) == 2:
        lines += [
            "warning: both wheels own the folder `onnxruntime`, so each has overwritten files of the other; repair:",
            "  pip uninstall --yes onnxruntime onnxruntime-gpu",
            "  pip install onnxruntime-gpu    (or onnxruntime, for processors only)",
        ]
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
