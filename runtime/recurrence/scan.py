"""Linear recurrences backward in time, element by element."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of one step below which a step takes as long as calling it does: fewer and larger calls are faster then.
_SMALL = 4096
_FEWEST = 64  # steps


class Scan:
    """u_t += K_t u_(t+1) from the last row but one to the first, in place; rows of u: 0 to `steps`.

    coefficient: (steps, ...), or None for ones. Where a step has few elements, blocks of steps run side by side, as if
    zero entered each; what did enter is then carried from block to block, and added: the same up to the order of
    operations.
    """

    def __init__(self, coefficient: Tensor | None, steps: int, elements: int) -> None:
        self._coefficient = coefficient
        self._blocks: tuple[Tensor, Tensor] | None = None
        if coefficient is not None and steps >= _FEWEST and elements < _SMALL:
            length = round(steps**0.5)
            blocks = torch.unflatten(coefficient[: steps // length * length], 0, (-1, length))
            running = blocks.clone()
            for row in range(length - 2, -1, -1):
                running[:, row] *= running[:, row + 1]
            self._blocks = blocks, running

    def __call__(self, u: Tensor) -> None:
        if self._coefficient is None:
            u.copy_(u.flip(0).cumsum(0).flip(0))
        elif self._blocks is None:
            _one_by_one(u, self._coefficient)
        else:
            blocks, running = self._blocks
            whole = blocks.shape[0] * blocks.shape[1]
            _one_by_one(u[whole:], self._coefficient[whole:])
            _by_blocks(u[: whole + 1], blocks, running)


def _one_by_one(u: Tensor, coefficient: Tensor) -> None:
    rows = u.unbind(0)
    for factor, after, before in zip(
        reversed(coefficient.unbind(0)), reversed(rows[1:]), reversed(rows[:-1]), strict=True
    ):
        before.addcmul_(factor, after)


def _by_blocks(u: Tensor, blocks: Tensor, running: Tensor) -> None:
    """blocks: (count, length, ...) coefficients; running: their products from each row to the end of its block."""
    count, length = blocks.shape[:2]
    own = torch.unflatten(u[:-1], 0, (count, length))
    for factor, after, before in _columns(own, blocks):
        before.addcmul_(factor, after)
    entering = torch.empty_like(own[:, 0])
    entering[-1] = u[-1]
    for block in range(count - 1, 0, -1):
        torch.addcmul(own[block, 0], running[block, 0], entering[block], out=entering[block - 1])
    own.addcmul_(running, entering.unsqueeze(1))


def _columns(own: Tensor, blocks: Tensor) -> zip[tuple[Tensor, Tensor, Tensor]]:
    rows = own.unbind(1)
    return zip(reversed(blocks.unbind(1)[:-1]), reversed(rows[1:]), reversed(rows[:-1]), strict=True)
