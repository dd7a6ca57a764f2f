"""How many iterations run: numbers, schedules, and what "auto" learns from the lengths of the terms."""

import json
import math

import pytest

from rewriter.runtime.errors import RewriteError, RewriteWarning
from rewriter.runtime.iterations import Iterations


def ran(iterations, terms, forward=0, most=1000):
    """(iterations run, last verdict) on terms of given lengths that all point the same way."""
    limit = iterations.limit(forward, most)
    lengths = [terms(0)]
    verdict = "stop"
    for index in range(1, limit + 1):
        lengths.append(terms(index))
        if iterations.watches(forward):
            verdict = iterations.watch(forward, most, lengths, abs(math.fsum(lengths)))
            if verdict != "on":
                break
    return len(lengths) - 1, verdict


def poisson(gain):
    return lambda index: gain**index / math.factorial(index)


def test_a_number_is_cut_at_what_is_exact():
    three = Iterations(3, "part")
    assert [three.limit(0, most) for most in (10, 3, 2, 0)] == [3, 3, 2, 0]
    assert not three.exact(0)
    assert not three.watches(0)
    assert three.get_state() == {}


def test_a_schedule_rises_with_the_forwards():
    rising = Iterations(((0, 1), (10, 4), (20, "exact")), "part")
    assert [rising.limit(forward, 50) for forward in (-1, 0, 9, 10, 19, 20, 99)] == [1, 1, 1, 4, 4, 50, 50]
    assert [rising.exact(forward) for forward in (0, 19, 20, 1000)] == [False, False, True, True]
    assert rising.describe() == "1, 4 from forward 10 on, exact from forward 20 on"


@pytest.mark.parametrize(
    "wrong",
    [-1, 1.5, True, None, "many", "exact", (), (1, 2), ((1, 2),), ((0, 1), (0, 2)), ((0, 1), (5, -1)), ((0, "auto"),)],
)
def test_other_values_are_refused(wrong):
    with pytest.raises(RewriteError, match=r"(?s)is not known.*remedy: a whole number"):
        Iterations(wrong, "part")


@pytest.mark.parametrize("gain", [0.1, 0.5, 1.0, 1.5])
def test_auto_stops_where_little_is_left(gain):
    count, verdict = ran(Iterations("auto", "part"), poisson(gain))
    assert verdict == "stop"
    left = math.exp(gain) - sum(poisson(gain)(index) for index in range(count + 1))
    before = math.exp(gain) - sum(poisson(gain)(index) for index in range(count - 1))
    assert left < 0.1 * math.exp(gain)
    assert count == 1 or before > 0.05 * math.exp(gain)  # not much later than needed


def test_the_count_is_kept_and_measured_again_after_a_hundred_forwards():
    auto = Iterations("auto", "part")
    first, _ = ran(auto, poisson(1.0), forward=3)
    assert [auto.watches(forward) for forward in (3, 4, 102, 103, 104)] == [True, False, False, True, True]
    assert auto.limit(50, 1000) == first
    assert auto.limit(50, 1) == 1
    second, _ = ran(auto, poisson(0.1), forward=103)
    assert second < first
    assert auto.limit(104, 1000) == second


def test_several_chains_keep_the_largest_count():
    auto = Iterations("auto", "part")
    many, _ = ran(auto, poisson(1.5))
    few, _ = ran(auto, poisson(0.1))
    assert few < many == auto.limit(1, 1000)


def test_growth_gives_the_exact_backward_with_one_warning():
    auto = Iterations("auto", "part")
    with pytest.warns(RewriteWarning, match=r"part do not converge.*shift"):
        count, verdict = ran(auto, lambda index: math.comb(24, index) * 0.2**index)
    assert verdict == "exact"
    assert count == 2
    assert auto.exact(1)
    assert not auto.exact(100)  # measured anew
    assert ran(auto, lambda index: 2.0**index, forward=100)[1] == "exact"  # pytest fails on a second warning


def test_terms_that_never_shrink_end_at_the_ceiling():
    auto = Iterations("auto", "part")
    with pytest.warns(RewriteWarning):
        count, verdict = ran(auto, lambda index: 1 - 1e-3 * index)
    assert (count, verdict) == (32, "exact")


def test_a_short_chain_is_exact_after_its_last_iteration():
    auto = Iterations("auto", "part")
    assert ran(auto, lambda index: 2.0**index, most=2) == (2, "stop")
    assert auto.exact(1)
    assert not Iterations("auto", "part").exact(0)


@pytest.mark.parametrize(("lengths", "total"), [([0.0, 0.0], 0.0), ([1.0, math.nan], 1.0), ([math.inf] * 2, math.inf)])
def test_nothing_is_learnt_from_nothing(lengths, total):
    auto = Iterations("auto", "part")
    assert auto.watch(0, 10, lengths, total) == "stop"
    assert auto.watches(1)
    assert auto.get_state() == {}


def test_what_was_learnt_survives_as_text():
    auto = Iterations("auto", "part")
    ran(auto, poisson(1.0), forward=7)
    again = Iterations("auto", "part")
    again.set_state(json.loads(json.dumps(auto.get_state())))
    assert again.describe() == auto.describe()
    assert [again.limit(8, most) for most in (2, 1000)] == [auto.limit(8, most) for most in (2, 1000)]
    assert Iterations("auto", "part").describe() == "auto, not measured yet"
