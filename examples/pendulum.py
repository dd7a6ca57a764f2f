"""Train a controller through MuJoCo's inverted pendulum, where only the score of a whole episode comes back.

One row is one episode: a reset, a loop of observations, forces and physics, and a count of the steps until the pole
fell. Nothing inside is differentiated. The controller's gains enter the box as a shared input, repeated per row, so
each episode is played with gains of its own around the present ones, and both sides of a difference start from the same
reset because a row's seed is one of its inputs. The score is a whole number and has a cap: its gradient is zero almost
everywhere, and what probes see is its average over their step. What comes out is what was asked for and no more: a pole
that is up after 1,000 control steps, be it with a swing that grows.

    python -m rewriter.examples.pendulum
"""

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

# The geometry, masses and limits are those of gymnasium's InvertedPendulum: MuJoCo computes masses from the shapes.
XML = """
<mujoco model="inverted pendulum">
  <compiler inertiafromgeom="true"/>
  <default>
    <joint damping="1" limited="true"/>
    <geom contype="0" friction="1 .1 .1"/>
  </default>
  <option integrator="RK4" timestep=".02"/>
  <worldbody>
    <geom type="capsule" quat=".707 0 .707 0" size=".02 1"/>
    <body>
      <joint name="slider" type="slide" axis="1 0 0" range="-1 1"/>
      <geom type="capsule" quat=".707 0 .707 0" size=".1 .1"/>
      <body>
        <joint name="hinge" type="hinge" axis="0 1 0" range="-90 90"/>
        <geom type="capsule" fromto="0 0 0 .001 0 .6" size=".049 .3"/>
      </body>
    </body>
  </worldbody>
  <actuator>
    <motor joint="slider" gear="100" ctrllimited="true" ctrlrange="-3 3"/>
  </actuator>
</mujoco>
"""
SKIP, PERIOD = 2, 0.04  # physics steps per control step, and its seconds
FALLEN, RESET = 0.2, 0.01  # rad; the state after a reset lies within +-RESET of its start in each number
CAP, MOST = 1000, 6000  # control steps of an episode; episodes of a training
ROWS, SURE = 4, 5  # episodes in a forward; training ends once SURE forwards in a row reach the cap
# Four probes of four gains on both sides: 32 episodes in a backward. Half a unit of each gain is a step wide enough to
# change a score. Chosen on seeds 100 to 102, as was the rate.
PROBES: dict[str, Any] = {"probes": 4, "difference": "central", "step_size": 0.5, "input_scale": 1.0, "clip": None}
RATE = 0.3
SEEDS, TESTS = 3, 20


class Pendulum:
    """The simulator; `scores` holds that of every episode ever played in it by `score`."""

    def __init__(self, cap: int = CAP) -> None:
        import mujoco

        self.cap, self.model = cap, mujoco.MjModel.from_xml_string(XML)
        self.scores: list[int] = []

    def score(self, gains: Array, start: Array, seed: int) -> float:
        """Control steps until the pole falls, or the cap; gains: (4,), as `play`."""
        lasted = len(self.play(gains, start, seed))
        self.scores.append(lasted)
        return float(lasted)

    def play(self, gains: Array, start: Array, seed: int) -> list[float]:
        """Angles (rad) after each control step with the pole up, `cap` at most.

        gains: (4,) force in units of 100 N per m, rad, m/s and rad/s; start: (4,) in the same order
        """
        import mujoco

        model, data = self.model, mujoco.MjData(self.model)  # its own: episodes run on several threads
        state = start + np.random.default_rng(seed).uniform(-RESET, RESET, 4)
        data.qpos[:], data.qvel[:] = state[:2], state[2:]
        position, speed, control = data.qpos, data.qvel, data.ctrl
        angles: list[float] = []
        while len(angles) < self.cap:
            control[0] = gains[:2] @ position + gains[2:] @ speed  # MuJoCo keeps it within +-3
            mujoco.mj_step(model, data, SKIP)
            angle = float(position[1])
            if not abs(angle) <= FALLEN:  # not a number is fallen, too
                break
            angles.append(angle)
        return angles


class Controller(nn.Module):
    """Four gains, and the episodes they are tried in."""

    def __init__(self, pendulum: Pendulum) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        self.episodes = CallableBox(pendulum.score, per_row=True, shared=(0,), seed="seed", name="pendulum")

    def forward(self, starts: Tensor) -> Tensor:
        """Scores (n,) of episodes from starts (n, 4), each with a reset drawn anew."""
        scores: Tensor = self.episodes(self.gains, starts)
        return scores


@dataclass
class Training:
    """How one training went.

    played: episodes until after each forward, for whatever purpose; scores: mean of that forward; solved: it ended
    because SURE forwards in a row reached the cap; gains: (4,) at the end
    """

    played: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    solved: bool = False
    gains: Array = field(default_factory=lambda: np.zeros(4))


def train(
    pendulum: Pendulum, seed: int, most: int = MOST, report: Callable[[Training], None] = lambda training: None
) -> Training:
    """Adam on minus the mean score until it is sure to be at the cap, or `most` episodes are played."""
    controller = Controller(pendulum)
    step = rewrite(controller, Plan([BlackBox("episodes", **PROBES)]), loss=lambda scores: -scores.mean(), seed=seed)
    optimizer = torch.optim.Adam(step.parameters(), lr=RATE)
    starts = torch.zeros(ROWS, 4, dtype=torch.float64)
    training, sure, before, dearest = Training(), 0, len(pendulum.scores), 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # what the seeds of the resets are drawn with
        while sure < SURE and len(pendulum.scores) - before + dearest <= most:
            began = len(pendulum.scores)
            loss = step(starts)
            training.played.append(len(pendulum.scores) - before)
            training.scores.append(-loss.item())
            report(training)
            sure = sure + 1 if training.scores[-1] == pendulum.cap else 0
            if not sure:
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
            dearest = max(dearest, len(pendulum.scores) - began)
    training.solved, training.gains = sure == SURE, controller.gains.detach().numpy().copy()
    return training


def unseen(pendulum: Pendulum, gains: Array) -> Array:
    """Scores (20,) from resets that no training has seen: these seeds are below 20, those are drawn below 2^62."""
    return np.array([len(pendulum.play(gains, np.zeros(4), seed)) for seed in range(TESTS)], np.float64)


def draw(pendulum: Pendulum, trainings: dict[int, Training], path: Path) -> Path:
    """Mean score over episodes for every seed, and the angle in one test episode before and after."""
    figure, ((learning, angle),) = new_figure(11, 4, columns=2)
    for seed, training in trainings.items():
        learning.plot(training.played, training.scores, ".-", label=f"seed {seed}")
    learning.axhline(pendulum.cap, color="grey", linewidth=1, linestyle=":")
    learning.set(xlabel="episodes, those of probes among them", ylabel="control steps survived", title="Learning")
    learning.legend(title=f"mean of {ROWS} episodes")
    first = next(iter(trainings.values()))
    for label, gains in (("before", np.zeros(4)), ("after", first.gains)):
        angles = np.degrees(pendulum.play(gains, np.zeros(4), 0))
        angle.plot(PERIOD * np.arange(1, len(angles) + 1), angles, label=label)
    for limit in np.degrees([-FALLEN, FALLEN]):
        angle.axhline(limit, color="grey", linewidth=1, linestyle=":")
    angle.set(xlabel="seconds", ylabel="angle of the pole in degrees", title="One test episode", xscale="log")
    angle.legend()
    figure.savefig(path, dpi=120)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Train from three seeds (quick: one, shorter episodes); write pendulum.png. Returns the exit status."""
    options = chosen(arguments, str(__doc__).splitlines()[0], "pendulum", ("mujoco", "matplotlib"))
    pendulum = Pendulum(cap=150 if options.quick else CAP)
    trainings = {}

    def report(training: Training) -> None:
        if len(training.scores) % 4 == 1:
            progress(f"  {training.played[-1]:>5} episodes   score {training.scores[-1]:>7.1f}")

    with one_thread():
        progress(f"Score: control steps with the pole up, {pendulum.cap} at most.")
        progress(f"without control: {unseen(pendulum, np.zeros(4)).mean():.1f}, mean of {TESTS} resets")
        for seed in range(options.seed, options.seed + (1 if options.quick else SEEDS)):
            progress(f"seed {seed}")
            training = trainings[seed] = train(pendulum, seed, report=report)
            scores = unseen(pendulum, training.gains)
            end = "ended at the cap" if training.solved else "not solved"
            progress(f"  {end} after {training.played[-1]:,} episodes, every one of them counted")
            progress(f"  {TESTS} resets not trained on: mean {scores.mean():.1f}, worst {scores.min():.0f}")
        progress(f"Figure: {draw(pendulum, trainings, options.folder / 'pendulum.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
