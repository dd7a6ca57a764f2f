"""Losses of rows with known gradients of their smoothed versions, for tests of likelihood ratios."""

import math

import numpy as np
import torch

WIDTH, SIGMA = 6, 0.3
_numbers = torch.Generator().manual_seed(11)
Z = torch.randn(WIDTH, generator=_numbers, dtype=torch.float64)
W = torch.randn(WIDTH, generator=_numbers, dtype=torch.float64)
_root = torch.randn(WIDTH, WIDTH, generator=_numbers, dtype=torch.float64)
H = (_root + _root.T) / 2


def _characteristic(laplace, frequency):
    """E exp(i frequency w.e sigma), real as the noise is symmetric; frequency: numbers or arrays."""
    scaled = (SIGMA * W.numpy()) ** 2 * np.asarray(frequency)[..., None] ** 2 / 2
    return np.prod(1 / (1 + scaled), -1) if laplace else np.exp(-scaled.sum(-1))


def _density(laplace, at):
    """Of sigma w.e at a number, from its characteristic function."""
    grid = np.linspace(0, 400, 400_001)
    return float(np.trapezoid(np.cos(grid * at) * _characteristic(laplace, grid), grid) / math.pi)


def linear(z):
    return 1.5 + z @ W


def quadratic(z):
    return 0.7 + z @ W + 0.5 * ((z @ H) * z).sum(-1)


def sine(z):
    return torch.sin(z @ W + 0.4)


def step(z):
    return (z @ W - 1.2 > 0).double()


def cubic(z):
    return z.pow(3).sum(-1) * 0.8 / 6


def smoothed(loss, laplace):
    """Gradient at Z of E loss(Z + SIGMA e)."""
    at = float(Z @ W)
    return {
        linear: lambda: W,
        quadratic: lambda: W + H @ Z,
        sine: lambda: W * math.cos(at + 0.4) * float(_characteristic(laplace, 1.0)),
        step: lambda: W * _density(laplace, at - 1.2),
        cubic: lambda: 0.8 * (Z.square() + SIGMA**2) / 2,
    }[loss]()
