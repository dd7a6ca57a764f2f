"""Counter-based random numbers: what row r draws depends on (key, r) only.

Any split of the rows over ranks, chunks or subsets therefore gives the same numbers, and a resumed run continues
them. The generator is Philox 4x64 (Salmon et al. 2011). Its key is hashed from seed and region; of the four words
of its counter the first counts the words of the rows, of which each row owns a fixed number, the others are forward
and replicate.
"""

import hashlib
import math
import threading
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_WORDS_PER_COUNT = 4  # Philox 4x64 yields four words for each value of its counter


class Key(NamedTuple):
    """Names one block of random numbers.

    seed: the user's; forward: index of the forward call; region: name of the region; replicate: copy of a row
    """

    seed: int
    forward: int
    region: str
    replicate: int = 0

    def named(self, purpose: str) -> "Key":
        """The key of an independent block, for another purpose of the same call."""
        return Key(self.seed, self.forward, f"{self.region}/{purpose}", self.replicate)


class _Generator(threading.local):
    """One Philox per thread: setting its state is ten times cheaper than building one."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(0)
        self.uniforms = np.random.Generator(self.philox)
        self.counter = np.zeros(4, dtype=np.uint64)
        self.buffer = np.zeros(4, dtype=np.uint64)

    def seek(self, key: Key, counter: int) -> np.random.Philox:
        self.counter[:] = counter, key.forward, key.replicate, 0
        self.philox.state = {
            "bit_generator": "Philox",
            "state": {"counter": self.counter, "key": _philox_key(key.seed, key.region)},
            "buffer": self.buffer,
            "buffer_pos": _WORDS_PER_COUNT,
            "has_uint32": 0,
            "uinteger": 0,
        }
        return self.philox


_generator = _Generator()
_HALF_A_BIT, _TURN = np.float32(2.0**-25), np.float32(2.0 * math.pi)
_ONE, _TWO, _MINUS_TWO = np.float32(1.0), np.float32(2.0), np.float32(-2.0)


@lru_cache(maxsize=1024)
def _philox_key(seed: int, region: str) -> npt.NDArray[np.uint64]:
    return np.frombuffer(hashlib.blake2b(repr((seed, region)).encode(), digest_size=16).digest(), dtype=np.uint64)


def words(key: Key, rows: int, width: int, first_row: int = 0) -> npt.NDArray[np.uint64]:
    """Uniform 64-bit words for the rows first_row .. first_row + rows - 1, (rows, width or a few more)."""
    counts = -(-width // _WORDS_PER_COUNT)
    philox = _generator.seek(key, first_row * counts)
    return philox.random_raw(rows * counts * _WORDS_PER_COUNT).reshape(rows, -1)


def normal(key: Key, rows: int, width: int, first_row: int = 0) -> npt.NDArray[np.float32]:
    """Standard normal numbers, (rows, width), by Box-Muller from 24-bit uniforms (tails end at 5.9)."""
    words_per_row = _WORDS_PER_COUNT * -(-width // (2 * _WORDS_PER_COUNT))
    _generator.seek(key, first_row * words_per_row // _WORDS_PER_COUNT)
    uniform = _generator.uniforms.random(
        2 * rows * words_per_row, np.float32
    )  # two of a word; flat, as short rows are slow
    radius = uniform[0::2] + _HALF_A_BIT  # never log(0)
    np.log(radius, out=radius)
    radius *= _MINUS_TWO
    np.sqrt(radius, out=radius)
    angle = uniform[1::2] * _TURN
    numbers = np.empty((len(radius), 2), dtype=np.float32)
    np.multiply(radius, np.cos(angle), out=numbers[:, 0])
    np.multiply(radius, np.sin(angle, out=angle), out=numbers[:, 1])
    return numbers.reshape(rows, -1)[:, :width]


def signs(key: Key, rows: int, width: int, first_row: int = 0) -> npt.NDArray[np.float32]:
    """Independent fair signs, (rows, width) of -1 and +1 (Rademacher)."""
    packed = words(key, rows, -(-width // 64), first_row).view(np.uint8)
    numbers = np.unpackbits(packed, axis=1, count=width).astype(np.float32)
    numbers *= _TWO
    numbers -= _ONE
    return numbers


def subsets(key: Key, rows: int, width: int, count: int, first_row: int = 0) -> npt.NDArray[np.int64]:
    """For each row `count` of the indices 0 .. width - 1, without replacement, in random order: (rows, count)."""
    return np.argsort(words(key, rows, width, first_row)[:, :width], axis=1)[:, :count]
