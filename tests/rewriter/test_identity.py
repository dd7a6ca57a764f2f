"""The identity plan equals eager bit for bit: outputs, every gradient, every buffer; what runs is the emitted code."""

import copy

import pytest
import torch
import zoo
from oracle import equal, train
from torch import nn

from rewriter import rewrite

MODELS = [*zoo.torch_modules(), *zoo.torch_modules_inside(), *zoo.nets()]


def records(model, module, args, kwargs):
    return train(model, lambda given, named: module(*given, **named), args, kwargs)


def difference(expected, found):
    """What differs first, or None."""
    for step, (left, right) in enumerate(zip(expected, found, strict=True)):
        for what in left:
            if not equal(left[what], right[what]):
                return f"{what} of step {step}"
    return None


def check(entry, mode=True):
    torch.manual_seed(0)
    eager = entry.make_module().train(mode)
    args, kwargs = entry.make_inputs()
    own = copy.deepcopy(eager)
    step = rewrite(own)
    assert difference(records(eager, eager, args, kwargs), records(own, step, args, kwargs)) is None
    return step


def test_the_zoo_is_large_enough():
    assert len(zoo.torch_modules()) >= 60
    assert len(zoo.nets()) >= 10


@pytest.mark.parametrize("entry", MODELS, ids=lambda entry: entry.name)
def test_training_mode(entry):
    step = check(entry)
    if step.training:
        assert step.latest.emitted.sources["step"].startswith("def forward")


@pytest.mark.parametrize("entry", [*zoo.torch_modules(), *zoo.nets()], ids=lambda entry: entry.name)
def test_evaluation_mode(entry):
    check(entry, mode=False)


@pytest.mark.interop
@pytest.mark.parametrize("name", ["GPT-2", "BERT", "RoBERTa", "ViT", "Llama", "Mamba"])
def test_hugging_face(name):
    pytest.importorskip("transformers")
    check(next(entry for entry in zoo.huggingface() if entry.name == name))


def test_a_wrong_graph_is_noticed():
    """The negative control: the emitted code of one model against another one's eager run."""
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    other = copy.deepcopy(eager)
    other[1].p = 0.4
    step = rewrite(other)
    args = (torch.randn(6, 4),)
    assert difference(records(eager, eager, args, {}), records(other, step, args, {})) is not None


def test_batch_norm_counts_once_a_step():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    step = rewrite(model)
    for expected in (1, 2, 3):
        step(torch.randn(5, 4)).sum().backward()
        assert int(model[1].num_batches_tracked) == expected
