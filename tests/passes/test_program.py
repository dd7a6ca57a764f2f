"""The program and its contract: what verify() refuses, texts, and the runner's history."""

import operator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from exact_entry import Exact
from torch import fx, nn

from rewriter import Plan, RewriteError, rewrite
from rewriter.passes.base import Pass, Refused, run
from rewriter.passes.program import Cost, Program, Region, Rows, Segment, Value


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 3) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(3))


def program(**changes):
    """x -> a -> b -> c, and the sum of a and c."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_module("a", (x,))
    b = graph.call_module("b", (a,))
    c = graph.call_module("c", (b,))
    total = graph.call_function(operator.add, (a, c))
    graph.output((total,))
    return Program(Chain(), graph).with_(**changes)


def region(name, *owned):
    return Region(name, Exact(name), name, owned)


def test_a_clean_program_passes():
    program(regions=(region("a", "a"), region("b", "b", "c"))).verify()


def test_overlap_is_refused():
    with pytest.raises(RewriteError, match=r"two plan entries[\s\S]*second .* and first ") as caught:
        program(regions=(region("first", "a", "b"), region("second", "b"))).verify()
    assert "exactly one source" in caught.value.why


def test_a_region_with_a_hole_is_refused():
    with pytest.raises(RewriteError, match=r"not convex[\s\S]*where: outer[\s\S]*comes back at c"):
        program(regions=(region("outer", "a", "c"),)).verify()


def test_a_region_of_nodes_that_are_not_there_is_refused():
    with pytest.raises(RewriteError, match="not in the graph"):
        program(regions=(region("a", "nothing"),)).verify()


@pytest.mark.parametrize("kind", ["call_module", "get_attr"])
def test_names_that_do_not_resolve_are_refused(kind):
    broken = program()
    graph = broken.edit()
    output = graph.output_node()
    with graph.inserting_before(output):
        node = graph.get_attr("gone") if kind == "get_attr" else graph.call_module("gone", (output.args[0][0],))
    output.args = ((node,),)
    with pytest.raises(RewriteError, match=r"not in the model[\s\S]*gone"):
        broken.with_(graph=graph).verify()


@pytest.mark.parametrize(
    ("segments", "odd"),
    [
        ((Segment("one", ("a", "b"), None),), "add, c"),
        ((Segment("one", ("a", "b", "c", "add"), None), Segment("two", ("c",), None)), "c, c"),
        ((Segment("one", ("a", "b", "c", "add", "d"), None),), "d"),
    ],
)
def test_segments_cover_every_node_once(segments, odd):
    with pytest.raises(RewriteError, match=rf"exactly once\n  where: {odd}$"):
        program(segments=segments).verify()


def test_every_segment_has_a_device():
    with pytest.raises(RewriteError, match="no device"):
        program(segments=(Segment("one", ("a", "b", "c", "add"), None, device=""),)).verify()


def test_text_is_stable():
    shown = program(
        values={"a": Value((2, 3), torch.float32, Rows(0), True)},
        regions=(region("b", "b"),),
        segments=(
            Segment("exact_0", ("a",), None),
            Segment("b", ("b",), "b"),
            Segment("exact_1", ("c", "add"), None),
        ),
    )
    assert str(shown) == "\n".join(
        (
            "x = placeholder()",
            "a = call_module a(x) : float32[2, 3] rows dim 0",
            "b = call_module b(a)",
            "c = call_module c(b)",
            "add = call_function add(a, c)",
            "output = output(add)",
            "region b: Exact('b') owns b",
            "segment exact_0 [exact]: a",
            "segment b [b]: b",
            "segment exact_1 [exact]: c, add",
        )
    )


def test_edit_is_a_copy_and_with_a_new_program():
    first = program()
    graph = first.edit()
    graph.erase_node(graph.output_node())
    assert first.graph.output_node() is not None
    assert first.with_(notes=("changed",)) is not first
    assert first.notes == ()


def test_costs_add_up():
    assert Cost(1, 2, 3) + Cost(10, 20, 30) == Cost(11, 22, 33)


@dataclass(frozen=True)
class Same(Pass):
    name: ClassVar[str] = "same"

    def apply(self, program):
        return program


@dataclass(frozen=True)
class Drops(Pass):
    name: ClassVar[str] = "drops"

    def apply(self, program):
        graph = program.edit()
        output = graph.output_node()
        add = output.args[0][0]
        output.args = ((add.args[1],),)
        graph.erase_node(add)
        return program.with_(graph=graph)


@dataclass(frozen=True)
class Declines(Pass):
    name: ClassVar[str] = "declines"
    what: str = ""

    def apply(self, program):
        return Refused("the node", "the reason", "the remedy", self.what)


@dataclass(frozen=True)
class Breaks(Pass):
    name: ClassVar[str] = "breaks"

    def apply(self, program):
        return program.with_(regions=(region("a", "nothing"),))


def test_history_has_a_line_per_pass():
    found, history = run([Same(), Drops()], program())
    assert [(line.name, line.nodes, line.changed) for line in history] == [("same", 6, False), ("drops", 5, True)]
    assert history[-1].text == str(found)
    assert all(line.seconds >= 0 for line in history)


@pytest.mark.parametrize(("what", "shown"), [("", "declines does not apply"), ("it is so", "it is so")])
def test_a_refusal_becomes_an_error_with_all_it_says(what, shown):
    with pytest.raises(RewriteError) as caught:
        run([Declines(what)], program())
    error = caught.value
    assert (error.what, error.where, error.why, error.remedy) == (shown, "the node", "the reason", "the remedy")


def test_the_runner_verifies_after_each_pass():
    with pytest.raises(RewriteError, match="not in the graph"):
        run([Breaks()], program())


def test_history_of_a_rewrite():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    step = rewrite(model, Plan([Exact("1")]), example=(torch.randn(4, 3),))
    names = [line.name for line in step.history]
    assert names == ["normalise", "annotate", "unpack", "Exact('1')", "cover", "partition"]
    assert step.history[-1].text == str(step.latest.program)
    assert {line.nodes for line in step.history} == {5}
