"""Rows that fail in the caller's process: masked and told, raised where a mask would be silent; retries and seeds."""

import copy
import itertools
import math
import os
import pickle
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from simulators import HANG, RAISE, SHAPE, noisy, noisy_batch, simulate

from rewriter.runtime.boxes import CallableBox
from rewriter.runtime.boxes.task import Block, Failure, Progress, Task
from rewriter.runtime.errors import BoxError

Array = np.ndarray[Any, Any]


def refuses_negative(x: Array) -> Array:
    if (x < 0).any():
        raise ValueError("negative input")
    return np.sqrt(x)


@pytest.mark.parametrize("per_row", [False, True])
def test_where_no_row_ever_had_outputs_the_exception_is_raised_with_its_cause(per_row: bool) -> None:
    box = CallableBox(refuses_negative, per_row=per_row, executor="threads:2" if per_row else None)
    with pytest.raises(BoxError, match="refuses_negative raised ValueError: negative input") as caught:
        box(-torch.ones(3, 1))
    assert isinstance(caught.value.__cause__, ValueError)
    assert "test_box_failures, line" in caught.value.where
    box.evaluate(torch.ones(3, 1))
    assert box.evaluate(-torch.ones(3, 1))[0].isnan().all()  # the layout is known by now


@pytest.mark.parametrize("per_row", [False, True])
def test_exception_masks_its_rows_only(per_row: bool) -> None:
    box = CallableBox(refuses_negative, per_row=per_row, nonfinite="keep")
    x = torch.arange(1.0, 10.0).square()[:, None]
    x[4] = -1
    y = box(x)
    assert y.isnan()[:, 0].tolist() == [row == 4 for row in range(9)]
    good = [row for row in range(9) if row != 4]
    assert torch.equal(y[good], x[good].sqrt())
    assert box.last_failure == "row 4 raised ValueError: negative input (1 of 9 rows failed)"
    box(x[:4])
    assert box.last_failure is None


def test_a_masked_row_is_an_error_in_forward_unless_declared() -> None:
    with pytest.raises(BoxError, match=r"1 of 2 rows[\s\S]*row 1 raised ValueError: negative input"):
        CallableBox(refuses_negative)(torch.tensor([[4.0], [-1.0]]))


def test_masked_integers_become_zero_beside_floats_and_cannot_stand_alone() -> None:
    def both(x: Array) -> tuple[Array, Array]:
        return refuses_negative(x), np.ones(len(x), int)

    box = CallableBox(both, nonfinite="zero")
    y, k = box(torch.tensor([[4.0], [-1.0]]))
    assert (y.tolist(), k.tolist()) == ([[2], [0]], [1, 0])
    alone = CallableBox(lambda x: refuses_negative(x).astype(int))
    with pytest.raises(BoxError, match="negative input"):
        alone(torch.tensor([[4.0], [-1.0]]))


@pytest.mark.parametrize("rows", [2, 64, 1000])
def test_a_broken_batched_function_is_given_up_soon(rows: int) -> None:
    calls = []

    def function(x: Array) -> Array:
        calls.append(len(x))
        if len(x) and x[0, 0] < 0:
            raise RuntimeError("broken")
        return x

    box, x = CallableBox(function, nonfinite="keep"), torch.ones(rows, 1)
    box(x)
    calls.clear()
    assert box(-x).isnan().all()
    assert len(calls) <= 4 * math.ceil(math.log2(rows)) + 16
    if rows == 1000:
        last = min(calls)
        assert last == 1  # it went down to single rows first
        assert "raised RuntimeError: broken (1000 of 1000 rows failed)" in str(box.last_failure)


def test_halving_finds_one_row_in_a_thousand() -> None:
    box, x = CallableBox(refuses_negative, nonfinite="keep"), torch.ones(1000, 1)
    x[777] = -1
    assert box(x).isnan().nonzero().tolist() == [[777, 0]]


def test_another_layout_is_a_failure_of_its_row() -> None:
    """Most rows decide while nothing is known, the first answer afterwards; garbage may come first."""
    x = torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
    x[0, 0], x[30, 0] = SHAPE, SHAPE
    box = CallableBox(simulate, per_row=True, nonfinite="keep")
    for _ in range(2):
        y = box(x)
        assert y.isnan().any(1).nonzero()[:, 0].tolist() == [0, 30]
        assert (
            box.last_failure
            == "row 0 returned rows of float64 (3,) where others are float64 (2,) (2 of 50 rows failed)"
        )
    number = itertools.count()
    odd = CallableBox(
        lambda x: (x, x) if next(number) == 7 else x, per_row=True, executor="threads:1", nonfinite="keep"
    )
    assert odd(x).isnan().any(1).nonzero()[:, 0].tolist() == [7]


def test_a_batched_function_that_returns_too_few_rows_is_halved() -> None:
    def drops_negative(x: Array) -> Array:
        return x[x[:, 0] >= 0]

    x = torch.arange(-3.0, 29.0)[:, None]
    with pytest.raises(BoxError, match=r"shape \(29, 1\) for 32 rows"):
        CallableBox(drops_negative)(x)  # it may be wrong altogether
    box = CallableBox(drops_negative, nonfinite="keep")
    box(x[3:])
    y = box(x)
    assert y.isnan()[:, 0].tolist() == [bool(value < 0) for value in x]
    assert torch.equal(y[3:], x[3:])


def test_precision_is_adapted_but_numbers_are_not_lost() -> None:
    number = itertools.count()
    kinds = [np.float64, np.float32, np.int64, np.float16]
    box = CallableBox(lambda x: x.astype(kinds[next(number) % 4]), per_row=True, executor="threads:1")
    assert box(torch.ones(8, 1)).tolist() == [[1]] * 8
    whole = CallableBox(lambda x: np.int32(1) if x[0] < 2 else np.int64(2**40), per_row=True, executor="threads:1")
    whole(torch.ones(2, 1))
    with pytest.raises(BoxError, match="int64"):
        whole(torch.full((2, 1), 3.0))


@pytest.mark.parametrize("retries", [0, 1, 2])
def test_retries_repeat_the_same_arguments(retries: int) -> None:
    seen: dict[float, list[int]] = {}

    def flaky(x: Array, *, seed: int) -> Array:
        tries = seen.setdefault(float(x[0]), [])
        tries.append(seed)
        if len(tries) <= x[0]:
            raise ConnectionError("no licence")
        return x

    box = CallableBox(flaky, per_row=True, retries=retries, seed="seed", nonfinite="keep")
    y = box.evaluate(*box.complete([torch.arange(4.0)[:, None]]))[0]
    assert y.isnan()[:, 0].tolist() == [row > retries for row in range(4)]
    assert all(len(set(tries)) == 1 for tries in seen.values())
    assert [len(seen[float(row)]) for row in range(4)] == [min(row, retries) + 1 for row in range(4)]


def test_system_exit_in_a_function_is_a_failure_of_its_row() -> None:
    def leaves(x: Array) -> Array:
        if x[0] < 0:
            raise SystemExit(1)
        return x

    for executor in ("threads:1", "threads:2"):
        box = CallableBox(leaves, per_row=True, executor=executor, nonfinite="keep")
        assert box(torch.tensor([[1.0], [-1.0], [2.0]])).isnan()[:, 0].tolist() == [False, True, False]


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class UnpicklableError(Exception):
    def __reduce__(self) -> Any:
        raise RuntimeError("it holds a licence")


class PickyError(Exception):
    """Cannot be made from what its pickle holds."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)


def test_an_exception_without_a_text_is_a_failure_of_its_row() -> None:
    def function(x: Array) -> Array:
        if x[0] < 0:
            raise MuteError
        return x

    box = CallableBox(function, per_row=True, executor="threads:2", nonfinite="keep")
    assert box(torch.tensor([[1.0], [-1.0]])).isnan()[:, 0].tolist() == [False, True]
    assert box.last_failure == "row 1 raised MuteError (1 of 2 rows failed)"


@pytest.mark.parametrize("error", [MuteError(), UnpicklableError("a"), PickyError(3, "a")])
def test_a_failure_reaches_another_process_whatever_its_exception(error: Exception) -> None:
    found = pickle.loads(pickle.dumps(Failure("raised something", "a remedy", error)))
    assert (found.reason, found.remedy) == ("raised something", "a remedy")
    assert type(error).__name__ in "".join(traceback.format_exception(found.error))
    assert pickle.loads(pickle.dumps(Failure("hung"))) == Failure("hung")


def test_the_limit_of_time_is_that_of_each_try() -> None:
    class Clocked(Progress):
        begun = 0

        def begin(self, start: int, stop: int) -> None:
            self.begun += 1
            super().begin(start, stop)

    progress = Clocked([0.0] * 4)
    Task(refuses_negative, True, frozenset(), None, 2)(Block([-np.ones(4)], 0, 4, None), progress)
    assert progress.begun == 4 * 3


# Boxes inside of boxes.


def test_a_box_inside_of_a_box() -> None:
    """Workers that wait for themselves would wait for ever."""

    def outer(x: Array) -> Array:
        return inner.evaluate(torch.tensor(x)[None])[0].numpy()[0]

    x = torch.rand(5, 2, dtype=torch.float64)
    inner = CallableBox(np.sin, per_row=True, executor="threads:2")
    assert torch.equal(CallableBox(outer, per_row=True, executor="threads:2").evaluate(x)[0], x.sin())
    inner = CallableBox(outer, per_row=True, executor="threads:2")
    with pytest.raises(BoxError, match="called by its own workers"):
        inner(x)
    with ThreadPoolExecutor(2) as executor:
        lent = [CallableBox(function, per_row=True, executor=executor) for function in (np.sin, outer)]
        inner = lent[0]
        assert torch.equal(inner.evaluate(x)[0], x.sin())
        with pytest.raises(BoxError, match="or by those it shares"):
            lent[1](x)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_box_after_a_fork() -> None:
    """Threads do not survive one; the child gets its own."""
    box, x = CallableBox(np.sin, per_row=True, executor="threads:2", timeout=60), torch.rand(50, 2)
    expected = box(x)
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if torch.equal(box(x), expected) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(box(x), expected)


# Threads that hang.


def test_a_thread_that_hangs_is_left_behind() -> None:
    box = CallableBox(simulate, per_row=True, executor="threads:2", timeout=0.2, nonfinite="keep")
    x = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    x[57, 0], x[90, 0] = HANG, RAISE
    began = time.monotonic()
    y = box(x)
    assert time.monotonic() - began < 5
    assert y.isnan().any(1).nonzero()[:, 0].tolist() == [57, 90]
    assert box.last_failure == "row 57 took longer than 0.2 s (2 of 200 rows failed)"
    assert torch.equal(box(x[:57]), x[:57].double().sin().float())


def test_too_many_threads_that_hang() -> None:
    box = CallableBox(simulate, per_row=True, executor="threads:8", timeout=0.05)
    with pytest.raises(BoxError, match=r"17 threads of a box hang[\s\S]*processes:2"):
        box(torch.full((40, 1), float(HANG)))


def test_a_batched_call_may_be_limited_too() -> None:
    def slow(x: Array) -> Array:
        time.sleep(20 if (x < 0).any() else 0)
        return x

    x = torch.ones(8, 1)
    x[3] = -1
    box = CallableBox(slow, timeout=0.1, nonfinite="keep")
    assert box(x).isnan().nonzero()[:, 0].tolist() == [3]


def test_an_error_inside_a_batch_leaves_no_answers_to_the_next() -> None:
    class Interrupt(BaseException):
        pass

    def function(x: Array) -> Array:
        if x[0] < 0:
            raise Interrupt
        time.sleep(0.001)
        return x

    box, x = CallableBox(function, per_row=True, executor="threads:2"), torch.arange(40.0)[:, None]
    x[1] = -1
    with pytest.raises(Interrupt):
        box(x)
    assert torch.equal(box(x.abs() + 1), x.abs() + 1)


def test_batches_from_several_threads() -> None:
    box = CallableBox(np.sin, per_row=True, executor="threads:2", nonfinite="keep")
    x = torch.rand(6, 64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found: dict[int, Any] = {}

    def evaluate(i: int) -> None:
        found[i] = box.evaluate(x[i])[0]

    threads = [threading.Thread(target=evaluate, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], torch.from_numpy(np.sin(x[i].numpy()))) for i in range(6))


# Seeds.


def test_seeds_are_the_last_input() -> None:
    x, scale = torch.rand(9, 3, dtype=torch.float64), torch.ones(9, dtype=torch.float64)
    per_row = CallableBox(noisy, per_row=True, seed="seed", executor="threads:2")
    batched = CallableBox(noisy_batch, seed="seed")
    seeds = torch.arange(9) + 2**40
    found = per_row.evaluate(x, scale, seeds)[0]
    assert torch.equal(found, batched.evaluate(x, scale, seeds)[0])
    assert torch.equal(found, per_row.evaluate(x, scale, seeds)[0])
    assert not torch.equal(found, per_row.evaluate(x, scale, seeds + 1)[0])
    with pytest.raises(BoxError, match="seeds of noisy are missing"):
        per_row.evaluate(x, scale)


def test_complete_draws_seeds_once() -> None:
    box, x, scale = CallableBox(noisy, per_row=True, seed="seed"), torch.rand(5, 3), torch.ones(5)
    torch.manual_seed(0)
    inputs = box.complete([x, scale])
    assert (len(inputs), inputs[2].dtype, inputs[2].shape) == (3, torch.int64, (5,))
    assert box.complete(inputs) is inputs
    torch.manual_seed(0)
    assert torch.equal(box.complete((x, scale))[2], inputs[2])
    assert not torch.equal(box.complete((x, scale))[2], inputs[2])
    plain = CallableBox(np.sin)
    assert plain.complete((x,)) == (x,)


def test_an_integer_input_is_not_taken_for_seeds() -> None:
    def days(x: Array, day: Array, *, seed: Array) -> Array:
        return x + day

    box = CallableBox(days, seed="seed")
    assert len(box.complete((torch.rand(4), torch.arange(4)))) == 3
    anything = CallableBox(lambda *x, seed: x[0], seed="seed")
    assert len(anything.complete((torch.rand(4), torch.arange(4)))) == 2  # nothing tells them apart


def test_a_copy_of_a_stochastic_box() -> None:
    box = CallableBox(noisy, per_row=True, seed="seed")
    arguments = torch.rand(5, 3), torch.ones(5), torch.arange(5)
    assert torch.equal(copy.deepcopy(box).evaluate(*arguments)[0], box.evaluate(*arguments)[0])
