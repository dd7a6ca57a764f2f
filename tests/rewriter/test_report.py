"""program.json, its drawing and the emitted code as files: stable bytes, nothing of this machine, readable."""

import ast
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from exact_entry import Exact
from torch import nn

from rewriter import BlackBox, CallableBox, Plan, rewrite
from rewriter.report.describe import SCHEMA, VERSION, describe
from rewriter.report.dot import COLOURS, READABLE, dot

X = torch.linspace(-1, 1, 15).reshape(5, 3)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(3, 4), nn.Linear(4, 2)
        self.box = CallableBox(np.sin)
        self.scale = nn.Parameter(torch.ones(4))
        self.rnn = nn.LSTM(4, 4)

    def forward(self, x):
        y, _ = self.rnn(self.box(self.before(x)) * self.scale)
        return {"out": self.after(y), "scale": self.scale}


def step_of(plan=None):
    torch.manual_seed(0)
    return rewrite(Net(), plan or Plan([BlackBox("box"), Exact("rnn")]), example=(X,))


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_bytes_are_stable(tmp_path):
    first = files(step_of().export(tmp_path / "one"))
    step = step_of()
    step(X)["out"].sum().backward()
    second = files(step.export(tmp_path / "two"))
    assert first == second
    assert {name for name in first if not name.endswith(".svg")} == {
        "program.json", "program.dot", "plan.txt", "step.py",
        *(f"segments/{name}.py" for name in ("exact_0", "box", "exact_1", "rnn", "exact_2")),
    }  # fmt: skip


def test_exporting_twice_into_one_folder(tmp_path):
    step = step_of()
    first = files(step.export(tmp_path))
    assert files(step.export(str(tmp_path))) == first
    (tmp_path / "segments" / "mine.py").write_text("# kept")
    other = rewrite(torch.nn.Sequential(torch.nn.Linear(2, 2)), Plan([]), example=(torch.zeros(2, 2),))
    other.export(tmp_path)
    assert {path.name for path in (tmp_path / "segments").iterdir()} == {"exact_0.py", "mine.py"}


def test_nothing_of_this_machine_is_in_it(tmp_path):
    for name, content in files(step_of().export(tmp_path / "out")).items():
        text = content.decode()
        assert "0x" not in text, name
        for place in (os.getcwd(), str(tmp_path), os.path.dirname(torch.__file__), os.path.dirname(__file__)):
            assert place not in text, name
        if name != "program.svg":
            assert not re.search(r'["\s=(]/[a-z]+/', text), name


def test_only_its_folder_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    returned = step_of().export("elsewhere/deep/er")
    assert str(returned) == "elsewhere/deep/er"
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere"}
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"deep"}


def test_content_of_program_json(tmp_path):
    program = json.loads((step_of().export(tmp_path) / "program.json").read_text())
    assert program == json.loads(json.dumps(describe(step_of())))
    assert (program["schema"], program["version"], program["front_end"]) == (SCHEMA, VERSION, "fx")
    assert program["plan"] == ["BlackBox('box')", "Exact('rnn')"]
    assert [(region["name"], region["rule"], region["owned"]) for region in program["regions"]] == [
        ("box", "black-box", ["box"]),
        ("rnn", "exact-oracle", ["rnn", "getitem", "getitem_1"]),
    ]
    assert [(s["name"], s["rule"], s["region"]) for s in program["segments"]] == [
        ("exact_0", "exact", None),
        ("box", "black-box", "box"),
        ("exact_1", "exact", None),
        ("rnn", "exact-oracle", "rnn"),
        ("exact_2", "exact", None),
    ]
    nodes = {node["name"]: node for node in program["nodes"]}
    assert nodes["before"]["values"] == [
        {
            "shape": [5, 4],
            "dtype": "float32",
            "rows": {"dimension": 0, "multiplicity": 1},
            "width": 4,
            "differentiable": True,
        }
    ]
    assert nodes["before"]["cost"] == {"flops": 2 * 5 * 3 * 4, "saved_bytes": 4 * 5 * 3, "queries": 0}
    assert nodes["box"]["cost"]["queries"] == 5
    assert nodes["mul"]["target"] == "_operator.mul"
    assert nodes["before"]["source"].startswith("test_report.py:")
    covered = [name for segment in program["segments"] for name in segment["nodes"]]
    assert sorted(covered) == sorted(
        name for name, node in nodes.items() if node["op"] not in ("placeholder", "output")
    )
    assert [line["name"] for line in program["passes"]][-1] == "partition"


def test_a_target_without_text_is_told_by_its_kind(tmp_path):
    model = Net()
    step = rewrite(model, [BlackBox(model.box), Exact(lambda module, name: name == "rnn")], example=(X,))
    program = json.loads((step.export(tmp_path) / "program.json").read_text())
    assert program["plan"] == ["BlackBox", "Exact"]
    assert not (tmp_path / "plan.txt").exists()
    assert [region["target"] for region in program["regions"]] == ["box", "rnn"]


def test_the_plan_is_written_and_read_back(tmp_path):
    step = step_of(Plan([BlackBox("box", probes=3)]))
    assert Plan.load(step.export(tmp_path) / "plan.txt") == step.plan


def test_emitted_code_is_python(tmp_path):
    step = step_of()
    folder = step.export(tmp_path)
    for path in [folder / "step.py", *folder.glob("segments/*.py")]:
        (function,) = ast.parse(path.read_text()).body
        assert isinstance(function, ast.FunctionDef)
        assert path.read_text() == step.latest.emitted.sources[path.stem]


# The drawing.


def drawn(step):
    """Clusters (name -> (label, colour, boxes)) and edges of the drawing, read back from its text."""
    clusters, current = {}, None
    edges = []
    for line in dot(describe(step)).source.splitlines():
        text = line.strip()
        if text.startswith("subgraph"):
            current = text.split()[1].strip('"')
            clusters[current] = {"boxes": []}
        elif text == "}":
            current = None
        elif " -> " in text:
            edges.append(tuple(part.strip('"') for part in re.split(r" -> ", text)))
        elif current and "fillcolor=" in text and "label=" in text and "color=" in text and " [" not in text[:1]:
            clusters[current]["fill"] = re.search(r'fillcolor="([^"]+)"', text).group(1)
        elif current and " [" in text:
            clusters[current]["boxes"].append(re.match(r'"?([^"\[]+)"? \[', text).group(1).strip())
    return clusters, edges


def test_segments_are_clusters_coloured_by_rule():
    clusters, edges = drawn(step_of())
    assert {name: cluster["fill"] for name, cluster in clusters.items()} == {
        "cluster_exact_0": COLOURS["exact"],
        "cluster_box": COLOURS["black-box"],
        "cluster_exact_1": COLOURS["exact"],
        "cluster_rnn": "#e5d4ef",
        "cluster_exact_2": COLOURS["exact"],
    }
    boxes = {box for cluster in clusters.values() for box in cluster["boxes"]}
    assert all(end in boxes | {"x", "output"} for edge in edges for end in edge)
    assert ("exact_0/before", "box/box") in edges
    source = dot(describe(step_of())).source
    assert source.count("{") == source.count("}")
    assert "Net: 2 regions, captured by fx" in source


def test_a_deep_model_folds_into_its_blocks():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.one, self.two = nn.LayerNorm(3), nn.Linear(3, 6), nn.Linear(6, 3)
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x + self.two(torch.relu(self.one(self.norm(x)))) * self.scale

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(*(Block() for _ in range(24)))
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.blocks(x))

    step = rewrite(Deep(), example=(X,))
    clusters, _ = drawn(step)
    assert len(step.latest.program.graph.nodes) > 3 * READABLE
    assert clusters["cluster_exact_0"]["boxes"] == [*(f"exact_0/blocks.{i}" for i in range(24)), "exact_0/head"]
    clusters, edges = drawn(rewrite(Deep(), Exact("blocks.11"), example=(X,)))
    assert clusters["cluster_exact_0"]["boxes"] == [f"exact_0/blocks.{i}" for i in range(11)]
    assert len(clusters["cluster_blocks_11"]["boxes"]) == 6
    assert ("exact_0/blocks.10", "blocks_11/blocks_11_norm") in edges
    assert ("exact_1/blocks.23", "exact_1/head") in edges


def test_names_with_signs_are_quoted():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            names = ('a"b', "c:d", "e\\f<g>")
            self.heads = nn.ModuleDict({name: nn.Sequential(*map(nn.Softplus, range(1, 18))) for name in names})
            self.first = nn.Linear(3, 3)

        def forward(self, x):
            x = self.first(x)
            for head in self.heads.values():
                x = head(x)
            return x

    drawing = dot(describe(rewrite(Odd(), example=(X,))))
    assert '-> "exact_0/heads.c_d"' in drawing.source  # a colon would start a port
    assert "heads.c:d" in drawing.source
    assert "e\\\\f<g>" in drawing.source
    assert re.sub(r"\\.", "", drawing.source).count('"') % 2 == 0
    if shutil.which("dot"):
        assert drawing.pipe("plain").decode().count("\nnode ") == 6


@pytest.mark.parametrize("installed", [True, False])
def test_without_graphviz_the_svg_is_left_out(tmp_path, monkeypatch, installed):
    if installed and shutil.which("dot") is None:
        pytest.skip("the `dot` program is not installed")
    if not installed:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    folder = step_of().export(tmp_path)
    assert (folder / "program.svg").exists() == installed
    assert (folder / "program.dot").exists()
