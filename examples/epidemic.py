"""The simulator of `calibration`: an epidemic in a closed population (SIR), solved by scipy, and data made with it.

s' = -b s i and i' = b s i - g i in fractions of the population; what one sees is log i on given days.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NAMES = ("infections per day b", "recoveries per day g", "infected on day 0")
GUESS = np.log([0.25, 0.2, 0.005])
UNITS = np.array([0.3, 0.5, 1.5])  # how unsure the guess is: what is fitted is (logarithm - GUESS) / UNITS
NOISE = 0.05  # standard deviation of log i
DAYS, SPARSE_DAYS = np.arange(1.0, 61), np.arange(3.0, 61, 3)
FEATURES = 3  # of a region


class Epidemic:
    """The simulator, with a counter of its runs."""

    def __init__(self) -> None:
        self.runs = 0

    def solve(self, days: Array, parameters: Array) -> Array:
        """Log of the infected fraction on `days` (n,), ascending; parameters: log of b, g and i on day 0."""
        from scipy.integrate import odeint

        self.runs += 1
        infections, recoveries, infected = np.exp(parameters).tolist()

        def slope(_: float, state: Array) -> list[float]:
            susceptible, ill = state.tolist()  # python's numbers: numpy's are slow one by one
            new = infections * susceptible * ill
            return [-new, new - recoveries * ill]

        start = [1 - infected, infected]
        found = odeint(slope, start, np.append(0.0, days), tfirst=True, rtol=1e-8, atol=1e-12)
        result: Array = np.log(np.maximum(found[1:, 1], 1e-12))
        return result

    def on_days(self, days: Array, fitted: Array) -> Array:
        """Rows are days: one run gives them all. days: (n, 1); fitted: (3,); returns (n, 1)."""
        return self.solve(days[:, 0], GUESS + UNITS * fitted)[:, None]

    def in_regions(self, infections: Array, fitted: Array) -> Array:
        """Rows are regions: one run each. infections: (n, 1) log b; fitted: (2,), of g and i; returns (n, 20)."""
        shared = GUESS[1:] + UNITS[1:] * fitted
        return np.stack([self.solve(SPARSE_DAYS, np.append(row, shared)) for row in infections])


def natural(fitted: Array) -> Array:
    """The parameters that `fitted` stands for: all three, or the last two."""
    result: Array = np.exp(GUESS[-len(fitted) :] + UNITS[-len(fitted) :] * fitted)
    return result


def draw_truth(seed: int) -> Array:
    """b in .35...45, g in .08...12, 1 to 3 in a thousand infected."""
    return np.random.default_rng([seed, 0]).uniform([0.35, 0.08, 0.001], [0.45, 0.12, 0.003])


def data_of_one(seed: int, truth: Array) -> Array:
    """Log i on 60 days, with noise; (60,)."""
    return Epidemic().solve(DAYS, np.log(truth)) + np.random.default_rng([seed, 1]).normal(0, NOISE, len(DAYS))


def infections_of(features: Array) -> Array:
    """b of regions as it is in the data, a smooth function of their features (n, 3); (n,)."""
    a, b, c = features.T
    infections: Array = 0.35 * np.exp(0.25 * np.tanh(a - b) + 0.1 * np.sin(2 * c))
    return infections


def data_of_regions(seed: int, features: Array, truth: Array) -> Array:
    """Log i on 20 days in each region, with noise; truth: (2,) g and i on day 0, the same everywhere; (n, 20)."""
    fitted = (np.log(truth) - GUESS[1:]) / UNITS[1:]
    clean = Epidemic().in_regions(np.log(infections_of(features))[:, None], fitted)
    return clean + np.random.default_rng([seed, 3]).normal(0, NOISE, clean.shape)
