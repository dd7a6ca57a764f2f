"""What first users run into: threads, hooks put on late, other options for an old checkpoint, boxes of one number."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewriter import BlackBox, BoxError, CallableBox, Plan, RewriteError, rewrite

WEIGHTS = np.random.default_rng(0).normal(size=(4, 3))
PLAN = Plan([BlackBox("box")])


class Model(nn.Module):
    def __init__(self, function=lambda x: np.tanh(x @ WEIGHTS), width=3):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.box, self.head = nn.Linear(5, 4), CallableBox(function), nn.Linear(width, 2)

    def forward(self, x):
        y = self.box(self.encoder(x))
        return self.head((y.unsqueeze(1) if y.dim() == 1 else y).float())


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 5, generator=generator), torch.randint(0, 2, (8,), generator=generator)


def test_threads_capture_one_at_a_time_and_disturb_nobody():
    x, y = batch()
    errors, stop = [], threading.Event()
    bystander_model = nn.Sequential(nn.Linear(5, 4), nn.LSTM(4, 3))

    def guarded(work):
        try:
            work()
        except Exception as error:
            errors.append(error)

    def bystander():
        while not stop.is_set():
            guarded(lambda: bystander_model(x))

    shared = rewrite(Model(), PLAN, loss=F.cross_entropy)
    works = [lambda: rewrite(Model(), PLAN, loss=F.cross_entropy, example=(x,))] * 3
    works += [lambda: shared(x, target=y).backward()] * 3
    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    watcher = threading.Thread(target=bystander)
    watcher.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    watcher.join()
    assert errors == []
    assert sum(map(len, shared._variants.values())) == 1
    assert isinstance.__self__.__name__ == "builtins"


@pytest.mark.parametrize("times", [3, 99])
def test_a_thread_that_draws_during_a_capture_is_not_taken_for_the_model(times):
    asked, drawn, seen = threading.Event(), threading.Event(), []

    def bystander():
        while asked.wait() and len(seen) <= times:
            asked.clear()
            torch.rand(3)
            drawn.set()

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 2)

        def forward(self, x):
            seen.append(1)
            if len(seen) <= times:  # the bystander draws while this line waits
                asked.set()
                drawn.wait()
                drawn.clear()
            return self.inner(x)

    watcher = threading.Thread(target=bystander, daemon=True)
    watcher.start()
    try:
        if times == 3:
            assert rewrite(Slow(), Plan([]), example=(torch.randn(8, 5),)).explain()
        else:  # as long as it draws, nobody can tell
            with pytest.raises(RewriteError, match="draws from torch"):
                rewrite(Slow(), Plan([]), example=(torch.randn(8, 5),))
    finally:
        seen.extend([1] * 99)
        asked.set()
        watcher.join()


def test_capture_is_counted_apart():
    x, _ = batch()
    rows = []

    def counted(values):
        rows.append(len(values))
        return np.tanh(values @ WEIGHTS)

    step = rewrite(Model(counted), PLAN, loss=F.cross_entropy, example=(x,))
    assert step.ledger["box"].capture == sum(rows) > 0
    assert step.ledger["box"].queries == 0


def test_a_hook_put_on_a_box_later_is_noticed():
    x, y = batch()
    step = rewrite(Model(), PLAN, loss=F.cross_entropy, example=(x,))
    step.model.box.register_forward_hook(lambda module, inputs, output: output * 0)
    with pytest.raises(RewriteError, match="hooks"):
        step(x, target=y)


def test_options_of_the_plan_win_over_a_checkpoint():
    x, y = batch()
    learnt = rewrite(Model(), PLAN, loss=F.cross_entropy)
    learnt(x, target=y).backward()
    step = rewrite(
        Model(), Plan([BlackBox("box", step_size=0.01, input_scale=5.0)]), loss=F.cross_entropy, example=(x,)
    )
    step.load_state_dict(learnt.state_dict())
    step(x, target=y).backward()
    assert step._rules["box"].describe()["absolute_step"] == pytest.approx(0.05)
    same = rewrite(Model(), PLAN, loss=F.cross_entropy, example=(x,))
    same.load_state_dict(learnt.state_dict())
    assert str(same._rules["box"].get_state()) == str(learnt._rules["box"].get_state())


def test_a_box_of_one_number_a_row_can_be_checked():
    x, y = batch()
    step = rewrite(Model(lambda v: np.sin(v).sum(1), width=1), Plan([BlackBox("box", probes=4)]), loss=F.cross_entropy)
    (region,) = step.check(x, target=y).regions
    assert region.inputs.cosine > 0.999
    assert region.order > 1.5


def test_whole_numbers_carry_no_gradient():
    x, _ = batch()
    with pytest.raises(RewriteError, match="whole numbers only"):
        rewrite(Model(lambda v: (v > 0).astype(int)[:, :3]), PLAN, example=(x,))


def test_a_region_no_gradient_reaches_is_named():
    x, y = batch()
    step = rewrite(Model(), PLAN, loss=F.cross_entropy)
    step.model.encoder.requires_grad_(False)
    report = step.check(x, target=y)
    assert report.silent == ("box",)
    assert "box: no gradient asked" in str(report)


def test_a_box_that_fails_while_the_model_is_captured_says_so():
    def broken(values):
        raise RuntimeError("licence server unreachable")

    x, _ = batch()
    with pytest.raises(BoxError, match="licence server unreachable"):
        rewrite(Model(broken), PLAN, loss=F.cross_entropy, example=(x,))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda box, x: box(x, 3.0), "was called with float"),
        (lambda box, x: box(x=x), "was called with x="),
        (lambda box, x: box(None), "was called with NoneType"),
    ],
)
def test_a_box_says_what_it_takes(call, said):
    with pytest.raises(BoxError, match=said):
        call(Model().box, torch.zeros(2, 4))


@pytest.mark.parametrize("target", [3, None, ("box",)])
def test_a_target_of_another_kind_is_refused_at_once(target):
    with pytest.raises(RewriteError, match="is not a target"):
        BlackBox(target)


def test_what_the_model_has_is_set_on_the_model():
    class Scaled(Model):
        def __init__(self):
            super().__init__()
            self.alpha = 1.0

        def forward(self, x):
            return super().forward(x) * self.alpha

    step = rewrite(Scaled(), PLAN)
    x, _ = batch()
    before = step(x)
    step.alpha, step.note = 3.0, "mine"
    assert step.model.alpha == 3.0
    assert not hasattr(step.model, "note")
    assert torch.equal(step(x), before * 3.0)
