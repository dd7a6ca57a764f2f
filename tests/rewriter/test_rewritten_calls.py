"""What a step returns: numbers, losses and targets, other signatures, changed flags, forms of output."""

import copy
import dataclasses
import logging

import pytest
import torch
import torch.nn.functional as F
from exact_entry import Exact, Wrong
from stepped import Net, agrees, batch, pair, same
from torch import nn

from rewriter import BlackBox, RewriteError, rewrite

# Numbers.


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_output_and_loss_are_eagers(mode):
    eager, step = pair(loss=F.cross_entropy)
    x, y = batch(8), torch.arange(8) % 3
    for module in (eager, step):
        module.train(mode != "eval")
    with torch.set_grad_enabled(mode != "no_grad"):
        for target in (None, y):
            torch.manual_seed(1)
            expected = eager(x) if target is None else F.cross_entropy(eager(x), y)
            torch.manual_seed(1)
            found = step(x) if target is None else step(x, target=y)
            assert torch.equal(found, expected)
            assert found.requires_grad == expected.requires_grad
    assert (step._latest is None) == (mode != "train")
    assert same(list(eager.buffers()), list(step.buffers()))


def test_a_step_changes_nothing_but_what_eager_changes():
    eager, step = pair()
    assert agrees(eager, step, batch(8))
    assert not agrees(*pair([Wrong("part", factor=0.999)]), batch(8))


def test_in_model_loss():
    class Own(Net):
        def forward(self, x, labels=None):
            logits = super().forward(x)
            loss = None if labels is None else F.cross_entropy(logits, labels)
            return {"loss": loss, "logits": logits}

    torch.manual_seed(0)
    model = Own()
    step = rewrite(model, Exact("part"), loss=lambda output: output["loss"])
    torch.manual_seed(1)
    expected = model(batch(8), labels=torch.arange(8) % 3)["loss"]
    torch.manual_seed(1)
    assert torch.equal(step(batch(8), labels=torch.arange(8) % 3), expected)
    with pytest.raises(RewriteError, match="no loss that takes it"):
        step(batch(8), target=torch.arange(8) % 3)


def test_a_models_own_target_argument():
    class Takes(Net):
        def forward(self, x, target=None):
            y = super().forward(x)
            return y if target is None else F.cross_entropy(y, target)

    model = Takes()
    y = torch.arange(8) % 3
    for loss in (None, lambda output: 2 * output):
        step = rewrite(model, Exact("part"), loss=loss)
        torch.manual_seed(1)
        expected = model(batch(8), target=y)
        torch.manual_seed(1)
        assert torch.equal(step(batch(8), target=y), expected if loss is None else 2 * expected)


def test_a_target_without_a_loss_is_refused():
    _, step = pair()
    for module in (step, step.eval()):
        with pytest.raises(RewriteError, match=r"no loss that takes it[\s\S]*loss="):
            module(batch(8), target=torch.zeros(8))


# Other signatures.


CHANGES = {
    "batch size": ((batch(5),), {}),
    "one row": ((batch(2),), {}),
    "a sequence": ((batch(5, 7),), {}),
    "mask given": ((batch(8), torch.ones(8)), {}),
    "mask by name": ((batch(8),), {"mask": torch.zeros(8)}),
    "a keyword": ((batch(8),), {"factor": 3.0}),
    "another keyword": ((), {"x": batch(8), "factor": 2.0}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_calls_are_captured_anew_or_fit(name):
    eager, step = pair(example=(batch(8),))
    args, kwargs = CHANGES[name]
    assert agrees(eager, step, *args, **kwargs)
    assert agrees(eager, step, batch(8))


def test_the_batch_size_alone_needs_no_new_capture():
    eager, step = pair(example=(batch(8),))
    for rows in (2, 5, 31):
        assert agrees(eager, step, batch(rows))
    assert sum(map(len, step._variants.values())) == 1


def test_another_dtype():
    eager, step = pair(example=(batch(8),))
    eager.double()
    step.double()
    assert agrees(eager, step, batch(8, dtype=torch.float64))
    eager.float()
    step.float()
    assert agrees(eager, step, batch(8))


def test_another_sequence_length():
    eager, step = pair(example=(batch(3, 5),))
    for length in (5, 7, 2):
        assert agrees(eager, step, batch(3, length))


def test_changed_flags_are_honoured(caplog):
    eager, step = pair(example=(batch(8),))

    def change(act):
        act(eager)
        act(step.model)
        assert agrees(eager, step, batch(8))

    change(lambda model: setattr(model.part[1], "p", 0.1))
    change(lambda model: model.norm.eval())
    change(lambda model: model.part.eval())
    change(lambda model: model.part.train())
    with caplog.at_level(logging.WARNING, "rewriter"):
        change(lambda model: setattr(model, "squared", True))
    assert "`squared` of the model is True and was False" in caplog.text
    change(lambda model: setattr(model, "squared", False))
    change(lambda model: model.last.weight.requires_grad_(True))
    assert step.explain()


def test_replaced_children_are_honoured():
    eager, step = pair(example=(batch(8),))
    new = nn.Linear(6, 2)
    step.last = new
    eager.last = copy.deepcopy(new)
    assert step.model.last is step.last is new
    assert any(parameter is new.weight for parameter in step.parameters())
    assert agrees(eager, step, batch(8))
    step.model.last = newer = nn.Linear(6, 5)
    eager.last = copy.deepcopy(newer)
    assert agrees(eager, step, batch(8))
    assert step.last is newer
    assert "last.weight" in step.state_dict()
    assert step.state_dict()["last.weight"].shape == (5, 6)


def test_more_than_eight_signatures_are_refused():
    _, step = pair()
    for factor in range(8):
        step(batch(8), factor=float(factor))
    step(batch(8), factor=3.0)
    with pytest.raises(RewriteError, match=r"more than 8 call signatures[\s\S]*as tensors[\s\S]*recapture"):
        step(batch(8), factor=8.0)
    step(batch(8), factor=7.0)
    step.recapture()
    step(batch(8), factor=8.0)
    assert sum(map(len, step._variants.values())) == 1


def test_a_flag_that_keeps_changing_is_refused_with_its_name():
    _, step = pair()
    step.model.level = 0.0

    def go_on():
        for level in range(10):
            step.model.level = float(level)
            step(batch(8))

    with pytest.raises(RewriteError, match=r"`level` of the model is 8.0 and was 7.0"):
        go_on()


def test_recapture_keeps_what_rules_have_learnt():
    class Boxed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.box = nn.Linear(4, 3), Sine()

        def forward(self, x):
            return self.box(self.first(x))

    class Sine(nn.Module):
        def forward(self, x):
            return torch.sin(x)

    with pytest.warns(UserWarning, match="ordinary module"):
        step = rewrite(Boxed(), BlackBox("box"), example=(batch(8),))
    step(batch(8)).sum().backward()
    before = step.state_dict()["rewriter._extra_state"]
    step.recapture()
    with pytest.warns(UserWarning, match="ordinary module"):
        step.capture(batch(8))
    assert torch.equal(step.state_dict()["rewriter._extra_state"], before)
    assert "not measured yet" not in step.explain()


# Forms of outputs.


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    extra: dict
    name: str = "result"


@pytest.mark.parametrize(
    "form",
    [
        lambda y, z: (y, z),
        lambda y, z: [y, None, z],
        lambda y, z: {"a": y, "b": {"c": z}},
        lambda y, z: Result(y, {"z": z}),
        lambda y, z: (y, y, z, 3, "text"),
    ],
    ids=["tuple", "list", "dict", "dataclass", "repeats and constants"],
)
def test_outputs_keep_their_form(form):
    class Formed(Net):
        def forward(self, x):
            y = super().forward(x)
            return form(y, y.mean())

    torch.manual_seed(0)
    eager = Formed()
    step = rewrite(copy.deepcopy(eager), Exact("part"))
    found = []
    for model in (eager, step):
        torch.manual_seed(1)
        found.append(model(batch(8)))
    assert type(found[0]) is type(found[1])
    left, right = (torch.utils._pytree.tree_leaves(vars(v) if isinstance(v, Result) else v) for v in found)
    for one, two in zip(left, right, strict=True):
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
