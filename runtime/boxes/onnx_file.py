"""An ONNX file on disk: what it is made of, what it declares, and a session that runs it."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rewriter.runtime.errors import BoxError

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


def digest(path: Path) -> str:
    """SHA-256 over the file and the files that hold its weights. Raises `BoxError` if one is missing or unreadable."""
    total = hashlib.sha256()
    for part in (path, *(path.parent / name for name in sorted(set(_external_files(path))))):
        try:
            with part.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise BoxError(
                f"the weights of {path.name} are missing: {part.name}",
                where=str(part),
                why=str(error),
                remedy="keep the file with the weights beside the model, under its first name",
            ) from error
    return total.hexdigest()


def open_session(path: Path, providers: list[str], threads: int | None) -> Any:
    """An `onnxruntime.InferenceSession`; loads no custom operators. Raises `BoxError` naming the file."""
    runtime = onnxruntime_module()
    absent = [name for name in providers if name not in runtime.get_available_providers()]
    if absent:
        raise _provider_error(path, absent, "the installed onnxruntime was built without it")
    options = runtime.SessionOptions()
    # A file whose declared output shapes are wrong is common; it would make onnxruntime print a warning at every call.
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
    try:
        session = runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        raise BoxError(
            f"{path.name} cannot be loaded",
            where=str(path),
            why=str(error),
            remedy="check it with onnx.checker.check_model(path); operators outside ONNX's own are not loaded",
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


def _external_files(path: Path) -> Iterator[str]:
    """Names, relative to the file's folder, of the files that hold weights of the model."""
    import onnx  # only here, because importing it takes .3 s

    if not path.is_file():
        raise BoxError(f"there is no file {path.name}", where=str(path), remedy="check the path")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise BoxError(f"{path.name} is not a readable ONNX file", where=str(path), why=str(error)) from error
    for tensor in _weights(model.graph):
        yield from (entry.value for entry in tensor.external_data if entry.key == "location")


def _weights(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for body in (attribute.g, *attribute.graphs):
                yield from _weights(body)
