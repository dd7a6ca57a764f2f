"""Repeats: runs of equal units, by what they do and not by which parameters they hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Basic, ResNet, Transformer
from structures import FRONT_ENDS, WIDTH, Branch, Net, program_of, repeated
from torch import nn

from rewriter.passes.structure import analyse
from rewriter.passes.structure.repeats import tandem


def vectors():
    return torch.randn(3, WIDTH)


def found_in(model, *args, front_end="fx"):
    structure = analyse(program_of(model, *args, front_end=front_end))
    return [(repeat.start, repeat.period, repeat.count, repeat.shared) for repeat in structure.chains[0].repeats]


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_layers_of_a_transformer(front_end):
    assert found_in(Transformer(3), torch.randint(0, 20, (3, 6)), front_end=front_end) == [(0, 2, 3, False)]


def test_stages_of_a_resnet():
    class Staged(ResNet):
        def __init__(self):
            super().__init__(Basic)
            self.layer1 = nn.Sequential(*(Basic(8, 8, 1) for _ in range(3)))
            self.layer2 = nn.Sequential(Basic(8, 16, 2), *(Basic(16, 16, 1) for _ in range(4)))

    assert found_in(Staged(), torch.randn(3, 3, 16, 16)) == [(4, 1, 4, False), (0, 1, 3, False)]


def test_one_other_block_breaks_the_run():
    """The negative control: one wider, one with another option, one that does more."""
    for change in (_widen, _other_option, _more):
        model = Net(repeated(lambda x, f: x + f(x)))
        change(model.blocks)
        assert found_in(model, vectors()) == [(3, 1, 3, False), (0, 1, 2, False)]


def _widen(blocks):
    blocks[2].up, blocks[2].down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)


def _other_option(blocks):
    blocks[2].norm.eps = 1e-3


def _more(blocks):
    blocks[2].down = nn.Sequential(blocks[2].down, nn.Tanh())


def test_repeats_of_a_plain_net():
    layers = [layer for _ in range(5) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    structure = analyse(program_of(nn.Sequential(*layers), vectors()))
    assert [(r.start, r.period, r.count, r.shared) for r in structure.repeats] == [(0, 2, 5, False)]
    assert structure.cuts == tuple(f"_{number}" for number in range(10))


def test_shared_parameters_are_told_from_equal_shapes():
    block = Branch()
    model = Net(repeated(lambda x, f: x + f(x)), blocks=3)
    model.blocks = nn.ModuleList([block, block, block])
    assert found_in(model, vectors()) == [(0, 1, 3, True)]
    assert found_in(Net(repeated(lambda x, f: x + f(x)), blocks=3), vectors()) == [(0, 1, 3, False)]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=24))
def test_tandem_runs(codes):
    """Every run repeats, none can be continued by a whole unit, none overlaps, and the longest one is there."""
    runs = tandem(codes)
    places = []
    for start, period, count in runs:
        unit = codes[start : start + period]
        assert count > 1
        assert codes[start : start + period * count] == unit * count
        assert codes[start + period * count : start + period * (count + 1)] != unit
        places += range(start, start + period * count)
    assert len(places) == len(set(places))
    assert max((period * count for _, period, count in runs), default=0) == _longest(codes)


def _longest(codes):
    best = 0
    for start in range(len(codes)):
        for period in range(1, (len(codes) - start) // 2 + 1):
            count = 1
            while codes[start + count * period : start + (count + 1) * period] == codes[start : start + period]:
                count += 1
            best = max(best, period * count if count > 1 else 0)
    return best
