"""What follows each answer of Redis, made to happen on real servers: AHEAD, BEHIND, GONE, REFUSED."""

import logging

import pytest

from outbox.errors import DatabaseUnavailable, Unsuitable
from outbox.streams import decode
from tests.integration.box import after, before


class Lost(Exception):
    """Stands for whatever ends a relay between its publish and its commit."""


def lose_commit(relay):
    """Have the next commit of the relay fail after its publish, with its connection closed."""

    def fail():
        relay._store.close()
        raise Lost

    before(relay._store, "record_batch", fail)


def journal(box):
    rows = box.sql.execute("SELECT batch, body FROM outbox_journal ORDER BY batch")
    return {batch: [event.payload for event in decode(body)[1]] for batch, body in rows}


# -- AHEAD ------------------------------------------------------------------------------------------------


def test_a_batch_whose_commit_was_lost_is_adopted_and_not_repeated(box, caplog):
    box.add("a")
    box.add("b")
    relay = box.relay()
    lose_commit(relay)
    with pytest.raises(Lost):
        relay.run_once()
    assert (box.lane(), box.waiting(), box.batch()) == (["a", "b"], ["a", "b"], 0)
    relay.drain()
    assert (box.lane(), box.waiting(), box.batch()) == (["a", "b"], [], 1)
    assert journal(box) == {1: ['"a"', '"b"']}
    assert "batch_adopted" in [record.action for record in caplog.records]


def test_only_what_was_published_is_adopted_though_the_claim_would_choose_others(box):
    box.add("a")
    relay = box.relay(batch_size=1)
    lose_commit(relay)
    with pytest.raises(Lost):
        relay.run_once()
    box.add("urgent", priority=100)
    relay.drain()
    assert box.lane() == ["a", "urgent"]
    assert journal(box) == {1: ['"a"'], 2: ['"urgent"']}


def test_what_redis_had_refused_of_a_lost_batch_is_not_adopted(box):
    box.redis.set("broken", "no stream")
    box.add("refused", stream="broken")
    box.add("a")
    relay = box.relay()
    lose_commit(relay)
    with pytest.raises(Lost):
        relay.run_once()
    assert relay.run_once() == 1
    assert (box.lane(), box.waiting()) == (["a"], ["refused"])
    assert box.value("SELECT attempts FROM outbox") == 0


def test_a_backend_that_is_killed_before_the_commit(box):
    box.add("a")
    relay = box.relay()
    before(relay._store, "record_batch", lambda: kill_backends(box))
    with pytest.raises(DatabaseUnavailable):
        relay.run_once()
    relay.drain()
    assert (box.lane(), box.waiting()) == (["a"], [])


def kill_backends(box):
    """End all connections of relays, as their timeouts do with a frozen one."""
    box.sql.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
        "WHERE application_name = 'outbox-relay' AND datname = current_database() AND pid <> pg_backend_pid()"
    )


# -- BEHIND -----------------------------------------------------------------------------------------------


def test_exactly_the_batches_that_redis_forgot_are_sent_again(box, caplog):
    relay = box.relay()
    for name in "abcd":
        box.add(name)
        relay.drain()
        if name == "b":
            photograph = box.photograph()
    box.go_back_to(photograph)
    box.add("e")
    relay.drain()
    assert box.lane() == ["a", "b", "c", "d", "e"]
    assert "redis_behind" in [record.action for record in caplog.records]


def test_more_batches_than_one_step_sends_again(box, monkeypatch):
    monkeypatch.setattr("outbox.relay.CATCH_UP", 2)
    relay = box.relay(batch_size=1)
    names = [f"{n:02}" for n in range(9)]
    for name in names:
        box.add(name)
    relay.drain()
    box.redis.flushall()
    box.add("99")
    relay.drain()
    assert box.lane() == [*names, "99"]


def test_a_crash_while_batches_are_sent_again_repeats_none(box):
    relay = box.relay(batch_size=1)
    for name in "abc":
        box.add(name)
    relay.drain()
    box.redis.flushall()
    box.add("d")
    count = iter(range(9))

    def fail_third():
        if next(count) == 2:
            raise Lost

    after(relay._streams, "publish", fail_third, times=9)
    with pytest.raises(Lost):
        relay.drain()
    relay.drain()
    assert box.lane() == ["a", "b", "c", "d"]


def test_a_redis_that_comes_back_empty_halts_the_relay_if_so_set(box):
    box.add("a")
    relay = box.relay(on_redis_reset="halt")
    relay.drain()
    box.redis.flushall()
    box.add("b")
    with pytest.raises(Unsuitable, match="OUTBOX_ON_REDIS_RESET=halt"):
        relay.run_once()
    assert (box.lane(), box.waiting()) == ([], ["b"])
    box.relay().drain()
    assert box.lane() == ["a", "b"]


@pytest.mark.parametrize(("purged", "left", "lost"), [("batch < 3", ["c", "d", "e"], 2), ("true", ["e"], 4)])
def test_batches_that_the_journal_has_purged_are_counted_and_passed_over(box, caplog, purged, left, lost):
    relay = box.relay()
    for name in "abcd":
        box.add(name)
        relay.drain()
    box.redis.flushall()
    box.sql.execute(f"DELETE FROM outbox_journal WHERE {purged}")
    box.add("e")
    relay.drain()
    assert box.lane() == left
    assert box.value("SELECT batches_lost FROM outbox_relay") == lost
    assert "batches_lost" in [record.action for record in caplog.records]


def test_an_event_that_is_refused_when_it_is_sent_again_is_a_dead_letter(box):
    relay = box.relay()
    box.add("a")
    bad = box.add("b", stream="other", key="k")
    relay.drain()
    box.redis.flushall()
    box.redis.set("other", "no stream")
    box.add("c")
    relay.drain()
    assert box.lane() == ["a", "c"]
    dead = box.sql.execute("SELECT event_id::text, stream, key, payload::text, reason FROM outbox_dead")
    ((event_id, *event, reason),) = dead
    assert (event_id, event) == (bad, ["other", "k", '"b"'])
    assert "WRONGTYPE" in reason


@pytest.mark.parametrize("crash", ["before sending again commits", "before", "after"])
def test_what_is_refused_when_it_is_sent_again_outlives_a_crash(box, crash):
    """Redis stands after the batch by then: nothing else tells that the events are in no stream."""
    relay = box.relay()
    box.add("bad", stream="other", key="k")
    box.add("behind it", stream="other", key="k")
    relay.drain()
    box.redis.flushall()
    box.redis.set("other", "no stream")
    box.add("new")

    def fail():
        raise Lost

    points = {
        "before sending again commits": (relay, "_commit"),
        "before": (relay._store, "bury"),
        "after": (relay._streams, "forget_refusals"),
    }
    before(*points[crash], fail)
    with pytest.raises(Lost):
        relay.drain()
    relay.drain()
    dead = box.sql.execute("SELECT payload #>> '{}' FROM outbox_dead ORDER BY 1")
    assert [name for (name,) in dead] == ["bad", "behind it"]
    assert (box.lane(), b"refused" in box.state()) == (["new"], False)


# -- a zombie ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_a_zombie_that_wakes_after_its_successor_publishes_nothing(box, batches):
    zombie, successor = box.relay(batch_size=1), box.relay(batch_size=1)

    def freeze():
        kill_backends(box)
        for n in range(batches):
            box.add(str(n))
            successor.run_once()

    box.add("a")
    before(zombie._streams, "publish", freeze)
    assert zombie.run_once() == 1  # it has found out that somebody has led since
    zombie.drain()
    assert sorted(box.lane()) == sorted(["a", *map(str, range(batches))])


# -- GONE -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recreate", [False, "by a group", "by an entry"])
def test_a_lane_that_is_gone_is_filled_again(box, caplog, recreate):
    relay = box.relay(batch_size=2)
    for n in range(5):
        box.add(f"{n}")
        box.add(f"low {n}", priority=-1)
    relay.drain()
    box.redis.delete("s")
    if recreate == "by a group":
        box.redis.xgroup_create("s", "billing", id="0", mkstream=True)
    if recreate == "by an entry":
        box.redis.xadd("s", {"data": '"not ours"'}, id="1-1")
    box.add("new")
    relay.drain()
    assert [name for name in box.lane() if name != "not ours"] == ["0", "1", "2", "3", "4", "new"]
    assert box.lane("s:backfill") == [f"low {n}" for n in range(5)]
    assert box.value("SELECT streams_lost FROM outbox_relay") == 1
    assert "streams_lost" in [record.action for record in caplog.records]


@pytest.mark.parametrize("call", range(4))
def test_a_crash_while_a_lane_is_filled_repeats_nothing(box, call):
    relay = box.relay(batch_size=1)
    for name in "abc":
        box.add(name)
    relay.drain()
    box.redis.delete("s")
    box.add("d")
    count = iter(range(99))

    def fail():
        if next(count) == call:
            raise Lost

    after(relay._streams, "restore", fail, times=99)
    with pytest.raises(Lost):
        relay.drain()
    relay.drain()
    assert box.lane() == ["a", "b", "c", "d"]


def test_a_lane_that_is_gone_halts_the_relay_if_so_set(box):
    box.add("a")
    relay = box.relay(on_redis_reset="halt")
    relay.drain()
    box.redis.delete("s")
    box.add("b")
    with pytest.raises(Unsuitable, match="has lost s,"):
        relay.run_once()
    assert (box.redis.exists("s"), box.waiting()) == (0, ["b"])


def test_a_lane_that_was_trimmed_to_nothing_is_not_gone(box):
    box.add("a")
    relay = box.relay()
    relay.drain()
    box.redis.xtrim("s", maxlen=0)
    box.add("b")
    relay.drain()
    assert box.lane() == ["b"]
    assert box.value("SELECT streams_lost FROM outbox_relay") == 0


def test_lanes_and_state_of_two_outboxes_in_one_redis_do_not_meet(box, caplog):
    """Each outbox has an id of its own, which is part of the state's key."""
    caplog.set_level(logging.WARNING)
    box.add("a")
    box.relay().drain()
    box.sql.execute("UPDATE outbox_relay SET outbox_id = gen_random_uuid(), batch = 0")
    box.sql.execute("DELETE FROM outbox_journal")
    box.add("b")
    box.relay().drain()
    assert box.lane() == ["a", "b"]
    assert not caplog.records
