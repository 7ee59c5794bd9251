"""A Redis that fills up: backfill waits in PostgreSQL first, primary last, and nothing else is held up."""

import pytest

from outbox.errors import RedisUnavailable
from outbox.lanes import BEYOND, Lanes
from outbox.priority import LOWEST, Priority
from outbox.settings import Settings
from outbox.status import read_status
from tests.integration.test_wakeup import running, wait_until

LANES = Lanes()


@pytest.fixture
def maxmemory(box):
    """Set the share of its memory that Redis has used, in percent."""
    before = box.redis.config_get("maxmemory", "maxmemory-policy")

    def use(percent):
        used = box.redis.info("memory")["used_memory"]
        box.redis.config_set("maxmemory", int(used * 100 / percent) if percent else 0)

    yield use
    for name, value in before.items():
        box.redis.config_set(name, value)


# -- the rule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("used", "floor"), [(0.0, LOWEST), (0.79, LOWEST), (0.8, 0), (0.89, 0), (0.9, BEYOND), (1.2, BEYOND)]
)
def test_backfill_waits_before_primary_does(used, floor):
    assert LANES.pause({}, 0, used, 0.8).floor == floor


def test_without_lanes_there_is_nothing_that_could_wait_first():
    assert Lanes(on=False).pause({}, 0, 0.8, 0.8).floor == BEYOND


def test_a_full_backfill_lane_waits_and_a_primary_one_from_twice_as_many():
    entries = {"a": 199, "a:backfill": 100, "b": 200, "b:backfill": 99, "c": None}
    assert LANES.pause(entries, 100, 0.0, 0.8).lanes == ("a:backfill", "b")
    assert LANES.pause(entries, 0, 0.0, 0.8).lanes == ()


# -- the relay ---------------------------------------------------------------------------------------------------


def relay_under_pressure(box, **settings):
    """Make a relay that has looked at the pressure once."""
    relay = box.relay(**settings)
    relay._housekeeper.look_at_pressure()
    return relay


def settle(relay):
    """Take steps until there is nothing left that need not wait."""
    relay._behind_again = 0.0
    while relay.run_once():
        relay._behind_again = 0.0


def test_what_a_full_lane_would_get_waits_and_the_rest_goes_on(box):
    box.add("first", priority=Priority.LOW)
    box.relay().drain()
    relay = relay_under_pressure(box, lane_max_entries=1)
    box.add("waits", priority=Priority.LOW)
    box.add("other", priority=Priority.LOW, stream="t")
    box.add("urgent")
    settle(relay)
    assert (box.lane(), box.lane("s:backfill"), box.lane("t:backfill")) == (["urgent"], ["first"], ["other"])
    assert box.waiting() == ["waits"]
    box.redis.xtrim("s:backfill", maxlen=0)
    relay._housekeeper.look_at_pressure()
    settle(relay)
    assert (box.lane("s:backfill"), box.waiting()) == (["waits"], [])


def test_what_is_committed_late_behind_the_floor_is_not_passed_over(box):
    """A claim that stops at the floor has not looked below it for what ended transactions have written."""
    relay = relay_under_pressure(box)
    with box.connect() as early:
        box.add("early", on=early, priority=Priority.LOW, key="k")
        box.add("a", priority=Priority.LOW)
        box.add("b")
        settle(relay)
        relay._housekeeper.pause = LANES.pause({}, 0, 0.85, 0.8)
        early.commit()
    box.add("c")
    settle(relay)
    assert box.waiting() == ["early"]
    relay._housekeeper.pause = LANES.pause({}, 0, 0.0, 0.8)
    box.add("late", priority=Priority.LOW, key="k")
    settle(relay)
    assert box.lane("s:backfill") == ["a", "early", "late"]


def test_of_a_redis_that_fills_up_backfill_waits_and_goes_on_by_itself(box, maxmemory):
    maxmemory(85)
    relay = relay_under_pressure(box)
    box.add("bulk", priority=Priority.BULK)
    box.add("payment")
    settle(relay)
    assert (box.lane(), box.waiting()) == (["payment"], ["bulk"])
    with running(relay):
        maxmemory(0)
        wait_until(lambda: not box.waiting())
    assert box.lane("s:backfill") == ["bulk"]


def test_run_once_leaves_what_would_fill_redis_and_ends(box, maxmemory):
    maxmemory(85)
    box.add("bulk", priority=Priority.BULK)
    box.add("payment")
    assert box.relay().drain() == 1
    assert (box.lane(), box.waiting()) == (["payment"], ["bulk"])


def test_with_a_nearly_full_redis_everything_waits_and_no_attempt_is_spent(box, maxmemory):
    maxmemory(95)
    relay = relay_under_pressure(box)
    box.add("payment", priority=Priority.CRITICAL)
    with pytest.raises(RedisUnavailable, match="nearly full"):
        relay.run_once()
    assert box.value("SELECT attempts FROM outbox") == 0
    maxmemory(0)
    relay._housekeeper.look_at_pressure()
    settle(relay)
    assert box.lane() == ["payment"]


def test_status_says_which_lanes_wait(box, maxmemory):
    box.add("bulk", priority=Priority.BULK)
    box.add("payment")
    box.relay().drain()
    maxmemory(85)
    state = read_status(Settings(database_url=box.database_url, redis_url=box.redis_url))
    assert {lane: facts["waits"] for lane, facts in state["lanes"].items()} == {
        "s": False,
        "s:backfill": True,
    }
    assert 0.8 < state["redis"]["memory_used"] < 0.9
