"""An ONNX file on disk: what it is made of, what it declares, and a session that runs it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rewriter.runtime.errors import BoxError

from .onnx_check import Allowed, check_file
from .onnx_runtime import onnxruntime_module

_DTYPES = {
    "tensor(float16)": torch.float16,
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(int8)": torch.int8,
    "tensor(int16)": torch.int16,
    "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
    "tensor(uint8)": torch.uint8,
    "tensor(uint16)": torch.uint16,
    "tensor(uint32)": torch.uint32,
    "tensor(uint64)": torch.uint64,
    "tensor(bool)": torch.bool,
}


@dataclass(frozen=True)
class Declared:
    """One input as the file declares it; a free dimension is its name, or None where it has none."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        sizes = [str(size) if size is not None else "any" for size in self.shape]
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}: {dtype} ({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def provider_names(providers: str | Sequence[str] | None) -> list[str]:
    """The execution providers to ask for: the CPU by default; "cuda" is short for CUDA with the CPU behind it."""
    if providers is None:
        return ["CPUExecutionProvider"]
    if providers == "cuda":
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]
    return [providers] if isinstance(providers, str) else list(providers)


def digest(path: Path, allowed: Allowed) -> str:
    """SHA-256 over the file and the files that hold its weights, all of them checked. Raises `BoxError`."""
    total = hashlib.sha256()
    for part in (path, *check_file(path, allowed)):
        try:
            with part.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise BoxError(f"{part.name} cannot be read", where=str(part), why=str(error)) from error
    return total.hexdigest()


def open_session(path: Path, providers: list[str], threads: int | None, allowed: Allowed) -> Any:
    """An `onnxruntime.InferenceSession` of a checked file; of custom operators it loads the library named in `allowed`.

    Raises `BoxError` naming the file.
    """
    runtime = onnxruntime_module()
    absent = [name for name in providers if name not in runtime.get_available_providers()]
    if absent:
        raise _provider_error(path, absent, "the installed onnxruntime was built without it")
    options = runtime.SessionOptions()
    # A file whose declared output shapes are wrong is common; it would make onnxruntime print a warning at every call.
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
    # Whatever its name ends in: the other format that onnxruntime reads is not checked.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    # What depends on constants alone is computed while loading; 20 bytes can ask for gigabytes.
    options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(allowed.max_bytes))
    try:
        if allowed.custom_ops is not None:
            options.register_custom_ops_library(str(allowed.custom_ops))
        session = runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        raise BoxError(
            f"{path.name} cannot be loaded",
            where=str(path),
            why=str(error),
            remedy="check it with onnx.checker.check_model(path, full_check=True), or export it again",
        ) from error
    lost = [name for name in providers if name not in session.get_providers()]
    if lost:
        raise _provider_error(path, lost, "onnxruntime could not start it (its libraries or a device are missing)")
    return session


def declared_inputs(session: Any, path: Path) -> tuple[Declared, ...]:
    """The inputs in order. Raises `BoxError` for what numpy cannot hold."""
    return tuple(
        Declared(
            entry.name,
            _dtype(entry, path, "input"),
            tuple(size if isinstance(size, int) else size or None for size in entry.shape),
        )
        for entry in session.get_inputs()
    )


def output_names(session: Any, path: Path) -> tuple[str, ...]:
    """The outputs in order; their declared shapes are not looked at, because many exporters write wrong ones."""
    for entry in session.get_outputs():
        _dtype(entry, path, "output")
    return tuple(entry.name for entry in session.get_outputs())


def _dtype(entry: Any, path: Path, kind: str) -> torch.dtype:
    if entry.type not in _DTYPES:
        raise BoxError(
            f"{kind} {entry.name} of {path.name} is a {entry.type}",
            where=str(path),
            why="a box takes and returns tensors of numbers or booleans that numpy can hold",
            remedy="export numeric tensors (scikit-learn classifiers: options={'zipmap': False}, integer labels)",
        )
    return _DTYPES[entry.type]


def _provider_error(path: Path, names: list[str], why: str) -> BoxError:
    return BoxError(
        f"{path.name} was to run on {', '.join(names)}, which is not available",
        where=str(path),
        why=why,
        remedy="install onnxruntime-gpu for CUDA, or leave providers= away to run on the CPU",
    )
