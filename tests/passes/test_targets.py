"""Which modules a target names."""

import pytest
from torch import nn

from rewriter.passes.targets import Place, pattern, resolve
from rewriter.runtime.errors import RewriteError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(2, 2)
        self.mlp = nn.Sequential(nn.Linear(2, 2), nn.ReLU())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(2, 2)


def names(target):
    return [place.module for place in resolve(target, Net())]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("head", ["head"]),
        ("blocks.1.mlp.0", ["blocks.1.mlp.0"]),
        ("blocks.*", [f"blocks.{i}" for i in range(4)]),
        ("blocks.*.mlp", [f"blocks.{i}.mlp" for i in range(4)]),
        ("**.mlp", [f"blocks.{i}.mlp" for i in range(4)]),
        ("**.0", ["blocks.0", *(f"blocks.{i}.mlp.0" for i in range(4))]),
        ("blocks[1:3]", ["blocks.1", "blocks.2"]),
        ("blocks[2:].attention", ["blocks.2.attention", "blocks.3.attention"]),
        ("blocks[:1].*", ["blocks.0.attention", "blocks.0.mlp"]),
    ],
)
def test_patterns(target, expected):
    assert names(target) == expected


def test_star_stays_within_one_level():
    assert not pattern("blocks.*")("blocks.0.mlp")
    assert pattern("blocks.**")("blocks.0.mlp")


def test_calls_and_borders():
    model = Net()
    assert resolve("head@2", model) == (Place("head", 2),)
    assert resolve("head:out", model) == (Place("head", None, border=True),)
    assert resolve("head", model) == (Place("head"),)


def test_modules_and_predicates():
    model = Net()
    assert resolve(model.blocks[2], model) == (Place("blocks.2"),)
    found = resolve(lambda module, name: isinstance(module, nn.ReLU), model)
    assert [place.module for place in found] == [f"blocks.{i}.mlp.1" for i in range(4)]


def test_nothing_matched_names_the_nearest():
    with pytest.raises(RewriteError, match=r"haed[\s\S]*nearest names are: head"):
        resolve("haed", Net())
    with pytest.raises(RewriteError, match="names nothing"):
        resolve(nn.Linear(1, 1), Net())


def test_the_whole_model_is_refused():
    model = Net()
    with pytest.raises(RewriteError, match="whole model"):
        resolve(model, model)


def test_a_module_with_two_names_goes_by_its_first():
    model = Net()
    model.again = model.blocks[1]
    assert resolve("again.mlp", model) == (Place("blocks.1.mlp"),)
    assert resolve("again@1", model) == (Place("blocks.1", 1),)
    assert [place.module for place in resolve("**.mlp", model)] == [f"blocks.{i}.mlp" for i in range(4)]
