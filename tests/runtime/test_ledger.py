import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from rewriter.runtime.ledger import Ledger


def test_counts_by_region_and_purpose():
    ledger = Ledger()
    ledger.add("a", capture=7)
    ledger.add("a", calls=1, forward=128)
    ledger.add("a", calls=1, probes=256, quality=128, failed=3)
    ledger.add("b", vjps=1, forwards=2)
    assert ledger["a"].queries == 512
    assert (ledger.total("queries"), ledger.total("calls"), ledger.total("vjps"), ledger.total("failed")) == (
        512,
        2,
        1,
        3,
    )
    assert ledger["never"].queries == 0
    assert ledger.regions() == ("a", "b")
    lines = str(ledger).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[:4] == ["a", "7", "2", "512"]


def test_unknown_names_are_refused():
    ledger = Ledger()
    with pytest.raises(KeyError):
        ledger.add("a", guesses=1)


def test_survives_pickle_and_state():
    ledger = Ledger()
    ledger.add("a", probes=5)
    again, other = pickle.loads(pickle.dumps(ledger)), Ledger()
    other.set_state(ledger.get_state())
    for copy in (again, other):
        copy.add("a", probes=1)
        assert copy["a"].probes == 6
    assert ledger["a"].probes == 5


def test_increments_from_threads_add_up():
    ledger = Ledger()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: ledger.add("a", calls=1, probes=3), range(2000)))
    assert (ledger["a"].calls, ledger["a"].probes) == (2000, 6000)
