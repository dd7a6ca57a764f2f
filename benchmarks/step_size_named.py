"""Boxes of benchmarks/step_size.py that the goal names: real packages and a solver that prints text.

Packages: sgp4, CoolProp, QuantLib, mujoco and gymnasium (for its half_cheetah.xml).
"""

from pathlib import Path

import numpy as np
import torch
from step_size_case import ROWS, Array, Case, exported, plain, uniform
from torch import nn

from rewriter import CallableBox


def sgp4() -> Case:
    """Seven orbital elements of a low satellite -> position (km) and velocity (km/s) after 90 minutes."""
    from sgp4.api import WGS72, Satrec

    def row(elements: Array) -> Array:
        drag, eccentricity, perigee, inclination, anomaly, motion, node = map(float, elements)
        satellite = Satrec()
        epoch = 27000.0
        satellite.sgp4init(
            WGS72, "i", 1, epoch, drag, 0.0, 0.0, eccentricity, perigee, inclination, anomaly, motion, node
        )
        error, position, velocity = satellite.sgp4_tsince(90.0)
        return np.array((*position, *velocity)) if error == 0 else np.full(6, np.nan)

    low, high = [1e-5, 1e-3, 0.5, 0.5, 0.5, 0.055, 0.5], [1e-4, 2e-2, 5.5, 1.5, 5.5, 0.067, 5.5]
    return plain(lambda a: np.stack([row(elements) for elements in a]), uniform(low, high))


def coolprop() -> Case:
    """Temperature (K) and pressure (Pa) of liquid water -> density and enthalpy."""
    from CoolProp.CoolProp import PropsSI

    def water(a: Array) -> Array:
        return np.stack([PropsSI(name, "T", a[:, 0], "P", a[:, 1], "Water") for name in ("D", "H")], 1)

    return plain(water, uniform([290.0, 1e6], [360.0, 2e7]))


def quantlib() -> Case:
    """American put on a Cox-Ross-Rubinstein tree of 200 steps: spot, strike, volatility, rate, dividend -> price."""
    import QuantLib

    today = QuantLib.Date(15, 1, 2026)
    QuantLib.Settings.instance().evaluationDate = today
    days = QuantLib.Actual365Fixed()

    def row(numbers: Array) -> float:
        spot, strike, volatility, rate, dividend = map(float, numbers)
        flat = [
            QuantLib.YieldTermStructureHandle(QuantLib.FlatForward(today, value, days)) for value in (dividend, rate)
        ]
        surface = QuantLib.BlackVolTermStructureHandle(
            QuantLib.BlackConstantVol(today, QuantLib.NullCalendar(), volatility, days)
        )
        process = QuantLib.BlackScholesMertonProcess(QuantLib.QuoteHandle(QuantLib.SimpleQuote(spot)), *flat, surface)
        exercise = QuantLib.AmericanExercise(today, today + 270)
        option = QuantLib.VanillaOption(QuantLib.PlainVanillaPayoff(QuantLib.Option.Put, strike), exercise)
        option.setPricingEngine(QuantLib.BinomialVanillaEngine(process, "crr", 200))
        return float(option.NPV())

    low, high = [80.0, 90.0, 0.15, 0.01, 0.0], [120.0, 110.0, 0.45, 0.06, 0.03]
    function = lambda a: np.array([[row(numbers)] for numbers in a])  # noqa: E731
    return plain(function, uniform(low, high))


def float32_mlp() -> Case:
    """16-64-64-8 tanh, exported to ONNX, float32."""
    torch.manual_seed(0)
    return exported(nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)), 16)


def cheetah() -> Case:
    """MuJoCo half-cheetah: positions, velocities and controls -> positions and velocities after 10 steps.

    32 states met under random controls whose set of contacts does not change within these steps.
    """
    import gymnasium
    import mujoco

    assets = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
    model = mujoco.MjModel.from_xml_path(str(assets / "half_cheetah.xml"))
    data = mujoco.MjData(model)
    n = model.nq

    def run(row: Array) -> tuple[Array, set[frozenset[tuple[int, int]]]]:
        mujoco.mj_resetData(model, data)
        data.qpos[:], data.qvel[:], data.ctrl[:] = row[:n], row[n : 2 * n], row[2 * n :]
        seen = set()
        for _ in range(10):
            mujoco.mj_step(model, data)
            seen.add(frozenset(zip(data.contact.geom1.tolist(), data.contact.geom2.tolist(), strict=True)))
        return np.concatenate((data.qpos, data.qvel)), seen

    random = np.random.default_rng(0)
    states: list[Array] = []
    while len(states) < ROWS:
        row = np.zeros(2 * n + model.nu)
        row[:n] = 0.1 * random.standard_normal(n)
        for _ in range(random.integers(1, 15)):
            row[2 * n :] = random.uniform(-1, 1, model.nu)
            row[: 2 * n] = run(row)[0]
        row[2 * n :] = random.uniform(-0.9, 0.9, model.nu)
        if len(run(row)[1]) == 1:
            states.append(row)
    return plain(lambda a: np.stack([run(row)[0] for row in a]), np.stack(states))


def pipes(digits: int, tolerance: float) -> Case:
    """Heads at six junctions of a pipe network (Hazen-Williams), read from text of so many digits.

    Inputs: demands of the six (l/s), head of the reservoir (m), roughness. Newton's method from a fixed start.
    """
    edges = np.array([(6, 0), (0, 1), (1, 2), (0, 3), (3, 4), (4, 5), (1, 4), (2, 5)])
    incidence = np.zeros((8, 7))
    incidence[np.arange(8), edges[:, 0]], incidence[np.arange(8), edges[:, 1]] = 1, -1
    inner = incidence[:, :6]
    length = np.array([400.0, 300, 350, 300, 280, 320, 260, 300])
    width = np.array([0.35, 0.3, 0.25, 0.25, 0.2, 0.2, 0.2, 0.15])

    def heads(a: Array) -> Array:
        resistance = 10.67 * length / (a[:, 7:8] ** 1.852 * width**4.87)
        found = a[:, 6:7] - np.linspace(1, 6, 6)
        flows = np.full((len(a), 8), 0.02)
        for _ in range(40):  # Newton on energy and mass balance (the global gradient algorithm)
            slopes = 1.852 * resistance * np.abs(flows) ** 0.852 + 1e-9
            weights = 1 / slopes
            loss = resistance * flows * np.abs(flows) ** 0.852
            drop = np.concatenate((found, a[:, 6:7]), 1) @ incidence.T
            matrix = np.einsum("ei,ne,ej->nij", inner, weights, inner)
            # mass balance: -inner^T (flows + weights (drop - loss)) = demand
            right = -a[:, :6] * 1e-3 - (flows + weights * (drop - loss)) @ inner
            change = np.linalg.solve(matrix, right[:, :, None])[:, :, 0]
            found = found + change
            flows = flows + weights * (drop + change @ inner.T - loss)
        return found

    def text(a: Array) -> Array:
        return np.vectorize(lambda value: float(f"{value:.{digits}g}"), otypes=[float])(heads(a))

    x = uniform([5.0] * 6 + [50.0, 90.0], [15.0] * 6 + [70.0, 130.0])
    return Case(CallableBox(text), torch.from_numpy(x), clean=heads, tolerance=tolerance)


NAMED = {
    "sgp4": sgp4,
    "CoolProp water": coolprop,
    "QuantLib American put": quantlib,
    "ONNX tanh float32": float32_mlp,
    "MuJoCo half-cheetah": cheetah,
    "pipes, 6 digits": lambda: pipes(6, 0.05),
    "pipes, 5 digits": lambda: pipes(5, 0.05),
    "pipes, 4 digits": lambda: pipes(4, 0.05),
}
