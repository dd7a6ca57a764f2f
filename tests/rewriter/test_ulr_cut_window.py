"""`UlrCut(every=..., window=...)`: what a copy computes, what it is credited with, and what a window leaves out."""

import math

import cuts
import pytest
import steps
import torch
from steps import INPUTS, LENGTH, TARGETS, WEIGHT, WIDTH, Recurrence, Walk, entropy, weighed
from torch import nn

from rewriter import RewriteError, UlrCut, rewrite
from rewriter.runtime import ulr_cut
from rewriter.runtime.estimators.likelihood_ratio import row_gradients
from rewriter.runtime.noisy_tail import NoisyTail

TIME = 32  # of the closed forms
CUTS = LENGTH - 1
COPIES, SIGMA = 4, 0.1


def reach(first, last, coupling):
    """Of losses first to last - 1, how many depend on what enters at each step; (steps,)."""
    numbers = [[q <= t < q + coupling for q in range(TIME)] for t in range(first, last)]
    return torch.tensor(numbers, dtype=torch.float64).sum(0)


def theory(coupling, credited, width=WIDTH):
    """Trace variance over all steps with noise at all of them, each credited with so many losses from its own on."""
    total = 0.0
    for s in range(TIME):
        first, last = (0, TIME) if credited is None else (s, min(TIME, s + credited))
        counts = reach(first, last, coupling)
        total += float(width * counts.square().sum() + counts[s] ** 2)
    return total / COPIES


def simulated(coupling, credited, rows=600):
    generator = torch.Generator().manual_seed(1)
    unit = WEIGHT / WEIGHT.norm()
    noise = torch.randn(TIME, rows, COPIES, WIDTH, generator=generator, dtype=torch.float64)
    along = (noise @ unit) * SIGMA
    total = 0.0
    for s in range(TIME):
        first, last = (0, TIME) if credited is None else (s, min(TIME, s + credited))
        counts = reach(first, last, coupling)
        found = row_gradients(
            torch.einsum("trk,t->rk", along, counts),
            torch.zeros(rows, dtype=torch.float64),
            noise[s],
            SIGMA,
            directions="gaussian",
            baseline="clean",
            valid=torch.ones(rows, COPIES, dtype=torch.bool),
        )
        total += float((found - counts[s] * unit).square().sum(1).mean())
    return total


@pytest.mark.parametrize(("coupling", "credited", "expected"), [(32, 32, 0.51), (8, 32, 0.51), (8, 8, 0.165)])
def test_noise_at_all_steps_with_only_the_losses_behind_each(coupling, credited, expected):
    """What a chain whose copies carry noise everywhere gains by crediting each step with its own losses only."""
    wide = 10**6  # the term |g g'| of a step's own noise is one in `width`
    assert theory(coupling, credited, wide) / theory(coupling, None, wide) == pytest.approx(expected, abs=0.003)
    for each in (None, credited):
        assert simulated(coupling, each) == pytest.approx(theory(coupling, each), rel=0.05)


def samples(entry, net=None, rows=240, repeats=5):
    """Estimates at each cut of a walk, (samples, cuts, width), and the step they came from."""
    x = torch.randn(rows, LENGTH, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x.requires_grad_()
    target = torch.ones(rows, LENGTH, dtype=torch.float64)
    step = rewrite(net or Walk(), entry, loss=weighed, example=(x,))
    found = [torch.autograd.grad(step(x, target=target), x)[0][:, :-1] for _ in range(repeats)]
    local = step.model.weights[:-1]  # a step's own loss is differentiated exactly
    return torch.cat(found) - local, step


def spread(found, expected):
    return float((found - expected).square().sum(2).mean(0).sum())


def largest_z(found, expected):
    error = found - expected
    spreads = error.std(0) / math.sqrt(len(error))
    return float((error.mean(0) / spreads).abs().max())


def walked(window=LENGTH):
    """Gradients at the cuts of a walk: each later loss within reach adds the weight."""
    counts = torch.tensor([min(window, CUTS - s) for s in range(CUTS)], dtype=torch.float64)
    return counts[:, None] * WEIGHT


def entry(**options):
    chosen = {"every": 1, "copies": COPIES, "sigma": SIGMA, "directions": "gaussian", "baseline": "clean", **options}
    return UlrCut("cell", **chosen)


def test_copies_pay_for_nothing_before_their_cut(monkeypatch):
    """Losses before a cut are the clean pass's own numbers: (D + 1) |g|^2 / K, as if there were none."""
    found, step = samples(entry())
    expected = (WIDTH + 1) / COPIES * float(walked().square().sum())
    assert largest_z(found, walked()) < 4.8
    assert spread(found, walked()) == pytest.approx(expected, rel=0.05)
    # For its variance it runs about half of the stages that noise at all cuts at once would.
    stages = step.ledger["cell"].stages - 2 * 2 * 240 * CUTS * (CUTS + 1) // 2  # the two proofs, two batches
    assert stages == (5 + 1) * 240 * COPIES * CUTS * (CUTS + 1) // 2  # one backward is repeated for quality
    # Controls: a baseline that does not cancel them, and copies that carry other numbers there.
    none, _ = samples(entry(baseline="none"))
    assert spread(none, walked()) > 3 * expected
    completed = NoisyTail._completed

    def noisy(self, part, names):
        whole = completed(self, part, names)
        moved = SIGMA * WEIGHT.norm() * torch.randn(len(part.source), dtype=torch.float64)
        for name in set(names) - {n for cut in self.course.cuts for n in cut}:
            whole.held[name] = whole.held[name] + moved
        return whole

    monkeypatch.setattr(NoisyTail, "_completed", noisy)
    monkeypatch.setattr(ulr_cut, "prove", lambda *_: None)
    torch.manual_seed(0)
    late, _ = samples(entry())
    before = WIDTH / COPIES * float(WEIGHT.square().sum()) * sum(s**2 for s in range(CUTS))
    assert before > 0.5 * expected
    assert spread(late, walked()) == pytest.approx(expected + before, rel=0.05)


def test_a_window_leaves_out_what_comes_later():
    """Exactly that, and nothing where the dependence is no longer: a state of 8 inputs, and one of all of them."""
    short, step = samples(entry(window=7), Walk(parts=8))
    whole, other = samples(entry(), Walk(parts=8))
    assert largest_z(short, walked(7)) < 4.8
    assert spread(short, walked(7)) == pytest.approx(spread(whole, walked(7)), rel=0.05)
    assert step.ledger["cell"].queries == other.ledger["cell"].queries
    assert step.ledger["cell"].stages < 0.8 * other.ledger["cell"].stages
    long, _ = samples(entry(window=7))
    assert largest_z(long, walked(7)) < 4.8
    assert largest_z(long, walked()) > 10  # the bias
    expected = (WIDTH + 1) / COPIES * float(walked(7).square().sum())  # and what is left out is no noise either
    assert spread(long, walked(7)) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("window", [1, 2])
def test_what_is_estimated_is_the_truncated_gradient(every, window):
    net = Recurrence()
    parameters = list(net.cell.parameters())
    step = rewrite(
        net, UlrCut("cell", every=every, window=window, copies=400, sigma=1e-4), loss=entropy, example=(INPUTS,)
    )
    found = torch.autograd.grad(step(INPUTS, target=TARGETS), parameters)
    true = torch.autograd.grad(entropy(net(INPUTS), TARGETS), parameters)
    expected = steps.truncated(net, every, window)

    def error(reference):
        return max(float((a - b).norm() / b.norm()) for a, b in zip(found, reference, strict=True))

    assert error(expected) < 0.1
    for reference in (steps.truncated(net, every, window - 1), *([true] if every * (window + 1) < 6 else [])):
        assert error(reference) > 2 * error(expected)


def test_the_reference_is_the_whole_gradient_without_a_window():
    net = Recurrence()
    true = torch.autograd.grad(entropy(net(INPUTS), TARGETS), list(net.cell.parameters()))
    for a, b in zip(steps.truncated(net, 2, 4), true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell])
def test_a_window_over_all_stages_changes_nothing(cell):
    net = Recurrence(cell=cell)
    found = {}
    for window in (None, 4, 3, 2):
        step = rewrite(net, UlrCut("cell", every=2, copies=6, window=window), loss=entropy, example=(INPUTS,))
        loss = step(INPUTS, target=TARGETS)
        found[window] = (torch.autograd.grad(loss, list(net.cell.parameters())), step.ledger["cell"].stages)
    for window in (4, 3):  # three cuts, so three stages
        assert all(map(torch.equal, found[window][0], found[None][0]))
        assert found[window][1] == found[None][1]
    assert not torch.equal(found[2][0][0], found[None][0][0])
    assert found[2][1] == found[None][1]  # one stage left out, the last run through: the shortest chain that differs


@pytest.mark.parametrize("max_rows", [7, 40])
def test_chunks_change_no_number(max_rows):
    found = []
    for most in (None, max_rows):
        given = UlrCut("cell", every=1, copies=6, window=3, max_rows=most)
        step = rewrite(Recurrence(), given, loss=entropy, example=(INPUTS,))
        found.append(torch.autograd.grad(step(INPUTS, target=TARGETS), list(step.model.cell.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_pieces_of_a_recurrent_module():
    """All results are read behind the chain: what the window made is kept for that, the rest is the clean pass's."""

    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.head = nn.GRU(6, 5, batch_first=True), nn.Linear(5, 4)
            self.double()

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    class Cell(Recurrence):
        """The same numbers, a step at a time."""

        def __init__(self, read):
            super().__init__(cell=nn.GRUCell)
            with torch.no_grad():
                for own, other in zip(self.cell.parameters(), read.rnn.parameters(), strict=True):
                    own.copy_(other)
            self.head = read.head

    net = Read()
    step = rewrite(net, UlrCut("rnn", every=2, window=2, copies=400, sigma=1e-4), loss=entropy, example=(INPUTS,))
    found = torch.autograd.grad(step(INPUTS, target=TARGETS), list(net.rnn.parameters()))
    expected = steps.truncated(Cell(net), 2, 2)
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)) < 0.08
    wrong = steps.truncated(Cell(net), 2, 1)
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(found, wrong, strict=True)) > 0.1


def test_windows_that_reach_nothing_are_refused():
    with pytest.raises(RewriteError, match="ends before anything that the loss reads"):
        cuts.cut(cuts.Loop(nn.GRUCell), UlrCut("cell", every=1, window=2), cuts.SEQUENCES)
    with pytest.raises(RewriteError, match="counts sub-chains"):
        UlrCut("cell", window=2)
    for wrong in (0, 1.5, True):
        with pytest.raises(RewriteError, match="no number of sub-chains"):
            UlrCut("cell", every=2, window=wrong)
    step = rewrite(Recurrence(), UlrCut("cell", every=2, window=1), loss=entropy, example=(INPUTS,))
    assert "through 1 sub-chains" in step.explain()
    region = cuts.region_of(step)
    whole = rewrite(Recurrence(), UlrCut("cell", every=2), loss=entropy, example=(INPUTS,))
    other = cuts.region_of(whole)
    assert region.rule.facts.kind == other.rule.facts.kind == "trainable"
    assert region.rule.facts.ratios[0] > 1.3 * other.rule.facts.ratios[0]  # a copy costs less beside the rest
    assert region.rule.facts.ratios[2] == other.rule.facts.ratios[2]


def test_the_cuts_of_a_chain_are_no_steps():
    """Where the loss reads the last state only, all else goes through detached values: there is a derivative still."""
    step = cuts.cut(cuts.Loop(nn.GRUCell), UlrCut("cell", every=2), cuts.SEQUENCES)
    region = cuts.region_of(step)
    assert region.rule.facts.kind == "trainable"


def test_a_sum_kept_in_place_is_refused():
    """What changes it is read by nobody, so copies would keep the clean pass's sum: a gradient silently too small."""

    class Kept(Recurrence):
        def forward(self, x):
            h = x.new_zeros(x.shape[0], 5)
            total, outputs = None, []
            for t in range(self.length):
                h = self.cell(x[:, t], h)
                if total is None:
                    total = h.clone()
                else:
                    total.add_(h)
                outputs.append(self.head(total * 1.0))
            return torch.stack(outputs, 1)

    with pytest.raises(RewriteError, match="in place, which is read after that"):
        rewrite(Kept(), UlrCut("cell", every=2, copies=4), loss=entropy, example=(INPUTS,))
