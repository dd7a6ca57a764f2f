"""The trajectory example: it reaches the noise, and predicts; wrong gradients do neither."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sgp4")
pytest.importorskip("matplotlib")

from rewriter import BlackBox, Plan, rewrite  # after the check for the extra
from rewriter.examples import trajectory


def test_the_orbit_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[trajectory.Found] = []
    fit = trajectory.fit

    def kept(*given: Any, **options: Any) -> trajectory.Found:
        fits.append(fit(*given, **options))
        return fits[-1]

    monkeypatch.setattr(trajectory, "fit", kept)
    assert trajectory.main(["--quick", "--folder", str(tmp_path / "out")]) == 0
    found = fits[0]
    assert found.residuals[0] > 100
    assert 0.8 < found.residuals[-1] < 1.2
    assert found.start_km.max() > 100
    assert found.end_km.max() < 0.5
    assert f"{found.start_km.max():.1f} km -> {found.end_km.max():.3f} km" in capsys.readouterr().out
    assert (tmp_path / "out" / "trajectory.png").read_bytes().startswith(b"\x89PNG")


def test_every_position_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    propagate = trajectory.propagate

    def counting(minutes: trajectory.Array, units: trajectory.Array) -> trajectory.Array:
        computed.append(len(minutes))
        return propagate(minutes, units)

    monkeypatch.setattr(trajectory, "propagate", counting)
    found = trajectory.fit(0, apart=30, evaluations=2)
    by_hand = 48 + 3 * 144  # the data, every 30 minutes of a day; the error over a day every 10, twice, and the truth
    assert sum(computed) == found.rows + by_hand


def test_wrong_gradients_do_not_find_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Flipped(trajectory.Orbit):
        """The last element goes the wrong way."""

        def __init__(self, start: trajectory.Array) -> None:
            super().__init__(start)
            self.units.register_hook(lambda gradient: gradient * torch.tensor([1, 1, 1, 1, 1, -1]))

    monkeypatch.setattr(trajectory, "Orbit", Flipped)
    found = trajectory.fit(0, apart=4)
    assert found.residuals[-1] > 10
    assert found.end_km.max() > 10


def test_the_gradient_is_that_of_a_fine_difference() -> None:
    """Through box, stations and loss, against central differences of the whole with another step."""
    seen = trajectory.observe(0, 60)
    model = trajectory.Orbit(seen.truth + 1)
    entry = BlackBox("sgp4", **trajectory.PROBES)
    step = rewrite(model, Plan([entry]), loss=torch.nn.MSELoss())
    torch.autograd.backward(step(seen.minutes, seen.station, target=seen.seen))
    assert model.units.grad is not None

    @torch.no_grad()
    def loss(units: trajectory.Array) -> float:
        return float((trajectory.Orbit(units)(seen.minutes, seen.station) - seen.seen).square().mean())

    base, width = seen.truth + 1, 2e-3
    fine = [(loss(base + width * axis) - loss(base - width * axis)) / (2 * width) for axis in np.eye(6)]
    np.testing.assert_allclose(model.units.grad.numpy(), fine, rtol=1e-4)
    assert not np.allclose(model.units.grad.numpy(), np.roll(fine, 1), rtol=1e-2)  # the comparison can fail


def test_sightings_are_above_the_horizon() -> None:
    seen = trajectory.observe(0, 1)
    stations = trajectory.stations_at(seen.minutes)[torch.arange(len(seen.station)), seen.station]
    assert torch.allclose(stations.norm(dim=1), torch.tensor(trajectory.EARTH, dtype=torch.float64))
    ranges = seen.seen[:, 0] * trajectory.NOISE[0]
    directions = seen.seen[:, 1:] * trajectory.NOISE[1]
    assert ((directions * stations).sum(1) / trajectory.EARTH > 0.15).all()  # sin 10 degrees is 0.17, less the noise
    assert 300 < ranges.min() < ranges.max() < 3500
