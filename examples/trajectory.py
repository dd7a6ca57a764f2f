"""Find a satellite's orbit from what ground stations see: a fit through sgp4, the package that orbit catalogues use.

sgp4 is compiled code without derivatives. It goes into the model as a box from times (rows) and orbital elements (a
shared input) to positions; probes differentiate it. The stations, which turn with the Earth, are torch code behind it
and stay with autograd.

    python -m rewriter.examples.trajectory
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rewriter import BlackBox, CallableBox, Plan, rewrite
from rewriter.examples.command import chosen, new_figure, progress
from rewriter.examples.random_forest import one_thread

Array = NDArray[np.float64]

# Mean motion (rad/min), e cos w, e sin w, inclination, node, w + mean anomaly (rad). What is fitted is the difference
# from these in UNITS, each a shift of some 7 km.
ELEMENTS = np.array([0.0647, 0.0012, -0.0008, 0.9012, 1.2, 0.7])
UNITS = np.array([6.5e-7, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3])
DRAG = 3e-5  # B*, known
GUESS_SPREAD = 8.0  # units
EPOCH = 27_000.0  # days after 1950 begins: in December 2023
STATIONS = np.radians([[48.1, 11.6], [-33.9, 18.4], [37.2, -80.4], [-35.3, 149.1]])  # latitude, longitude
EARTH, TURN = 6371.0, 2 * math.pi / 1436.07  # km, a sphere; radians per minute
NOISE = (0.05, math.radians(0.02))  # range in km, direction in radians
DAY = 1440.0  # minutes
# Six probes of six elements: exact but for the step, which is small as sgp4 is smooth and in double precision.
PROBES: dict[str, Any] = {"probes": 6, "difference": "central", "step_size": 1e-2, "input_scale": 1.0}


def propagate(minutes: Array, units: Array) -> Array:
    """Positions by sgp4; minutes: (n, 1) since the epoch; units: (6,) away from ELEMENTS; returns km, (n, 3)."""
    from sgp4.api import WGS72, Satrec

    motion, along, across, inclination, node, latitude = ELEMENTS + units * UNITS
    eccentricity, perigee = math.hypot(along, across), math.atan2(across, along)
    satellite = Satrec()
    anomaly = (latitude - perigee) % (2 * math.pi)
    satellite.sgp4init(
        WGS72, "i", 1, EPOCH, DRAG, 0.0, 0.0, eccentricity, perigee, inclination, anomaly, motion, node % (2 * math.pi)
    )
    days = minutes[:, 0] / DAY
    failed, positions, _ = satellite.sgp4_array(np.full(len(days), satellite.jdsatepoch), satellite.jdsatepochF + days)
    positions[failed != 0] = np.nan
    result: Array = positions
    return result


def stations_at(minutes: Tensor) -> Tensor:
    """Positions of the stations, km, (n, 4, 3), in the frame of the satellite, in which they turn with the Earth."""
    latitude, longitude = torch.from_numpy(STATIONS).T
    angle = longitude + TURN * minutes
    flat = latitude.cos().expand_as(angle)
    return EARTH * torch.stack([flat * angle.cos(), flat * angle.sin(), latitude.sin().expand_as(angle)], -1)


class Orbit(nn.Module):
    """Six elements, sgp4, and what each observing station sees."""

    def __init__(self, start: Array) -> None:
        super().__init__()
        self.units = nn.Parameter(torch.from_numpy(start))
        self.sgp4 = CallableBox(propagate, shared=(1,))

    def forward(self, minutes: Tensor, station: Tensor) -> Tensor:
        """Range and unit direction, each over its noise; minutes: (n, 1), station: (n,) index; returns (n, 4)."""
        here = stations_at(minutes)[torch.arange(len(station)), station]
        return observed(self.sgp4(minutes, self.units) - here)


def observed(sight: Tensor) -> Tensor:
    """Range and unit direction of lines of sight (n, 3) in km, in units of their noise; (n, 4)."""
    distance = sight.norm(dim=1, keepdim=True)
    return torch.cat([distance / NOISE[0], sight / distance / NOISE[1]], 1)


@dataclass(frozen=True)
class Observations:
    """minutes: (n, 1); station: (n,); seen: (n, 4), with noise; truth: (6,) in units."""

    minutes: Tensor
    station: Tensor
    seen: Tensor
    truth: Array


def observe(seed: int, apart: float) -> Observations:
    """One sighting every `apart` minutes of a day by each station whose horizon the satellite is 10 degrees above."""
    random = np.random.default_rng([seed, 0])
    truth = random.normal(0, 5, 6)
    every = torch.arange(0, DAY, apart, dtype=torch.float64)[:, None]
    stations = stations_at(every)
    sight = torch.from_numpy(propagate(every.numpy(), truth))[:, None] - stations
    height = (sight * stations).sum(2) / (sight.norm(dim=2) * EARTH)
    when, station = (height > math.sin(math.radians(10))).nonzero(as_tuple=True)
    clean = observed(sight[when, station])
    return Observations(every[when], station, clean + torch.from_numpy(random.normal(0, 1, clean.shape)), truth)


@dataclass
class Found:
    """How a fit went.

    residuals: root mean square of observed - computed over the noise, after each gradient (1: nothing but noise)
    start_km, end_km: error of the position over the day after that of the sightings, every ten minutes
    rows: positions that sgp4 computed for the fit, for whatever purpose
    """

    observations: Observations
    residuals: list[float] = field(default_factory=list)
    start_km: Array = field(default_factory=lambda: np.zeros(0))
    end_km: Array = field(default_factory=lambda: np.zeros(0))
    rows: int = 0


def fit(
    seed: int,
    *,
    apart: float = 1,
    evaluations: int = 60,
    report: Callable[[int, float], None] = lambda number, residual: None,
) -> Found:
    """L-BFGS from a guess that is GUESS_SPREAD units off in each element; `apart`: minutes between sightings."""
    observations = observe(seed, apart)
    signs = np.random.default_rng([seed, 1]).choice([-1.0, 1.0], 6)
    model = Orbit(observations.truth + GUESS_SPREAD * signs)
    found, after = Found(observations), np.arange(DAY, 2 * DAY, 10)[:, None]
    true_after = propagate(after, observations.truth)

    def distance() -> Array:
        shift: Array = np.linalg.norm(propagate(after, model.units.detach().numpy()) - true_after, axis=1)
        return shift

    found.start_km = distance()
    step = rewrite(model, Plan([BlackBox("sgp4", **PROBES)]), loss=nn.MSELoss(), seed=seed)
    optimizer = torch.optim.LBFGS(
        step.parameters(), max_iter=evaluations, max_eval=evaluations, line_search_fn="strong_wolfe", history_size=20
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = step(observations.minutes, observations.station, target=observations.seen)
        torch.autograd.backward(loss)
        found.residuals.append(math.sqrt(loss.item()))
        report(len(found.residuals), found.residuals[-1])
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    found.end_km, found.rows = distance(), step.ledger.total("queries") + step.ledger.total("capture")
    return found


def draw(found: Found, path: Path) -> Path:
    """The residual on the way, and the error of the orbit afterwards."""
    figure, ((way, after),) = new_figure(10, 4, columns=2)
    way.plot(range(1, len(found.residuals) + 1), found.residuals, ".-")
    way.axhline(1, color="grey", linewidth=1, linestyle=":")
    way.annotate("noise alone", (1, 1), (0, 4), textcoords="offset points", color="grey")
    seen = len(found.observations.minutes)
    way.set(xlabel="gradients", ylabel="residual / noise", yscale="log", title=f"Fit of six elements, {seen} sightings")
    for label, error in (("guess", found.start_km), ("fitted", found.end_km)):
        after.plot(np.arange(len(error)) / 6, error, label=label)
    after.set(
        xlabel="hours after the day of the sightings", ylabel="position error in km", yscale="log", title="Prediction"
    )
    after.legend()
    figure.savefig(path, dpi=120)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit one orbit; write trajectory.png. Returns the exit status."""
    options = chosen(arguments, str(__doc__).splitlines()[0], "trajectory", ("sgp4", "matplotlib"))

    def report(number: int, residual: float) -> None:
        if number % 3 == 1:
            progress(f"gradient {number:>3}  residual {residual:>8.2f} times the noise")

    with one_thread():
        found = fit(options.seed, apart=4 if options.quick else 1, report=report)
    seen, minutes = found.observations, found.observations.minutes
    progress(
        f"{len(minutes)} sightings by {len(set(seen.station.tolist()))} stations in {float(minutes[-1]) / 60:.0f} hours"
    )
    progress(f"{len(found.residuals)} gradients, {found.rows:,} positions computed by sgp4, those of probes among them")
    progress(f"residual {found.residuals[-1]:.2f} times the noise (1 is the best one can expect)")
    progress(
        f"error over the 24 hours after that day, at most: {found.start_km.max():.1f} km -> {found.end_km.max():.3f} km"
    )
    progress(f"Figure: {draw(found, options.folder / 'trajectory.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
