"""A soak of a few seconds, and that it catches what repeats and what leaks; `make soak` goes on for longer."""

import os

import pytest

from outbox import testing
from tests.faults.flat import FEWEST, Series, curve
from tests.faults.mixed import FAULTS
from tests.faults.soak import soak_for

SECONDS, EVENTS_A_SECOND = 6, 100

own_servers = pytest.mark.skipif(
    testing.DATABASE_URL in os.environ or testing.REDIS_URL in os.environ,
    reason="servers of the environment cannot be killed",
)


@own_servers
def test_a_short_soak_loses_nothing_and_nothing_grows():
    verdict = soak_for(SECONDS, rate=EVENTS_A_SECOND, seed=1)
    assert verdict.wrong() == {}
    assert verdict.outcome.findings.committed > SECONDS * EVENTS_A_SECOND / 2
    assert verdict.soak.inflicted.keys() <= FAULTS.keys()
    assert sum(map(len, verdict.soak.inflicted.values())) > 0


@own_servers
def test_the_controls_are_caught():
    """A naive relay, and consumers that keep a descriptor and some memory of each event."""
    verdict = soak_for(SECONDS, rate=EVENTS_A_SECOND, seed=1, faults=["replies lost"], naive=True, leaks=True)
    wrong = verdict.wrong()
    assert wrong["repeated"]
    assert wrong["consumer: descriptors"] == wrong["consumer: memory"] == "grows"


def series(*values: float, share: float = 0.05, more: float = 2) -> Series:
    return Series("memory", "MB", lambda: 0, share, more, [*map(float, values)])


def test_what_settles_within_the_first_third_is_flat():
    assert series(*range(30), *[30] * 60).wrong() == ""


def test_what_goes_up_and_down_is_flat():
    assert series(*[30, 36] * 15).wrong() == ""


def test_what_grows_by_more_than_the_margin_is_not_flat():
    assert series(*[100] * 20, *[106.9] * 10).wrong() == ""
    assert series(*[100] * 20, *[107.1] * 10).wrong() == "grows"


def test_what_grows_steadily_from_nothing_is_not_flat_within_a_wide_margin():
    assert series(*range(90), share=0.25, more=2).wrong() == "grows"


def test_few_samples_say_nothing():
    assert "too few" in series(*[1] * (FEWEST - 1)).wrong()
    assert series(*[1] * FEWEST).wrong() == ""


def test_a_curve_starts_at_zero():
    assert curve([]) == ""
    assert curve([0, 0]) == "▁▁"
    assert curve([0, 50, 100]) == "▁▅█"
    assert len(curve([1.0] * 1000)) == 40
