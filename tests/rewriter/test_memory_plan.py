"""`memory_plan` against measured memory, and the ways to choose a horizon."""

import gc

import pytest
import torch
import torch.nn.functional as F
from chains import Small, Stack
from live_memory import LiveMemory
from torch import nn
from windowed import Eager, built

from rewriter import Checkpoint, Horizon, Plan, RewriteError, alignment, memory_plan, pilot, rewrite

X, Y = torch.randn(64, 16, 5), torch.randn(64, 16, 3)


def model(blocks=12):
    return Stack(Small, blocks)


def squares(output, y):
    return (output - y).square().mean()


def peak(entry):
    net = model()
    call = Eager(net, squares) if entry is None else rewrite(net, Plan([entry]), loss=squares, example=(X,))
    call(X, target=Y).backward()
    net.zero_grad()
    gc.collect()
    with LiveMemory() as memory:
        call(X, target=Y).backward()
        return memory.peak


@pytest.fixture(scope="module")
def plan():
    return memory_plan(model(), (X,), blocks="blocks")


@pytest.mark.parametrize(
    "entry",
    [
        None,
        Checkpoint("blocks"),
        Checkpoint("blocks", every=3),
        Horizon("blocks", 4),
        Horizon("blocks", 4, when="backward"),
        Horizon("blocks", 4, checkpoint=True),
    ],
    ids=str,
)
def test_predicted_bytes_are_those_measured(plan, entry):
    (option,) = [option for option in plan.options if option.entry == entry]
    assert 0.9 < option.bytes / peak(entry) < 1.1


def test_exact_ways_come_first_and_times_follow_the_vjps(plan):
    exact = [option.exact for option in plan.options]
    assert exact == sorted(exact, reverse=True)
    times = {option.name: option.time for option in plan.options}
    assert times["ordinary tape"] == 1.0
    assert times["Checkpoint('blocks')"] == pytest.approx(4 / 3, abs=0.01)
    assert times["Horizon('blocks', horizon=4)"] == pytest.approx(1.0, abs=0.02)
    assert times["Horizon('blocks', horizon=4, when='backward')"] == pytest.approx(1 + 8 / 36, abs=0.02)


def test_the_best_is_exact_wherever_that_fits(plan):
    least = min(option.bytes for option in plan.options if option.exact)
    assert memory_plan(model(), (X,), 10**9).best.entry is None
    tight = memory_plan(model(), (X,), least)
    assert isinstance(tight.best.entry, Checkpoint)
    assert "a horizon buys nothing within this budget" in str(tight)
    short = memory_plan(model(), (X,), least - 1)
    assert isinstance(short.best.entry, Horizon)
    assert short.best.bytes < least
    assert "approximations" in str(short)
    assert memory_plan(model(), (X,), 1000).best is None
    assert "nothing here fits" in str(memory_plan(model(), (X,), 1000))


def test_horizons_that_need_more_than_checkpointing_say_so(plan):
    named = {option.name: option for option in plan.options}
    assert "buys nothing" in named["Horizon('blocks', horizon=8)"].note
    assert not named["Horizon('blocks', horizon=1)"].note


def test_a_chain_that_no_horizon_fits():
    class Dropped(Stack):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5)

    found = memory_plan(Dropped(Small, 4), (X,))
    assert any(option.entry is not None and option.entry.head == "auxiliary" for option in found.options[4:])
    with pytest.raises(RewriteError, match="no list of blocks"):
        memory_plan(nn.Linear(5, 3), (X,))
    with pytest.raises(RewriteError, match="no chain of blocks there"):
        memory_plan(nn.Sequential(nn.Linear(5, 3)), (X,), blocks="0")


def test_accumulated_alignment_is_that_of_the_whole_batch():
    net = model(6).double()
    x, y = X[:8].double(), Y[:8].double()
    step = built(net, x, squares, 2)
    before = [p.detach().clone() for p in net.parameters()]
    whole = alignment(step, [((x,), y)], [1, 2, 4, 6])
    parts = alignment(step, [((x[i : i + 2],), y[i : i + 2]) for i in range(0, 8, 2)], [1, 2, 4, 6])
    assert all(abs(whole[h] - parts[h]) < 1e-6 for h in whole)
    assert whole[1] < whole[2] < whole[4] < whole[6]
    assert whole[6] == pytest.approx(1, abs=1e-12)
    single = [alignment(step, [((x[i : i + 2],), y[i : i + 2])], [2])[2] for i in range(0, 8, 2)]
    assert abs(sum(single) / 4 - whole[2]) > 1e-4  # the mean of the parts' own cosines is another number
    assert all(map(torch.equal, before, net.parameters()))
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(RewriteError, match="one Horizon"):
        alignment(rewrite(net, Plan(), loss=squares), [], [1])


def test_pilot_runs_are_sorted_by_what_is_held_out():
    def train(horizon):
        torch.manual_seed(0)
        net = model(6)
        step = built(net, X, squares, horizon, tape="never")
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            step(X[:32], target=Y[:32]).backward()
            optimizer.step()
        return net

    runs = pilot([1, 6], train, lambda net: float(squares(net(X[32:]), Y[32:]).detach()))
    assert {run.horizon for run in runs} == {1, 6}
    assert runs[0].loss <= runs[1].loss
    assert all(run.seconds > 0 for run in runs)
    assert [run.horizon for run in pilot([1, 2], lambda h: h, lambda h: float("nan") if h == 1 else 0.0)] == [2, 1]
