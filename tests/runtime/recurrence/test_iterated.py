"""Highway-BP through time on cells: exact in the end, truncated where K is zero, whatever the splitting."""

import cells
import pytest
import torch

from rewriter.runtime.iterations import Iterations
from rewriter.runtime.recurrence import scan
from rewriter.runtime.recurrence.iterated import Highway
from rewriter.runtime.recurrence.recurrence import Recurrence
from rewriter.runtime.recurrence.splitting import Splitting

STEPS = 6


def reference(cell, inputs, states, weights, cotangents, depth=None):
    """Gradients by autograd, in the order inputs, states, weights.

    depth: of truncation: a cotangent crosses at most that many steps before it ends at a step's weights and inputs.
    """
    sources = [each.detach().requires_grad_() for each in (*inputs, *states, *weights)]
    first, last = len(inputs), len(inputs) + len(states)
    given, weights = sources[:first], tuple(sources[last:])
    if depth is None:
        results = cells.in_a_loop(cell, given, tuple(sources[first:last]), weights)
        return torch.autograd.grad(results, sources, cotangents)
    steps = len(given[0])
    with torch.no_grad():
        after = cells.in_a_loop(cell, given, tuple(sources[first:last]), weights)[: len(states)]
    totals = [torch.zeros_like(each) for each in sources]
    states_, outputs = range(len(states)), range(len(states), len(cotangents))
    for end in range(steps):
        # A cell's own output belongs to the state before the step.
        for which, length in ((states_, depth), (outputs, depth + 1)):
            begin = max(0, end - length)
            entered = tuple(
                s if not begin else each[begin - 1] for s, each in zip(sources[first:last], after, strict=True)
            )
            window = cells.in_a_loop(cell, [each[begin : end + 1] for each in given], entered, weights)
            results, own = [window[index][-1] for index in which], [cotangents[index][end] for index in which]
            found = torch.autograd.grad(results, sources, own, allow_unused=True) if results else ()
            for total, each in zip(totals, found, strict=False):
                if each is not None:
                    total += each
    return totals


def made(cell, steps=STEPS, dtype=torch.float64, **sizes):
    inputs, states, weights = cells.example(cell, steps=steps, dtype=dtype, **sizes)
    torch.manual_seed(1)
    cotangents = [torch.randn_like(each) for each in cells.in_a_loop(cell, inputs, states, weights)]
    return inputs, states, weights, cotangents


_traces = {}


def traced(cell, inputs, states, weights):
    """Once per cell and shapes, unless the splitting is another one."""
    key = (cell, inputs[0].dtype, inputs[0].shape[1:], Splitting.__init__)
    if key not in _traces:
        needed = [True] * (len(inputs) + len(weights))
        _traces[key] = Recurrence(cell, tuple(each[0] for each in inputs), states, weights, needed)
    return _traces[key]


def pulled(cell, given, iterations, shift=0.0):
    """(gradients of inputs, states and weights; steps evaluated)."""
    inputs, states, weights, cotangents = given
    recurrence = traced(cell, inputs, states, weights)
    ran = recurrence.run(inputs, states, weights, False)
    before = tuple(torch.cat([s[None], after[:-1]]) for s, after in zip(states, ran.states, strict=True))
    buffers = [torch.cat([torch.zeros_like(each[:1]), each]) for each in cotangents[: len(states)]]
    highway = Highway(Iterations(iterations, "cell"), 0, shift)
    found = recurrence.pull(inputs, before, weights, (), buffers, tuple(cotangents[len(states) :]), highway)
    return [*found.inputs, *found.states, *found.weights], highway.vjps


def error(found, expected):
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)


def two_way(inputs, states, weights):
    """Two states that reach each other element by element: no order for K, so only its diagonal is cheap."""
    (x,), (a, b), (w,) = inputs, states, weights
    return torch.tanh(0.5 * a + 0.3 * b + x @ w), torch.sigmoid(0.2 * a - 0.7 * b) + a @ w


def doubled(inputs, states, weights):
    """A state that reaches itself in three ways without a product."""
    (x,), (h,), (w,) = inputs, states, weights
    return (h + 0.5 * h + h * torch.tanh(x @ w) - 0.1 * (h @ w),)


def example_of(cell, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    count = 2 if cell is two_way else 1
    made_ = [torch.randn(*shape, generator=generator, dtype=dtype) for shape in [(STEPS, 3, 4), *[(3, 4)] * count]]
    weights = (0.5 * torch.randn(4, 4, generator=generator, dtype=dtype),)
    inputs, states = (made_[0],), tuple(made_[1:])
    cotangents = [torch.randn_like(each) for each in cells.in_a_loop(cell, inputs, states, weights)]
    return inputs, states, weights, cotangents


@pytest.mark.parametrize("shift", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("cell", cells.ALL, ids=lambda cell: cell.__name__)
def test_exact_with_one_iteration_less_than_steps(cell, shift):
    given = made(cell)
    found, vjps = pulled(cell, given, STEPS - 1, shift)
    assert error(found, reference(cell, *given)) < 1e-12
    assert vjps == STEPS + sum(range(2, STEPS + 1))
    if cell is not cells.fast_weights or shift:  # whose J is zero: exact from the start
        assert error(pulled(cell, given, STEPS - 3, shift)[0], reference(cell, *given)) > 1e-6


@pytest.mark.parametrize("shift", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("cell", [two_way, doubled])
def test_exact_where_states_reach_each_other(cell, shift):
    given = example_of(cell)
    assert error(pulled(cell, given, STEPS - 1, shift)[0], reference(cell, *given)) < 1e-12


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("cell", [*cells.ALL, two_way, doubled], ids=lambda cell: cell.__name__)
def test_without_k_it_is_truncated_backpropagation(cell, depth):
    given = made(cell) if cell in cells.ALL else example_of(cell)
    found, _ = pulled(cell, given, depth, shift=1.0)
    assert error(found, reference(cell, *given, depth)) < 1e-12
    assert error(found, reference(cell, *given, depth + 1)) > 1e-6


@pytest.mark.parametrize("cell", cells.ALL, ids=lambda cell: cell.__name__)
def test_long_sequences_in_blocks(cell):
    """Enough steps for the recurrences to run in blocks, with some left over."""
    given, shift = made(cell, steps=83), 0.3 if cell is cells.normed else 0.0
    assert error(pulled(cell, given, 82, shift)[0], reference(cell, *given)) < 1e-12


def test_terms_that_cancel():
    """A cell that takes back part of what it keeps: large terms with K as it is, none with a shift."""
    given = made(cells.normed, steps=83)
    expected = reference(cells.normed, *given)
    assert error(pulled(cells.normed, given, 5)[0], expected) > 1e3
    assert error(pulled(cells.normed, given, 5, shift=0.2)[0], expected) < 1


@pytest.mark.parametrize("cell", [cells.gru, cells.normed, cells.gates_as_views], ids=lambda cell: cell.__name__)
def test_single_precision(cell):
    given = made(cell, steps=20, dtype=torch.float32, width=8, size=16)
    assert error(pulled(cell, given, 19)[0], reference(cell, *given)) < 1e-5


@pytest.mark.parametrize("cell", [cells.gru, cells.gates_as_views, cells.sliced], ids=lambda cell: cell.__name__)
def test_k_counted_twice_is_seen(monkeypatch, cell):
    """The negative control: K stays in J too."""
    plain = Splitting.__init__

    def wrong(self, joint, collapse):
        plain(self, joint, collapse)
        self.rest = collapse.updates

    monkeypatch.setattr(Splitting, "__init__", wrong)
    given = made(cell)
    assert error(pulled(cell, given, STEPS - 1)[0], reference(cell, *given)) > 1e-3


def test_one_step():
    given = made(cells.gru, steps=1)
    found, vjps = pulled(cells.gru, given, 5)
    assert error(found, reference(cells.gru, *given)) < 1e-12
    assert vjps == 1


def test_auto_runs_the_loop_where_terms_grow():
    def unstable(inputs, states, weights):
        return (states[0] - 0.9 * (states[0] @ weights[0]) + inputs[0],)

    generator = torch.Generator().manual_seed(0)
    x, h = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in [(30, 2, 3), (2, 3)])
    given = (x,), (h,), (torch.eye(3, dtype=torch.float64),), [torch.randn_like(x)]
    with pytest.warns(UserWarning, match="do not converge"):
        found, vjps = pulled(unstable, given, "auto")
    assert error(found, reference(unstable, *given)) < 1e-12
    assert vjps == 30 + 30 + 29  # two iterations, the second without its last row, and the loop
    assert error(pulled(unstable, given, 3)[0], reference(unstable, *given)) > 10


@pytest.mark.parametrize("steps", [1, 63, 64, 100, 121])
@pytest.mark.parametrize("elements", [3, 5000])
def test_scans_agree_with_the_plain_recurrence(steps, elements):
    torch.manual_seed(0)
    factors, u = torch.randn(steps, elements).double().sigmoid(), torch.randn(steps + 1, elements).double()
    for given in (factors, factors[:1].expand(steps, elements), None):
        expected, found = u.clone(), u.clone()
        for row in range(steps - 1, -1, -1):
            expected[row] += expected[row + 1] * (1 if given is None else given[row])
        scan.Scan(given, steps, elements)(found)
        assert torch.allclose(found, expected, rtol=1e-13, atol=1e-13)
