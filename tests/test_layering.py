"""The import rule: rewriter -> passes -> runtime -> torch, numpy and the standard library."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The first folder that matches, the most particular one first, decides what its files may import.
ALLOWED = {
    "runtime/boxes": {"rewriter.runtime", "torch", "numpy", "onnx", "onnxruntime"},
    "runtime": {"rewriter.runtime", "torch", "numpy"},
    "passes": {"rewriter.passes", "rewriter.runtime", "torch", "numpy", "networkx"},
    "rewriter/report": {"rewriter", "torch", "numpy", "graphviz"},
    "rewriter": {"rewriter", "torch", "numpy"},
    "examples": {
        "rewriter",
        "torch",
        "numpy",
        "onnx",
        "sklearn",
        "skl2onnx",
        "matplotlib",
        "scipy",
        "sgp4",
        "mujoco",
    },
}


def violations(root: Path) -> list[str]:
    """`path:line imports name` for every import that its folder may not make."""
    found = []
    for path in sorted(path for folder in ALLOWED if "/" not in folder for path in (root / folder).rglob("*.py")):
        name = path.relative_to(root).as_posix()
        allowed = next(names for folder, names in ALLOWED.items() if name.startswith(f"{folder}/"))
        for line, imported in imports(ast.parse(path.read_text())):
            if not is_allowed(imported, allowed):
                found.append(f"{name}:{line} imports {imported}")
    return found


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every imported module; a relative import within its folder is none, any other is its own name with the dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level != 1:
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def is_allowed(imported: str, allowed: set[str]) -> bool:
    top = imported.split(".")[0]
    return top in sys.stdlib_module_names or any(f"{imported}.".startswith(f"{name}.") for name in allowed)


def test_every_import_goes_down() -> None:
    assert (ROOT / "runtime" / "errors.py").exists()
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("runtime/region.py", "from rewriter.passes.program import Program"),
        ("runtime/region.py", "from rewriter import rewrite"),
        ("runtime/region.py", "import onnxruntime"),
        ("runtime/boxes/onnx_box.py", "def load():\n    from rewriter.passes import emit"),
        ("runtime/boxes/onnx_box.py", "from ..errors import BoxError"),
        ("passes/emit.py", "from rewriter.plan import Plan"),
        ("passes/emit.py", "from runtime.errors import BoxError"),
        ("passes/emit.py", "import graphviz"),
        ("rewriter/plan.py", "import networkx as nx"),
        ("rewriter/plan.py", "from sklearn import datasets"),
        ("rewriter/plan.py", "import passes.program"),
        ("rewriter/report/dot.py", "import onnxruntime"),
        ("examples/forest.py", "import transformers"),
    ],
)
def test_imports_that_go_up_are_seen(tmp_path: Path, path: str, line: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(f"import math\nfrom .errors import BoxError\n{line}\n")
    assert len(violations(tmp_path)) == 1


def test_allowed_imports_are_no_violations(tmp_path: Path) -> None:
    for path, line in [
        ("runtime/boxes/onnx_box.py", "import onnxruntime"),
        ("runtime/boxes/onnx_box.py", "from rewriter.runtime.errors import BoxError"),
        ("passes/structure.py", "import networkx"),
        ("rewriter/report/dot.py", "import graphviz"),
        ("rewriter/rewrite.py", "from rewriter.passes.emit import emit"),
    ]:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(line)
    assert violations(tmp_path) == []
