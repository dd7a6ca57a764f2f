"""Boxes of benchmarks/step_size.py made up against the rule."""

import numpy as np
import torch
from step_size_case import Array, Case, exported, matrix, normal, torch_case, uniform
from torch import Tensor, nn

from rewriter import CallableBox


def decades() -> Case:
    """Eleven inputs with units 1e-5 .. 1e5, one each."""
    units = 10.0 ** np.arange(-5.0, 6.0)
    weights = matrix(11, 6)
    return torch_case(lambda x: torch.tanh(x / torch.from_numpy(units) @ weights), normal(11) * units)


def near_linear() -> Case:
    """A x + 1e-6 sin(A x): no step up to the input scale is too long."""
    weights = matrix(12, 5)
    return torch_case(lambda x: x @ weights + 1e-6 * torch.sin(x @ weights), normal(12))


def oscillatory() -> Case:
    """sin(500 A x): a period is a hundredth of the input scale."""
    weights = matrix(8, 4)
    return torch_case(lambda x: torch.sin(500 * (x @ weights)), normal(8))


def offset() -> Case:
    """1e6 + tanh(A x): outputs hold ten digits less of the signal."""
    weights = matrix(10, 5)
    return torch_case(lambda x: 1e6 + torch.tanh(x @ weights), normal(10))


def reactor() -> Case:
    """An adiabatic batch reactor, some rows ignited, some not: T0 (K), c0, activation temperature, log rate -> T, c."""

    def run(x: Tensor) -> Tensor:
        start, full, activation, rate = x.unbind(1)
        left = full
        for _ in range(300):
            temperature = start + 200 * (full - left)
            left = left * torch.exp(-0.01 * torch.exp(rate - activation / temperature))
        return torch.stack((start + 200 * (full - left), left), 1)

    return torch_case(run, uniform([330.0, 0.8, 9500.0, 24.0], [370.0, 1.2, 10500.0, 26.0]))


def noisy_kinks() -> Case:
    """relu(A x) B with white noise of deviation 1e-6 in every output: a new draw at every evaluation."""
    inner, outer = matrix(12, 24), matrix(24, 4, 2)
    random = np.random.default_rng(3)

    def clean(x: Tensor) -> Tensor:
        return torch.relu(x @ inner) @ outer

    def noisy(a: Array) -> Array:
        exact = clean(torch.from_numpy(a.copy())).numpy()
        return exact + 1e-6 * random.standard_normal(exact.shape)

    return Case(CallableBox(noisy), torch.from_numpy(normal(12)), exact=clean)


def dense512() -> Case:
    """512-256-10 tanh, exported to ONNX, float32, dense."""
    torch.manual_seed(0)
    return exported(nn.Sequential(nn.Linear(512, 256), nn.Tanh(), nn.Linear(256, 10)), 512)


MADE_UP = {
    "10 decades": decades,
    "near-linear": near_linear,
    "oscillatory": oscillatory,
    "offset 1e6": offset,
    "reactor": reactor,
    "kinks, noise 1e-6": noisy_kinks,
    "ONNX d=512 float32": dense512,
}
