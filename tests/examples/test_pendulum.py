"""The pendulum example: what it learns, that every episode is counted, and what the box plays for a gradient."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mujoco")
pytest.importorskip("matplotlib")

import mujoco  # after the check for the extra

from rewriter import BlackBox, Plan, rewrite
from rewriter.examples import pendulum

SHORT = 150  # control steps


def test_a_quick_run_keeps_the_pole_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    trainings: list[tuple[pendulum.Pendulum, pendulum.Training, int]] = []
    data, train = mujoco.MjData, pendulum.train

    def counting(model: Any) -> Any:
        made.append(1)
        return data(model)

    def kept(simulator: pendulum.Pendulum, seed: int, **options: Any) -> pendulum.Training:
        before = len(made)
        training = train(simulator, seed, **options)
        trainings.append((simulator, training, len(made) - before))
        return training

    monkeypatch.setattr(mujoco, "MjData", counting)
    monkeypatch.setattr(pendulum, "train", kept)
    assert pendulum.main(["--quick", "--seed", "1", "--folder", str(tmp_path / "out")]) == 0
    ((simulator, training, states),) = trainings
    assert training.solved
    assert training.scores[0] < 40
    assert training.played[-1] == states == len(simulator.scores) < 400  # one state of MuJoCo's for each episode
    assert pendulum.unseen(simulator, np.zeros(4)).mean() < 30
    assert pendulum.unseen(simulator, training.gains).min() == simulator.cap == SHORT
    shown = capsys.readouterr().out
    assert f"ended at the cap after {states} episodes" in shown
    assert "mean 150.0, worst 150" in shown
    assert (tmp_path / "out" / "pendulum.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_gradients_teach_it_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Backwards(pendulum.Controller):
        """Each gain goes the wrong way."""

        def __init__(self, simulator: pendulum.Pendulum) -> None:
            super().__init__(simulator)
            self.gains.register_hook(lambda gradient: -gradient)

    monkeypatch.setattr(pendulum, "Controller", Backwards)
    simulator = pendulum.Pendulum(SHORT)
    training = pendulum.train(simulator, 1, most=300)
    assert not training.solved
    assert training.played[-1] <= len(simulator.scores) <= 300
    assert pendulum.unseen(simulator, training.gains).mean() < 30


def test_both_sides_of_a_difference_start_from_one_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[tuple[int, bytes]] = []
    simulator = pendulum.Pendulum(SHORT)
    play = simulator.play

    def noting(gains: pendulum.Array, start: pendulum.Array, seed: int) -> list[float]:
        played.append((seed, gains.tobytes()))
        return play(gains, start, seed)

    monkeypatch.setattr(simulator, "play", noting)
    controller = pendulum.Controller(simulator)
    plan = Plan([BlackBox("episodes", **pendulum.PROBES)])
    step = rewrite(controller, plan, loss=lambda scores: -scores.mean())
    starts = torch.zeros(3, 4, dtype=torch.float64)
    torch.autograd.backward(step(starts))
    played.clear()
    loss = step(starts)
    seeds = [seed for seed, _ in played]
    assert len(set(seeds)) == 3
    torch.autograd.backward(loss)
    assert Counter(seed for seed, _ in played) == dict.fromkeys(seeds, 9)  # the forward, four probes on both sides
    tried = {seed: np.array([np.frombuffer(g) for other, g in played[3:] if other == seed]) for seed in seeds}
    for gains in tried.values():
        np.testing.assert_allclose(gains.sum(0), 0, atol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(gains, axis=1), 0.5 * 4**0.5)


def test_an_episode() -> None:
    simulator = pendulum.Pendulum(SHORT)
    still = np.zeros(4)
    angles = simulator.play(still, still, 0)
    assert angles == simulator.play(still, still, 0)
    assert angles != simulator.play(still, still, 1)
    assert np.abs(angles).max() <= pendulum.FALLEN
    assert simulator.score(still, np.array([0, 0.5, 0, 0]), 0) == 0  # it starts fallen
    assert simulator.score(np.array([0.1, 3, 0.1, 0.3]), still, 0) == SHORT  # gains that hold it
    assert simulator.scores == [0, SHORT]


def test_masses_are_those_of_the_shapes() -> None:
    """Capsules of radius r and length l between their centres weigh 1000 (pi r^2 l + 4/3 pi r^3) kg."""
    masses = [1000 * (np.pi * r**2 * length + 4 / 3 * np.pi * r**3) for r, length in ((0.1, 0.2), (0.049, 0.6))]
    np.testing.assert_allclose(pendulum.Pendulum().model.body_mass[1:], masses, rtol=1e-5)
