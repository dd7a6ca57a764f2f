"""The Highway example: few iterations hold most of the gradient, and enough of them all of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("matplotlib")

from rewriter.examples import highway  # after the check for the extra


def test_it_trains_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results: list[highway.Result] = []
    run = highway.run

    def kept(*given: Any) -> highway.Result:
        results.append(run(*given))
        return results[-1]

    monkeypatch.setattr(highway, "run", kept)
    assert highway.main(["--quick", "--folder", str(tmp_path / "out")]) == 0
    (result,) = results
    assert [curve.name for curve in result.curves] == ["back-propagation", *(f"Highway, k = {k}" for k in (0, 1, 3))]
    exact = result.curves[0].losses
    for curve in result.curves:
        assert curve.losses[0] == pytest.approx(exact[0], rel=1e-5)  # the same weights and batch
        assert curve.losses[-1] < curve.losses[0] - 1
    for cosines in (result.before, result.after):
        assert cosines[0] < cosines[1] < cosines[2] < 1 + 1e-6
        assert cosines[0] < 0.999 < cosines[3]
    assert f"{result.before[1]:.4f}" in capsys.readouterr().out
    assert (tmp_path / "out" / "highway.png").read_bytes().startswith(b"\x89PNG")


def test_eleven_iterations_of_twelve_units_are_exact() -> None:
    text, target = next(highway.batches(0, rows=2))
    model = highway.Bytes(0)
    parameters = list(model.parameters())
    exact = torch.autograd.grad(F.cross_entropy(model(text), target), parameters)

    def apart(iterations: int) -> float:
        entry = highway.Highway("units", iterations=iterations, segments=None, tape="never")
        step = highway.rewrite(model, highway.Plan([entry]), loss=torch.nn.CrossEntropyLoss(), example=(text,))
        found = torch.autograd.grad(step(text, target=target), parameters)
        return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))

    assert apart(11) < 1e-4
    assert apart(1) > 1e-2
