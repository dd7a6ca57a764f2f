"""Boxes of benchmarks/step_size.py written after the rule. Package: scipy."""

from collections.abc import Callable

import numpy as np
import torch
from step_size_case import Array, Case, matrix, normal, torch_case, uniform
from torch import Tensor

from rewriter import CallableBox


def in_float32(function: Callable[[Tensor], Tensor], x: Array, hidden: bool) -> Case:
    """A function computed in float32; hidden: behind float64 inputs and outputs."""

    def arrays(a: Array) -> Array:
        found = function(torch.from_numpy(a.astype(np.float32))).numpy()
        return found.astype(np.float64) if hidden else found

    dtype = torch.float64 if hidden else torch.float32
    return Case(CallableBox(arrays, dtype=dtype), torch.from_numpy(x).to(dtype), exact=function)


def pendulum() -> Case:
    """A double pendulum in float32, 300 leapfrog steps of .01 s: two angles, two velocities, two lengths."""

    def run(x: Tensor) -> Tensor:
        first, second, speed, other, length, arm = x.unbind(1)
        for _ in range(300):
            pull = -9.8 / length * torch.sin(first) + 0.5 * torch.sin(second - first)
            push = -9.8 / arm * torch.sin(second) - 0.5 * torch.sin(second - first)
            speed, other = speed + 0.01 * pull, other + 0.01 * push
            first, second = first + 0.01 * speed, second + 0.01 * other
        return torch.stack((first, second, speed, other), 1)

    return in_float32(run, uniform([-2.0, -2.0, -1.0, -1.0, 0.8, 0.8], [2.0, 2.0, 1.0, 1.0, 1.2, 1.2]), hidden=False)


def hidden_float32() -> Case:
    """A network in float32 behind float64 inputs and outputs: nothing declares its precision."""
    inner, outer = matrix(20, 40), matrix(40, 6, 2)
    return in_float32(lambda x: torch.tanh(x @ inner.to(x.dtype)) @ outer.to(x.dtype), normal(20), hidden=True)


def eigenvalues() -> Case:
    """Sorted eigenvalues of a symmetric 8 x 8 matrix that depends on 12 inputs: kinks where they cross."""
    parts = torch.from_numpy(np.random.default_rng(4).standard_normal((12, 8, 8)))
    return torch_case(lambda x: torch.linalg.eigvalsh(torch.einsum("nk,kij->nij", x, parts + parts.mT)), normal(12))


def quadrature() -> Case:
    """An oscillating integral by scipy's adaptive rule to 1e-4: where it divides an interval is noise."""
    from scipy.integrate import quad

    nodes, weights = np.polynomial.legendre.leggauss(400)
    t = 2 * (nodes + 1)

    def adaptive(row: Array) -> float:
        decay, pace, phase = row
        return float(
            quad(lambda s: np.exp(-decay * s) * np.cos(pace * s * s + phase), 0, 4, epsabs=1e-4, epsrel=1e-4)[0]
        )

    def clean(a: Array) -> Array:
        values = np.exp(-a[:, :1] * t) * np.cos(a[:, 1:2] * t * t + a[:, 2:3])
        return (values @ weights * 2)[:, None]

    x = uniform([0.2, 1.0, 0.0], [1.0, 3.0, 3.0])
    return Case(CallableBox(lambda a: np.array([[adaptive(row)] for row in a])), torch.from_numpy(x), clean=clean)


def mixed_curvature(most: float) -> Case:
    """sin(w x) / w in float32 with w from 1 to `most`: as much gradient in every dimension, but not of one length."""
    rates = torch.from_numpy(np.geomspace(1.0, most, 8))
    weights = matrix(8, 5)
    return in_float32(
        lambda x: (torch.sin(x * rates.to(x.dtype)) / rates.to(x.dtype)) @ weights.to(x.dtype), normal(8), hidden=False
    )


def noisy(deviation: float) -> Case:
    """A network with white noise in its outputs, declared noisy."""
    inner, outer = matrix(10, 30), matrix(30, 4, 2)
    random = np.random.default_rng(5)

    def clean(x: Tensor) -> Tensor:
        return torch.sin(x @ inner) @ outer

    def box(a: Array) -> Array:
        exact = clean(torch.from_numpy(a.copy())).numpy()
        return exact + deviation * random.standard_normal(exact.shape)

    return Case(CallableBox(box, noisy=True), torch.from_numpy(normal(10)), exact=clean)


FRESH = {
    "pendulum float32": pendulum,
    "hidden float32": hidden_float32,
    "eigenvalues": eigenvalues,
    "adaptive quadrature": quadrature,
    "curvature 1 to 1e2": lambda: mixed_curvature(1e2),
    "curvature 1 to 1e4": lambda: mixed_curvature(1e4),
    "declared noise 1e-6": lambda: noisy(1e-6),
    "declared noise 1e-4": lambda: noisy(1e-4),
    "declared noise 1e-2": lambda: noisy(1e-2),
}
