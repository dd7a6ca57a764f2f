"""Numpy functions as boxes: batched and per row, failures, and what a function may not do."""

import copy
import functools
import pickle
import threading
from typing import Any

import numpy as np
import pytest
import torch

from rewriter.runtime.boxes import CallableBox
from rewriter.runtime.errors import BoxError

Array = np.ndarray[Any, Any]


def square(x: Array) -> Array:
    return x**2


def test_batched_function_in_its_own_precision() -> None:
    seen: list[np.dtype[Any]] = []

    def function(x: Array, k: Array) -> tuple[Array, Array]:
        seen.extend([x.dtype, k.dtype])
        return x * k[:, None], k + 1

    box = CallableBox(function)
    y, k = box(torch.full((2, 3), 0.5), torch.tensor([2, 4], dtype=torch.int32))
    assert seen == [np.float64, np.int32]
    assert y.tolist() == [[1, 1, 1], [2, 2, 2]]
    assert (y.dtype, k.dtype, k.tolist()) == (torch.float32, torch.int32, [3, 5])
    assert CallableBox(square, dtype=torch.float32).evaluate(torch.ones(1, 1))[0].dtype is torch.float32


def test_per_row_equals_batched() -> None:
    x, k = torch.randn(23, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(23)
    batched = CallableBox(lambda x, k: (np.sin(x) + k[:, None], k * x.sum(1)))
    per_row = CallableBox(lambda x, k: (np.sin(x) + k, k * x.sum()), per_row=True, executor="threads:3")
    for one, other in zip(batched(x, k), per_row(x, k), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)
    assert per_row(x[:1], k[:1])[0].shape == (1, 3)


def test_per_row_uses_the_threads() -> None:
    meeting = threading.Barrier(3, timeout=10)

    def function(x: Array) -> Array:
        meeting.wait()  # returns only when three rows are evaluated at the same time
        return x

    assert torch.equal(CallableBox(function, per_row=True, executor="threads:3")(torch.ones(3, 1)), torch.ones(3, 1))


def test_inputs_are_views_and_outputs_are_not() -> None:
    kept: list[Array] = []
    buffer = np.zeros((2, 2))

    def function(x: Array) -> tuple[Array, Array, Array]:
        kept.append(x)
        buffer[:] = x
        return x, x[:, ::-1], buffer

    box, x = CallableBox(function), torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    first = [output.clone() for output in box.evaluate(x)]
    outputs = box.evaluate(x)
    assert np.shares_memory(kept[0], x.numpy())
    box.evaluate(x + 1)
    x += 100
    assert all(torch.equal(one, other) for one, other in zip(first, outputs, strict=True))
    box.evaluate(x.float())
    assert not np.shares_memory(kept[-1], x.numpy())  # a cast cannot be a view


def test_function_cannot_overwrite_its_inputs() -> None:
    def function(x: Array) -> Array:
        x += 1
        return x

    x = torch.zeros(2, 1, dtype=torch.float64)
    with pytest.raises(BoxError, match="read-only") as caught:
        CallableBox(function)(x)
    assert "x.copy()" in caught.value.remedy
    assert x.sum() == 0


def test_shared_inputs() -> None:
    x, theta = torch.ones(3, 2, dtype=torch.float64), torch.tensor([2.0, 5.0], dtype=torch.float64)
    batched = CallableBox(lambda x, theta: x * theta[0] + theta[1], shared=[1])
    assert batched.repeats_shared is False
    per_row = CallableBox(lambda x, theta: x * theta[0] + theta[1], shared=[1], per_row=True, executor="threads:2")
    assert per_row.repeats_shared is True
    assert torch.equal(batched(x, theta), torch.full((3, 2), 7.0, dtype=torch.float64))
    assert torch.equal(per_row(x, theta), batched(x, theta))
    own = torch.tensor([[1.0, 0], [2, 0], [3, 0]], dtype=torch.float64)
    assert per_row.evaluate(x, own)[0].tolist() == [[1, 1], [2, 2], [3, 3]]
    with pytest.raises(BoxError, match="no input with rows"):
        CallableBox(lambda theta: theta, shared=[0])(theta)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x[:-1], r"returned an output 0 of shape \(2, 1\) for 3 rows[\s\S]*per_row=True"),
        (lambda x: x.sum(), r"output 0 of shape \(\) for 3 rows"),
        (lambda x: (x, x.sum(0)), r"output 1 of shape \(1,\) for 3 rows"),
        (lambda x: (), "returned nothing"),
        (lambda x: np.array(["a"] * len(x)), "returned an array of <U1"),
        (lambda x: x + 1j, "returned an array of complex128"),
        (lambda x: None, "returned an array of object"),
    ],
)
def test_wrong_outputs(function: Any, message: str) -> None:
    with pytest.raises(BoxError, match=message):
        CallableBox(function)(torch.ones(3, 1))


def test_an_integer_where_a_float_was_is_converted() -> None:
    box = CallableBox(lambda x: 0 if x[0] < 0 else float(x[0]), per_row=True, executor="threads:1")
    assert box(torch.tensor([[0.5], [1.5]])).tolist() == [0.5, 1.5]
    assert box(torch.tensor([[-0.5], [-1.5]])).tolist() == [0, 0]
    other = CallableBox(lambda x: 0 if x[0] < 0 else float(x[0]), per_row=True, executor="threads:1")
    other(torch.tensor([[-0.5]]))  # integers, as far as anybody knows
    with pytest.raises(BoxError, match=r"returned rows of float64 \(\) where others are int64 \(\)"):
        other(torch.tensor([[0.5]]))


def test_autograd_works_inside_a_function() -> None:
    """A simulator may use torch for its own derivatives, though the box itself is never taped."""
    modes: list[bool] = []

    def slope(x: Array) -> Array:
        modes.append(torch.is_grad_enabled())
        with torch.enable_grad():
            inner = torch.tensor(x, requires_grad=True)
            return torch.autograd.grad((inner**3).sum(), inner)[0].numpy()

    box = CallableBox(slope)
    for x in (torch.ones(2, 1), torch.ones(2, 1, requires_grad=True)):
        assert torch.equal(box(x).detach(), torch.full((2, 1), 3.0))
    assert modes == [False, False]


def test_copies_and_pickles_of_functions() -> None:
    box = CallableBox(square, per_row=True, executor="threads:2")
    x = torch.ones(5, 1) * 3
    expected = box(x)
    for twin in (copy.deepcopy(box), pickle.loads(pickle.dumps(box))):
        assert torch.equal(twin(x), expected)
        assert twin._workers is not box._workers
    assert not box.state_dict()
    assert torch.equal(copy.deepcopy(CallableBox(lambda x: x**2))(x), expected)


def test_names() -> None:
    class Simulator:
        def __call__(self, x: Array) -> Array:
            return x

    assert CallableBox(square).label == "square"
    assert CallableBox(functools.partial(functools.partial(square))).label == "square"
    assert CallableBox(Simulator()).label == "Simulator"
    assert CallableBox(square, name="pricing").label == "pricing"
    assert "float64" in CallableBox(square).describe_inputs()


@pytest.mark.parametrize("per_row", [False, True])
def test_a_shared_number(per_row: bool) -> None:
    """Without dimensions: a scalar parameter."""
    box = CallableBox(lambda x, rate: x * rate, per_row=per_row, shared=[1])
    assert torch.equal(box(torch.arange(6.0).reshape(3, 2), torch.tensor(2.0)), 2 * torch.arange(6.0).reshape(3, 2))


def test_unknown_options() -> None:
    wrong: list[dict[str, Any]] = [
        {"nonfinite": "drop"},
        {"dtype": torch.int64},
        {"executor": "threads"},
        {"executor": "processes:0"},
        {"executor": 2},
        {"timeout": 0},
        {"retries": -1},
        {"seed": "random_state"},
    ]
    for option in wrong:
        with pytest.raises(BoxError, match=next(iter(option))):
            CallableBox(square, **option)
