"""What is said about the installed onnxruntime, and when there is none."""

import importlib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from rewriter.runtime.boxes import OnnxBox, onnxruntime_report
from rewriter.runtime.errors import BoxError


def pretend(monkeypatch: pytest.MonkeyPatch, **wheels: str) -> None:
    def version(name: str) -> str:
        if name.replace("-", "_") not in wheels:
            raise metadata.PackageNotFoundError(name)
        return wheels[name.replace("-", "_")]

    monkeypatch.setattr(metadata, "version", version)


def test_report_names_version_and_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, onnxruntime="1.2.3")
    report = onnxruntime_report()
    assert "onnxruntime 1.2.3" in report
    assert "CPUExecutionProvider" in report
    assert "warning" not in report


def test_both_wheels_are_a_warning_with_the_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, onnxruntime="1.2.3", onnxruntime_gpu="1.2.3")
    report = onnxruntime_report()
    assert "warning" in report
    assert "pip uninstall --yes onnxruntime onnxruntime-gpu" in report


def test_absent_onnxruntime(monkeypatch: pytest.MonkeyPatch, doubling: Path) -> None:
    found = importlib.import_module

    def missing(name: str, *arguments: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return found(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(BoxError, match="cannot be imported") as caught:
        OnnxBox(doubling)
    assert "pip install onnxruntime" in caught.value.remedy
    pretend(monkeypatch)
    assert "not installed" in onnxruntime_report()
