"""The spiking example: true spikes learn through the cut, and not without it."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from rewriter.examples import spiking  # after the check for the extras
from rewriter.examples.random_forest import Digits, one_thread


def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    curves: list[spiking.Curve] = []
    train = spiking.train

    def kept(*given: Any) -> spiking.Curve:
        curves.append(train(*given))
        return curves[-1]

    monkeypatch.setattr(spiking, "train", kept)
    assert spiking.main(["--quick", "--folder", str(tmp_path / "out")]) == 0
    assert [curve.method for curve in curves] == ["UlrCut", "surrogate", "the tape"]
    through_the_cut, surrogate, tape = curves
    assert through_the_cut.accuracy[-1] > 0.75
    assert through_the_cut.accuracy[-1] > tape.accuracy[-1] + 0.05
    assert surrogate.accuracy[-1] > tape.accuracy[-1] + 0.05
    assert through_the_cut.moved > 0.2
    assert tape.moved == 0
    assert 13 <= through_the_cut.forwards < 15
    assert f"{through_the_cut.accuracy[-1]:.3f}" in capsys.readouterr().out
    assert (tmp_path / "out" / "spiking.png").read_bytes().startswith(b"\x89PNG")


def test_true_spikes_read_nine_digits_in_ten() -> None:
    with one_thread():
        curve = spiking.train("UlrCut", Digits.load(0), 0, 8)
    assert curve.accuracy[-1] >= 0.9
    current = curve.network.current(Digits.load(0).test_images[:5])
    assert {0.0, 1.0} == set(torch.stack(curve.network.spikes(current)).unique().tolist())
