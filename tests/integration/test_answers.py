"""What follows each answer of Redis, made to happen on real servers: AHEAD, BEHIND, GONE, REFUSED."""

import itertools
import logging
from contextlib import suppress
from uuid import uuid4

import msgpack
import pytest

from outbox.errors import DatabaseUnavailable, RedisUnavailable, Unsuitable
from outbox.event import Waiting
from outbox.streams import decode, encode
from tests.integration.box import after, before


class Lost(Exception):
    """Stands for whatever ends a relay between its publish and its commit."""


def lose_commit(relay):
    """Have the next commit of the relay fail after its publish, with its connection closed."""

    def fail():
        relay._store.close()
        raise Lost

    before(relay._store, "record_batch", fail)


def lost_at(call):
    """Return a function that raises Lost the time of that number, from 0 on."""
    calls = itertools.count()

    def lose():
        if next(calls) == call:
            raise Lost

    return lose


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
    after(relay._streams, "publish", lost_at(2), times=9)
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


def test_what_is_lost_is_counted_before_the_next_batch_is_sent_again(box, caplog):
    """Else nobody would learn of it, as Redis stands behind it then, if that batch ends in an error."""
    relay = box.relay()
    for name in "abcd":
        box.add(name)
        relay.drain()
    box.redis.flushall()
    box.sql.execute("DELETE FROM outbox_journal WHERE batch < 3")
    box.add("e")
    before(relay._streams, "publish", lost_at(2), times=9)
    for _ in range(2):
        with suppress(Lost):
            relay.drain()
    assert box.lane() == ["c", "d", "e"]
    assert box.value("SELECT batches_lost FROM outbox_relay") == 2
    assert [record.action for record in caplog.records].count("batches_lost") == 1


def test_what_is_sent_again_is_kept_for_as_long_as_what_is_new(box):
    """Redis may forget it once more before it is on its disk."""
    relay = box.relay()
    for name in "abc":
        box.add(name)
        relay.drain()
    box.sql.execute("UPDATE outbox_journal SET published_at = now() - interval '2 hours'")
    state = next(iter(box.redis.keys("outbox:*")))
    box.redis.hset(state, "batch", 1)
    box.add("d")
    relay.close()
    relay.drain()
    young = box.sql.execute("SELECT batch FROM outbox_journal WHERE published_at > now() - interval '1 hour'")
    assert {batch for (batch,) in young} >= {2, 3, 4}


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
    after(relay._streams, "restore", lost_at(call), times=99)
    with pytest.raises(Lost):
        relay.drain()
    relay.drain()
    assert box.lane() == ["a", "b", "c", "d"]


@pytest.mark.parametrize(("frozen_at", "again"), [(0, False), (0, True), (1, False)])
def test_a_zombie_that_was_filling_a_lane_changes_nothing_when_it_wakes(box, frozen_at, again):
    """The batch number stands still while a lane is filled: it does not tell who leads."""
    zombie, successor = (box.relay(batch_size=1) for _ in range(2))
    for name in "abc":
        box.add(name)
    zombie.drain()
    box.redis.delete("s")
    box.add("d")
    calls, restore, restore_next = [], zombie._streams.restore, successor._streams.restore

    def freeze(*call):
        if call[4] == frozen_at:
            calls.append(call)
            raise Lost
        return restore(*call)

    def meet(*call):
        if call[4] != 1:
            restore(*calls[0])
        return restore_next(*call)

    zombie._streams.restore = freeze
    successor._streams.restore = meet
    before(successor._streams, "publish", lambda: restore(*calls[0]), times=99)
    with pytest.raises(Lost):
        zombie.drain()
    if again:
        box.redis.delete("s")
    successor.drain()
    restore(*calls[0])
    successor.drain()
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


# -- a state that somebody has damaged --------------------------------------------------------------------


def damage(box, **fields):
    """Write into what Redis knows of the outbox; a name ends with the lane or the number after a colon."""
    (key,) = box.redis.keys("outbox:*")
    box.redis.hset(key, mapping=fields)


def actions(caplog):
    return [getattr(record, "action", None) for record in caplog.records]


DAMAGED_IDS = [
    b"\xff\xfe", b"1", b"1:2:3", b"x:00000000", b"1:", b":", b"99999999999999999999:00000000", b"1:0000000g",
]  # fmt: skip


@pytest.mark.parametrize("ids", DAMAGED_IDS)
def test_a_batch_whose_ids_are_damaged_is_one_that_redis_does_not_remember(box, caplog, ids):
    box.add("a")
    relay = box.relay()
    lose_commit(relay)
    with pytest.raises(Lost):
        relay.run_once()
    damage(box, **{"ids:1": ids})
    box.add("b")
    relay.drain()
    assert (box.lane(), box.waiting(), box.batch()) == (["a", "a", "b"], [], 2)
    assert {"state_damaged", "commits_lost"} <= {*actions(caplog)}


def test_a_mark_without_an_id_makes_no_other_event_taken_for_published(box):
    """It would be that of any event."""
    box.add("a")
    relay = box.relay()
    lose_commit(relay)
    with pytest.raises(Lost):
        relay.run_once()
    box.add("b")
    damage(box, **{"ids:1": " ".join(f"{row}:" for (row,) in box.sql.execute("SELECT id FROM outbox"))})
    relay.drain()
    assert "b" in box.lane()


@pytest.mark.parametrize("batch", ["many", "-1", "1.5", "nan", "inf", "", "9" * 16])
def test_a_batch_number_that_is_damaged_stops_the_relay_and_is_named(box, batch):
    box.add("a")
    relay = box.relay()
    relay.drain()
    damage(box, batch=batch)
    box.add("b")
    for _ in range(2):
        with pytest.raises(RedisUnavailable, match="batch of outbox:.* is no number"):
            relay.run_once()
    assert (box.lane(), box.waiting()) == (["a"], ["b"])
    damage(box, batch=box.batch())
    relay.drain()
    assert box.lane() == ["a", "b"]


@pytest.mark.parametrize("last", ["", "x", b"\xff", "1-1", "nan-nan nan"])
def test_a_newest_entry_that_is_damaged_is_found_anew(box, last):
    box.add("a")
    relay = box.relay()
    relay.drain()
    damage(box, **{"last:s": last})
    box.add("b")
    relay.drain()
    assert box.lane() == ["a", "b"]
    box.redis.delete("s")  # which is noticed again
    box.add("c")
    relay.drain()
    assert box.lane() == ["a", "b", "c"]


@pytest.mark.parametrize("note", [
    b"", b"\xff", b"\xc1", b"garbage", msgpack.packb(7), msgpack.packb([1, 7]), msgpack.packb([1, [b"0", b"why"]]),
    msgpack.packb([1, [0, 7]]), msgpack.packb([1, [9, b"why"]]), msgpack.packb([1, [-9, b"why"]]), msgpack.packb(["x"]),
])  # fmt: skip
def test_a_note_of_refusals_that_is_damaged_counts_its_batch_as_lost(box, caplog, note):
    box.add("a")
    relay = box.relay()
    relay.drain()
    damage(box, refused=note)
    box.add("b")
    relay.drain()
    assert box.lane() == ["a", "b"]
    assert b"refused" not in box.state()
    assert box.value("SELECT batches_lost FROM outbox_relay") == 1
    assert box.value("SELECT count(*) FROM outbox_dead") == 0


def test_a_note_of_refusals_of_a_batch_that_is_damaged_counts_it_as_lost(box):
    box.add("a")
    relay = box.relay()
    relay.drain()
    box.sql.execute("UPDATE outbox_journal SET body = 'x'")
    damage(box, refused=msgpack.packb([1, [0, b"why"]]))
    box.add("b")
    relay.drain()
    assert (box.lane(), box.value("SELECT batches_lost FROM outbox_relay")) == (["a", "b"], 1)


def test_how_far_a_lane_was_filled_is_damaged_and_it_is_filled_from_the_start(box, caplog):
    relay = box.relay(batch_size=1)
    for name in "ab":
        box.add(name)
    relay.drain()
    box.redis.delete("s")
    box.add("c")

    def fail():
        raise Lost

    after(relay._streams, "restore", fail)
    with pytest.raises(Lost):
        relay.drain()
    damage(box, **{"restored:s": "x"})
    relay.drain()
    assert box.lane() == ["a", "a", "b", "c"]
    assert "streams_lost" in actions(caplog)


def test_a_damaged_state_is_named_where_it_is_looked_at(box):
    relay = box.relay()
    box.add("a")
    relay.drain()
    outbox_id = box.value("SELECT outbox_id::text FROM outbox_relay")
    box.redis.hset(f"outbox:{outbox_id}", b"last:\xff", "1-1 1")
    assert relay._streams.state(outbox_id) == (1, ["s"])
    damage(box, batch="x")
    with pytest.raises(RedisUnavailable, match="is no number"):
        relay._streams.state(outbox_id)


# -- a journal that is ahead of the leader's row: one of the tables was changed by hand, or restored alone --


def add_to_journal(box, batch, name="by hand"):
    event = Waiting(99, str(uuid4()), "s", "T", None, 0, "2026-01-01 00:00:00+00", f'"{name}"', None, 0, None)
    body = encode("hand", [event], lambda stream, priority: stream).body
    box.sql.execute(
        "INSERT INTO outbox_journal (partition, batch, events, body) VALUES (0, %s, 1, %s)", (batch, body)
    )


def add_the_next(box):
    add_to_journal(box, 3)


def set_the_leader_back(box):
    box.sql.execute("UPDATE outbox_relay SET batch = 1")


@pytest.mark.parametrize("change", [add_the_next, set_the_leader_back])
def test_a_batch_that_no_leader_has_committed_is_named_and_nothing_is_lost_or_repeated(box, change):
    relay = box.relay()
    for name in "ab":
        box.add(name)
        relay.drain()
    change(box)
    box.add("c")
    for _ in range(3):
        with pytest.raises(Unsuitable, match=r"a batch [23], .* DELETE FROM outbox_journal WHERE batch > "):
            relay.run_once() or relay.run_once()
    published = box.lane()
    box.sql.execute("DELETE FROM outbox_journal WHERE batch > (SELECT batch FROM outbox_relay)")
    relay.drain()
    assert published in (["a", "b"], ["a", "b", "c"])
    assert (box.lane(), box.waiting(), box.batch()) == (["a", "b", "c"], [], 3)


def test_a_batch_that_no_leader_has_committed_is_not_sent_again(box):
    relay = box.relay()
    for name in "ab":
        box.add(name)
        relay.drain()
    add_to_journal(box, 7)
    box.sql.execute("DELETE FROM outbox_journal WHERE batch = 2")
    box.redis.flushall()
    box.add("c")
    relay.drain()
    assert (box.lane(), box.batch()) == (["a", "c"], 3)
    assert box.value("SELECT batches_lost FROM outbox_relay") == 1
