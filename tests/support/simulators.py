"""Functions for boxes in other processes, which find them by name; they behave as the first number of a row says."""

import os
import signal
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

HANG, EXIT, SEGFAULT, RAISE, SHAPE, MISSING, HANG_FOR_GOOD, THREADS = range(-1, -9, -1)


def simulate(x: Array) -> Array:
    """One row: sin(x), unless its first number is one of the codes above."""
    code = x[0]
    if code == HANG_FOR_GOOD:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        time.sleep(1000)
    elif code == HANG:
        time.sleep(1000)
    elif code == EXIT:
        os._exit(3)
    elif code == SEGFAULT:
        os.kill(os.getpid(), signal.SIGSEGV)
    elif code == RAISE:
        raise ValueError("no solution")
    elif code == SHAPE:
        return np.zeros(len(x) + 1)
    elif code == MISSING:
        return np.full(len(x), np.nan)
    elif code == THREADS:
        return np.full(len(x), float(os.environ.get("OMP_NUM_THREADS", "0")))
    return np.sin(x)


def simulate_batch(x: Array) -> Array:
    """Rows in dimension 0; any code in the batch is the fate of the call."""
    for row in x:
        if row[0] < 0:
            return simulate(row)
    return np.sin(x)


def noisy(x: Array, scale: Array, *, seed: int) -> Array:
    """One row with noise of its own seed."""
    return np.sin(x) + scale * np.random.default_rng(seed).standard_normal(x.shape)


def noisy_batch(x: Array, scale: Array, *, seed: Array) -> Array:
    """The same, rows in dimension 0."""
    return np.stack([noisy(*row, seed=int(number)) for *row, number in zip(x, scale, seed, strict=True)])


class Treacherous:
    """One row: sin(x), but a quarter of all points have no solution, and some calls, counted in `folder`, go wrong.

    Those numbers in `fates` say how; who kills a worker once does so whenever the same row comes again.
    """

    def __init__(self, folder: Path, fates: dict[int, int]) -> None:
        self.folder, self.fates = folder, fates

    def __call__(self, x: Array) -> Array:
        with open(self.folder / "calls", "ab", buffering=0) as calls:
            calls.write(b".")
            fate = self.fates.get(calls.tell(), 0)
        killer = self.folder / "killer"
        if fate == EXIT:
            killer.write_bytes(x.tobytes())
        elif killer.exists() and killer.read_bytes() == x.tobytes():
            fate = EXIT
        if fate:
            (self.folder / f"met{fate}").touch()
        elif zlib.crc32(x.tobytes()) % 4 == 0:
            fate = RAISE
        return simulate(np.concatenate([[fate], x]))[1:] if fate else np.sin(x)


class Unloadable:
    """Pickles, but not back."""

    def __call__(self, x: Array) -> Array:
        return x

    def __getstate__(self) -> dict[str, int]:
        return {"version": 1}

    def __setstate__(self, state: dict[str, int]) -> None:
        raise OSError("the licence server does not answer")
