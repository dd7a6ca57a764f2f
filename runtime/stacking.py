"""Values with their rows in front, and back: copies of rows are stacked wherever a value keeps its rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the rows of a value lie: dimension, and how many neighbouring entries of it belong to each row."""

    dimension: int
    multiplicity: int = 1

    def rows(self, value: Tensor) -> int:
        return value.shape[self.dimension] // self.multiplicity

    def split(self, value: Tensor) -> Tensor:
        """(rows, multiplicity, the other dimensions)."""
        moved = value.movedim(self.dimension, 0)
        return moved.reshape(-1, self.multiplicity, *moved.shape[1:])

    def joined(self, split: Tensor) -> Tensor:
        """From what `split` gives, for any number of rows, to a value that lies as the original."""
        return split.flatten(0, 1).movedim(0, self.dimension).contiguous()

    def parted(self, value: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """The value's first rows, and the others; views of it."""
        first, whole = rows * self.multiplicity, value.shape[self.dimension]
        return value.narrow(self.dimension, 0, first), value.narrow(self.dimension, first, whole - first)

    def take(self, value: Tensor, index: Tensor) -> Tensor:
        """The value of the rows of an index, (n,), repeats included."""
        if self.dimension == 0 and self.multiplicity == 1:
            return value[index]
        return self.joined(self.split(value)[index])
