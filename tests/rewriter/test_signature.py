"""The form of a call: what makes two calls alike, and how results are put together again."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from rewriter.signature import flatten, signature, tree_of_call

Point = namedtuple("Point", ["x", "y"])


@dataclass
class Batch:
    tokens: torch.Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class Frozen:
    tokens: torch.Tensor


class Cache:
    """Neither a container nor a dataclass, but it holds tensors."""

    def __init__(self, keys, name):
        self.keys, self.name = keys, name


def _key(*args, **kwargs):
    return signature(args, kwargs)[0]


X = torch.ones(2, 3)


def test_other_sizes_and_values_are_the_same_signature():
    assert _key(X) == _key(torch.zeros(5, 7))
    assert hash(_key(X)) == hash(_key(torch.zeros(5, 7)))
    assert _key(X, mask=X) == _key(X, mask=torch.zeros(9, 1))
    assert _key(b=X, a=None) == _key(a=None, b=X)


@pytest.mark.parametrize(
    "other",
    [
        ((X.double(),), {}),
        ((X[0],), {}),
        ((X.to("meta"),), {}),
        ((X, X), {}),
        (((X,),), {}),
        (([X],), {}),
        (({"x": X},), {}),
        ((), {"x": X}),
        ((X,), {"mask": None}),
        ((X, None), {}),
        ((X,), {"flag": True}),
    ],
    ids=["dtype", "dimensions", "device", "number", "tuple", "list", "dict", "keyword", "none", "positional", "flag"],
)
def test_every_difference_in_form_is_another_signature(other):
    assert signature(*other)[0] != _key(X)


def test_constants_count_by_type_and_value():
    assert len({_key(X, value) for value in (None, True, False, 0, 1, 1.0, "1", b"1", torch.float32)}) == 9
    assert _key(X, "a") == _key(X, "a")


def test_other_objects_count_by_identity():
    first, second = object(), object()
    assert _key(X, first) == _key(X, first)
    assert _key(X, first) != _key(X, second)


def test_autocast_is_part_of_the_signature():
    plain = _key(X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _key(X) != plain
    assert _key(X) == plain


def test_subclasses_of_tensor_are_told_apart():
    class Own(torch.Tensor):
        pass

    assert _key(X.as_subclass(Own)) != _key(X)
    assert _key(nn.Parameter(X)) == _key(X)


NESTED = [
    X,
    (X, X + 1),
    [X, None, 3],
    {"b": X, "a": (X, "text")},
    OrderedDict(one=X, two=X),
    Point(X, [X]),
    Batch(X, 2.0),
    Frozen(X),
    Cache([X, X + 2], "past"),
    (None, 3),
]


@pytest.mark.parametrize("value", NESTED, ids=lambda value: type(value).__name__)
def test_flatten_and_rebuild(value):
    leaves, tree = flatten(value)
    changed = tree.rebuild([leaf * 2 for leaf in leaves])
    assert type(changed) is type(value)
    again, other = flatten(changed)
    assert other.outline() == tree.outline()
    assert all(torch.equal(a, 2 * b) for a, b in zip(again, leaves, strict=True))
    assert _key(value) == _key(changed)


def test_what_is_baked_is_kept():
    _, tree = flatten({"a": X, "b": (1, None, "text")})
    assert tree.rebuild([0]) == {"a": 0, "b": (1, None, "text")}
    assert tree.baked_values() == [1, None, "text"]


@pytest.mark.parametrize("value", NESTED, ids=lambda value: type(value).__name__)
def test_tensors_come_in_the_order_of_the_tree(value):
    args, kwargs = (value, X), {"z": value, "a": X + 5}
    _, tensors = signature(args, kwargs)
    leaves, _ = tree_of_call(args, kwargs)
    assert [id(tensor) for tensor in tensors] == [id(leaf) for leaf in leaves]


def test_outlines_tell_structures_apart():
    outlines = [repr(flatten(value)[1].outline()) for value in NESTED]
    assert len(set(outlines)) == len(NESTED)
