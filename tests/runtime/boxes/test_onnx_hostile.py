"""ONNX files that claim too much, need operators they should not, or have no end: a `BoxError` each, naming them."""

import itertools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from hostile import FLOAT, Save, branching, external, model, refused, save_weights, scaling, works
from onnx import TensorProto, helper, numpy_helper

from rewriter import OnnxBox


def test_constants_that_claim_more_than_they_hold(save: Save) -> None:
    for dims in ([2**31], [2**20, 2**20], [2**62, 2**62, 2**62], [4], [2], []):
        claiming = scaling()
        claiming.graph.initializer[0].dims[:] = dims
        refused(save(claiming), "claim")
    negative = scaling()
    negative.graph.initializer[0].dims[:] = [-3]
    refused(save(negative), r"has the shape \[-3\]")
    typed = scaling()
    typed.graph.initializer[0].CopyFrom(helper.make_tensor("w", FLOAT, [3], [1.0, 2.0, 3.0]))
    works(save(typed))
    typed.graph.initializer[0].dims[:] = [2**28]
    refused(save(typed), r"claims 268,435,456 values where 3 are stored")
    unknown = scaling()
    unknown.graph.initializer[0].data_type = 99
    refused(save(unknown), "unknown type")


def test_constants_inside_attributes(save: Save) -> None:
    def constant(dims: list[int]) -> onnx.ModelProto:
        tensor = numpy_helper.from_array(np.ones(3, np.float32))
        tensor.dims[:] = dims
        node = helper.make_node("Constant", [], ["w"])
        node.attribute.append(helper.make_attribute("value", tensor))
        return model([node, helper.make_node("Mul", ["x", "w"], ["y"])])

    works(save(constant([3])))
    refused(save(constant([2**31])), "claim")


def test_sparse_constants_count_as_dense(save: Save) -> None:
    def sparse(width: int) -> onnx.ModelProto:
        values = numpy_helper.from_array(np.ones(1, np.float32), "w")
        indices = numpy_helper.from_array(np.array([0]), "at")
        found = model([helper.make_node("Gather", ["w", "k"], ["g"]), helper.make_node("Mul", ["x", "g"], ["y"])])
        found.graph.initializer.append(numpy_helper.from_array(np.array([0]), "k"))
        found.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [width]))
        return found

    works(save(sparse(1000)))
    refused(save(sparse(2**30)), "claim 4,294,967,")


def computed(size: int) -> onnx.ModelProto:
    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
        helper.make_node("ReduceMax", ["zeros"], ["zero"], keepdims=0),
        helper.make_node("Add", ["x", "zero"], ["y"]),
    ]
    return model(nodes, {"size": [size]})


def test_values_that_follow_from_constants(save: Save) -> None:
    works(save(computed(10)))
    refused(save(computed(2**30)), "zeros of hostile.onnx claims 4,294,967,296 bytes")
    outer = [
        helper.make_node("MatMul", ["column", "row"], ["square"]),
        helper.make_node("ReduceMax", ["square"], ["one"], keepdims=0),
        helper.make_node("Mul", ["x", "one"], ["y"]),
    ]
    side = np.ones(2**15, np.float32)
    refused(save(model(outer, {"column": side[:, None], "row": side[None]})), "square of hostile.onnx claims")
    side = side[:100]
    works(save(model(outer, {"column": side[:, None], "row": side[None]})))


def test_inputs_with_a_huge_fixed_batch(save: Save) -> None:
    refused(save(model([helper.make_node("Neg", ["x"], ["y"])], inputs=(("x", FLOAT, [2**30, 3]),))), "x of hostile")
    works(save(model([helper.make_node("Neg", ["x"], ["y"])], inputs=(("x", FLOAT, [2, 3]),))))


def test_max_bytes(save: Save, tmp_path: Path) -> None:
    path = save(computed(10**6))
    refused(path, "claims 4,000,000 bytes", max_bytes=3_999_999)
    works(path, max_bytes=4_000_000)
    refused(path, r"hostile.onnx has [0-9,]+ bytes", max_bytes=100)
    with (tmp_path / "models" / "large.onnx").open("wb") as file:
        file.truncate(2**31 + 1)  # takes no room on the disk
    refused(tmp_path / "models" / "large.onnx", "has 2,147,483,649 bytes")
    with (tmp_path / "models" / "weights.bin").open("wb") as file:
        file.truncate(2**33)
    large = external("weights.bin")
    large.graph.initializer[0].dims[:] = [2**31]
    refused(save(large), "claim 8,589,934,592 bytes")


def test_many_constants_on_the_same_bytes(save: Save, tmp_path: Path) -> None:
    save_weights(tmp_path / "models" / "weights.bin", 4096)
    many = external("weights.bin")
    for number in range(20):
        many.graph.initializer.add().CopyFrom(many.graph.initializer[0])
        many.graph.initializer[-1].name = f"w{number}"
        many.graph.initializer[-1].dims[:] = [1024]
    path = save(many)
    assert path.stat().st_size < 4096
    refused(path, "the constants of hostile.onnx up to w15 claim 65,548 bytes", max_bytes=2**16)
    OnnxBox(path, max_bytes=21 * 4096)


def test_custom_operators(save: Save, tmp_path: Path) -> None:
    path = save(model([helper.make_node("Backdoor", ["x"], ["y"], domain="evil.example")]))
    refused(path, "custom operator evil.example.Backdoor")
    refused(path, "cannot be loaded", custom_ops=tmp_path / "absent.so")
    (tmp_path / "text.so").write_text("no library")
    refused(path, "cannot be loaded", custom_ops=tmp_path / "text.so")
    inner = helper.make_graph(
        [helper.make_node("Backdoor", ["x"], ["t"], domain="evil.example")],
        "inner",
        [],
        [helper.make_tensor_value_info("t", FLOAT, None)],
    )
    hidden = [
        helper.make_node("Cast", ["k"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner),
    ]
    refused(save(model(hidden, {"k": 1})), "custom operator evil.example.Backdoor")
    function = helper.make_function(
        "local",
        "Plain",
        ["a"],
        ["b"],
        [helper.make_node("Backdoor", ["a"], ["b"], domain="evil.example")],
        [helper.make_opsetid("evil.example", 1)],
    )
    called = model([helper.make_node("Plain", ["x"], ["y"], domain="local")], functions=[function])
    refused(save(called), "custom operator evil.example.Backdoor")


@pytest.mark.parametrize("operator", ["EPContext", "PythonOp", "ATen", "Snpe"])
def test_operators_that_lead_elsewhere(save: Save, operator: str) -> None:
    path = save(model([helper.make_node(operator, ["x"], ["y"], domain="com.microsoft")]))
    refused(path, f"contains the operator com.microsoft.{operator}")
    refused(path, f"contains the operator com.microsoft.{operator}", custom_ops="library.so")


def test_operators_of_onnxruntime_and_of_the_file(save: Save) -> None:
    works(save(model([helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")])))
    works(save(branching()))
    refused(save(model([helper.make_node("Absent", ["x"], ["y"], domain="com.microsoft")])), "cannot be loaded")
    refused(save(model([helper.make_node("Absent", ["x"], ["y"])])), "not a valid ONNX file")


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_library_is_loaded_only_if_named(save: Save, tmp_path: Path) -> None:
    marker, library = tmp_path / "executed", tmp_path / "models" / "library.so"
    path = save(scaling())
    source = tmp_path / "library.c"
    body = f'fclose(fopen("{marker}", "w"));'
    source.write_text(f"#include <stdio.h>\n__attribute__((constructor)) static void run(void) {{ {body} }}\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    works(path)
    assert not marker.exists()
    refused(path, "cannot be loaded", custom_ops=library)  # it registers nothing, but its code has run
    assert marker.exists()


def test_cycles_of_nodes(save: Save) -> None:
    def following(first: str) -> onnx.ModelProto:
        nodes = [("Add", ["x", first], "a"), ("Neg", ["a"], "b"), ("Add", ["a", "b"], "y")]
        return model([helper.make_node(kind, taken, [given]) for kind, taken, given in nodes])

    works(save(following("x")))
    refused(save(following("b")), "not a valid ONNX file")
    refused(save(model([helper.make_node("Add", ["x", "y"], ["y"])])), "not a valid ONNX file")


def function(name: str, *called: str) -> onnx.FunctionProto:
    """b = a through each of the functions `called`, one after the other, then Neg."""
    names = ["a", *(f"t{number}" for number in range(len(called)))]
    nodes = [
        helper.make_node(each, [names[number]], [names[number + 1]], domain="local")
        for number, each in enumerate(called)
    ]
    nodes.append(helper.make_node("Neg", [names[-1]], ["b"]))
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, ["a"], ["b"], nodes, opsets)


def calling(*functions: onnx.FunctionProto) -> onnx.ModelProto:
    return model([helper.make_node("F0", ["x"], ["y"], domain="local")], functions=functions)


def test_cycles_of_functions(save: Save) -> None:
    refused(save(calling(function("F0", "F0"))), "in a circle: F0 -> F0")
    refused(save(calling(function("F0", "F1"), function("F1", "F2"), function("F2", "F1"))), "F1 -> F2 -> F1")
    refused(save(calling(function("F0"), function("F1", "F1"))), "in a circle")  # never called
    refused(save(calling(function("F0"), function("F0", "F0"))), "defines a function twice")
    works(save(calling(function("F0", "F1", "F1"), function("F1"))))


def test_functions_that_call_each_other_ever_more_often(save: Save) -> None:
    """A file of a few kilobytes, ten calls on each of twelve levels."""
    levels = [function(f"F{level}", *[f"F{level + 1}"] * 10) for level in range(12)]
    refused(save(calling(*levels, function("F12"))), r"has [0-9,]{15,} nodes")
    chain = [function(f"F{level}", f"F{level + 1}") for level in range(3000)]
    refused(save(calling(*chain, function("F3000"))), "hostile.onnx")


def test_max_nodes(save: Save) -> None:
    names = ["x", *(f"t{number}" for number in range(49)), "y"]
    path = save(model([helper.make_node("Neg", [a], [b]) for a, b in itertools.pairwise(names)]))
    refused(path, "has 50 nodes", max_nodes=49)
    works(path, max_nodes=50)
    refused(save(branching()), "has 11 nodes", max_nodes=10)  # 7, two in the branches, one in the function, two ways
    works(save(branching()), max_nodes=11)


def test_deep_nesting(save: Save) -> None:
    def nested(depth: int) -> onnx.ModelProto:
        node = helper.make_node("Neg", ["x"], ["t0"])
        for level in range(depth):
            output = helper.make_tensor_value_info(f"t{level}", FLOAT, None)
            inner = helper.make_graph([node], f"g{level}", [], [output])
            node = helper.make_node("If", ["c"], [f"t{level + 1}"], then_branch=inner, else_branch=inner)
            if level > 2:  # one way only, or the file doubles at every level
                node.attribute[1].g.CopyFrom(plain(level))
        nodes = [node, helper.make_node("Identity", [f"t{depth}"], ["y"])]
        return model([helper.make_node("Cast", ["k"], ["c"], to=TensorProto.BOOL), *nodes], {"k": 1})

    def plain(level: int) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(f"e{level}", FLOAT, None)
        return helper.make_graph([helper.make_node("Neg", ["x"], [f"e{level}"])], f"e{level}", [], [output])

    works(save(nested(10)))
    refused(save(nested(17)), "nested more than 16 deep")

    def field(number: int, content: bytes) -> bytes:
        size = len(content)
        return bytes([number << 3 | 2, size & 127 | 128, size >> 7 & 127 | 128, size >> 14]) + content

    graph = b""  # by hand, because protobuf does not write what it would not read
    for _ in range(1000):
        graph = field(1, field(4, b"If") + field(5, field(6, graph)))
    path = save(scaling())
    path.write_bytes(b"\x08\x0a" + field(7, graph))
    refused(path, "not a valid ONNX file")


def test_trees_in_a_circle(save: Save) -> None:
    """The children of node 0 are 1 and 2; in the circle node 1 leads back to 0."""

    def tree(circle: bool) -> onnx.ModelProto:
        node = helper.make_node(
            "TreeEnsembleRegressor",
            ["x"],
            ["y"],
            domain="ai.onnx.ml",
            n_targets=3,
            nodes_treeids=[0, 0, 0],
            nodes_nodeids=[0, 1, 2],
            nodes_featureids=[0, 0, 0],
            nodes_modes=["BRANCH_LEQ", "BRANCH_LEQ" if circle else "LEAF", "LEAF"],
            nodes_values=[5.0, 5.0, 0.0],
            nodes_truenodeids=[1, 0, 0],
            nodes_falsenodeids=[2, 2 if circle else 0, 0],
            target_treeids=[0, 0],
            target_nodeids=[2 if circle else 1, 2],
            target_ids=[0, 1],
            target_weights=[1.0, 2.0],
        )
        return model([node])

    works(save(tree(circle=False)))
    refused(save(tree(circle=True)), "cannot be loaded")
