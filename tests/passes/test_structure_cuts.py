"""Cuts are cuts, segments are what they say: against graph search, against autograd, and by running the pieces."""

import functools

import networkx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NETS, Basic, ResNet, Transformer
from structures import (
    WIDTH,
    HandNorm,
    Net,
    cases,
    conditioned,
    crossed,
    gated,
    graph_program,
    linears,
    nested,
    parallel,
    program_of,
    repeated,
    unet,
    written_in_place,
)
from torch import fx, nn

from rewriter.passes.annotate import Runner
from rewriter.passes.structure import analyse
from rewriter.passes.structure.dominators import dominators
from rewriter.passes.structure.lines import line
from rewriter.passes.structure.stream import Stream
from rewriter.shadow import preserved

B = 3
TOLERANCE = 1e-12


def vectors():
    return torch.randn(B, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


MODELS = {
    "transformer": (lambda: Transformer(2), lambda: torch.randint(0, 20, (B, 6))),
    "resnet": (lambda: ResNet(Basic), lambda: torch.randn(B, 3, 16, 16, dtype=torch.float64)),
    "convnext": (NETS["convnext"], lambda: torch.randn(B, 3, 16, 16, dtype=torch.float64)),
    "residual": (lambda: Net(repeated(lambda x, f: x + f(x))), vectors),
    "subtracted": (lambda: Net(repeated(lambda x, f: x - f(x))), vectors),
    "post norm": (lambda: Net(repeated(lambda x, f: f.norm(x + f(x)))), vectors),
    "gated": (lambda: Net(gated, gates=linears(6)), vectors),
    "crossed": (lambda: Net(crossed), vectors),
    "nested": (lambda: Net(nested), vectors),
    "parallel": (lambda: Net(parallel, norms=nn.ModuleList(HandNorm() for _ in range(3))), vectors),
    "conditioned": (lambda: Net(conditioned, condition=nn.Linear(WIDTH, WIDTH), scales=linears(6)), vectors),
    "in place": (lambda: Net(written_in_place), vectors),
}


EXPORTED = ("transformer", "resnet", "post norm", "gated", "parallel", "in place")


@functools.cache
def built(name, front_end):
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model = make().double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "rate"):
            module.rate = 0.0  # of stochastic depth
    argument = inputs()
    return program_of(model, argument, front_end=front_end), argument


class Watched(Runner):
    """Runs a program and keeps every value, and what it was before others wrote to it; detaches one on the way."""

    def __init__(self, program, graph, detached=None):
        super().__init__(program, graph)
        self.detached, self.seen, self.copies = detached, {}, {}

    def run_node(self, n):
        value = super().run_node(n)
        if n.name == self.detached:
            value = value.detach()
        self.seen[n.name] = value
        self.copies[n.name] = value.detach().clone() if isinstance(value, torch.Tensor) else value
        return value


def values_of(program, argument, detached=None):
    with preserved(program.model):
        runner = Watched(program, program.graph, detached)
        outputs = runner.run(argument)
    return runner, sum(out.sum() for out in outputs if out.is_floating_point())


@pytest.mark.parametrize(("name", "front_end"), cases(MODELS, EXPORTED))
def test_no_gradient_gets_around_a_cut(name, front_end):
    program, argument = built(name, front_end)
    structure = analyse(program)
    start = structure.chains[0].input
    for value in structure.chains[0].values[1:]:
        run, total = values_of(program, argument, detached=value)
        (gradient,) = torch.autograd.grad(total, run.seen[start], allow_unused=True)
        assert gradient is None, value


def test_a_gradient_gets_around_what_is_no_cut():
    """The negative control: the values that a skip of a U-Net, or one over two blocks, goes around."""
    for model, inside in (
        (Net(unet, merges=linears(3, 2 * WIDTH)), "relu_1"),
        (Net(crossed), "add_1"),
    ):
        program = program_of(model.double(), vectors())
        run, total = values_of(program, vectors(), detached=inside)
        assert inside not in analyse(program).cuts
        (gradient,) = torch.autograd.grad(total, run.seen["add"], allow_unused=True)
        assert gradient is not None
        assert gradient.abs().max() > 0


def _fresh(value):
    """Segments may write to what they are given."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def segment_graph(program, segment, cut_off=(), without_after=False):
    """A segment alone: (input, side inputs) -> output; the nodes in `cut_off` read the input detached."""
    graph = fx.Graph()
    mapping = {}
    for name in (segment.input, *segment.side_inputs):
        mapping[program.node(name)] = graph.placeholder(name)
    start = program.node(segment.input)
    for name in segment.nodes:
        node = program.node(name)
        if without_after and name in segment.after:
            continue
        if name in cut_off:
            detached = graph.call_method("detach", (mapping[start],))
            mapping[node] = graph.node_copy(node, lambda n, d=detached: d if n is start else mapping[n])
        else:
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
    return graph, mapping


def pulled_back(program, segment, seen, cotangent, cut_off=()):
    graph, mapping = segment_graph(program, segment, cut_off, without_after=True)
    graph.output(mapping[program.node(segment.add)])
    given = [_fresh(seen[name]) for name in (segment.input, *segment.side_inputs)]
    given[0].requires_grad_()
    # A write in place changes what it is given; a leaf may not be written to.
    result = Runner(program, graph).run(given[0] * 1, *given[1:])
    (gradient,) = torch.autograd.grad(result, given[0], cotangent, allow_unused=True)
    return torch.zeros_like(given[0]) if gradient is None else gradient


@pytest.mark.parametrize(("name", "front_end"), cases(MODELS, EXPORTED))
def test_a_segment_runs_alone(name, front_end):
    program, argument = built(name, front_end)
    structure = analyse(program)
    with preserved(program.model):
        seen = values_of(program, argument)[0].copies
        for segment in (*structure.spans, *structure.chains[0].segments):
            graph, mapping = segment_graph(program, segment)
            graph.output(mapping[program.node(segment.output)])
            given = [_fresh(seen[name]) for name in (segment.input, *segment.side_inputs)]
            assert torch.equal(Runner(program, graph).run(*given), seen[segment.output]), segment


@pytest.mark.parametrize(("name", "front_end"), [case for case in cases(MODELS, EXPORTED) if case[0] != "gated"])
def test_the_pullback_is_that_of_the_skip_and_that_of_the_branch(name, front_end):
    """J = K + J_branch at the sum, K = 1 where the skip is the identity; each alone is not the whole."""
    program, argument = built(name, front_end)
    with preserved(program.model):
        seen = values_of(program, argument)[0].copies
        for segment in analyse(program).chains[0].residual:
            cotangent = torch.randn_like(seen[segment.add])
            whole = pulled_back(program, segment, seen, cotangent)
            skip = pulled_back(program, segment, seen, cotangent, cut_off=segment.branch)
            branch = pulled_back(program, segment, seen, cotangent, cut_off=(*segment.skip_nodes, segment.add))
            assert (whole - skip - branch).abs().max() <= TOLERANCE * whole.abs().max()
            assert (whole - skip).abs().max() > 1e-3 * whole.abs().max()
            assert torch.equal(skip, cotangent) == (segment.skip == "identity")


def test_segments_share_no_node_and_are_in_order():
    for name in MODELS:
        program, _ = built(name, "fx")
        place = {node.name: number for number, node in enumerate(program.graph.nodes)}
        (chain,) = analyse(program).chains
        nodes = [node for segment in chain.segments for node in segment.nodes]
        assert len(nodes) == len(set(nodes))
        assert chain.input not in nodes
        assert all(sorted(segment.nodes, key=place.get) == list(segment.nodes) for segment in chain.segments)
        for segment in chain.residual:
            parts = {*segment.branch, *segment.skip_nodes, *segment.after, segment.add}
            assert parts <= set(segment.nodes)
            assert len(parts) == len(segment.branch) + len(segment.skip_nodes) + len(segment.after) + 1


@st.composite
def dags(draw):
    """Reads of each node, by number: at least one earlier node each."""
    count = draw(st.integers(3, 25))
    return [draw(st.sets(st.integers(max(0, n - 6), n - 1), min_size=1, max_size=3)) for n in range(1, count)]


@settings(max_examples=150, deadline=None)
@given(dags())
def test_dominators_are_those_of_networkx(reads):
    graph = networkx.DiGraph([(source, n) for n, sources in enumerate(reads, 1) for source in sources])
    tree = dominators(range(len(reads) + 1), [(), *map(tuple, reads)])
    expected = networkx.immediate_dominators(graph, 0)
    assert all(tree.parent[node] == expected[node] for node in graph if node)


@settings(max_examples=60, deadline=None)
@given(dags())
def test_a_line_has_every_node_without_which_the_end_is_out_of_reach(reads):
    def build(x, f, add, cat):
        nodes = [x]
        for sources in reads:
            nodes.append(cat(*(nodes[source] for source in sorted(sources))))
        return nodes[-1]

    stream = Stream(graph_program(build))
    graph = networkx.DiGraph([(source, n) for n, sources in enumerate(reads, 1) for source in sources])
    end = len(reads)
    expected = [
        node for node in range(end + 1) if node in (0, end) or not networkx.has_path(_without(graph, node), 0, end)
    ]
    assert line(stream, 0, end).cuts == tuple(expected)


def _without(graph, node):
    left = graph.copy()
    left.remove_node(node)
    return left
