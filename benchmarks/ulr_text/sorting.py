"""A GRU that says which book a window is from, and its training with gradients from several sources."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from time import process_time
from typing import Any

import torch
import torch.nn.functional as F
from books import BOOKS, VOCABULARY, Shelf
from torch import Tensor, nn

from rewriter import UlrCut, rewrite
from rewriter.rewritten import Rewritten
from rewriter.runtime.ulr_cut import UlrCutRule
from rewriter.standins import StandIn, standing_in

LENGTH, WIDTH, EMBEDDED, ROWS = 64, 32, 16, 32
QUARTER = LENGTH // 4
WARM_UP = 0.05  # of the steps; then the rate falls as a cosine to 0
CLIP = 1.0  # norm of the whole gradient
TESTED = 3000  # windows, the same for all


class Sorter(nn.Module):
    """Words (rows, length) -> logits; the head reads the last state. truncated: the state is detached every quarter."""

    def __init__(self, truncated: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, EMBEDDED)
        self.rnn = nn.GRU(EMBEDDED, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, len(BOOKS))
        self.truncated = truncated
        with torch.no_grad():  # memories of 1 to `length` steps (arXiv 1804.11188): the second third is the update gate
            self.rnn.bias_hh_l0.zero_()
            self.rnn.bias_ih_l0.zero_()
            self.rnn.bias_ih_l0[WIDTH : 2 * WIDTH] = torch.empty(WIDTH).uniform_(1, LENGTH - 1).log()

    def forward(self, words: Tensor) -> Tensor:
        embedded = self.embed(words)
        if not self.truncated:
            _, last = self.rnn(embedded)
            return self.head(last[-1])
        last = embedded.new_zeros(1, len(words), WIDTH)
        for quarter in embedded.split(QUARTER, 1):
            _, last = self.rnn(quarter, last.detach())
        return self.head(last[-1])


@dataclass(frozen=True)
class Method:
    """zero: its cuts pass zero, as a defect would."""

    name: str
    cut: UlrCut | None = None
    truncated: bool = False
    zero: bool = False


@dataclass(frozen=True)
class Task:
    """evidence: words of the book at the start of a window; what follows is neutral."""

    name: str
    title: str
    evidence: int
    steps: int


@dataclass(frozen=True)
class Run:
    """accuracy: on the test's windows, percent; seconds: CPU time of the steps; copies: noisy rows evaluated for each
    row of a step, over all cuts; cosine: measured, of the estimates at the cuts with the rows' gradients."""

    accuracy: float
    seconds: float
    copies: float
    cosine: float | None


class _Zero(StandIn):
    def backward(self, call: Any, taken: Any, cotangents: Any, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        given = zip(taken.tensors, needed, strict=True)
        return tuple([torch.zeros_like(value) if need else None for value, need in given])


def train(task: Task, method: Method, rate: float, seed: int, training: Shelf, testing: Shelf) -> Run:
    """The seed fixes the first weights and the windows, the same for every method."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Sorter(method.truncated)
    example, _ = testing.windows(ROWS, LENGTH, task.evidence, torch.Generator().manual_seed(1))
    step = rewrite(model, [method.cut] if method.cut else [], loss=F.cross_entropy, example=(example,), seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    seconds = 0.0
    zero = standing_in(step, step.latest, lambda _, rule: _Zero(rule) if isinstance(rule, UlrCutRule) else rule)
    with zero if method.zero else nullcontext():
        for number in range(task.steps):
            words, book = training.windows(ROWS, LENGTH, task.evidence, generator)
            start = process_time()
            for group in optimizer.param_groups:
                group["lr"] = rate * _share(number / task.steps)
            loss = step(words, target=book)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            seconds += process_time() - start
    copies = step.ledger.total("queries") / task.steps / ROWS
    return Run(round(_accuracy(model, task, testing), 2), round(seconds, 1), round(copies, 2), _cosine(step))


def _share(done: float) -> float:
    """Of the learning rate: a short linear rise, then a cosine to 0."""
    return min(1.0, done / WARM_UP + 0.05) * 0.5 * (1 + math.cos(math.pi * done))


def _accuracy(model: nn.Module, task: Task, testing: Shelf) -> float:
    words, book = testing.windows(TESTED, LENGTH, task.evidence, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return 100 * float((model(words).argmax(1) == book).double().mean())


def _cosine(step: Rewritten) -> float | None:
    found = [region.rule.quality for region in step.latest.emitted.regions.values()]
    measured = [quality.measured_cosine for quality in found if quality and quality.measured_cosine is not None]
    return round(measured[0], 3) if measured else None
