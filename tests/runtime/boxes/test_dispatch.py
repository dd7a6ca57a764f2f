"""Blocks of rows over workers that are only played: every row answered once, the guilty ones and no others masked."""

import math
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.runtime.boxes import dispatch as dispatch_module
from rewriter.runtime.boxes.assemble import assemble
from rewriter.runtime.boxes.dispatch import Dispatch, Lost, Pace
from rewriter.runtime.boxes.task import Block, Progress, Task


def double(x):
    return 2 * x


@dataclass(eq=False)
class Played:
    """A worker that knows beforehand which rows would hang or kill it, and whether it tells at which row it is."""

    crew: "PlayedCrew"
    ready: bool = True
    block: Block | None = None

    def send(self, task: Task, block: Block) -> None:
        self.task, self.block = task, block

    def under_way(self):
        bad = self.crew.bad(self.block)
        first = bad[0] if bad else self.block.start
        hangs = first in self.crew.hanging
        rows = (first, first + 1) if self.crew.tells else (self.block.start, self.block.stop)
        return *rows, time.monotonic() - 10 if hangs else time.monotonic()


@dataclass
class PlayedCrew:
    size: int
    tells: bool
    alone: bool
    hanging: set[int]
    killing: set[int]
    workers: list[Played] = field(default_factory=list)
    crashes: int = 0

    def bad(self, block: Block) -> list[int]:
        return [row for row in range(block.start, block.stop) if row in self.hanging | self.killing]

    def grow(self, count):
        while len(self.workers) < min(count, self.size):
            self.workers.append(Played(self))

    def wait(self, seconds):
        events = []
        for worker in [worker for worker in self.workers if worker.block is not None]:
            bad = self.bad(worker.block)
            if bad and bad[0] in self.hanging:
                continue
            if bad:
                self.crashes += 1
                events.append((worker, Lost("killed its worker process")))
                self.workers.remove(worker)
                continue
            answer = worker.task(worker.block, Progress([0.0] * 4))
            answer.seconds = 1e-3 * (worker.block.stop - worker.block.start)
            worker.block = None
            events.append((worker, answer))
        if self.alone and any(isinstance(answer, Lost) for _, answer in events):
            for worker in [worker for worker in self.workers if worker.block is not None]:
                events.append((worker, Lost()))
                self.workers.remove(worker)
        return events

    def employs(self, thread):
        return False

    def replace(self, worker):
        self.workers.remove(worker)

    def close(self):
        pass


def dispatch(crew, rows, *, per_row=True, retries=0):
    task = Task(double, per_row, frozenset(), None, retries)
    x = np.arange(float(rows))
    answers = Dispatch(crew, task, [x], rows, (((), np.dtype(float)),), 5.0, Pace()).run()
    told = [row for answer in answers for part, _ in answer.parts for row in part]
    told += [row for answer in answers for row, _ in answer.failures]
    assert sorted(told) == list(range(rows))  # exactly once
    return *assemble(answers, rows, (((), np.dtype(float)),)), x


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    rows=st.integers(1, 300),
    size=st.integers(1, 5),
    tells=st.booleans(),
    per_row=st.booleans(),
    data=st.data(),
)
def test_only_guilty_rows_are_masked(rows, size, tells, per_row, data):
    bad = data.draw(st.lists(st.integers(0, rows - 1), max_size=min(5, rows), unique=True))
    cut = data.draw(st.integers(0, len(bad)))
    crew = PlayedCrew(size, tells, alone=not tells, hanging=set(bad[:cut]), killing=set(bad[cut:]))
    (outputs,), failures, x = dispatch(crew, rows, per_row=per_row)
    given_up = {row for row, failure in failures.items() if "not tried" in failure.reason}
    assert set(failures) - given_up == set(bad) - given_up
    if rows >= 100 and tells:
        assert not given_up
    for row, failure in failures.items():
        if row not in given_up:
            assert failure.reason == ("took longer than 5 s" if row in bad[:cut] else "killed its worker process")
    good = np.array([row not in failures for row in range(rows)])
    assert (outputs[good] == 2 * x[good]).all()
    assert np.isnan(outputs[~good]).all()


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_row_kills_its_worker_twice_or_once_more_than_it_is_retried(retries):
    crew = PlayedCrew(2, True, False, set(), {17})
    _, failures, _ = dispatch(crew, 100, retries=retries)
    assert set(failures) == {17}
    assert crew.crashes == max(2, retries + 1)


def test_a_box_that_always_hangs_is_given_up():
    crew = PlayedCrew(2, True, False, set(range(1000)), set())
    _, failures, _ = dispatch(crew, 1000)
    reasons = [failure.reason for failure in failures.values()]
    assert len(reasons) == 1000
    assert 17 <= sum("took longer" in reason for reason in reasons) <= 18
    assert any("was not tried any more" in reason for reason in reasons)


@pytest.mark.parametrize(("stall", "masked"), [(0.2, 0), (math.inf, 1)])
def test_a_program_that_was_stopped_gives_its_workers_their_time(monkeypatch, stall, masked):
    """As after Ctrl-Z and fg: what the clock shows is not what the row took."""
    monkeypatch.setattr(dispatch_module, "_STALL", stall)

    @dataclass(eq=False)
    class Timed(Played):
        def send(self, task, block):
            super().send(task, block)
            self.began = time.monotonic()

        def under_way(self):
            return self.block.start, self.block.stop, self.began

    @dataclass
    class Stopped(PlayedCrew):
        waits: int = 0

        def wait(self, seconds):
            self.waits += 1
            if self.waits == 1:
                time.sleep(0.6)
                return []
            return super().wait(seconds)

    crew = Stopped(1, True, False, set(), set())
    crew.workers = [Timed(crew)]
    task, x = Task(double, True, frozenset(), None, 0), np.arange(3.0)
    answers = Dispatch(crew, task, [x], 3, (((), np.dtype(float)),), 0.3, Pace()).run()
    assert sum(len(answer.failures) for answer in answers) == masked


@pytest.mark.parametrize("seconds", [1e-6, 1e-4, 1e-3, 1.0])
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_blocks_are_long_enough_and_the_last_ones_short(seconds, workers):
    pace, sizes, remaining = Pace(row=seconds, block=3e-4), [], 4000
    while remaining:
        sizes.append(min(pace.rows(remaining, workers, True), remaining))
        remaining -= sizes[-1]
    overhead = len(sizes) * pace.block / (4000 * seconds)
    work = 4000 * seconds / workers
    assert overhead < 0.05 or work < 0.1  # a batch of less than .1 s for each worker is mostly last blocks
    assert min(sizes[:-1]) * seconds >= 2.5 * pace.block
    assert max(sizes) * seconds <= 0.1 + seconds
    assert workers == 1 or sizes[-1] * seconds <= 2.5 * pace.block + seconds


def test_the_pace_is_that_of_the_rows_within_a_few_blocks():
    pace = Pace()
    assert (pace.rows(100, 2, True), pace.rows(100, 2, False)) == (1, 25)
    pace.update(2.0, 1, 2.5)  # the first call imports something
    for _ in range(20):
        pace.update(0.01, 10, 0.0102)
    assert math.isclose(pace.row, 1e-3, rel_tol=0.01)
    assert pace.block < 1.5e-3
