"""What decides how an operation runs, recorded once and entered again elsewhere."""

import threading

import pytest
import torch

from rewriter.runtime.ambient import Ambient


def now():
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


@pytest.fixture(autouse=True)
def _restored():
    yield
    torch.use_deterministic_algorithms(False)


def record(autocast=None, deterministic=False, warn_only=False, cached=True):
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    try:
        if autocast is None:
            return Ambient.now(), now()
        with torch.autocast("cpu", autocast, cache_enabled=cached):
            return Ambient.now(), now()
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    "plain": {},
    "bfloat16": {"autocast": torch.bfloat16},
    "float16, no cache": {"autocast": torch.float16, "cached": False},
    "deterministic": {"deterministic": True},
    "warn only": {"deterministic": True, "warn_only": True, "autocast": torch.bfloat16},
}


@pytest.mark.parametrize("inner", STATES)
@pytest.mark.parametrize("outer", STATES)
def test_every_state_is_entered_from_every_other(outer, inner):
    ambient, expected = record(**STATES[inner])
    before, _ = record(**STATES[outer])
    with before.enter():
        around = now()
        with ambient.enter():
            found = now()
        assert now() == around
    if expected[0]:
        assert found == expected
    else:  # the dtype of an autocast that is off decides nothing
        assert (found[0], found[3:]) == (expected[0], expected[3:])


def test_a_thread_inherits_nothing_and_takes_it_along():
    ambient, expected = record(autocast=torch.bfloat16)
    found = {}

    def run():
        found["bare"] = torch.is_autocast_enabled("cpu")
        with ambient.enter():
            found["entered"] = now()
            found["dtype"] = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    with torch.autocast("cpu", torch.bfloat16):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert found == {"bare": False, "entered": expected, "dtype": torch.bfloat16}


def test_an_error_inside_restores():
    ambient, _ = record(autocast=torch.bfloat16, deterministic=True)
    before = now()
    with pytest.raises(ValueError, match="inside"), ambient.enter():
        raise ValueError("inside")
    assert now() == before


def test_equal_states_are_equal():
    assert record()[0] == record()[0]
    assert record(autocast=torch.bfloat16)[0] != record()[0]
    assert record(autocast=torch.bfloat16)[0] != record(autocast=torch.float16)[0]
    assert record(deterministic=True)[0] != record(deterministic=True, warn_only=True)[0]
