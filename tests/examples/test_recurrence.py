"""The recurrence example: the same training in less time, and the cell really learns."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from rewriter.examples import recurrence  # after the check for the extra
from rewriter.examples.random_forest import one_thread


def test_both_ways_are_the_same_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recurrence, "SAMPLES", 100)
    assert recurrence.main(["--quick", "--folder", str(tmp_path)]) == 0
    with one_thread():
        result = recurrence.run(0, 40)
    plain, deferred = result.curves
    assert result.apart < 1e-5
    assert deferred.losses == pytest.approx(plain.losses, rel=1e-2)
    assert sum(plain.losses[-5:]) < 0.5 * sum(plain.losses[:5])
    assert "with Deferred" in capsys.readouterr().out
    assert (tmp_path / "recurrence.png").read_bytes().startswith(b"\x89PNG")


def test_the_comparison_notices_other_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrence, "SAMPLES", 100)
    rewrite = recurrence.rewrite

    def scaled(*args: object, **kwargs: object) -> object:
        step = rewrite(*args, **kwargs)  # type: ignore[arg-type]
        return lambda *given: step(*given) * torch.tensor(1.01)

    monkeypatch.setattr(recurrence, "rewrite", scaled)
    with one_thread():
        assert recurrence.run(0, 1).apart > 1e-3


def test_temperatures_follow_the_currents() -> None:
    currents, temperatures = recurrence.sequences(torch.Generator().manual_seed(0))
    before, after = temperatures[:-1] / 4, temperatures[1:] / 4
    drawn_towards = currents[1:, :, 0]
    assert torch.allclose(after - before, (drawn_towards - before) / recurrence.SLOWNESS, atol=1e-6)
