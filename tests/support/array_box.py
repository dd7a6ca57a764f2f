"""A box made of a numpy function, with a count of its rows that nothing in the library can touch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rewriter.runtime.black_box import BlackBoxRule
from rewriter.runtime.evaluator import Answer
from rewriter.runtime.random import Key
from rewriter.runtime.rule import Call, Taken


class ArrayBox:
    """`function` takes arrays and returns one array or a tuple; floating inputs are cast to `dtype`."""

    def __init__(
        self, function: Callable[..., Any], dtype=torch.float64, shared=(), repeats_shared=False, label="array box"
    ) -> None:
        self.function, self.dtype, self.label = function, dtype, label
        self.shared, self.repeats_shared = frozenset(shared), repeats_shared
        self.domains, self.noisy = {}, False
        self.rows = self.calls = 0

    def complete(self, inputs):
        return inputs

    def dtypes(self, *inputs: Tensor) -> tuple[torch.dtype, ...]:
        return tuple(self.dtype if value.is_floating_point() else value.dtype for value in inputs)

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        arrays = [value.to(dtype).numpy() for value, dtype in zip(inputs, self.dtypes(*inputs), strict=True)]
        outputs = self.function(*arrays)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        self.calls += 1
        self.rows += len(outputs[0])
        return tuple(torch.from_numpy(output) for output in outputs)

    def query(self, arrays, like):
        return [output.numpy() for output in self.evaluate(*map(torch.from_numpy, arrays))]

    def answer(self, *inputs: Tensor) -> Answer:
        kept = self.evaluate(*inputs)
        return Answer(tuple(output.float() if output.is_floating_point() else output for output in kept), kept, False)


def forward(rule: BlackBoxRule, *inputs: Tensor, step: int = 0, rank: int = 0) -> tuple[Call, Taken]:
    call = Call("region", Key(7, step, "region"), rank)
    return call, rule.forward(call, inputs, ())


def gradient(rule: BlackBoxRule, *inputs: Tensor, v, step: int = 0, rank: int = 0, needed=None):
    """One forward and one backward; the gradients of the inputs."""
    call, taken = forward(rule, *inputs, step=step, rank=rank)
    cotangents = v if isinstance(v, tuple) else (v,)
    return rule.backward(call, taken, cotangents, needed or tuple(x.is_floating_point() for x in inputs))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of each row."""
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=1)


def slope(found: Tensor, true: Tensor) -> float:
    """<found, true> / <true, true> over everything: 1 for the right scale."""
    return float((found.double() * true.double()).sum() / true.double().square().sum())


def relative_error(found: Tensor, true: Tensor) -> float:
    """Mean over rows of |found - true|^2 / |true|^2."""
    return float(((found.double() - true.double()).square().sum(1) / true.double().square().sum(1)).mean())
