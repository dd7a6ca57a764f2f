"""Which rows get more copies, learnt over batches from clean losses: a running regression, and FLOPS's two policies."""

import math
from typing import Any

import numpy as np
import torch

from rewriter.runtime.random import Key, normal, words

from .arrays import Array

_GROUPS = 15  # of the batch's rows in the order of their losses
_KEPT = 0.9  # of what earlier batches say
_RATE = 0.05  # Adam's
_DECAYS = (0.9, 0.999)  # likewise
_NUGGET = 1e-2  # independent part of the Gaussian policy's variance


class RunningNorms:
    """Rows in proportion to the length that gradients of rows with losses of that rank had in earlier batches.

    parameters: (15,), running mean squares by rank of the loss, in units of the batch's; NaN where no row was yet. The
    groups of ranks end at 1 - 2^(-k / 2), finer where the long gradients are. No pilot is needed, and the losses' scale
    does not matter; what differs between rows of equal loss is not seen.
    """

    def __init__(self) -> None:
        self.parameters: Array = np.full(_GROUPS, math.nan)
        self._seen: Array = np.zeros(_GROUPS)

    def shares(self, losses: Array, key: Key, first_row: int, parameters: Array) -> Array:
        """(n,), what rows' copies are to be in proportion to; losses: (n,), clean. No random numbers are drawn."""
        known = np.isfinite(parameters)
        if not known.any():
            return np.ones(len(losses))
        edges = 1 - 2.0 ** (-np.arange(_GROUPS + 1) / 2)
        edges[-1] = 1
        centres = (edges[1:] + edges[:-1]) / 2
        found: Array = np.sqrt(np.interp(_ranks(losses), centres[known], parameters[known]))
        return found

    def learn(self, losses: Array, shares: Array, counts: Array, squares: Array) -> None:
        """After a batch; squares: (n,), of the rows' gradients, up to a factor, from their `counts` copies."""
        total = float(squares.sum())
        if not (math.isfinite(total) and total > 0):
            return
        group = np.minimum(-2 * np.log2(1 - _ranks(losses)), _GROUPS - 1).astype(np.int64)
        rows = np.bincount(group, minlength=_GROUPS)
        means = np.bincount(group, squares / total * len(squares), _GROUPS) / np.maximum(rows, 1)
        self._seen = self._seen + (rows > 0)
        known = np.where(np.isfinite(self.parameters), self.parameters, 0.0)
        share = np.maximum(1 - _KEPT, 1 / np.maximum(self._seen, 1))
        self.parameters = np.where(rows > 0, known + share * (means - known), self.parameters)

    def get_state(self) -> dict[str, Any]:
        """Tensors."""
        return {"parameters": torch.from_numpy(self.parameters), "seen": torch.from_numpy(self._seen)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned."""
        self.parameters, self._seen = state["parameters"].numpy(), state["seen"].numpy()


class GaussianAllocator:
    """FLOPS's Gaussian policy: shares ~ N(m, C), m linear in the rows' losses, C by an RBF kernel of their differences.

    parameters: slope, intercept, log length scale, log amplitude; losses are standardised within the batch, so that
    their scale does not matter. Trained to spend copies where they lower the estimate's variance, by the score function
    of ln N(shares; m, C) (arXiv 2410.05966).
    """

    def __init__(self) -> None:
        self.parameters: Array = np.array([0.0, 1.0, 0.0, math.log(0.4)])
        self._ascent = _Ascent(4)

    def shares(self, losses: Array, key: Key, first_row: int, parameters: Array) -> Array:
        """(n,), one draw; what is not positive asks for the fewest copies. losses: (n,), clean."""
        mean, covariance, _ = _moments(_standard(losses), parameters)
        drawn: Array = mean + np.linalg.cholesky(covariance) @ normal(key, len(losses), 1, first_row)[:, 0]
        return drawn

    def learn(self, losses: Array, shares: Array, counts: Array, squares: Array) -> None:
        """As `RunningNorms.learn`; shares: what was drawn."""
        self.parameters = self._ascent.step(self.parameters, self.score(losses, shares), _reward(counts, squares))

    def score(self, losses: Array, shares: Array) -> Array:
        """Gradient of ln N(shares; m, C) in the four parameters."""
        x = _standard(losses)
        mean, covariance, distances = _moments(x, self.parameters)
        inverse = np.linalg.inv(covariance)
        pull = inverse @ (shares - mean)
        scale = np.exp(-2 * self.parameters[2])
        stretched = covariance * distances * scale  # dC / d log length: its diagonal is zero
        slack = np.outer(pull, pull) - inverse
        return np.array([x @ pull, pull.sum(), 0.5 * (slack * stretched).sum(), (slack * covariance).sum()])

    def get_state(self) -> dict[str, Any]:
        """Tensors and numbers."""
        return {"parameters": torch.from_numpy(self.parameters), **self._ascent.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned."""
        self.parameters = state["parameters"].numpy()
        self._ascent.set_state(state)


class BernoulliAllocator:
    """FLOPS's Bernoulli policy: rows below the mean loss have their copies halved with probability p, the others share
    what that frees equally.

    parameters: (1,), the logit of p, from p = .3, trained as `GaussianAllocator` is (arXiv 2410.05966).
    """

    def __init__(self) -> None:
        self.parameters: Array = np.array([math.log(0.3 / 0.7)])
        self._ascent = _Ascent(1)

    def shares(self, losses: Array, key: Key, first_row: int, parameters: Array) -> Array:
        """(n,), one draw; 1/2 for a halved row. losses: (n,), clean."""
        uniform = (words(key, len(losses), 1, first_row)[:, 0] >> np.uint64(11)) * 2.0**-53
        halved = _below(losses) & (uniform < _sigmoid(parameters[0]))
        # Some row is not below the mean, so there is one to share with.
        found: Array = np.where(halved, 0.5, 1 + 0.5 * np.count_nonzero(halved) / np.count_nonzero(~halved))
        return found

    def learn(self, losses: Array, shares: Array, counts: Array, squares: Array) -> None:
        """As `RunningNorms.learn`; shares: what was drawn."""
        score = (shares < 1)[_below(losses)] - _sigmoid(self.parameters[0])
        self.parameters = self._ascent.step(self.parameters, np.array([score.sum()]), _reward(counts, squares))

    def get_state(self) -> dict[str, Any]:
        """Tensors and numbers."""
        return {"parameters": torch.from_numpy(self.parameters), **self._ascent.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned."""
        self.parameters = state["parameters"].numpy()
        self._ascent.set_state(state)


LearnedAllocator = RunningNorms | GaussianAllocator | BernoulliAllocator
LEARNED: dict[str, type[LearnedAllocator]] = {
    "running": RunningNorms,
    "gaussian": GaussianAllocator,
    "bernoulli": BernoulliAllocator,
}


class _Ascent:
    """Score-function ascent on a reward, by Adam, with the running mean of the reward as its baseline."""

    def __init__(self, width: int) -> None:
        self._steps = 0
        self._baseline = 0.0
        self._moments: Array = np.zeros((2, width))

    def step(self, parameters: Array, score: Array, reward: float) -> Array:
        """The next parameters."""
        if not (math.isfinite(reward) and np.isfinite(score).all()):
            return parameters
        if self._steps == 0:
            self._baseline = reward  # nothing to compare it with: this step only starts the baseline
        gradient = (reward - self._baseline) * score
        self._baseline += (1 - _KEPT) * (reward - self._baseline)
        self._steps += 1
        powers = np.stack((gradient, np.square(gradient)))
        decays = np.array(_DECAYS)[:, None]
        self._moments = decays * self._moments + (1 - decays) * powers
        first, second = self._moments / (1 - decays**self._steps)
        moved: Array = parameters + _RATE * first / (np.sqrt(second) + 1e-8)
        return moved

    def get_state(self) -> dict[str, Any]:
        return {"steps": self._steps, "baseline": self._baseline, "moments": torch.from_numpy(self._moments)}

    def set_state(self, state: dict[str, Any]) -> None:
        self._steps, self._baseline, self._moments = state["steps"], state["baseline"], state["moments"].numpy()


def _reward(counts: Array, squares: Array) -> float:
    """Minus the estimate's variance, sum of squares / counts, in units of that of equal shares."""
    uniform = squares.sum() / counts.mean()
    return -float((squares / counts).sum() / uniform) if uniform > 0 else math.nan


def _moments(x: Array, parameters: Array) -> tuple[Array, Array, Array]:
    """Mean, covariance and squared distances of standardised losses."""
    slope, intercept, length, amplitude = parameters
    distances = np.square(x[:, None] - x)
    kernel = np.exp(-0.5 * distances * np.exp(-2 * length)) + _NUGGET * np.eye(len(x))
    return intercept + slope * x, kernel * np.exp(2 * amplitude), distances


def _standard(losses: Array) -> Array:
    """Losses less their mean over their deviation; those that are not finite count as the mean."""
    finite = np.isfinite(losses)
    if not finite.any() or (deviation := float(losses[finite].std())) == 0:
        return np.zeros(len(losses))
    return np.where(finite, (np.where(finite, losses, 0) - losses[finite].mean()) / deviation, 0.0)


def _below(losses: Array) -> Array:
    found: Array = _standard(losses) < 0
    return found


def _ranks(losses: Array) -> Array:
    """Places of rows in the order of their losses, in (0, 1)."""
    places = np.empty(len(losses))
    places[np.argsort(losses, kind="stable")] = (np.arange(len(losses)) + 0.5) / len(losses)
    return places


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
