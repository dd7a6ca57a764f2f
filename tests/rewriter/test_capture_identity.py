"""The captured graph trains exactly as eager: torch's own modules, and nets in torchvision's style."""

import operator

import pytest
import torch
from nets import Transformer
from oracle import compare, run_captured, snapshot
from torch import nn
from zoo import nets, torch_modules, torch_modules_inside

from rewriter import RewriteError
from rewriter.capture import capture
from rewriter.shadow import MismatchError, prove

MODULES = torch_modules()
INSIDE = torch_modules_inside()
NETS = nets()


def _check(entry, training, **options):
    torch.manual_seed(0)
    model = entry.make_module().train(training)
    args, kwargs = entry.make_inputs()
    before = snapshot(model)
    captured = capture(model, args, kwargs, **options)
    after = snapshot(model)
    for what, value in before.items():
        assert repr(value) == repr(after[what]), f"capture changed the {what}"
    assert compare(model, captured, args, kwargs) is None
    return captured


def test_there_are_enough_of_them():
    assert len(MODULES) >= 60
    assert len(NETS) >= 10


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("entry", INSIDE, ids=lambda entry: entry.name)
def test_torch_modules_as_parts(entry, training):
    captured = _check(entry, training, prove=False)
    assert captured.front_end == "fx"
    assert captured.opaque == {}


@pytest.mark.parametrize("entry", MODULES, ids=lambda entry: entry.name)
def test_torch_modules_as_roots(entry):
    _check(entry, True, prove=False)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("entry", NETS, ids=lambda entry: entry.name)
def test_nets(entry, training):
    captured = _check(entry, training)
    assert captured.front_end == "fx"
    assert captured.opaque == {}
    assert captured.notes == ()


def test_a_root_that_reads_a_buffer_as_a_number_is_refused():
    with pytest.raises(RewriteError, match="cannot be captured"):
        capture(nn.BatchNorm1d(4, momentum=None), (torch.randn(3, 4),), {})


def test_batch_norm_counts_once_per_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    captured = capture(model, (torch.randn(5, 4),), {})
    assert model[1].num_batches_tracked == 0
    assert compare(model, captured, (torch.randn(5, 4),), {}, steps=3) is None


def _transformer():
    torch.manual_seed(0)
    model = Transformer()
    tokens = torch.randint(0, 20, (4, 10))
    return model, tokens, capture(model, (tokens,), {})


def test_a_transformer_takes_other_batch_sizes_and_lengths():
    model, _, captured = _transformer()
    assert captured.front_end == "fx"
    for shape in [(1, 10), (7, 10), (3, 16)]:
        other = torch.randint(0, 20, shape)
        assert captured.guards.reason(model, [other]) is None
        assert compare(model, captured, (other,), {}) is None


def test_the_models_own_assertion_still_speaks():
    model, _, captured = _transformer()
    with pytest.raises(AssertionError):
        compare(model, captured, (torch.randint(0, 20, (2, 17)),), {})


def test_tied_weights_are_one_name():
    model, _, captured = _transformer()
    names = {node.target for node in captured.graph.nodes if node.op in ("get_attr", "call_module")}
    assert "head" in names
    assert model.head.weight is model.tokens.weight
    assert all(not name.startswith("_constants") for name in names)


def test_every_node_knows_its_block_and_its_line():
    _, _, captured = _transformer()
    scores = next(node for node in captured.graph.nodes if node.target is operator.matmul)
    assert scores.meta["block"] == (("blocks.0", 0), ("blocks.0.attn", 0))
    assert scores.meta["source"].startswith("nets.py:")
    assert scores.meta["source"].endswith(" in forward")
    for node in captured.graph.nodes:
        assert isinstance(node.meta["block"], tuple)
        assert isinstance(node.meta["source"], str)
    leaf = next(node for node in captured.graph.nodes if node.target == "blocks.1.mlp.0")
    assert [name for name, _ in leaf.meta["block"]] == ["blocks.1", "blocks.1.mlp", "blocks.1.mlp.0"]


class Again(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x):
        return self.part(self.part(x))


def test_calls_of_one_module_are_counted():
    captured = capture(Again(), (torch.randn(3, 4),), {})
    calls = [node.meta["block"] for node in captured.graph.nodes if node.target == "part.0"]
    assert calls == [(("part", 0), ("part.0", 0)), (("part", 1), ("part.0", 1))]


def _wrong_graphs():
    def detached(graph):
        node = next(node for node in graph.nodes if node.target == "blocks.0.ln2")
        with graph.inserting_after(node):
            cut = graph.call_method("detach", (node,))
        node.replace_all_uses_with(cut, delete_user_cb=lambda user: user is not cut)

    def misplaced(graph):
        next(node for node in graph.nodes if node.target == "blocks.1.ln1").target = "blocks.0.ln1"

    return [detached, misplaced]


@pytest.mark.parametrize("break_it", _wrong_graphs(), ids=lambda function: function.__name__)
def test_a_wrong_graph_is_noticed_by_oracle_and_proof(break_it):
    model, tokens, captured = _transformer()
    break_it(captured.graph)
    assert compare(model, captured, (tokens,), {}) is not None
    with pytest.raises(MismatchError, match="on the example"):
        prove(model, lambda a, k: run_captured(model, captured, a, k), (tokens,), {}, captured.guards)


def test_the_proof_sees_a_frozen_batch_size():
    model = Again()
    x = torch.randn(5, 4)
    captured = capture(model, (x,), {})
    with captured.graph.inserting_before(captured.graph.output_node()):
        last = captured.graph.output_node().args[0][0]
        frozen = captured.graph.call_method("view", (last, 5, 4))
    captured.graph.output_node().args = ((frozen,),)
    assert compare(model, captured, (x,), {}) is None
    with pytest.raises(MismatchError, match="fails on 4 rows"):
        prove(model, lambda a, k: run_captured(model, captured, a, k), (x,), {}, captured.guards)
