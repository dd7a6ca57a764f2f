"""Boxes of benchmarks/step_size.py kept back while the rule was made. Packages: scipy, CoolProp, QuantLib."""

from typing import Any

import numpy as np
import torch
from step_size_case import Array, Case, exported, matrix, normal, plain, torch_case, uniform
from torch import Tensor, nn

from rewriter import CallableBox


def predator() -> Case:
    """Lotka-Volterra by scipy's adaptive RK45 (rtol 1e-6): the number of steps it takes is noise."""
    from scipy.integrate import solve_ivp

    def run(row: Array, method: str, rtol: float) -> Array:
        a, b, c, d = row[:4]

        def rate(_: float, y: Array) -> list[float]:
            return [a * y[0] - b * y[0] * y[1], d * y[0] * y[1] - c * y[1]]

        return np.asarray(solve_ivp(rate, (0, 10), row[4:], method=method, rtol=rtol, atol=rtol * 1e-3).y[:, -1])

    x = uniform([0.8, 0.3, 0.8, 0.2, 1.0, 1.0], [1.2, 0.5, 1.2, 0.4, 3.0, 3.0], rows=8)  # its reference is slow
    return Case(
        CallableBox(lambda a: np.stack([run(row, "RK45", 1e-6) for row in a])),
        torch.from_numpy(x),
        clean=lambda a: np.stack([run(row, "DOP853", 1e-12) for row in a]),
    )


def carbon_dioxide() -> Case:
    """Temperature and pressure of supercritical CO2 near its critical point -> density, viscosity, speed of sound."""
    from CoolProp.CoolProp import PropsSI

    def fluid(a: Array) -> Array:
        return np.stack([PropsSI(name, "T", a[:, 0], "P", a[:, 1], "CO2") for name in ("D", "V", "A")], 1)

    return plain(fluid, uniform([306.0, 7.6e6], [330.0, 1.2e7]))


def heston() -> Case:
    """QuantLib's analytic Heston price of a call: spot, v0, kappa, theta, sigma, rho, rate -> price."""
    import QuantLib

    today = QuantLib.Date(15, 1, 2026)
    QuantLib.Settings.instance().evaluationDate = today
    days = QuantLib.Actual365Fixed()

    def row(numbers: Array) -> float:
        spot, v0, kappa, theta, sigma, rho, rate = map(float, numbers)
        curves = [QuantLib.YieldTermStructureHandle(QuantLib.FlatForward(today, value, days)) for value in (rate, 0.0)]
        quote = QuantLib.QuoteHandle(QuantLib.SimpleQuote(spot))
        model = QuantLib.HestonModel(QuantLib.HestonProcess(*curves, quote, v0, kappa, theta, sigma, rho))
        option = QuantLib.VanillaOption(
            QuantLib.PlainVanillaPayoff(QuantLib.Option.Call, 100.0), QuantLib.EuropeanExercise(today + 365)
        )
        option.setPricingEngine(QuantLib.AnalyticHestonEngine(model))
        return float(option.NPV())

    low, high = [90.0, 0.02, 1.0, 0.02, 0.2, -0.8, 0.01], [110.0, 0.08, 3.0, 0.08, 0.5, -0.3, 0.05]
    function = lambda a: np.array([[row(numbers)] for numbers in a])  # noqa: E731
    return plain(function, uniform(low, high))


def border() -> Case:
    """log and sqrt of A x with rows close to the end of their domain; NaN beyond it."""
    weights = matrix(6, 4).abs()
    return torch_case(
        lambda x: torch.cat((torch.log(x @ weights), torch.sqrt(x @ weights - 0.02)), 1), uniform([0.02] * 6, [1.0] * 6)
    )


def half_output() -> Case:
    """A float64 network whose outputs are rounded to float16."""
    inner, outer = matrix(10, 32), matrix(32, 5, 2)

    def clean(x: Tensor) -> Tensor:
        return torch.tanh(x @ inner) @ outer

    def rounded(a: Array) -> Any:
        return clean(torch.from_numpy(a.copy())).numpy().astype(np.float16)

    return Case(CallableBox(rounded), torch.from_numpy(normal(10)), exact=clean, tolerance=0.05)


def float32_relu() -> Case:
    """64-128-128-10 ReLU, exported to ONNX, float32."""
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    return exported(layers, 64)


def bisection() -> Case:
    """Root of y + exp(y) = a.x by bisection to 1e-7: piecewise constant if looked at closely."""
    weights = np.array([1.0, 0.5, 2.0])

    def solve(a: Array, tolerance: float) -> Array:
        right = a @ weights
        low, high = right - np.exp(np.clip(right, -5, 5)) - 1, right + 1
        while (high - low).max() > tolerance:
            middle = (low + high) / 2
            above = middle + np.exp(middle) > right
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        return ((low + high) / 2)[:, None]

    def newton(a: Array) -> Array:
        right = a @ weights
        y = solve(a, 1e-6)[:, 0]
        for _ in range(6):
            y = y - (y + np.exp(y) - right) / (1 + np.exp(y))
        return y[:, None]

    x = torch.from_numpy(uniform([-1.0] * 3, [1.0] * 3))
    return Case(CallableBox(lambda a: solve(a, 1e-7)), x, clean=newton)


def rosenbrock() -> Case:
    """Ten dimensions, a curved valley, second derivatives from 2 to 1200."""
    return torch_case(
        lambda x: (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(1, keepdim=True), normal(10)
    )


def special_functions() -> Case:
    """Gamma and Bessel functions of scipy; the first input varies by 1e3, the last hardly matters."""
    from scipy import special

    def run(a: Array) -> Array:
        return np.stack((special.gammaln(a[:, 0]) * a[:, 1], special.jv(a[:, 2], a[:, 1]) + 1e-6 * a[:, 3]), 1)

    return plain(run, uniform([10.0, 1.0, 0.5, -1.0], [3000.0, 9.0, 4.0, 1.0]))


def saturated() -> Case:
    """Logistic units, half of the rows deep in saturation, where outputs round to 1."""
    weights = matrix(8, 3)
    x = normal(8)
    x[::2] *= 12
    return torch_case(lambda x: torch.sigmoid(3 * (x @ weights)), x)


KEPT_BACK = {
    "Lotka-Volterra RK45": predator,
    "CoolProp CO2": carbon_dioxide,
    "QuantLib Heston": heston,
    "end of domain": border,
    "float16 outputs": half_output,
    "ONNX ReLU float32": float32_relu,
    "bisection 1e-7": bisection,
    "Rosenbrock": rosenbrock,
    "special functions": special_functions,
    "saturated": saturated,
}
