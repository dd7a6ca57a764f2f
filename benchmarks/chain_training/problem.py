"""What is trained: a model with one chain, batches in an order fixed by the seed, and what is held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """One task.

    name, title:  in files and in headings
    definition:   everything its runs share; runs made under another one are not used
    chain:        the module that holds the blocks
    blocks:       how many there are
    build:        seed -> model with its initial weights
    batches:      seed -> batches, as many as training has steps
    steps:        how many that is
    loss:         (output, target) -> mean loss
    measure:      model -> what is held out: mean loss in nats, accuracy in percent
    held:         a few held-out batches, on which gradients are compared
    rates:        what the learning rate is chosen among, on `tuning_seed` and for back-propagation only
    seeds:        of the runs that are compared
    """

    name: str
    title: str
    definition: str
    chain: str
    blocks: int
    build: Callable[[int], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    steps: int
    loss: Callable[[Any, Tensor], Tensor]
    measure: Callable[[nn.Module], tuple[float, float]]
    held: Callable[[], list[Batch]]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    tuning_seed: int = 100
