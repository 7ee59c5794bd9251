"""Trimming drops what all groups have finished, and nothing else; a lane that nobody reads is reported."""

import logging
import time

import pytest

from outbox.housekeeper import Housekeeper
from outbox.loop import Stop
from outbox.settings import Settings

ENTRIES = 250
NODE = 100  # a stream is trimmed by whole nodes, of at most so many entries


@pytest.fixture
def keeper(box):
    made = []

    def keeper(**settings):
        settings = {"stream_retention_seconds": 0.0} | settings
        named = {"database_url": box.database_url, "redis_url": box.redis_url}
        made.append(Housekeeper(Settings(**named, **settings), Stop()))
        return made[-1]

    yield keeper
    for keeper in made:
        keeper.close()


@pytest.fixture
def published(box):
    """A lane with entries."""
    for n in range(ENTRIES):
        box.add(str(n))
    box.relay(batch_size=50).drain()
    return box


def read(box, group, count):
    """Have a group read so many entries, and return their ids."""
    found = box.redis.xreadgroup(group, "c", {"s": ">"}, count=count)
    return [entry_id for entry_id, _ in found[0][1]]


def ids(box):
    return [entry_id for entry_id, _ in box.redis.xrange("s")]


def kept_from(box, everything):
    """Return the place of the first entry that is left; all after it must be there."""
    left = ids(box)
    assert left == everything[-len(left) :]
    return len(everything) - len(left)


def until_next_millisecond():
    start = time.time_ns() // 1_000_000
    while time.time_ns() // 1_000_000 == start:
        pass


def test_what_the_only_group_has_finished_is_dropped(published, keeper):
    everything = ids(published)
    published.redis.xgroup_create("s", "g", 0)
    published.redis.xack("s", "g", *read(published, "g", ENTRIES))
    until_next_millisecond()
    trimmed = keeper().trim()
    assert trimmed >= ENTRIES - NODE
    assert kept_from(published, everything) == trimmed


def test_what_the_slowest_group_has_pending_is_kept_with_all_that_follows(published, keeper):
    everything = ids(published)
    for group in ("fast", "slow"):
        published.redis.xgroup_create("s", group, 0)
        published.redis.xack("s", group, *read(published, group, ENTRIES))
    published.redis.xgroup_create("s", "stuck", 0)
    stuck = read(published, "stuck", ENTRIES)
    published.redis.xack("s", "stuck", *(entry_id for entry_id in stuck if entry_id != everything[120]))
    until_next_millisecond()
    assert keeper().trim() > 0
    assert 120 - NODE <= kept_from(published, everything) <= 120


def test_what_a_group_has_not_read_is_kept(published, keeper):
    everything = ids(published)
    published.redis.xgroup_create("s", "g", 0)
    published.redis.xack("s", "g", *read(published, "g", 130))
    until_next_millisecond()
    assert keeper().trim() > 0
    assert 130 - NODE <= kept_from(published, everything) <= 130
    published.redis.xgroup_create("s", "new", 0)
    assert keeper().trim() == 0


def test_what_is_younger_than_the_retention_is_kept(published, keeper):
    published.redis.xgroup_create("s", "g", 0)
    published.redis.xack("s", "g", *read(published, "g", ENTRIES))
    assert keeper(stream_retention_seconds=3600).trim() == 0
    assert keeper(trim="off").trim() == 0
    assert len(ids(published)) == ENTRIES


def test_a_lane_that_nobody_reads_is_kept_and_reported_once(published, keeper, caplog):
    caplog.set_level(logging.WARNING)
    keeper = keeper()
    assert [keeper.trim() for _ in range(4)] == [0] * 4
    actions = [record.action for record in caplog.records]
    assert actions == ["lane_unread"]
    assert len(ids(published)) == ENTRIES


def test_a_lane_is_not_taken_for_lost_because_it_was_trimmed(published, keeper):
    published.redis.xgroup_create("s", "g", 0)
    published.redis.xack("s", "g", *read(published, "g", ENTRIES))
    until_next_millisecond()
    keeper().trim()
    published.add("later")
    published.relay().drain()
    assert published.lane()[-1] == "later"
    assert published.value("SELECT streams_lost FROM outbox_relay") == 0
