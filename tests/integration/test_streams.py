"""The body of a batch, what can be an entry, lost lanes, and rights: the Redis side of the relay."""

import json

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox import testing
from outbox.errors import RedisUnavailable, Unavailable
from outbox.event import Waiting
from outbox.lanes import Lanes
from outbox.store import Store
from outbox.streams import decode, encode, faults, may_touch
from tests.integration.box import Box, after, before

# -- encode and decode ------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
names = st.sampled_from(["tenant", "traceparent", "causationid", "correlationid", "x-1.y_z"])
waiting = st.builds(
    Waiting,
    id=st.integers(1, 2**63 - 1),
    event_id=st.uuids().map(str),
    stream=st.sampled_from(["s", "customer", "{shop}:order"]),
    type=texts,
    key=st.none() | texts,
    priority=st.integers(-32768, 32767),
    created_at=st.datetimes().map(lambda moment: f"{moment}+00"),
    payload=st.dictionaries(texts, texts).map(json.dumps),
    headers=st.none() | st.dictionaries(names, texts, min_size=1).map(json.dumps),
    attempts=st.just(0),
    last_error=st.none(),
)
rules = st.builds(Lanes, threshold=st.integers(-3, 3), suffix=st.just("later"), on=st.booleans())


@given(st.lists(waiting, max_size=5), rules)
def test_a_journal_says_again_what_was_encoded(events, rule):
    batch = encode("shop", events, rule.lane)
    again, decoded = decode(batch.body)
    assert again == batch
    assert again.ids.split() == [f"{event.id}:{event.event_id[:8]}{event.event_id[-8:]}" for event in events]
    for event, found in zip(events, decoded, strict=True):
        assert found.stream == rule.lane(event.stream, event.priority)
        assert json.loads(found.headers or "{}") == json.loads(event.headers or "{}")
        assert found.created_at == event.created_at.replace(" ", "T").replace("+00", "Z")
        for field in ("id", "event_id", "type", "key", "priority", "payload"):
            assert getattr(found, field) == getattr(event, field)


@given(st.lists(waiting, max_size=8))
def test_events_share_a_group_only_if_they_share_stream_and_key(events):
    encoded = msgpack.unpackb(encode("shop", events, Lanes().lane).body)[2]
    groups = [event[1] for event in encoded]
    for event, group in zip(events, groups, strict=True):
        assert (group == 0) == (event.key is None)
        for other, its in zip(events, groups, strict=True):
            if event.key is not None and other.key is not None:
                same = (event.stream, event.key) == (other.stream, other.key)
                assert (group == its) == same


@given(st.integers(-32768, 32767), rules)
def test_the_lane_follows_from_the_threshold_alone(priority, rule):
    backfill = rule.on and priority < rule.threshold
    assert rule.lane("s", priority) == ("s:later" if backfill else "s")


@given(waiting)
def test_what_the_api_can_record_has_no_fault(event):
    assert faults([event]) == {}


# -- rows by hand that would end the daemon, or that Redis answers by closing the connection ----------------


@pytest.mark.parametrize(
    "headers",
    ['{"a": "\\ud800"}', '{"correlationid": "\\udfff"}', "[" * 1200 + "]" * 1200, "9" * 5000],
    ids=["a lone surrogate", "one in the correlation", "nested too deeply", "a number too long"],
)
def test_headers_that_python_cannot_read_or_write_are_the_events_fault(box, headers):
    box.add("bad", headers=headers)
    box.add("good")
    box.relay(backoff_seconds=100.0, backoff_max_seconds=100.0).drain()
    assert (box.lane(), box.waiting()) == (["good"], ["bad"])
    assert box.value("SELECT last_error FROM outbox").startswith("headers: ")


def test_a_payload_that_is_too_long_for_redis_is_the_events_fault(box, monkeypatch):
    monkeypatch.setattr("outbox.streams.MAX_PAYLOAD", 1000)
    box.add("x" * 2000)
    box.add("good")
    box.relay(backoff_seconds=100.0, backoff_max_seconds=100.0).drain()
    assert box.lane() == ["good"]
    assert "payload: more than" in box.value("SELECT last_error FROM outbox")


# -- sent again --------------------------------------------------------------------------------------------


def test_what_is_behind_a_refused_event_when_it_is_sent_again_is_a_dead_letter_too(box):
    """The journal's batch is over with this call: what the script holds back would be lost."""
    relay = box.relay()
    box.add("low", key="k", priority=-1)
    box.add("high", key="k", priority=1)
    box.add("free", key="k2")
    relay.drain()
    box.redis.flushall()
    box.redis.set("s", "no stream")
    box.add("new", stream="other")
    relay.drain()
    dead = box.sql.execute("SELECT payload #>> '{}', reason FROM outbox_dead ORDER BY 1").fetchall()
    assert [name for name, _ in dead] == ["free", "high", "low"]
    assert "behind an event of its key that was refused" in dict(dead)["low"]


@pytest.mark.parametrize("stream", ["s", "s:backfill"])
def test_what_is_refused_when_it_is_sent_again_comes_to_its_lane_after_a_retry(box, stream):
    """The journal tells the lane of an event, and the dead letters its stream."""
    relay = box.relay()
    box.add("a", stream=stream, priority=-1)
    relay.drain()
    box.redis.flushall()
    box.redis.set(f"{stream}:backfill", "no stream")
    box.add("b", stream="other")
    relay.drain()
    box.redis.delete(f"{stream}:backfill")
    store = Store(box.database_url)
    assert len(store.dead_retry(None)) == 1
    store.close()
    relay.drain()
    assert box.lane(f"{stream}:backfill") == ["a"]


def test_a_redis_restored_from_its_older_dump_gets_exactly_what_it_lacks(database_url):
    with testing.redis({"dbfilename": "dump.rdb"}) as server:
        box = Box(database_url, server.url)
        relay = box.relay()
        for name in "abcd":
            box.add(name, priority=-1 if name in "bd" else 0)
            relay.drain()
            if name == "b":
                box.redis.save()
        server.kill()
        server.restart()
        assert (box.lane(), box.lane("s:backfill")) == (["a"], ["b"])
        box.add("e")
        relay.drain()
        assert (box.lane(), box.lane("s:backfill")) == (["a", "c", "e"], ["b", "d"])
        box.close()


# -- lanes that are gone -------------------------------------------------------------------------------------


def test_a_lane_that_somebody_has_begun_anew_is_filled_again(box):
    """Its newest entry is later than our last: only the count of its entries tells."""
    relay = box.relay(batch_size=2)
    for n in range(5):
        box.add(str(n))
    relay.drain()
    box.redis.delete("s")
    box.redis.xadd("s", {"data": '"not ours"'})
    if "entries-added" not in box.redis.xinfo_stream("s"):
        pytest.skip("Redis before 7.0 does not count the entries of a stream")
    box.add("new")
    relay.drain()
    assert box.lane() == ["not ours", *"01234", "new"]
    assert box.value("SELECT streams_lost FROM outbox_relay") == 1


def test_entries_that_others_add_to_a_lane_or_trim_from_it_are_no_loss(box):
    relay = box.relay()
    for name in "abc":
        box.add(name)
        relay.drain()
        box.redis.xadd("s", {"data": '"not ours"'})
        box.redis.xtrim("s", maxlen=1, approximate=False)
    assert box.value("SELECT streams_lost FROM outbox_relay") == 0


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_lane_that_is_lost_again_while_it_is_filled_is_filled_from_the_start(box, call):
    relay = box.relay(batch_size=1)
    for name in "abc":
        box.add(name)
    relay.drain()
    box.redis.delete("s")
    box.add("d")
    calls = iter(range(1, 99))
    after(relay._streams, "restore", lambda: next(calls) == call and box.redis.delete("s"), times=99)
    relay.drain()
    assert box.lane() == ["a", "b", "c", "d"]


def test_a_lane_of_which_the_journal_knows_nothing_any_more_goes_on(box):
    relay = box.relay()
    box.add("a")
    relay.drain()
    box.redis.delete("s")
    box.sql.execute("DELETE FROM outbox_journal")
    box.add("b")
    relay.drain()
    assert box.lane() == ["b"]


def test_a_lane_that_cannot_be_filled_for_lack_of_memory_is_filled_later(database_url):
    with testing.redis() as server:
        box = Box(database_url, server.url)
        relay = box.relay()
        for name in "ab":
            box.add(name)
            relay.drain()
        box.redis.delete("s")
        box.add("c")
        # The state of the server changes after the question whether the lane is gone.
        before(relay._streams, "restore", lambda: box.redis.config_set("maxmemory", "1"))
        with pytest.raises(RedisUnavailable, match="maxmemory"):
            relay.run_once()
        assert box.redis.exists("s") == 0
        box.redis.config_set("maxmemory", "0")
        relay.drain()
        assert box.lane() == ["a", "b", "c"]
        box.close()


def test_filling_a_lane_stops_when_it_is_told_to_and_goes_on_from_there(box):
    relay = box.relay(batch_size=1)
    for name in "abc":
        box.add(name)
    relay.drain()
    box.redis.delete("s")
    box.add("d")
    after(relay._streams, "restore", relay.stop.set)
    relay.run_once()
    assert box.lane() == ["a"]
    box.relay().drain()
    assert box.lane() == ["a", "b", "c", "d"]


def test_filling_a_lane_stops_though_the_journal_has_nothing_more_of_it(box):
    """Reading an hour of it takes long; who has told the relay to stop would kill it."""
    relay = box.relay(batch_size=1)
    for stream in ["s", *["other"] * 5]:
        box.add("a", stream=stream)
    relay.drain()
    box.redis.delete("s")
    box.add("b")
    reads = []
    after(relay._store, "journal_after", lambda: len(reads) == 3 and relay.stop.set(), times=9)
    before(relay._store, "journal_after", lambda: reads.append(1), times=9)
    relay.run_once()
    assert len(reads) == 3


def test_a_body_of_any_size_tells_whether_it_may_have_events_of_a_lane():
    event = [2, 0, "1", "0" * 36, "T", "2026-01-31T12:00:00Z", "0", "x" * (101 << 20), None]
    body = msgpack.packb(["source", ["s"], [event]])
    assert [may_touch(body, [lane]) for lane in ("s", "t")] == [True, False]
    long = msgpack.packb(["source", [f"lane:{n}" for n in range(10_000)], []])
    assert may_touch(long, ["t"])  # its head is not read to its end


# -- rights ------------------------------------------------------------------------------------------------


@pytest.fixture
def restricted(database_url):
    """A box whose relay is a user of Redis with rights of its own: `limit(keys, commands)`."""
    with testing.redis() as server:
        box = Box(database_url, server.url)
        box.redis_url = server.url.replace("//", "//relay:pw@")

        def limit(keys="*", commands=("+@all",)):
            box.redis.acl_setuser(
                "relay", enabled=True, passwords=["+pw"], keys=[keys], commands=[*commands], reset=True
            )

        box.limit = limit
        yield box
        box.close()


def test_the_rights_that_a_relay_needs_are_few(restricted):
    commands = "+evalsha +eval +xadd +xinfo|stream +hget +hset +hexists +hdel +info +client|setname"
    restricted.limit(commands=commands.split())
    restricted.add("a")
    relay = restricted.relay()
    relay.drain()
    restricted.redis.delete("s")
    restricted.add("b")
    relay.drain()
    assert restricted.lane() == ["a", "b"]


def test_a_lane_that_may_not_be_filled_is_filled_once_it_may(restricted):
    restricted.limit()
    relay = restricted.relay()
    restricted.add("a")
    relay.drain()
    restricted.redis.delete("s")
    restricted.add("b")
    before(relay._streams, "restore", lambda: restricted.redis.acl_setuser("relay", commands=["-xadd"]))
    with pytest.raises(RedisUnavailable, match="run"):
        relay.run_once()
    restricted.limit()
    relay.drain()
    assert restricted.lane() == ["a", "b"]


def test_without_the_right_to_the_state_nothing_is_an_events_fault(restricted):
    restricted.limit(keys="s*")
    restricted.add("a")
    with pytest.raises(RedisUnavailable):
        restricted.relay().run_once()
    assert restricted.value("SELECT attempts FROM outbox") == 0


def test_without_a_login_nothing_is_an_events_fault(restricted):
    restricted.limit()
    restricted.redis.config_set("requirepass", "secret")
    restricted.redis_url = restricted.redis_url.replace("relay:pw@", "")
    restricted.add("a")
    with pytest.raises(Unavailable):
        restricted.relay().run_once()
    assert restricted.value("SELECT attempts FROM outbox") == 0


def test_a_lane_without_the_right_to_it_does_not_hold_up_what_is_sent_again(restricted):
    restricted.limit()
    relay = restricted.relay()
    restricted.add("kept")
    restricted.add("forbidden", stream="other")
    relay.drain()
    restricted.redis.flushdb()
    restricted.redis.acl_setuser("relay", enabled=True, reset_keys=True, keys=["s*", "outbox:*"])
    restricted.add("new")
    relay.drain()
    assert restricted.lane() == ["kept", "new"]
    assert "NOPERM" in restricted.value("SELECT reason FROM outbox_dead")
