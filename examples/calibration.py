"""Calibrate a simulator: the parameters of an epidemic, alone in few runs, then together with a small network.

The simulator's parameters go into the box as a shared input, an ordinary `nn.Parameter`: the box is probed in the space
of these few numbers, whatever the number of rows, and any torch optimizer does the rest.

    python -m rewriter.examples.calibration
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter import BlackBox, CallableBox, Plan, rewrite
from rewriter.examples import epidemic
from rewriter.examples.command import chosen, new_figure, progress
from rewriter.examples.epidemic import DAYS, GUESS, NAMES, NOISE, Array, Epidemic
from rewriter.examples.random_forest import one_thread

RUNS = 60  # of the simulator, those of `rewrite` and of gradients among them
LARGEST = 5  # runs of one gradient: the forward, three probes, and now and then one more that measures its quality
REGIONS, OTHERS = 16, 200  # trained on, and not
# The solver is accurate to 1e-8, so a small step has little bias; what is fitted has scale 1.
PROBES: dict[str, Any] = {"directions": "coordinate", "step_size": 1e-4, "input_scale": 1.0}


class Alone(nn.Module):
    """Three parameters, no network."""

    def __init__(self, simulator: Epidemic) -> None:
        super().__init__()
        self.fitted = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.simulator = CallableBox(simulator.on_days, shared=(1,), name="epidemic")

    def forward(self, days: Tensor) -> Tensor:
        found: Tensor = self.simulator(days, self.fitted)
        return found


@dataclass
class Fit:
    """How the calibration of three parameters went.

    truth, found: natural units; path: parameters after so many runs; runs: until each entry of the path
    """

    truth: Array
    data: Array
    path: list[Array] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)

    @property
    def found(self) -> Array:
        """Where the loss was lowest."""
        return self.path[int(np.argmin(self.losses))]

    @property
    def error(self) -> float:
        """Largest relative error of the three."""
        return float(np.abs(self.found / self.truth - 1).max())

    @property
    def runs_within(self) -> int | None:
        """Runs after which the parameters stay within 5 % of the truth; None: never."""
        inside = [bool((np.abs(point / self.truth - 1) < 0.05).all()) for point in self.path]
        outside = max((index for index, good in enumerate(inside) if not good), default=-1)
        return self.runs[outside + 1] if outside + 1 < len(inside) else None


class _BudgetSpentError(Exception):
    """No run is left for another gradient."""


def calibrate(seed: int, runs: int = RUNS) -> Fit:
    """L-BFGS on the squared error of log i until the simulator has run `runs` times, whatever for."""
    truth = epidemic.draw_truth(seed)
    fit, simulator = Fit(truth, epidemic.data_of_one(seed, truth)), Epidemic()
    model = Alone(simulator)
    step = rewrite(model, Plan([BlackBox("simulator", probes=3, **PROBES)]), loss=F.mse_loss, seed=seed)
    days, data = torch.from_numpy(DAYS)[:, None], torch.from_numpy(fit.data)[:, None]
    optimizer = torch.optim.LBFGS(step.parameters(), max_iter=1000, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        if simulator.runs + LARGEST > runs:
            raise _BudgetSpentError
        optimizer.zero_grad()
        loss: Tensor = step(days, target=data)
        torch.autograd.backward(loss)
        fit.path.append(epidemic.natural(model.fitted.detach().numpy()))
        fit.losses.append(loss.item())
        fit.runs.append(simulator.runs)
        return loss

    with contextlib.suppress(_BudgetSpentError):
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return fit


def least_squares(fit: Fit) -> tuple[int, float]:
    """What one would use without a network: scipy's, same data and guess. Returns its runs and largest error."""
    from scipy import optimize

    simulator = Epidemic()
    found = optimize.least_squares(lambda at: simulator.solve(DAYS, at) - fit.data, GUESS)
    return simulator.runs, float(np.abs(np.exp(found.x) / fit.truth - 1).max())


class WithNetwork(nn.Module):
    """b differs between regions as a network of their features says; g and i on day 0 are the same everywhere."""

    def __init__(self, simulator: Epidemic) -> None:
        super().__init__()
        self.infections = nn.Sequential(nn.Linear(epidemic.FEATURES, 16), nn.Tanh(), nn.Linear(16, 1)).double()
        self.fitted = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.simulator = CallableBox(simulator.in_regions, shared=(1,), name="epidemic")

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.simulator(self.log_infections(features), self.fitted)
        return found

    def log_infections(self, features: Tensor) -> Tensor:
        """Log b of each region, (n, 1)."""
        logs: Tensor = self.infections(features) + float(GUESS[0])
        return logs


@dataclass
class JointFit:
    """How network and parameters went together.

    infections, found_infections: b of regions not trained on, (n,); truth, found: g and i on day 0
    """

    infections: Array
    found_infections: Array
    truth: Array
    found: Array
    losses: list[float]
    runs: int

    @property
    def error(self) -> float:
        """Largest relative error of the two parameters."""
        return float(np.abs(self.found / self.truth - 1).max())

    @property
    def network_error(self) -> float:
        """Root mean square of the relative error of b."""
        return float(np.sqrt(np.mean((self.found_infections / self.infections - 1) ** 2)))

    @property
    def constant_error(self) -> float:
        """The same, had the network learnt nothing but the mean of the true b."""
        return float(np.sqrt(np.mean((self.infections.mean() / self.infections - 1) ** 2)))


def calibrate_with_network(
    seed: int, evaluations: int = 150, report: Callable[[int, float], None] = lambda number, loss: None
) -> JointFit:
    """L-BFGS on the squared error of log i in 16 regions; b is tested on 200 others."""
    random, truth = np.random.default_rng([seed, 2]), epidemic.draw_truth(seed)[1:]
    features, others = (random.uniform(-1, 1, (count, epidemic.FEATURES)) for count in (REGIONS, OTHERS))
    x, data = torch.from_numpy(features), torch.from_numpy(epidemic.data_of_regions(seed, features, truth))
    simulator = Epidemic()
    losses: list[float] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WithNetwork(simulator)
    step = rewrite(model, Plan([BlackBox("simulator", probes=2, **PROBES)]), loss=F.mse_loss, seed=seed)
    optimizer = torch.optim.LBFGS(
        step.parameters(), max_iter=evaluations, max_eval=evaluations, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = step(x, target=data)
        torch.autograd.backward(loss)
        losses.append(loss.item())
        report(len(losses), losses[-1])
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        infections = model.log_infections(torch.from_numpy(others)).exp()[:, 0].numpy()
    found = epidemic.natural(model.fitted.detach().numpy())
    return JointFit(epidemic.infections_of(others), infections, truth, found, losses, simulator.runs)


def draw(fit: Fit, joint: JointFit, path: Path) -> Path:
    """The fitted curve, the parameters on their way, and b of the network against the truth."""
    figure, ((curve, way, regions),) = new_figure(13, 4, columns=3)
    solve = Epidemic().solve
    curve.plot(DAYS, np.exp(fit.data), ".", color="grey", label="data")
    for label, point, line in (("guess", np.exp(GUESS), ":"), ("calibrated", fit.found, "-")):
        curve.plot(DAYS, np.exp(solve(DAYS, np.log(point))), line, label=label)
    curve.set(xlabel="day", ylabel="infected fraction", title=f"Three parameters, {fit.runs[-1]} runs", yscale="log")
    for index, name in enumerate(NAMES):
        way.plot(fit.runs, [point[index] / fit.truth[index] for point in fit.path], ".-", label=name)
    way.axhspan(0.95, 1.05, color="grey", alpha=0.3, label="within 5 %")
    way.set(xlabel="runs of the simulator", ylabel="parameter / truth", yscale="log", title="On the way")
    way.set_yticks([0.5, 1, 2, 5], ["0.5", "1", "2", "5"])
    way.set_yticks([], minor=True)
    regions.plot(joint.infections, joint.found_infections, ".")
    ends = [joint.infections.min(), joint.infections.max()]
    regions.plot(ends, ends, color="grey", linewidth=1)
    title = f"With a network: {OTHERS} regions not trained on"
    regions.set(xlabel="true b", ylabel="b of the network", title=title)
    for axes in (curve, way):
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Calibrate alone and with a network; write calibration.png. Returns the exit status."""
    options = chosen(arguments, str(__doc__).splitlines()[0], "calibration", ("scipy", "matplotlib"))
    with one_thread():
        fit = calibrate(options.seed)
        progress(f"alone: {fit.runs[-1]} runs, all of them counted; within 5 % for good after {fit.runs_within}")
        for name, guess, value, truth in zip(NAMES, np.exp(GUESS), fit.found, fit.truth, strict=True):
            progress(f"  {name:<22}{guess:>9.4f} ->{value:>9.4f}   truth{truth:>9.4f}  {value / truth - 1:+.1%}")
        runs, error = least_squares(fit)
        progress(f"  scipy.optimize.least_squares, which knows residuals one by one: {runs} runs, error {error:.1%}")

        def report(number: int, loss: float) -> None:
            if number % 15 == 0:
                progress(f"with a network: gradient {number:>4}  loss {loss:.5f}  (noise alone: {NOISE**2:.5f})")

        joint = calibrate_with_network(options.seed, 30 if options.quick else 150, report)
    progress(f"  {joint.runs:,} runs; g and day 0 within {joint.error:.1%}")
    progress(f"  b of {OTHERS} regions not trained on: {joint.network_error:.1%} off (root mean square)")
    progress(f"  a network that had learnt only the mean of b would be {joint.constant_error:.1%} off")
    progress(f"Figure: {draw(fit, joint, options.folder / 'calibration.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
