"""The command line and the demo: what it shows, what it counts, and that the methods it compares with are right."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.cli import main
from rewriter.runtime.errors import RewriteError

pytest.importorskip("skl2onnx")
pytest.importorskip("matplotlib")

from rewriter.examples import display, random_forest  # after the check for the extra


@pytest.fixture(scope="module")
def forest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_forest.fit_forest(tmp_path_factory.mktemp("forest") / "forest.onnx")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    shown = capsys.readouterr().out
    assert f"torch {torch.__version__}" in shown
    assert "onnxruntime" in shown


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--quick", "--folder", str(tmp_path / "out"), "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    for method in random_forest.METHODS:
        assert shown.count(f"\n{method}") >= 3  # progress, table, legend
    assert (tmp_path / "out" / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "regions" in json.loads((tmp_path / "out" / "program.json").read_text())
    assert (tmp_path / "out" / "program.dot").exists()


def test_demo_without_its_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rewriter.cli.util.find_spec", lambda name: None)
    assert main(["demo"]) == 1
    assert "pip install 'rewriter[demo]'" in capsys.readouterr().err


def test_an_error_is_a_message_and_a_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(path: Path) -> Path:
        raise RewriteError("no forest today", remedy="plant one")

    monkeypatch.setattr(random_forest, "fit_forest", fail)
    assert main(["demo", "--folder", str(tmp_path)]) == 1
    assert "plant one" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["fly"])


@pytest.mark.parametrize(
    ("method", "rows"), [("frozen encoder", 128), ("finite differences", 33 * 128), ("end-to-end SPSA", 3 * 128)]
)
def test_rows_of_every_kind_are_counted(forest: Path, method: str, rows: int) -> None:
    digits, network = random_forest.Digits.load(0), random_forest.Network(forest, 0)
    counted = count_rows(network)
    tried = random_forest.METHODS[method](network, 0)
    tried.differentiate(*next(digits.batches(0)))
    assert tried.rows == sum(counted) == rows


def test_the_ledger_counts_every_row(forest: Path) -> None:
    """Against a counter inside the box, capture apart, with enough steps for an extra probe that measures quality."""
    digits, network = random_forest.Digits.load(0), random_forest.Network(forest, 0)
    method = random_forest.Rewritten(network, 0)
    method.step.capture(digits.images[: random_forest.BATCH])
    counted = count_rows(network)
    batches = digits.batches(0)
    for _ in range(60):
        method.differentiate(*next(batches))
    assert method.rows == sum(counted) > 60 * 2 * 128


def count_rows(network: Any) -> list[int]:
    """Rows of each call that reaches the box's own arithmetic."""
    counted: list[int] = []
    compute = network.forest.compute

    def counting(arrays: list[Any], rows: int) -> Any:
        counted.append(rows)
        return compute(arrays, rows)

    network.forest.compute = counting
    return counted


def test_training_stops_at_the_budget(forest: Path) -> None:
    seen: list[int] = []
    curve, _ = random_forest.train(
        "finite differences", forest, 0, budget=10_000, report=lambda curve: seen.append(curve.rows[-1])
    )
    assert curve.rows == seen == [4224, 8448, 12672]
    assert curve.steps == 3


@pytest.mark.parametrize("method", list(random_forest.METHODS))
def test_the_same_seed_gives_the_same_curve(forest: Path, method: str) -> None:
    def curve(seed: int) -> tuple[list[int], list[float]]:
        found, _ = random_forest.train(method, forest, seed, budget=10_000)
        return found.rows, found.accuracy

    assert curve(0) == curve(0) != curve(1)


class SmoothNetwork(nn.Module):
    """A network whose middle autograd can differentiate too."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.Tanh()).double()
        self.head = nn.Linear(12, 10).double()
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4
        self.matrix = torch.randn(16, 12, generator=generator, dtype=torch.float64)

    def forest(self, values: Tensor) -> Tensor:
        return torch.tanh(values @ self.matrix)

    def gradients(self) -> list[Tensor]:
        return [torch.zeros(0) if each.grad is None else each.grad.clone() for each in self.parameters()]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 8, generator=generator, dtype=torch.float64), torch.arange(6)


def exact(network: SmoothNetwork, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    F.cross_entropy(network.head(network.forest(network.encoder(batch[0]))), batch[1]).backward()
    gradients = network.gradients()
    network.zero_grad()
    return gradients


def test_finite_differences_are_right_where_autograd_is(batch: tuple[Tensor, Tensor]) -> None:
    network = SmoothNetwork()
    expected = exact(network, batch)
    random_forest.FiniteDifferences(network, 0).differentiate(*batch)  # type: ignore[arg-type]
    torch.testing.assert_close(network.gradients(), expected, rtol=1e-3, atol=1e-5)


def test_spsa_is_right_along_its_direction(batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """gradient = direction * slope along it, so gradient . direction / size is the exact slope; the head is exact."""
    network = SmoothNetwork()
    expected, before = exact(network, batch), [each.detach().clone() for each in network.parameters()]
    monkeypatch.setattr(random_forest.EndToEndSPSA, "STEP", 1e-4)
    random_forest.EndToEndSPSA(network, 0).differentiate(*batch)  # type: ignore[arg-type]
    found = network.gradients()
    torch.testing.assert_close(found[2:], expected[2:], rtol=1e-12, atol=1e-14)
    estimate, truth = (torch.cat([part.flatten() for part in parts[:2]]) for parts in (found, expected))
    slope = (estimate.sign() @ truth).abs()
    torch.testing.assert_close(estimate.abs(), slope.expand_as(estimate), rtol=1e-5, atol=0)
    assert (estimate.abs() - 2 * slope).abs().max() > 1e-3 * slope  # negative control: a wrong scale
    assert all(map(torch.equal, before, network.parameters()))  # the point is put back


def test_a_frozen_encoder_has_no_gradient(batch: tuple[Tensor, Tensor]) -> None:
    network = SmoothNetwork()
    random_forest.FrozenEncoder(network, 0).differentiate(*batch)  # type: ignore[arg-type]
    assert [each.numel() > 0 for each in network.gradients()] == [False, False, True, True]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress() -> None:
    terminal, file = display.Progress(Terminal()), display.Progress(io.StringIO())
    curve = random_forest.Curve("rewriter", 1000, quality=0.25)
    for rows in range(25, 1001, 25):
        curve.rows.append(rows)
        curve.accuracy.append(rows / 2000)
        terminal(curve)
        file(curve)
    on_terminal, in_file = terminal.stream.getvalue(), file.stream.getvalue()  # type: ignore[attr-defined]
    assert on_terminal.count("\r") == 40
    assert on_terminal.count("\n") == 1
    assert in_file.count("\n") == 4
    assert "\r" not in in_file
    assert in_file.splitlines()[-1].split() == on_terminal.split("\r")[-1].split()
    assert "100%" in in_file
    assert "accuracy 0.500" in in_file
