"""What Redis refuses of an event, and what stands for the server as a whole."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from outbox import testing
from outbox.errors import DatabaseUnavailable, RedisUnavailable, Unavailable, Unsuitable
from outbox.store import Store
from tests.integration.box import Box, after, before
from tests.integration.test_answers import kill_backends


@pytest.fixture
def own_redis():
    """A Redis whose configuration a test may spoil."""
    with testing.redis() as server:
        yield server


@pytest.fixture
def spoilt(database_url, own_redis):
    box = Box(database_url, own_redis.url)
    yield box
    box.close()


def refused(box):
    return box.sql.execute("SELECT payload #>> '{}', attempts FROM outbox WHERE attempts > 0").fetchall()


# -- an event's own fault ---------------------------------------------------------------------------------


def test_a_refused_event_waits_and_the_others_go(box):
    box.redis.set("broken", "no stream")
    box.add("bad", stream="broken", key="k")
    box.add("good")
    relay = box.relay(backoff_seconds=100.0, backoff_max_seconds=1000.0)
    relay.drain()
    assert (box.lane(), box.waiting()) == (["good"], ["bad"])
    wait, error, attempts = box.sql.execute(
        "SELECT extract(epoch FROM available_at - clock_timestamp()), last_error, attempts FROM outbox"
    ).fetchone()
    assert 45 < wait <= 100
    assert "WRONGTYPE" in error
    assert attempts == 1


def test_later_events_of_its_key_wait_whatever_their_priority(box):
    box.redis.set("s:backfill", "no stream")
    box.add("first", key="k", priority=-50)
    relay = box.relay(backoff_seconds=100.0, backoff_max_seconds=1000.0)
    relay.drain()
    box.add("second", key="k", priority=100)
    box.add("other key", key="k2")
    box.add("no key")
    box.add("other stream", key="k", stream="s2")
    relay.drain()
    assert (box.lane(), box.lane("s2")) == (["other key", "no key"], ["other stream"])
    box.redis.delete("s:backfill")
    box.sql.execute("UPDATE outbox SET available_at = now() WHERE attempts > 0")
    assert relay.run_once() == 1
    assert (box.lane("s:backfill"), box.waiting()) == (["first"], ["second"])
    relay.drain()
    assert box.lane()[-1] == "second"


def test_in_one_batch_what_follows_a_refused_event_of_its_key_is_held_back(box):
    box.redis.set("s:backfill", "no stream")
    for name, priority in (("low 1", -50), ("low 2", -50), ("lower", -60)):
        box.add(name, key="k", priority=priority)
    box.add("free", key="k2")
    relay = box.relay(backoff_seconds=100.0, backoff_max_seconds=1000.0)
    relay.run_once()
    assert box.waiting() == ["low 1", "low 2", "lower"]
    assert refused(box) == [("low 1", 1)]


def test_the_order_of_a_key_survives_its_retry(box):
    box.redis.set("s", "no stream")
    for n in range(4):
        box.add(str(n), key="k")
    relay = box.relay()
    relay.run_once()
    relay.run_once()
    box.redis.delete("s")
    relay.drain()
    assert box.lane() == ["0", "1", "2", "3"]


def test_a_dead_letter_that_is_retried_comes_before_the_later_events_of_its_key(box):
    """It has a new row, and its old time: what counts is where the claim finds it."""
    box.redis.set("s", "no stream")
    first = box.add("first", key="k")
    relay = box.relay(max_attempts=1)
    relay.run_once()
    box.add("second", key="k")
    relay._settings = replace(relay._settings, max_attempts=10)
    relay.run_once()
    relay._store.dead_retry([UUID(first)])
    for _ in range(3):
        relay.run_once()  # both are refused
    box.redis.delete("s")
    relay.drain()
    assert box.lane() == ["first", "second"]


def test_after_its_last_attempt_an_event_is_a_dead_letter_and_its_key_goes_on(box):
    box.redis.set("s", "no stream")
    dead = box.add("dead", key="k", priority=7, headers=json.dumps({"a": "b"}))
    box.add("next", key="k")
    relay = box.relay(max_attempts=3)
    for _ in range(3):
        relay.run_once()
    row = box.sql.execute(
        "SELECT event_id::text, stream, type, key, priority, payload::text, headers, attempts, reason FROM outbox_dead"
    ).fetchone()
    assert row[:-1] == (dead, "s", "T", "k", 7, '"dead"', {"a": "b"}, 3)
    assert "WRONGTYPE" in row[-1]
    box.redis.delete("s")
    relay.drain()
    assert box.lane() == ["next"]


def test_what_was_refused_is_not_in_the_journal(box):
    box.redis.set("broken", "no stream")
    box.add("bad", stream="broken")
    box.add("good")
    relay = box.relay(backoff_seconds=100.0, backoff_max_seconds=1000.0)
    relay.run_once()
    box.redis.flushall()
    box.add("new")
    relay.drain()
    assert (box.lane(), box.lane("broken")) == (["good", "new"], [])


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"stream": "a b"}, "stream: 'a b'"),
        ({"stream": ""}, "stream: ''"),
        ({"headers": "[1]"}, "headers: a JSON object"),
        ({"headers": '{"data": "mine"}'}, "headers.'data'"),
        ({"headers": '{"n": 1}'}, "headers.'n'"),
        ({"headers": json.dumps({f"h{n}": "" for n in range(9000)})}, "headers: a JSON object"),
    ],
)
def test_rows_written_by_hand_that_can_be_no_entry_are_refused(box, columns, reason):
    box.add("bad", key="k", **columns)
    box.add("good")
    box.relay(backoff_seconds=100.0, backoff_max_seconds=1000.0).drain()
    assert (box.lane("s"), box.waiting()) == (["good"], ["bad"])
    assert box.value("SELECT last_error FROM outbox").startswith(reason)


@pytest.mark.parametrize("payload", ["null", "[1, 2]", '"\\u0000"', '{"a": 1, "a": 2}', "1e400"])
def test_whatever_json_a_row_holds_is_published_as_it_is(box, payload):
    box.add("", payload=payload)
    box.relay().drain()
    assert [entry[b"data"].decode() for _, entry in box.redis.xrange("s")] == [payload]


@pytest.mark.parametrize("moment", ["infinity", "-infinity", "0044-03-15 BC", "294276-01-01"])
def test_whatever_time_a_row_holds_it_is_published(box, moment):
    box.add("odd", created_at=moment)
    box.add("even")
    box.relay().drain()
    assert sorted(box.lane()) == ["even", "odd"]


def limit(box, *commands, keys=("*",)):
    """Have the relays of a box that are made from now on use Redis as a user with these rights."""
    box.redis.acl_setuser("relay", enabled=True, passwords=["+pw"], keys=keys, commands=["+@all", *commands])
    box.redis_url = box.redis_url.replace("//", "//relay:pw@")


def test_a_key_of_redis_that_the_relay_has_no_right_to_is_the_events_fault(spoilt):
    limit(spoilt, keys=["s*", "outbox:*"])
    spoilt.add("bad", stream="forbidden")
    spoilt.add("good")
    spoilt.relay(backoff_seconds=100.0, backoff_max_seconds=1000.0).drain()
    assert spoilt.lane() == ["good"]
    assert refused(spoilt) == [("bad", 1)]


# -- the server's ------------------------------------------------------------------------------------------


def spend_no_attempt(box, relay, cure, error=RedisUnavailable):
    """Check that a step fails as a whole, and that all goes once the server is cured."""
    box.add("a", key="k")
    box.add("b", stream="s2")
    with pytest.raises(error):
        relay.run_once()
    assert (box.waiting(), refused(box), box.batch()) == (["a", "b"], [], 0)
    cure()
    relay.drain()
    assert (box.lane(), box.lane("s2"), box.waiting()) == (["a"], ["b"], [])


def test_out_of_memory_adds_nothing_and_spends_no_attempt(spoilt):
    spoilt.redis.config_set("maxmemory", "1")
    relay = spoilt.relay()
    spend_no_attempt(spoilt, relay, lambda: spoilt.redis.config_set("maxmemory", "0"))


def test_a_read_only_replica_spends_no_attempt(spoilt):
    spoilt.redis.replicaof("127.0.0.1", "1")
    spend_no_attempt(spoilt, spoilt.relay(), lambda: spoilt.redis.replicaof("NO", "ONE"))


@pytest.mark.parametrize("command", ["xadd", "hset", "hdel"])
def test_a_relay_that_may_not_add_at_all_spends_no_attempt(spoilt, command):
    """Nor does one that may not write the state: what it added would be added again by its next try."""
    limit(spoilt, f"-{command}")
    relay = spoilt.relay()

    def cure() -> None:
        assert (spoilt.lane(), spoilt.lane("s2")) == ([], [])
        spoilt.redis.execute_command("ACL SETUSER", "relay", f"+{command}")

    spend_no_attempt(spoilt, relay, cure)


def test_a_lane_is_not_filled_by_a_relay_that_may_not_write_the_state(spoilt):
    relay = spoilt.relay()
    spoilt.add("a")
    relay.drain()
    spoilt.redis.delete("s")
    limit(spoilt, "-hset")
    other = spoilt.relay()
    spoilt.add("b")
    for _ in range(2):
        with pytest.raises(RedisUnavailable):
            other.run_once()
    assert spoilt.lane() == []
    spoilt.redis.execute_command("ACL SETUSER", "relay", "+hset")
    other.drain()
    assert spoilt.lane() == ["a", "b"]


def test_a_redis_that_is_down_spends_no_attempt(spoilt, own_redis):
    own_redis.kill()
    spend_no_attempt(spoilt, spoilt.relay(), own_redis.restart)


def test_a_redis_that_does_not_answer_spends_no_attempt(spoilt, own_redis):
    own_redis.freeze()
    spend_no_attempt(spoilt, spoilt.relay(takeover_seconds=1.0), own_redis.thaw)


def test_a_connection_that_redis_has_closed_is_opened_again(spoilt):
    relay = spoilt.relay()
    spoilt.add("a")
    relay.drain()
    spoilt.redis.client_kill_filter(_type="normal", skipme=True)
    spoilt.add("b")
    relay.drain()
    assert spoilt.lane() == ["a", "b"]


def test_scripts_that_redis_has_forgotten_are_sent_again(box):
    relay = box.relay()
    for name in "ab":
        box.add(name)
        relay.run_once()
        box.redis.script_flush()
    assert box.lane() == ["a", "b"]


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-lfu", "allkeys-random"])
def test_a_redis_that_evicts_streams_is_not_used_until_it_does_not(spoilt, policy):
    relay = spoilt.relay()
    spoilt.redis.config_set("maxmemory-policy", policy)
    with pytest.raises(Unsuitable, match=f"maxmemory-policy is {policy}"):
        relay.check()
    cure = lambda: spoilt.redis.config_set("maxmemory-policy", "volatile-lru")  # noqa: E731
    spend_no_attempt(spoilt, relay, cure, Unsuitable)


@pytest.mark.parametrize("statement", ["lead", "claim", "put_back", "record_batch", "commit"])
@pytest.mark.parametrize("when", [before, after])
def test_a_connection_of_postgresql_that_breaks_anywhere_loses_and_repeats_nothing(box, statement, when):
    box.redis.set("broken", "no stream")
    box.add("a", key="k")
    box.add("bad", stream="broken")
    relay = box.relay(max_attempts=99)
    when(relay._store, statement, lambda: kill_backends(box))
    try:
        relay.run_once()
    except DatabaseUnavailable:
        assert refused(box) == []
    box.redis.delete("broken")
    relay.drain()
    assert (box.lane(), box.lane("broken"), box.waiting()) == (["a"], ["bad"], [])


def test_a_row_that_somebody_has_locked_holds_the_step_up_and_nothing_passes_it(box):
    box.add("a", key="k")
    box.add("b", key="k")
    relay = box.relay()
    store = relay._store
    before(store, "claim", lambda: store._run("SET LOCAL lock_timeout = '50ms'"))
    with box.connect() as other:
        other.execute("SELECT FROM outbox WHERE payload::text = '\"a\"' FOR UPDATE")
        with pytest.raises(DatabaseUnavailable, match="lock timeout"):
            relay.run_once()
    relay.drain()
    assert box.lane() == ["a", "b"]


def test_an_outage_does_not_end_the_daemon_and_is_not_counted_against_events(database_url, own_redis):
    box = Box(database_url, own_redis.url)
    relay = box.relay()
    box.add("a")
    own_redis.kill()
    with pytest.raises(Unavailable):
        relay.drain(timeout_seconds=0.3)
    assert refused(box) == []
    own_redis.restart()
    relay.drain()
    assert box.lane() == ["a"]
    box.close()


def test_a_read_only_postgresql_is_refused(box):
    box.sql.execute("ALTER DATABASE " + box.sql.info.dbname + " SET default_transaction_read_only = on")
    with pytest.raises(Unsuitable, match="read-only"):
        Store(box.database_url).check()


# -- several relays ----------------------------------------------------------------------------------------


def test_while_one_relay_is_in_its_step_another_stands_by(box):
    box.add("a")
    first, second = box.relay(), box.relay()
    moved = []
    before(first._streams, "publish", lambda: moved.append(second.run_once()))
    assert (first.run_once(), moved) == (1, [0])


def test_two_relays_that_alternate_keep_the_order(box):
    relays = [box.relay(batch_size=3), box.relay(batch_size=2)]
    for n in range(20):
        box.add(f"{n:02}", key="k")
        relays[n % 2].run_once()
    for relay in relays:
        relay.drain()
    assert box.lane() == [f"{n:02}" for n in range(20)]


def test_old_batches_are_purged_and_young_ones_kept(box):
    relay = box.relay()
    for name in "abc":
        box.add(name)
        relay.run_once()
    old = datetime.now(UTC) - timedelta(hours=2)
    box.sql.execute("UPDATE outbox_journal SET published_at = %s WHERE batch < 3", (old,))
    store = Store(box.database_url)
    assert store.purge(3600, last=3) == 2
    assert box.value("SELECT array_agg(batch) FROM outbox_journal") == [3]
    store.close()
