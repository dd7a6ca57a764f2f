"""What an ONNX file must satisfy before onnxruntime sees it: its origin is not trusted."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewriter.runtime.errors import BoxError

from .onnx_weights import Weights, constants, lighten, sparse_constants

_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
# Of com.microsoft: these read further files, or run what the file carries for another engine.
_REFUSED = frozenset({"ATen", "EPContext", "PythonOp", "PythonOpGrad", "Snpe", "TritonOp"})
_MAX_DEPTH = 16  # graphs inside nodes of graphs; protobuf itself stops at about twice that

Key = tuple[str, str, str]  # domain, name, overload of a function


@dataclass(frozen=True)
class Allowed:
    """What a file may be.

    max_bytes:  of the file, of all its constants together, and of any value whose size it fixes
    max_nodes:  those of inner graphs and of functions, at every call, among them
    custom_ops: a library of custom operators to load; None: ONNX's and onnxruntime's operators only
    """

    max_bytes: int
    max_nodes: int
    custom_ops: Path | None = None


def check_file(path: Path, allowed: Allowed) -> tuple[Path, ...]:
    """Check the file without executing, writing or following anything out of its folder.

    Returns the files beside it that hold weights, in the order of their names there. Raises `BoxError`, naming the
    file, for whatever is no valid ONNX model, claims more than `allowed`, holds less than it claims, has a cycle, or
    needs operators that are not allowed.
    """
    if not path.is_file():
        raise BoxError(f"there is no file {path.name}", where=str(path), remedy="check the path")
    weights = Weights(path, allowed.max_bytes)
    if path.stat().st_size > allowed.max_bytes:
        raise weights.too_large(f"{path.name} has {path.stat().st_size:,} bytes")
    try:
        return _check(path, allowed, weights)
    except BoxError:
        raise
    # Parsing, decoding its texts and onnx.checker raise what they like on a damaged file.
    except Exception as error:
        raise BoxError(
            f"{path.name} is not a valid ONNX file",
            where=str(path),
            why=str(error) or type(error).__name__,
            remedy="export the model again, or fetch the file again: it may be cut or damaged",
        ) from error


def _check(path: Path, allowed: Allowed, weights: Weights) -> tuple[Path, ...]:
    import onnx  # only here, because importing it takes .3 s

    model = onnx.ModelProto.FromString(path.read_bytes())  # onnx.load would go by the ending of the name
    functions = {(each.domain, each.name, each.overload): each for each in model.functions}
    if len(functions) != len(model.functions):
        raise BoxError(f"{path.name} defines a function twice", where=str(path))
    main = list(_graphs(path, model.graph))
    bodies = {key: list(_graphs(path, function)) for key, function in functions.items()}
    everything = [*main, *(owner for body in bodies.values() for owner in body)]
    _check_operators(path, allowed, everything, bodies)
    _check_size(path, allowed, main, bodies)
    for owner in everything:
        for tensor in constants(owner):
            weights.add(tensor)
        for sparse in sparse_constants(owner):
            weights.add_sparse(sparse)
    _check_values(weights, main)
    if weights.files or not all(map(_has_shape, model.graph.output)):
        onnx.checker.check_model(_relaxed(path, model))
    else:
        onnx.checker.check_model(str(path))  # by path it is twice as fast
    for owner in everything:
        lighten(owner)
    _check_values(weights, list(_graphs(path, _inferred(model).graph)))
    return tuple([weights.files[name] for name in sorted(weights.files)])


def _graphs(path: Path, owner: Any, depth: int = 0) -> Iterator[Any]:
    """A graph or function, and every graph inside its nodes."""
    if depth > _MAX_DEPTH:
        raise BoxError(f"the graphs of {path.name} are nested more than {_MAX_DEPTH} deep", where=str(path))
    yield owner
    for node in owner.node:
        for attribute in node.attribute:
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _graphs(path, inner, depth + 1)


def _key(node: Any) -> Key:
    return node.domain, node.op_type, node.overload


def _check_operators(path: Path, allowed: Allowed, owners: Sequence[Any], functions: Mapping[Key, object]) -> None:
    for owner in owners:
        for node in owner.node:
            name = f"{node.domain or 'ai.onnx'}.{node.op_type}"
            if node.domain == "com.microsoft" and node.op_type in _REFUSED:
                raise BoxError(
                    f"{path.name} contains the operator {name}",
                    where=str(path),
                    why="it reads further files, or runs what the file carries for another engine",
                    remedy="export the model with ONNX's own operators",
                )
            if node.domain not in _DOMAINS and _key(node) not in functions and allowed.custom_ops is None:
                raise BoxError(
                    f"{path.name} contains the custom operator {name}",
                    where=str(path),
                    why="the library behind it is code, and a file does not choose which code runs",
                    remedy="name the library if you trust it: OnnxBox(path, custom_ops='library.so')",
                )


def _check_size(path: Path, allowed: Allowed, main: list[Any], functions: Mapping[Key, list[Any]]) -> None:
    """Functions are expanded at every call, so that a short file may describe a graph without end."""
    open_calls: list[Key] = []

    @functools.cache
    def expanded(key: Key) -> int:
        if key in open_calls:
            cycle = " -> ".join(each[1] for each in (*open_calls, key))
            raise BoxError(f"the functions of {path.name} call each other in a circle: {cycle}", where=str(path))
        open_calls.append(key)
        count = nodes(functions[key])
        open_calls.pop()
        return count

    def nodes(owners: list[Any]) -> int:
        calls = (_key(node) for owner in owners for node in owner.node)
        return sum(1 + expanded(key) if key in functions else 1 for key in calls)

    count = nodes(main) + sum(map(expanded, functions))
    if count > allowed.max_nodes:
        raise BoxError(
            f"{path.name} has {count:,} nodes",
            where=str(path),
            why=f"the limit is {allowed.max_nodes:,}, inner graphs and functions among them",
            remedy="if the file can be trusted, raise the limit: OnnxBox(path, max_nodes=...)",
        )


def _check_values(weights: Weights, graphs: list[Any]) -> None:
    for graph in graphs:
        for value in (*graph.input, *graph.output, *graph.value_info):
            weights.check_value(value)


def _has_shape(output: Any) -> bool:
    return not output.type.HasField("tensor_type") or bool(output.type.tensor_type.HasField("shape"))


def _relaxed(path: Path, model: Any) -> Any:
    """A copy without what onnx.checker refuses and a box does not.

    It refuses every link to weights, also those that stay in the folder, as download caches make them; and outputs
    without a shape, which many exporters write and no box looks at.
    """
    relaxed = type(model)()
    relaxed.CopyFrom(model)
    for owner in (each for part in (relaxed.graph, *relaxed.functions) for each in _graphs(path, part)):
        sparse = (part for each in sparse_constants(owner) for part in (each.values, each.indices))
        for tensor in (*constants(owner), *sparse):
            if tensor.data_location == type(tensor).EXTERNAL:
                tensor.ClearField("data_location")
                tensor.ClearField("external_data")
                tensor.dims[:] = [0]
                tensor.raw_data = b""
    for output in relaxed.graph.output:
        if not _has_shape(output):
            output.type.tensor_type.shape.SetInParent()
    return relaxed


def _inferred(model: Any) -> Any:
    """The model with the shapes that follow from it, as far as they do; shapes computed at run time stay open."""
    import onnx

    try:
        return onnx.shape_inference.infer_shapes(model)
    except Exception:  # nothing is known then, so nothing is claimed
        return model
