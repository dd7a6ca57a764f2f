"""Small ONNX files, written by hand where no exporter is needed."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

Value = tuple[str, int, list[Any]]
WriteOnnx = Callable[..., Path]


@pytest.fixture
def write_onnx(tmp_path: Path) -> WriteOnnx:
    """Write a graph of nodes (operator, inputs, outputs, attributes) with inputs and outputs (name, type, shape)."""

    def write(
        name: str,
        nodes: Sequence[tuple[str, list[str], list[str], dict[str, Any]]],
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        constants: dict[str, np.ndarray[Any, Any]] | None = None,
    ) -> Path:
        graph = helper.make_graph(
            [helper.make_node(kind, taken, given, **attributes) for kind, taken, given, attributes in nodes],
            "graph",
            [helper.make_tensor_value_info(*value) for value in inputs],
            [helper.make_tensor_value_info(*value) for value in outputs],
            [numpy_helper.from_array(array, key) for key, array in (constants or {}).items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.save(model, str(tmp_path / name))
        return tmp_path / name

    return write


@pytest.fixture
def doubling(write_onnx: WriteOnnx) -> Path:
    """y = x + x on (rows, 3) in float32."""
    return write_onnx(
        "doubling.onnx",
        [("Add", ["x", "x"], ["y"], {})],
        [("x", TensorProto.FLOAT, ["rows", 3])],
        [("y", TensorProto.FLOAT, ["rows", 3])],
    )


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A torch module and what torch.onnx.export wrote of it, weights in a file beside the graph."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 12)).eval()
    path = tmp_path_factory.mktemp("exported") / "network.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.randn(2, 16),),
            str(path),
            dynamo=True,
            external_data=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    return path, module


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[onnx.ModelProto], Path]]:
    """Write a model to models/hostile.onnx; the working folder is another one, empty, and must stay so."""
    models, working = tmp_path / "models", tmp_path / "working"
    models.mkdir()
    working.mkdir()

    def write(model: onnx.ModelProto) -> Path:
        path = models / "hostile.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    monkeypatch.chdir(working)
    yield write
    assert list(working.iterdir()) == []
