"""A soak of a few seconds, and that it catches what repeats and what leaks; `make soak` goes on for longer."""

import os
import random

import pytest

from outbox import testing
from tests.faults.flat import FEWEST, Series, curve
from tests.faults.soak import soak_for

QUICK = [
    "kill -9 of a relay", "kill -9 of a consumer", "connections cut", "replies lost", "events refused",
    "kill -9 of Redis, its tail cut",
]  # fmt: skip
SHORT = {"seconds": 6, "rate": 100, "effects": 500, "seed": 1}

own_servers = pytest.mark.skipif(
    testing.DATABASE_URL in os.environ or testing.REDIS_URL in os.environ,
    reason="servers of the environment cannot be killed",
)


@own_servers
def test_a_short_soak_loses_nothing_and_nothing_grows():
    verdict = soak_for(**SHORT, faults=QUICK)
    assert verdict.wrong() == {}
    assert verdict.outcome.findings.committed >= SHORT["effects"]
    assert set() < verdict.soak.inflicted.keys() <= {*QUICK}


@own_servers
def test_the_controls_are_caught():
    """A naive relay, and consumers that keep a descriptor and some memory of each event."""
    wrong = soak_for(**SHORT, faults=["replies lost"], naive=True, leaks=True).wrong()
    assert wrong["repeated"]
    assert wrong["consumer: descriptors"] == wrong["consumer: memory"] == "grows"


def series(*values: float, share: float = 0.05, more: float = 2, creep: float = 2) -> Series:
    return Series("memory", "MB", lambda: 0, share, more, creep, [*map(float, values)])


def test_what_settles_within_the_first_third_is_flat():
    assert series(*range(30), *[30] * 60).wrong() == ""


def test_what_goes_up_and_down_is_flat():
    assert series(*[30, 36] * 15).wrong() == ""


def test_what_grows_by_more_than_the_margin_is_not_flat():
    assert series(*[100] * 20, *[106.9] * 10).wrong() == ""
    assert series(*[100] * 20, *[107.1] * 10).wrong() == "grows"


def test_what_grows_steadily_from_nothing_is_not_flat_within_a_wide_margin():
    assert series(*range(90), share=0.25, more=2).wrong() == "grows"


def memory_of_half_an_hour(growth: float) -> Series:
    """What warms up, is noisy, has a spike now and then, and grows by so much in all."""
    chance = random.Random(1)
    warm = [75 + 5 * min(n / 60, 1) + growth * n / 360 + chance.gauss(0, 0.3) for n in range(360)]
    return series(*(mb + 3 * (chance.random() < 0.05) for mb in warm), more=4)


def test_what_is_noisy_and_has_spikes_is_flat():
    assert memory_of_half_an_hour(growth=0).wrong() == ""
    assert abs(memory_of_half_an_hour(growth=0).trend()) < 0.2


def test_what_grows_by_a_little_each_time_creeps():
    assert memory_of_half_an_hour(growth=3.6).wrong() == "creeps"
    assert memory_of_half_an_hour(growth=3.6).trend() == pytest.approx(2.4, abs=0.2)


def test_descriptors_that_are_kept_creep_and_those_that_come_and_go_do_not():
    come_and_go = [10, 11, 19] * 60
    assert series(*come_and_go, creep=0.5).wrong() == ""
    assert series(*(n + place // 90 for place, n in enumerate(come_and_go)), creep=0.5).wrong() == ""
    assert series(*(n + place // 45 for place, n in enumerate(come_and_go)), creep=0.5).wrong() == "creeps"


def test_few_samples_say_nothing():
    assert "too few" in series(*[1] * (FEWEST - 1)).wrong()
    assert series(*[1] * FEWEST).wrong() == ""


def test_a_curve_starts_at_zero():
    assert curve([]) == ""
    assert curve([0, 0]) == "▁▁"
    assert curve([0, 50, 100]) == "▁▅█"
    assert len(curve([1.0] * 1000)) == 40
