"""The calibration example: what it finds, how many runs it takes, and that wrong gradients would be noticed."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from rewriter.examples import calibration, epidemic  # after the check for the extra


@pytest.mark.parametrize("seed", range(5))
def test_three_parameters_within_five_percent_in_sixty_runs(seed: int) -> None:
    fit = calibration.calibrate(seed)
    assert fit.error < 0.05
    assert fit.runs[-1] <= 60
    assert fit.runs_within is not None
    assert np.abs(np.exp(epidemic.GUESS) / fit.truth - 1).max() > 0.5  # where it began


def test_every_run_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    integrate = pytest.importorskip("scipy.integrate")
    odeint = integrate.odeint

    def counting(*given: Any, **named: Any) -> Any:
        calls.append(1)
        return odeint(*given, **named)

    monkeypatch.setattr(integrate, "odeint", counting)
    fit = calibration.calibrate(0)
    assert len(calls) == fit.runs[-1] + 1  # the data


def test_wrong_gradients_do_not_find_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Flipped(calibration.Alone):
        """Each parameter gets the gradient of another one."""

        def __init__(self, simulator: epidemic.Epidemic) -> None:
            super().__init__(simulator)
            self.fitted.register_hook(lambda gradient: gradient.roll(1))

    monkeypatch.setattr(calibration, "Alone", Flipped)
    assert calibration.calibrate(0).error > 0.5


def test_the_simulator_conserves_and_grows() -> None:
    """Early on i grows by exp((b - g) t); without infections it decays by exp(-g t)."""
    early = epidemic.Epidemic().solve(np.array([1.0, 2.0]), np.log([0.5, 0.1, 1e-5]))
    assert early[1] - early[0] == pytest.approx(0.4, abs=1e-4)
    alone = epidemic.Epidemic().solve(np.array([1.0, 11.0]), np.log([1e-12, 0.1, 0.5]))
    assert alone[1] - alone[0] == pytest.approx(-1, abs=1e-6)


def test_together_with_a_network_and_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[calibration.JointFit] = []
    calibrate = calibration.calibrate_with_network

    def kept(*given: Any) -> calibration.JointFit:
        fits.append(calibrate(*given))
        return fits[-1]

    monkeypatch.setattr(calibration, "calibrate_with_network", kept)
    assert calibration.main(["--quick", "--folder", str(tmp_path / "out")]) == 0
    joint = fits[0]
    assert len(joint.losses) == 30
    assert joint.losses[-1] < 0.02 * joint.losses[0]
    assert joint.error < 0.05
    assert joint.network_error < 0.1
    assert joint.constant_error > 0.15  # the network has something to learn
    shown = capsys.readouterr().out
    runs = re.search(r"alone: (\d+) runs", shown)
    assert runs
    assert 40 < int(runs[1]) <= 60
    assert f"{joint.runs:,} runs" in shown
    assert (tmp_path / "out" / "calibration.png").read_bytes().startswith(b"\x89PNG")
