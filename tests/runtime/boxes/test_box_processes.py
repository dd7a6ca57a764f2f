"""Boxes over processes: hangs, crashes and exceptions cost the rows that cause them, and nothing hangs."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import simulators
import torch
import torch.nn.functional as F
from simulators import (
    EXIT,
    HANG,
    MISSING,
    SHAPE,
    THREADS,
    Treacherous,
    Unloadable,
    noisy,
    simulate,
    simulate_batch,
)
from torch import nn

from rewriter import BlackBox, rewrite
from rewriter.runtime.boxes import CallableBox, process_crew
from rewriter.runtime.boxes.task import Block, Progress, Task
from rewriter.runtime.errors import BoxError

TESTS = Path(__file__).parents[2]


def rows(number, **bad):
    x = torch.rand(number, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for code, positions in bad.items():
        x[positions, 0] = float(getattr(simulators, code))
    return x


@pytest.fixture(scope="module")
def box():
    """One pair of processes for most tests, as each start imports torch: boxes with the same function share it."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("OMP_NUM_THREADS", raising=False)
        box = CallableBox(simulate, per_row=True, executor="processes:2", timeout=1.0, nonfinite="keep")
        assert box.evaluate(torch.full((2, 3), float(THREADS)))[0].eq(1).all()  # of each numeric library
        assert "OMP_NUM_THREADS" not in os.environ
    return box


@pytest.fixture
def by_fork(monkeypatch):
    """Workers that start at once, where it is not the start that is tested."""
    monkeypatch.setattr(process_crew, "_SPAWN", multiprocessing.get_context("fork"))


def test_one_bad_row_in_many(box):
    x = rows(1000, HANG_FOR_GOOD=[300], SHAPE=[20], MISSING=[40], RAISE=[500], SEGFAULT=[700])
    began = time.monotonic()
    (y,) = box.evaluate(x)
    assert time.monotonic() - began < 120
    bad = {20, 40, 300, 500, 700}
    assert {int(row) for row in y.isnan().any(1).nonzero()} == bad
    good = [row for row in range(1000) if row not in bad]
    assert np.array_equal(y[good], np.sin(x[good].numpy()))
    reason = "returned rows of float64 (4,) where others are float64 (3,)"
    assert box.last_failure == f"row 20 {reason} (4 of 1000 rows failed)"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("by_fork")
def test_training_through_a_treacherous_box(tmp_path):
    """It raises on a quarter of all points; once in a thousand it hangs, kills its worker, or returns garbage."""
    fates = {200: SHAPE, 300: HANG, 400: MISSING, 600: EXIT}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.before, self.after = nn.Linear(3, 4), nn.Linear(4, 3)
            self.box = CallableBox(
                Treacherous(tmp_path, fates), per_row=True, executor="processes:2", timeout=1.0, nonfinite="zero"
            )

        def forward(self, x):
            return self.after(self.box(self.before(x)))

    step = rewrite(Net(), BlackBox("box", probes=2, max_failed=0.9), loss=F.cross_entropy)
    optimizer = torch.optim.Adam(step.parameters(), 1e-2)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        step(torch.randn(16, 3, generator=generator), target=torch.randint(0, 3, (16,), generator=generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(torch.isfinite(parameter).all() for parameter in step.parameters())
    counts = step.ledger["box"]
    assert 0.1 < counts.failed / counts.queries < 0.5
    assert {each.name for each in tmp_path.glob("met*")} == {f"met{fate}" for fate in fates.values()}


def test_a_masked_row_stops_the_forward_with_its_reason(box):
    strict = CallableBox(simulate, per_row=True, executor="processes:2")
    assert strict._workers._staff is box._workers._staff  # and so have the copies of a box that capture makes
    with pytest.raises(BoxError, match=r"1 of 9 rows of output 0[\s\S]*row 4 raised ValueError: no solution"):
        strict(rows(9, RAISE=[4]))


def test_the_cause_of_an_error_comes_from_the_worker(box):
    with pytest.raises(BoxError, match="simulate raised ValueError: no solution") as caught:
        CallableBox(simulate, per_row=True, executor="processes:2")(rows(2, RAISE=[0, 1]))
    assert isinstance(caught.value.__cause__, ValueError)
    assert "simulators.py" in "".join(caught.value.__cause__.__notes__)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("by_fork")
def test_one_and_two_workers_agree_bit_for_bit(box):
    one = CallableBox(simulate, per_row=True, executor="processes:1")
    assert torch.equal(one.evaluate(rows(300))[0], box.evaluate(rows(300))[0])


# What cannot be done is said.


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_function_that_does_not_pickle():
    with pytest.raises(BoxError, match="does not pickle") as caught:
        CallableBox(lambda x: x, executor="processes:2")
    assert "test_box_processes, line" in caught.value.where
    with ProcessPoolExecutor(1) as executor, pytest.raises(BoxError, match="does not pickle"):
        CallableBox(lambda x: x, executor=executor)
    with pytest.raises(BoxError, match=r"executor of a box failed[\s\S]*Can't pickle"):
        CallableBox(lambda x: x, executor=forked).evaluate(rows(2))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("by_fork")
def test_a_function_that_does_not_load():
    box = CallableBox(Unloadable(), executor="processes:1")
    with pytest.raises(BoxError, match=r"cannot be loaded[\s\S]*the licence server does not answer"):
        box.evaluate(rows(2))


def test_a_pickle_keeps_the_name_of_the_executor(box):
    twin = pickle.loads(pickle.dumps(box))
    assert (twin.executor, twin.timeout, twin.function) == ("processes:2", 1.0, simulate)
    assert twin._workers is not box._workers
    assert twin._workers._staff is box._workers._staff  # in the same process, there is no need to start others


# Executors of the user. By fork, which starts at once.


def forked():
    return ProcessPoolExecutor(2, multiprocessing.get_context("fork"))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("function", [simulate, simulate_batch])
def test_a_factory_of_executors(function):
    """Nobody knows which row of a block it was: the executor is made anew until that is found."""
    box = CallableBox(
        function, per_row=function is simulate, executor=forked, timeout=0.5, nonfinite="keep", name="simulator"
    )
    assert torch.equal(box.evaluate(rows(50))[0], rows(50).sin())
    y = box.evaluate(rows(60, HANG=[20], EXIT=[45], RAISE=[59]))[0]
    assert y.isnan().any(1).nonzero()[:, 0].tolist() == [20, 45, 59]
    assert box.last_failure == "row 20 took longer than 0.5 s (3 of 60 rows failed)"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_seeds_go_to_their_rows():
    arguments = rows(300), torch.ones(300, dtype=torch.float64), torch.arange(300)

    def evaluate(executor, seeds):
        box = CallableBox(noisy, per_row=True, seed="seed", executor=executor)
        return box.evaluate(*arguments[:2], seeds)[0]

    assert torch.equal(evaluate(forked, arguments[2]), evaluate("threads:1", arguments[2]))
    assert not torch.isclose(evaluate(forked, arguments[2] + 1), evaluate("threads:1", arguments[2])).any()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_executor_lent_to_a_box():
    with ThreadPoolExecutor(2) as threads:
        box = CallableBox(simulate, per_row=True, executor=threads, nonfinite="keep")
        assert box.evaluate(rows(50, RAISE=[7]))[0].isnan().any(1).nonzero()[:, 0].tolist() == [7]
        with pytest.raises(BoxError, match=r"cannot be pickled[\s\S]*a function that makes it"):
            pickle.dumps(box)
        for executor in (threads, lambda: threads):
            with pytest.raises(BoxError, match="a timeout does not go with a ThreadPoolExecutor"):
                CallableBox(simulate, executor=executor, timeout=1.0).evaluate(rows(2))
        assert threads.submit(int).result() == 0  # still the user's
    with forked() as processes:
        with pytest.raises(BoxError, match="a timeout does not go with an executor given as it is"):
            CallableBox(simulate, executor=processes, timeout=1.0)
        with pytest.raises(BoxError, match=r"executor of a box is broken[\s\S]*a function that makes it"):
            CallableBox(simulate, per_row=True, executor=processes).evaluate(rows(9, EXIT=[4]))


@pytest.fixture
def interruptible():
    """A shell starts what runs in the background with interrupts ignored, and Python then leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_leaves_no_answers_to_the_next_batch(interruptible):
    box = CallableBox(simulate, per_row=True, executor=forked, timeout=60)
    threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        box.evaluate(rows(9, HANG=[4]))
    assert torch.equal(box.evaluate(rows(9))[0], rows(9).sin())


# In the worker.


def serve(function, to_worker):
    """One block in a worker process, by fork because that starts at once: its answer, and how it ended."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    task = pickle.dumps(Task(function, True, frozenset(), None, 0))

    def work():
        here.close()  # or the parent's end would never close
        process_crew._serve(there, task, Progress([0.0] * 4))

    process = context.Process(target=work)
    process.start()
    there.close()
    here.send(Block([to_worker], 0, len(to_worker), None))
    try:
        assert here.recv() is None
        answer = here.recv()
    except EOFError:
        answer = None
    here.close()
    process.join(20)
    return answer, process.exitcode


def starts_a_thread(x):
    threading.Thread(target=time.sleep, args=(60,)).start()
    sys.stdout.write("a word")
    if x < 0:
        raise GeneratorExit
    return x


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_worker_does_not_wait_for_what_the_function_left_running(capfd):
    answer, status = serve(starts_a_thread, np.ones(1))
    assert (len(answer.parts), status) == (1, 0)
    assert capfd.readouterr().out == "a word"
    assert serve(starts_a_thread, -np.ones(1)) == (None, 1)
    assert "GeneratorExit" in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_inside_of_a_worker_are_refused():
    """As in the workers of a DataLoader, which Python does not let start others."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def work():
        try:
            CallableBox(simulate, per_row=True, executor="processes:1").evaluate(rows(2))
        except BoxError as error:
            there.send(str(error))

    process = context.Process(target=work, daemon=True)
    process.start()
    process.join(60)
    assert here.poll()
    found = here.recv()
    assert "cannot be started here" in found
    assert 'executor="threads:2"' in found


# At exit.


def test_a_program_whose_workers_hang_exits_and_leaves_nobody_behind(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import threading, time
            import torch
            from simulators import HANG, simulate
            from rewriter import CallableBox

            if __name__ == "__main__":
                x = torch.tensor([[0.5], [float(HANG)], [0.25]])
                left = CallableBox(simulate, per_row=True, executor="threads:2", timeout=1.0, nonfinite="keep")
                print(left(x).isnan()[:, 0].tolist(), flush=True)
                endless = CallableBox(simulate, per_row=True, executor="processes:1")
                threading.Thread(target=endless, args=(x,), daemon=True).start()
                staff = endless._workers._staff
                while not (staff._crew and [worker for worker in staff._crew.workers if worker.ready]):
                    time.sleep(0.05)
                time.sleep(0.5)
                print(staff._crew.workers[0].process.pid, flush=True)
            """
        )
    )
    paths = os.pathsep.join([str(TESTS / "support"), str(TESTS.parent)])
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    masked, process = done.stdout.splitlines()
    assert masked == "[False, True, False]"
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)
