"""A chain's cuts among each other: whose copies are worth more, and whose noise has grown for nothing."""

import copy

import cuts
import pytest
import torch
from cuts import SEQUENCES, Loop, Net, X, Y
from torch import nn

from rewriter import Plan, RewriteError, UlrCut
from rewriter.runtime.estimators.noise_size import NoiseSize


def fading(factor):
    """A recurrence that keeps little of what it knew."""
    net = Loop(nn.RNNCell)
    with torch.no_grad():
        net.cell.weight_hh *= factor / net.cell.weight_hh.norm()
    return net


def chain(across, factor=0.7, **options):
    entry = UlrCut("cell", every=1, across=across, sigma=1e-3, **options)
    step = cuts.cut(fading(factor), entry, SEQUENCES)
    return step, step.latest.emitted.regions["cell"].rule


def spent(rule):
    return sum(cut.copies * cost for cut, cost in zip(rule.cuts, rule.facts.costs, strict=True))


@pytest.mark.parametrize("antithetic", [False, True])
def test_copies_move_to_where_noise_is_and_cost_no_more(antithetic):
    variances, own = {}, {}
    for across in ("uniform", "neyman"):
        step, rule = chain(across, copies=8, antithetic=antithetic)
        assert list(rule.facts.costs) == sorted(rule.facts.costs, reverse=True)
        budget = 8 * sum(rule.facts.costs)
        step(SEQUENCES, target=Y).backward()
        assert [cut.copies for cut in rule.cuts] == [8] * 6  # nothing was measured before
        before = step.ledger["cell"].probes
        assert before == 6 * 8 * len(Y)
        found = [cuts.gradients(step, SEQUENCES, Y)[1]["cell.weight_hh"] for _ in range(40)]
        own[across] = [cut.copies for cut in rule.cuts]
        assert step.ledger["cell"].probes - before == 40 * sum(own[across]) * len(Y)
        assert budget - 2 < spent(rule) <= budget
        variances[across] = float(torch.stack(found).var(0).sum())
    assert own["uniform"] == [8] * 6
    assert own["neyman"] == sorted(own["neyman"])
    assert own["neyman"][0] == 2
    assert own["neyman"][-1] > 16
    assert not (antithetic and any(copies % 2 for copies in own["neyman"]))
    assert variances["neyman"] < 0.6 * variances["uniform"]
    assert "across cuts neyman" in step.explain()


def test_shared_copies_are_unbiased_and_kept():
    net = fading(0.7)
    _, expected = cuts.gradients(net, SEQUENCES, Y)
    step, rule = chain("neyman", copies=4)
    for _ in range(2):
        step(SEQUENCES, target=Y).backward()
    state = copy.deepcopy(step.state_dict())
    counts = [cut.copies for cut in rule.cuts]
    assert len(set(counts)) > 1
    found = [cuts.gradients(step, SEQUENCES, Y)[1] for _ in range(100)]
    for name in ("cell.weight_hh", "cell.weight_ih"):
        errors = torch.stack([each[name] for each in found]) - expected[name]
        assert float((errors.mean(0) / errors.std(0) * 10).abs().max()) < 4.8
        half = errors + expected[name] / 2  # negative control
        assert float((half.mean(0) / half.std(0) * 10).abs().max()) > 4.8
    other, again = chain("neyman", copies=4)
    other.load_state_dict(state)
    assert [cut.copies for cut in again.cuts] == counts
    _, same = cuts.gradients(other, SEQUENCES, Y)
    assert all(torch.equal(same[name], found[0][name]) for name in same)


def test_with_copies_from_noise_and_cost_their_sum_is_shared():
    step, rule = chain("neyman", copies="auto")
    for _ in range(2):
        step(SEQUENCES, target=Y).backward()
    wanted = sum(cut.wanted * cost for cut, cost in zip(rule.cuts, rule.facts.costs, strict=True))
    assert wanted - 1 < spent(rule) <= wanted
    assert [cut.copies for cut in rule.cuts] != [cut.wanted for cut in rule.cuts]


def test_spelled_right():
    with pytest.raises(RewriteError, match="across='cost'"):
        UlrCut("cell", across="cost")
    with pytest.raises(RewriteError, match="no Sobol sets"):
        UlrCut("cell", across="neyman", copies=80, directions="sobol")
    entry = UlrCut("cell", every=2, across="neyman", sigma="learned")
    assert Plan.parse(str(entry)) == Plan([entry])


def grown(step, backwards):
    rule = step.latest.emitted.regions["cell"].rule
    for _ in range(backwards):
        step(SEQUENCES.float(), target=Y).backward()
    return [cut.size.factor for cut in rule.cuts]


def test_a_cut_that_has_faded_does_not_keep_larger_noise(monkeypatch):
    """Nothing of the first states is left at the end, in float32; the last cut is heard."""

    def step():
        return cuts.cut(fading(0.05).float(), UlrCut("cell", every=1, copies=4), SEQUENCES.float())

    faded = step()
    assert grown(faded, 6) == [1] * 6
    tried = faded.ledger["cell"].step_size
    assert tried > 0
    grown(faded, 6)
    assert faded.ledger["cell"].step_size == tried  # not again in vain at every step
    monkeypatch.setattr(NoiseSize, "shrink", lambda _: None)
    assert grown(step(), 6)[0] == 10  # negative control


def test_larger_noise_goes_once_it_is_not_needed():
    net = Net().float()
    step = cuts.cut(net, UlrCut("encoder", copies=4), X.float())
    (cut,) = step.latest.emitted.regions["encoder"].rule.cuts
    with torch.no_grad():
        net.tail[2].weight *= 1e-5
    for _ in range(3):
        step(X.float(), target=Y).backward()
    assert cut.size.factor > 2
    with torch.no_grad():
        net.tail[2].weight *= 1e5
    for _ in range(80):
        step(X.float(), target=Y).backward()
    assert cut.size.factor == 1
