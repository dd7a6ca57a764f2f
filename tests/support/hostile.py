"""ONNX files written by hand to be loaded with suspicion, and what must happen to them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from rewriter import BoxError, OnnxBox

FLOAT = TensorProto.FLOAT
X, Y = ("x", FLOAT, ["n", 3]), ("y", FLOAT, ["n", 3])
Save = Callable[[onnx.ModelProto], Path]


def model(
    nodes: list[onnx.NodeProto], constants: dict[str, Any] | None = None, functions: Any = (), inputs: Any = (X,)
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(*Y)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()],
    )
    domains = dict.fromkeys(("", *(node.domain for node in nodes), *(each.domain for each in functions)))
    opsets = [helper.make_opsetid(domain, 18 if domain == "" else 1) for domain in domains]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)


def scaling() -> onnx.ModelProto:
    """y = x * w, w = (1, 2, 3)."""
    return model([helper.make_node("Mul", ["x", "w"], ["y"])], {"w": np.array([1, 2, 3], np.float32)})


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {each.name: (each.lstat().st_size, each.lstat().st_mtime_ns) for each in folder.iterdir()}


def refused(path: Path, match: str, **options: Any) -> None:
    before = snapshot(path.parent)
    with pytest.raises(BoxError, match=match) as caught:
        OnnxBox(path, **options)
    assert path.name in caught.value.what
    assert str(path) in str(caught.value)
    assert snapshot(path.parent) == before


def works(path: Path, **options: Any) -> None:
    """The control of every refusal: what is refused is the one thing that was changed."""
    assert OnnxBox(path, **options)(torch.ones(2, 3)).shape == (2, 3)


def branching() -> onnx.ModelProto:
    """An If, shape arithmetic, a function and typed data: much that a flip can hit."""
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(kind, ["x", "x"], [name])], name, [], [helper.make_tensor_value_info(name, FLOAT, None)]
        )
        for name, kind in (("then", "Add"), ("else", "Mul"))
    }
    function = helper.make_function(
        "local", "Bend", ["a"], ["b"], [helper.make_node("Tanh", ["a"], ["b"])], [helper.make_opsetid("", 18)]
    )
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Greater", ["m", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["z"], **branches),
        helper.make_node("Concat", ["z", "z"], ["zz"], axis=1),
        helper.make_node("Reshape", ["zz", "pairs"], ["p"]),
        helper.make_node("ReduceSum", ["p", "axis"], ["q"], keepdims=0),
        helper.make_node("Bend", ["q"], ["y"], domain="local"),
    ]
    return model(nodes, {"zero": np.float32(0), "pairs": [-1, 2, 3], "axis": [1]}, [function])


def external(location: str, **entries: int) -> onnx.ModelProto:
    found = scaling()
    tensor = found.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return found


def save_weights(path: Path, size: int = 12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.array([1, 2, 3], np.float32).tobytes().ljust(size, b"\0"))
