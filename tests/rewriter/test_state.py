"""Learnt state in `state_dict()`: exact, made of tensors, loadable before and after capture, harmless where foreign."""

import copy
import io
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exact_entry import Exact
from torch import nn

from rewriter import BlackBox, CallableBox, RewriteError, rewrite

KEY = "rewriter._extra_state"


class Net(nn.Module):
    def __init__(self, box):
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.box, self.after = box, nn.Linear(6, 3)

    def forward(self, x):
        return self.after(self.box(self.before(x)))


def forest(x):
    splits = np.linspace(-1, 1, 21)
    return (x[:, :, None] > splits).sum(2) / 10.0


def step_of(function=np.sin, **options):
    return rewrite(Net(CallableBox(function)), BlackBox("box", **options), loss=F.cross_entropy)


def data(number):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(32, 3, generator=generator), torch.randint(0, 3, (32,), generator=generator)


def train(step, first, last):
    """SGD without momentum, so that nothing but the step itself has a state."""
    for number in range(first, last):
        x, y = data(number)
        step(x, target=y).backward()
        with torch.no_grad():
            for parameter in step.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return step


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True))


def saved(step):
    file = io.BytesIO()
    torch.save(step.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


OPTIONS = {
    "smooth": (np.sin, {"probes": 2}),
    "forest": (forest, {"probes": 2}),
    "central": (np.sin, {"probes": 1, "difference": "central", "clip": 0.8}),
}


@pytest.mark.parametrize("captured", [True, False], ids=["into a captured step", "into a fresh step"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_run_is_bit_equal(name, captured):
    function, options = OPTIONS[name]
    one = train(step_of(function, **options), 0, 7)
    checkpoint = saved(one)
    other = step_of(function, **options)
    if captured:
        train(other, 20, 22)
    assert not equal(one, other)
    other.load_state_dict(checkpoint)
    train(one, 7, 12)
    train(other, 7, 12)
    assert equal(one, other)
    assert one._clock.forward == other._clock.forward == 11


def test_without_the_learnt_state_the_run_differs():
    """The control of the test above: the user's own keys alone are not enough."""
    one = train(step_of(probes=2), 0, 7)
    other = step_of(probes=2)
    other.load_state_dict({key: value for key, value in saved(one).items() if key != KEY})
    train(one, 7, 12)
    train(other, 7, 12)
    assert not equal(one, other)


def test_a_long_run_loaded_into_another_seed_continues_with_its_own():
    one = train(step_of(probes=2), 0, 3)
    other = rewrite(Net(CallableBox(np.sin)), BlackBox("box", probes=2), loss=F.cross_entropy, seed=99)
    other.load_state_dict(saved(one))
    assert equal(train(one, 3, 6), train(other, 3, 6))


def test_seeds_give_different_runs():
    runs = [
        train(rewrite(Net(CallableBox(np.sin)), BlackBox("box", probes=1), loss=F.cross_entropy, seed=seed), 0, 3)
        for seed in (0, 0, 1)
    ]
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])


def test_every_value_is_a_tensor():
    """Formats that take tensors only (safetensors) can hold it."""
    step = train(step_of(), 0, 2)
    state = step.state_dict()
    assert all(type(value) is torch.Tensor for value in state.values())
    assert state[KEY].dtype == torch.uint8
    assert state[KEY].is_contiguous()
    assert set(state) - {KEY} == set(step.model.state_dict())
    content = json.loads(bytes(state[KEY].tolist()))
    assert set(content) == {"version", "seed", "forward", "rules"}
    assert content["forward"] == 1


def test_it_survives_a_cast_and_a_prefix():
    """A trainer may hold the step inside another module, or cast whatever floats."""
    one = train(step_of(probes=2), 0, 3)
    outer = nn.ModuleDict({"inner": one})
    assert f"inner.{KEY}" in outer.state_dict()
    other = nn.ModuleDict({"inner": step_of(probes=2)})
    other.load_state_dict(outer.state_dict())
    assert equal(train(one, 3, 5), train(other["inner"], 3, 5))


def test_a_plain_checkpoint_loads_strictly_and_leaves_what_was_learnt():
    step = train(step_of(), 0, 3)
    learnt = step.state_dict()[KEY]
    step.load_state_dict(Net(CallableBox(np.sin)).state_dict())
    assert torch.equal(step.state_dict()[KEY], learnt)
    plain = Net(CallableBox(np.sin))
    plain.load_state_dict(step.model.state_dict())
    report = plain.load_state_dict(step.state_dict(), strict=False)
    assert report.unexpected_keys == [KEY]
    with pytest.raises(RuntimeError, match="Unexpected"):
        step.load_state_dict({**step.state_dict(), "rewriter.nonsense": torch.zeros(1)})


def test_what_was_learnt_for_regions_that_are_gone_is_kept():
    """Another plan for a while must not lose what is learnt about this one's regions."""
    one = train(step_of(probes=2), 0, 3)
    other = rewrite(Net(CallableBox(np.sin)), loss=F.cross_entropy)
    other.load_state_dict(saved(one))
    assert torch.equal(other.state_dict()[KEY], one.state_dict()[KEY])
    again = step_of(probes=2)
    again.load_state_dict(other.state_dict())
    assert equal(train(one, 3, 5), train(again, 3, 5))


@pytest.mark.parametrize(
    "content",
    [b"", b"not json", b"[]", b"{}", b'{"version": 2, "seed": 0, "forward": 0}', b'{"version": 2, "rules": 3}'],
)
def test_a_damaged_state_is_refused(content):
    step = step_of()
    before = step.state_dict()
    damaged = {**before, KEY: torch.tensor(list(content), dtype=torch.uint8)}
    with pytest.raises(RewriteError, match="could not be read"):
        step.load_state_dict(damaged)
    assert torch.equal(step.state_dict()[KEY], before[KEY])


def test_another_version_is_refused():
    step = step_of()
    content = json.loads(bytes(step.state_dict()[KEY].tolist())) | {"version": 3}
    damaged = {**step.state_dict(), KEY: torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)}
    with pytest.raises(RewriteError, match=r"another version[\s\S]*3, not 2"):
        step.load_state_dict(damaged)


def test_nothing_in_a_state_is_executed():
    """A dtype's name is looked up in torch: it must be a dtype and nothing else."""
    step = train(step_of(), 0, 1)
    content = json.loads(bytes(step.state_dict()[KEY].tolist()))
    content["rules"]["box"] = {"tensor": [1.0], "dtype": "manual_seed"}
    damaged = {**step.state_dict(), KEY: torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)}
    with pytest.raises(RewriteError, match="manual_seed is not a dtype"):
        step.load_state_dict(damaged)


def test_rules_without_state():
    step = rewrite(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), Exact("1"))
    step(data(0)[0]).sum().backward()
    other = copy.deepcopy(step)
    other.load_state_dict(step.state_dict())
    assert equal(step, other)
