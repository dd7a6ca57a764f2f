"""ONNX files as boxes: values, rows, shapes, dtypes, and what goes wrong with files."""

import copy
import io
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto
from torch import nn

from rewriter.runtime.boxes import OnnxBox
from rewriter.runtime.boxes.onnx_file import provider_names
from rewriter.runtime.errors import BoxError

FLOAT, INT64, DOUBLE = TensorProto.FLOAT, TensorProto.INT64, TensorProto.DOUBLE


def test_exported_network_equals_torch(exported: tuple[Path, nn.Module]) -> None:
    path, module = exported
    box, x = OnnxBox(path), torch.randn(33, 16, generator=torch.Generator().manual_seed(1))
    assert (path.parent / "network.onnx.data").exists()
    torch.testing.assert_close(box(x), module(x))
    assert not torch.allclose(box(x + 0.1), module(x), atol=1e-3)  # the comparison can fail


def test_forest_with_wrong_declared_shape(tmp_path: Path) -> None:
    ensemble = pytest.importorskip("sklearn.ensemble")
    skl2onnx = pytest.importorskip("skl2onnx")
    draw = np.random.default_rng(0)
    inputs = draw.standard_normal((200, 4))
    forest = ensemble.RandomForestRegressor(5, max_depth=4, random_state=0)
    forest.fit(inputs, np.tanh(inputs @ draw.standard_normal((4, 3))))
    model = skl2onnx.to_onnx(forest, inputs[:1].astype(np.float32))
    (tmp_path / "forest.onnx").write_bytes(model.SerializeToString())
    box = OnnxBox(tmp_path / "forest.onnx")
    declared = [size.dim_value for size in model.graph.output[0].type.tensor_type.shape.dim]
    assert declared[1] == 1  # the trap: the file says one column
    outputs = box(torch.from_numpy(inputs[:50]).float())
    assert outputs.shape == (50, 3)
    np.testing.assert_allclose(outputs.numpy(), forest.predict(inputs[:50].astype(np.float32)), atol=1e-5)


def several(write_onnx: Any) -> Path:
    """y = x * scale[index], count = index + 1, state' = state + x."""
    path: Path = write_onnx(
        "several.onnx",
        [
            ("Gather", ["scales", "index"], ["scale"], {}),
            ("Mul", ["x", "scale"], ["y"], {}),
            ("Add", ["index", "one"], ["count"], {}),
            ("Add", ["state", "x"], ["next"], {}),
        ],
        [("x", FLOAT, ["n", 2]), ("index", INT64, ["n"]), ("state", FLOAT, ["n", 2])],
        [("y", FLOAT, None), ("count", INT64, None), ("next", FLOAT, None)],
        {"scales": np.array([[1, 1], [10, 20]], np.float32), "one": np.array(1)},
    )
    return path


def test_several_inputs_and_outputs_with_integers(write_onnx: Any) -> None:
    box = OnnxBox(several(write_onnx))
    x, index, state = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 0]), torch.ones(2, 2)
    y, count, after = box(x, index, state)
    assert y.tolist() == [[10, 40], [3, 4]]
    assert count.tolist() == [2, 1]
    assert count.dtype is torch.int64
    assert after.tolist() == [[2, 3], [4, 5]]
    assert box.output_names == ("y", "count", "next")
    narrow = box(x, index.to(torch.int32), state)[0]  # integers change precision like floats do
    assert torch.equal(narrow, y)


def test_caller_precision_decides_the_returned_one(doubling: Path) -> None:
    box = OnnxBox(doubling)
    for given, returned in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ):
        x = torch.ones(2, 3, dtype=given)
        assert box.evaluate(x)[0].dtype is torch.float32
        assert box(x).dtype is returned
        assert box(x).tolist() == [[2, 2, 2]] * 2


def test_fixed_batch_is_chunked_and_filled_up(write_onnx: Any) -> None:
    """The sum over the batch shows which rows each call saw, and that padding repeats the last row and is dropped."""
    path = write_onnx(
        "four.onnx",
        [("ReduceSum", ["x", "axes"], ["total"], {"keepdims": 1}), ("Add", ["x", "total"], ["y"], {})],
        [("x", FLOAT, [4, 1])],
        [("y", FLOAT, [4, 1])],
        {"axes": np.array([0])},
    )
    box = OnnxBox(path)
    x = torch.arange(6.0)[:, None]
    y = box(x)[:, 0]
    first, second = 0 + 1 + 2 + 3, 4 + 5 + 5 + 5
    assert y.tolist() == [0 + first, 1 + first, 2 + first, 3 + first, 4 + second, 5 + second]
    assert box(x[:1]).tolist() == [[0]]
    assert torch.equal(box(x[:4])[:, 0], y[:4])
    box.check(x)


def test_max_rows_changes_nothing_but_the_calls(doubling: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, chunked = OnnxBox(doubling), OnnxBox(doubling, max_rows=4)
    calls: list[int] = []
    call = chunked._call
    monkeypatch.setattr(chunked, "_call", lambda arrays: calls.append(len(arrays[0])) or call(arrays))
    x = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole(x), chunked(x))
    assert calls == [4, 4, 2]


def shared_file(write_onnx: Any, first: Any, name: str = "shared.onnx") -> Path:
    rank = [first, 3] if first != "none" else [3]
    path: Path = write_onnx(
        name,
        [("Mul", ["x", "theta"], ["y"], {})],
        [("x", FLOAT, ["n", 3]), ("theta", FLOAT, rank)],
        [("y", FLOAT, ["n", 3])],
    )
    return path


def test_shared_inputs_are_found(write_onnx: Any) -> None:
    x, theta = torch.ones(4, 3), torch.tensor([1.0, 2.0, 3.0])
    box = OnnxBox(shared_file(write_onnx, "none"))
    assert (box.shared, box.repeats_shared) == ({1}, False)
    assert torch.equal(box(x, theta), theta.expand(4, 3))
    rowed = OnnxBox(shared_file(write_onnx, "n", "rows.onnx"))
    assert rowed.shared == frozenset()
    with pytest.raises(BoxError, match="number of rows"):
        rowed(x, theta)


def test_declared_shared_input_with_rows_is_repeated(write_onnx: Any) -> None:
    box = OnnxBox(shared_file(write_onnx, "n"), shared=["theta"])
    x, theta = torch.ones(4, 3), torch.tensor([1.0, 2.0, 3.0])
    assert (box.shared, box.repeats_shared) == ({1}, True)
    assert torch.equal(box(x, theta), theta.expand(4, 3))
    per_row = torch.arange(12.0).reshape(4, 3)
    assert torch.equal(box.evaluate(x, per_row)[0], per_row)
    with pytest.raises(BoxError, match="no input thets"):
        OnnxBox(shared_file(write_onnx, "n"), shared=["thets"])


def test_shared_input_beside_a_fixed_batch(write_onnx: Any) -> None:
    path = write_onnx(
        "fixed.onnx",
        [("Mul", ["x", "theta"], ["y"], {})],
        [("x", FLOAT, [4, 3]), ("theta", FLOAT, [3])],
        [("y", FLOAT, [4, 3])],
    )
    box, theta = OnnxBox(path), torch.tensor([1.0, 2.0, 3.0])
    assert box.shared == {1}
    assert torch.equal(box(torch.ones(6, 3), theta), theta.expand(6, 3))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.ones(2, 3, dtype=torch.int64),), r"must be floating \(float32\), got integer \(int64\)"),
        ((torch.ones(2, 4),), "input x of doubling.onnx does not fit: dimension 1 is fixed at 3, got 4"),
        ((torch.ones(3),), r"input x of doubling.onnx does not fit: it has 2 dimensions, got 1"),
        ((torch.tensor(1.0),), "single number without rows"),
        ((torch.ones(2, 3), torch.ones(2, 3)), "takes 1 inputs, got 2"),
        ((), "takes 1 inputs, got 0"),
        ((torch.ones(2, 3, dtype=torch.complex64),), "got complex"),
    ],
)
def test_wrong_inputs_are_refused_in_words(doubling: Path, inputs: tuple[torch.Tensor, ...], message: str) -> None:
    box = OnnxBox(doubling)
    for call in (box.check, box.evaluate, box.forward):
        with pytest.raises(BoxError, match=message) as caught:
            call(*inputs)
        assert "doubling.onnx" in str(caught.value)
    box.check(torch.ones(2, 3, dtype=torch.float64))


def test_integer_that_does_not_fit(write_onnx: Any) -> None:
    path = write_onnx(
        "small.onnx",
        [("Cast", ["k"], ["y"], {"to": FLOAT})],
        [("k", TensorProto.INT8, ["n", 1])],
        [("y", FLOAT, ["n", 1])],
    )
    assert OnnxBox(path)(torch.tensor([[-3]])).tolist() == [[-3]]
    with pytest.raises(BoxError, match="does not fit into"):
        OnnxBox(path)(torch.tensor([[300]]))


def test_output_without_rows(write_onnx: Any) -> None:
    path = write_onnx(
        "mean.onnx",
        [("ReduceMean", ["x"], ["y"], {"keepdims": 0})],
        [("x", FLOAT, ["n", 3])],
        [("y", FLOAT, ["n", 3])],
    )
    with pytest.raises(BoxError, match=r"output y of mean.onnx has shape \(\) for 2 rows"):
        OnnxBox(path)(torch.ones(2, 3))


def test_rows_in_an_inner_dimension_are_refused(write_onnx: Any) -> None:
    path = write_onnx(
        "recurrent.onnx",
        [("Squeeze", ["h", "axes"], ["s"], {}), ("Add", ["x", "s"], ["y"], {})],
        [("x", FLOAT, ["n", 3]), ("h", FLOAT, [1, "n", 3])],
        [("y", FLOAT, ["n", 3])],
        {"axes": np.array([0])},
    )
    with pytest.raises(BoxError, match="has its rows in dimension 1"):
        OnnxBox(path)


def test_strings_are_refused(write_onnx: Any) -> None:
    path = write_onnx(
        "text.onnx",
        [("Identity", ["s"], ["y"], {})],
        [("s", TensorProto.STRING, ["n"])],
        [("y", TensorProto.STRING, ["n"])],
    )
    with pytest.raises(BoxError, match=r"input s of text.onnx is a tensor\(string\)"):
        OnnxBox(path)


def test_failure_inside_the_session_names_the_file(write_onnx: Any) -> None:
    path = write_onnx(
        "gather.onnx",
        [("Gather", ["table", "k"], ["y"], {})],
        [("k", INT64, ["n"])],
        [("y", FLOAT, ["n", 1])],
        {"table": np.ones((2, 1), np.float32)},
    )
    with pytest.raises(BoxError, match=r"gather.onnx failed on 2 rows") as caught:
        OnnxBox(path)(torch.tensor([0, 7]))
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("content", [b"", b"not an ONNX file at all", b"\x08\x0a\x12\x05torch" + bytes(range(64))])
def test_files_that_are_no_models(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(BoxError, match=r"broken.onnx") as caught:
        OnnxBox(path)
    assert str(path) in str(caught.value)


def test_missing_and_cut_files(doubling: Path, exported: tuple[Path, nn.Module], tmp_path: Path) -> None:
    with pytest.raises(BoxError, match=r"there is no file absent.onnx"):
        OnnxBox(tmp_path / "absent.onnx")
    with pytest.raises(BoxError, match="there is no file"):
        OnnxBox(tmp_path)
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(doubling.read_bytes()[:-20])
    with pytest.raises(BoxError, match=r"cut.onnx"):
        OnnxBox(cut)
    shutil.copy(exported[0], tmp_path / "network.onnx")
    with pytest.raises(BoxError, match=r"weights of network.onnx are missing: network.onnx.data"):
        OnnxBox(tmp_path / "network.onnx")


def test_providers(doubling: Path) -> None:
    assert provider_names(None) == ["CPUExecutionProvider"]
    assert provider_names("cuda")[0] == "CUDAExecutionProvider"
    with pytest.raises(BoxError, match="MadeUpExecutionProvider, which is not available"):
        OnnxBox(doubling, providers="MadeUpExecutionProvider")


class Model(nn.Module):
    def __init__(self, box: OnnxBox) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.box = box

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.box(self.encoder(x))
        return y


def test_copies_and_pickles(doubling: Path) -> None:
    model, x = Model(OnnxBox(doubling)), torch.ones(2, 3)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(twin(x), expected)
        assert twin.box._handle != model.box._handle
    assert list(model.state_dict()) == ["encoder.weight", "encoder.bias"]
    assert torch.equal(model.to(torch.float64).box(x), model.half().box(x))


def test_reopened_file_must_be_the_same(doubling: Path, write_onnx: Any, tmp_path: Path) -> None:
    box, x = OnnxBox(doubling), torch.ones(2, 3)
    moved, changed, gone = copy.deepcopy(box), copy.deepcopy(box), copy.deepcopy(box)
    moved.path = doubling.rename(tmp_path / "elsewhere.onnx")
    assert torch.equal(moved(x), box(x))
    with pytest.raises(BoxError, match=r"there is no file doubling.onnx"):
        gone(x)
    shared_file(write_onnx, "n", "doubling.onnx")
    with pytest.raises(BoxError, match="not the file this box was made from"):
        changed(x)


def test_changed_weights_beside_the_file_are_noticed(exported: tuple[Path, nn.Module], tmp_path: Path) -> None:
    for file in exported[0].parent.iterdir():
        shutil.copy(file, tmp_path)
    twin = copy.deepcopy(OnnxBox(tmp_path / "network.onnx"))
    weights = tmp_path / "network.onnx.data"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BoxError, match="not the file this box was made from"):
        twin(torch.ones(1, 16))


def test_evaluation_from_many_threads(exported: tuple[Path, nn.Module]) -> None:
    box = copy.deepcopy(OnnxBox(exported[0]))  # the session is still to be opened
    batches = [torch.full((5, 16), float(k)) for k in range(40)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda x: box.evaluate(x)[0], batches))
    assert all(torch.equal(y, box.evaluate(x)[0]) for x, y in zip(batches, together, strict=True))
