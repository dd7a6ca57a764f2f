"""Recurrences against autograd through the same loop: gradients of inputs, initial states and weights."""

import cells
import pytest
import torch

from rewriter.runtime.errors import RewriteError
from rewriter.runtime.recurrence import all_steps
from rewriter.runtime.recurrence.recurrence import Recurrence


def reference(cell, inputs, states, weights, cotangents):
    """Gradients by autograd, in the order inputs, states, weights."""
    sources = [each.detach().requires_grad_() for each in (*inputs, *states, *weights)]
    first, last = len(inputs), len(inputs) + len(states)
    results = cells.in_a_loop(cell, sources[:first], tuple(sources[first:last]), tuple(sources[last:]))
    return results, torch.autograd.grad(results, sources, cotangents)


def pulled(recurrence, inputs, states, weights, cotangents, keep):
    ran = recurrence.run(inputs, states, weights, keep)
    before = tuple(torch.cat([s[None], after[:-1]]) for s, after in zip(states, ran.states, strict=True))
    buffers = [torch.cat([torch.zeros_like(each[:1]), each]) for each in cotangents[: len(states)]]
    found = recurrence.pull(inputs, before, weights, ran.kept, buffers, tuple(cotangents[len(states) :]))
    return ran, [*found.inputs, *found.states, *found.weights]


def both(cell, keep, dtype=torch.float64, **sizes):
    inputs, states, weights = cells.example(cell, dtype=dtype, **sizes)
    recurrence = traced(cell, inputs, states, weights)
    torch.manual_seed(1)
    cotangents = [torch.randn_like(each) for each in cells.in_a_loop(cell, inputs, states, weights)]
    results, expected = reference(cell, inputs, states, weights, cotangents)
    ran, found = pulled(recurrence, inputs, states, weights, cotangents, keep)
    return recurrence, results, expected, ran, found


def traced(cell, inputs, states, weights):
    return Recurrence(cell, tuple(each[0] for each in inputs), states, weights, [True] * (len(inputs) + len(weights)))


def error(found, expected):
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)


@pytest.mark.parametrize("keep", [False, True], ids=["evaluated again", "kept"])
@pytest.mark.parametrize("cell", cells.ALL, ids=lambda cell: cell.__name__)
def test_gradients_are_exact(cell, keep):
    _, results, expected, ran, found = both(cell, keep)
    assert all(torch.equal(a, b) for a, b in zip((*ran.states, *ran.outputs), results, strict=True))
    assert error(found, expected) < 1e-12


@pytest.mark.parametrize("cell", cells.ALL, ids=lambda cell: cell.__name__)
def test_gradients_in_single_precision(cell):
    *_, expected, _, found = both(cell, False, dtype=torch.float32, steps=20, width=8, size=16)
    assert error(found, expected) < 1e-5


def test_one_step():
    *_, expected, _, found = both(cells.separate, False, steps=1)
    assert error(found, expected) < 1e-12


def test_a_wrong_coefficient_is_seen(monkeypatch):
    """The negative control: one coefficient that the loop reads is off by a millionth."""
    plain = all_steps.AllSteps.__call__

    def wrong(self, values):
        plain(self, values)
        for node in [node for node in self.wanted if node.name.startswith("cat")][:1]:
            values[node] = values[node] * (1 + 1e-6)

    monkeypatch.setattr(all_steps.AllSteps, "__call__", wrong)
    *_, expected, _, found = both(cells.gru, False)
    assert error(found, expected) > 1e-8


def test_the_loop_holds_products_and_additions_only():
    recurrence, *_ = both(cells.gru, False)
    lines = [line.strip() for line in recurrence.loop.source.splitlines()[2:]]
    assert [line.partition("(")[0].partition(".")[2] for line in lines] == ["mul", "addcmul_", "addmm_"]


def test_products_that_add_up_become_one():
    recurrence, *_ = both(cells.separate, False)
    assert recurrence.loop.source.count("addmm_(") == 1
    assert recurrence.loop.source.count("mm(") == 0


def test_what_does_not_collapse_is_carried_out():
    recurrence, *_ = both(cells.normed, False)
    assert recurrence.loop.applied


def test_unneeded_gradients_are_not_taken():
    inputs, states, weights = cells.example(cells.gru)
    step = tuple(each[0] for each in inputs)
    recurrence = Recurrence(cells.gru, step, states, weights, [False, False, True, False, False])
    cotangents = [torch.ones(6, 3, 5, dtype=torch.float64)]
    _, found = pulled(recurrence, inputs, states, weights, cotangents, False)
    _, expected = reference(cells.gru, inputs, states, weights, cotangents)
    assert [each is None for each in found] == [True, False, True, False, True, True]
    assert error([found[1], found[3]], [expected[1], expected[3]]) < 1e-12


def test_inputs_are_not_read_where_everything_was_kept():
    inputs, states, weights = cells.example(cells.gru)
    recurrence = traced(cells.gru, inputs, states, weights)
    assert recurrence.reads_inputs(False)
    assert recurrence.reads_inputs(True)  # the gradient of W is a product with the input
    step = tuple(each[0] for each in inputs)
    frozen = Recurrence(cells.gru, step, states, weights, [True, False, True, False, False])
    assert not frozen.reads_inputs(True)


def test_cells_that_cannot_be_evaluated_again_are_refused():
    def dropping(inputs, states, weights):
        return (torch.dropout(states[0] + inputs[0] @ weights[0], 0.5, True),)

    example = (torch.ones(2, 3),), (torch.ones(2, 4),), (torch.ones(3, 4),)
    with pytest.raises(RewriteError, match="draws random numbers"):
        Recurrence(dropping, *example, [True, True])


def test_cells_that_write_into_what_they_are_given_are_refused():
    def writing(inputs, states, weights):
        inputs[0].add_(1)
        return (states[0] + inputs[0] @ weights[0],)

    example = (torch.ones(2, 3),), (torch.ones(2, 4),), (torch.ones(3, 4),)
    with pytest.raises(RewriteError, match="writes into"):
        Recurrence(writing, *example, [False, True])
