"""What a relay claims ahead, while Redis works on the batch before: nothing of it may be lost, pass or be passed."""

import json
from contextlib import closing

import psycopg
import pytest

from outbox.errors import Unavailable
from outbox.lanes import Lanes
from outbox.relay import Pace
from outbox.store import Store
from tests.integration.box import after, before


@pytest.fixture
def relay(box):
    """A relay with batches of two that always claims ahead."""
    relay = box.relay(batch_size=2)
    relay._store._from_top_at = float("inf")
    return relay


def ahead(relay) -> list[str]:
    """Return the names of what a relay has claimed ahead."""
    claimed = relay._store._ahead
    return [json.loads(event.payload) for event in claimed.events] if claimed else []


def step(relay) -> list[str]:
    """Take a step with a claim ahead; return the names of what that found."""
    relay.run_once(ahead=True)
    return ahead(relay)


class Crash(BaseException):
    """Raised where a relay is to end."""


def crash() -> None:
    raise Crash


def sizes(box) -> list[int]:
    return [n for (n,) in box.sql.execute("SELECT events FROM outbox_journal ORDER BY batch")]


def test_the_next_step_publishes_what_was_claimed_ahead(box, relay):
    for name in "abcde":
        box.add(name)
    assert step(relay) == ["c", "d"]
    assert step(relay) == ["e"]
    assert step(relay) == []
    assert (box.lane(), box.waiting(), sizes(box)) == (list("abcde"), [], [2, 2, 1])


def test_nothing_is_claimed_ahead_of_a_batch_that_is_not_full(box, relay):
    box.add("a")
    before(relay._streams, "publish", lambda: box.add("b"))
    assert step(relay) == []
    assert (box.lane(), box.waiting()) == (["a"], ["b"])


def test_a_step_by_itself_leaves_nothing_locked(box, relay):
    for name in "abc":
        box.add(name)
    relay.run_once()
    box.sql.execute("SELECT FROM outbox FOR UPDATE NOWAIT")


def test_what_comes_meanwhile_of_a_higher_priority_goes_first(box, relay):
    for name in "abcde":
        box.add(name, priority=-50)
    box.add("low")
    assert step(relay) == ["b", "c"]
    box.add("critical", priority=100)
    box.add("bulk", priority=-100)
    assert step(relay) == ["d", "e"]
    assert (box.lane(), box.lane("s:backfill")) == (["low", "critical"], ["a", "b", "c"])
    assert sizes(box) == [2, 3]


def test_what_comes_meanwhile_takes_its_place_among_what_was_claimed_ahead(box, relay):
    for name, priority in (("a", 0), ("b", 0), ("normal", 0), ("bulk", -100)):
        box.add(name, priority=priority)
    assert step(relay) == ["normal", "bulk"]
    box.add("low", priority=-50)
    relay.run_once()
    assert (box.lane(), box.lane("s:backfill")) == (["a", "b", "normal"], ["low", "bulk"])


def test_more_urgent_events_than_go_into_a_batch_leave_what_was_claimed_ahead_waiting(box, relay):
    """As after a Redis that took seconds to answer: nothing of a lower priority may go before the last of them."""
    for name in "abcd":
        box.add(name, priority=-50)
    assert step(relay) == ["c", "d"]
    for n in range(3):
        box.add(f"urgent {n}")
    assert step(relay) == ["urgent 2", "c"]
    assert (box.lane(), box.lane("s:backfill")) == (["urgent 0", "urgent 1"], ["a", "b"])
    relay.drain()
    assert (box.lane()[2:], box.lane("s:backfill")) == (["urgent 2"], ["a", "b", "c", "d"])


def test_what_another_relay_has_led_meanwhile_gives_the_claim_back(box, relay):
    for name in "abcd":
        box.add(name)
    assert step(relay) == ["c", "d"]
    box.add("urgent", priority=50)
    assert box.relay(batch_size=1).run_once() == 1
    assert step(relay) == []
    assert (box.lane(), sizes(box)) == (["a", "b", "urgent", "c", "d"], [2, 1, 2])


def test_what_another_relay_has_put_back_is_not_passed_by_what_was_claimed_ahead(box, relay):
    box.redis.set("broken", "no stream")
    box.add("refused", stream="broken", key="k", priority=50, available_at="2999-01-01")
    for name in "ab":
        box.add(name)
    box.add("behind it", stream="broken", key="k")
    assert step(relay) == ["behind it"]
    box.sql.execute("UPDATE outbox SET available_at = now() WHERE priority = 50")
    box.relay(batch_size=1, backoff_seconds=600.0, backoff_max_seconds=600.0).run_once()
    box.redis.delete("broken")
    relay.drain()
    assert (box.lane(), box.waiting()) == (["a", "b"], ["refused", "behind it"])


def test_another_relay_waits_for_what_is_claimed_ahead_rather_than_pass_it(box, relay):
    """The first one finds that it does not lead any more, and gives its claim back: nobody waits for long."""
    for name in "abcd":
        box.add(name, key="k")
    assert step(relay) == ["c", "d"]
    other = box.relay()
    before(other._store, "claim", lambda: relay.run_once())
    assert other.run_once() == 2
    assert box.lane() == list("abcd")


def test_a_claim_ahead_does_not_pass_what_somebody_else_has_locked(box, relay):
    for name in "abcd":
        box.add(name, key="k")
    with box.connect() as other:
        other.execute("SELECT FROM outbox WHERE payload #>> '{}' = 'c' FOR UPDATE")
        assert step(relay) == []
    assert box.lane() == ["a", "b"]
    relay._store._ahead_again = 0.0
    relay.drain()
    assert box.lane() == list("abcd")


def test_what_follows_a_refused_event_of_its_key_is_given_back(box, relay):
    box.redis.set("broken", "no stream")
    box.add("refused", stream="broken", key="k")
    box.add("a")
    box.add("behind it", stream="broken", key="k")
    box.add("b")
    after(relay._streams, "publish", lambda: box.redis.delete("broken"))
    assert step(relay) == []
    relay.drain()
    assert (box.lane("broken"), box.lane()) == (["refused", "behind it"], ["a", "b"])


def test_what_is_behind_an_event_with_a_fault_is_given_back(box, relay):
    box.add("faulty", headers='{"no such name": 1}', key="k")
    box.add("a")
    box.add("behind it", key="k")
    box.add("b")
    assert step(relay) == []
    assert (box.lane(), box.waiting()) == (["a"], ["faulty", "behind it", "b"])


def test_nothing_is_claimed_ahead_while_an_event_waits_for_its_retry(box, relay):
    """Once it is claimed itself, what must wait for it would be free, and go first where its priority is higher."""
    for name in "ab":
        box.add(name)
    box.add("retry", key="k", priority=-50, attempts=1)
    box.add("behind it", key="k", priority=50)
    assert step(relay) == []
    relay.drain()
    assert sizes(box) == [2, 1, 1]


def test_a_connection_that_is_closed_between_steps_leaves_nothing_behind_the_positions(box, relay):
    for day, name in enumerate("abcdef", start=1):
        box.add(name, created_at=f"2026-01-0{day}")
    assert step(relay) == ["c", "d"]
    relay._store.close()
    relay._store._from_top_at = float("inf")
    relay.drain()
    assert box.lane() == list("abcdef")


def test_what_is_held_behind_an_event_that_dies_at_once_is_not_left_behind(box):
    relay = box.relay(batch_size=2, max_attempts=1)
    relay.run_once()
    relay._store._from_top_at = float("inf")
    box.add("faulty", headers='{"no such name": 1}', key="k", created_at="2026-01-01")
    for day, name in enumerate("abc", start=2):
        box.add(name, key="k", created_at=f"2026-01-0{day}")
    while relay.run_once():
        continue
    assert box.lane() == ["a", "b", "c"]


def test_a_pool_that_is_full_is_not_tried_again_at_each_step(box, relay):
    for name in "abcdef":
        box.add(name)
    relay.check()
    relay._store._idle_ms = 0
    assert step(relay) == ["c", "d"]
    assert step(relay) == []


def test_a_new_connection_to_redis_gives_the_claim_back_before_anything_is_recovered(box, relay):
    """What is recovered is committed: with the claim in the same transaction, its events would be lost."""
    box.add("first")
    relay.drain()
    photograph = box.photograph()
    relay._store._from_top_at = float("inf")
    for name in "abcdef":
        box.add(name)
    assert step(relay) == ["c", "d"]
    box.go_back_to(photograph)
    relay._streams.close()
    relay.run_once(ahead=True)
    assert box.waiting() == ["c", "d", "e", "f"]
    relay.drain()
    assert (box.lane(), box.waiting()) == (["first", *"abcdef"], [])


def test_what_another_has_published_and_not_committed_is_adopted_and_the_claim_given_back(box, relay):
    for name in "abcd":
        box.add(name)
    assert step(relay) == ["c", "d"]
    box.add("urgent", priority=50)
    other = box.relay(batch_size=1)
    before(other._store, "record_batch", crash)
    with pytest.raises(Crash):
        other.run_once()
    assert (box.lane(), box.batch()) == (["a", "b", "urgent"], 1)
    relay.drain()
    assert (box.lane(), box.waiting(), sizes(box)) == (["a", "b", "urgent", "c", "d"], [], [2, 1, 2])


@pytest.mark.parametrize("which", ["_connection", "_spare"])
def test_either_connection_may_be_lost(box, relay, which):
    for name in "abcdef":
        box.add(name)
    assert step(relay) == ["c", "d"]
    getattr(relay._store, which).close()
    for _ in range(5):
        try:
            relay.run_once(ahead=True)
        except Unavailable:
            continue
    assert (box.lane(), box.waiting()) == (list("abcdef"), [])


def test_a_server_without_room_for_a_second_connection_is_no_reason_to_stand_still(box, relay):
    for name in "abcdef":
        box.add(name)

    def refuse() -> None:
        raise psycopg.OperationalError("too many connections")

    relay.check()
    before(relay._store, "_connect", refuse, times=99)
    assert relay.drain() == 6
    assert box.lane() == list("abcdef")


def test_under_an_old_snapshot_claims_ahead_do_not_read_the_dead_rows_again(box):
    with closing(Store(box.database_url)) as store, box.connect() as old:
        old.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        old.execute("SELECT count(*) FROM outbox")
        box.sql.execute(
            "INSERT INTO outbox (stream, type, priority, payload, created_at) "
            "SELECT 's', 'T', 0, to_json(n), clock_timestamp() - interval '1 hour' "
            "FROM generate_series(1, 4000) AS n"
        )
        found = []
        for _ in range(8):
            assert store.begin()
            lead = store.lead()
            events = store.claim(lead, 500, 1_000_000).events
            store._from_top_at = float("inf")
            store.claim_ahead(lead, 500, 1_000_000)
            store.record_batch(lead.batch + 1, len(events), b"")
            store.commit()
            found += [json.loads(event.payload) for event in events]
            positions = store._positions.parameters()["id"]
        assert found == [*range(1, 4001)]
        assert positions == "{0,4000}"


def test_what_was_claimed_ahead_is_given_back_when_redis_has_no_room_any_more(box, relay):
    for name in "abcd":
        box.add(name, priority=-100)
    assert step(relay) == ["c", "d"]
    box.add("low", priority=-50, stream="t")
    relay._housekeeper.pause = Lanes().pause({"s:backfill": 2}, 2, 0.0, 0.8)
    assert step(relay) == []
    assert (box.lane("s:backfill"), box.lane("t:backfill"), box.waiting()) == (
        ["a", "b"],
        ["low"],
        ["c", "d"],
    )


# -- how large a batch is ------------------------------------------------------------------------------


@pytest.fixture
def paced(box, monkeypatch):
    """A relay with batches of at most 30, and an event a millisecond; it has seen none yet."""
    monkeypatch.setattr(Pace, "rows", lambda pace, seconds: round(1000 * seconds))
    relay = box.relay(batch_size=30)
    relay._store._from_top_at = float("inf")
    return relay


def test_batches_are_small_while_urgent_events_keep_coming_and_grow_with_the_calm(box, paced):
    for n in range(140):
        box.add(str(n), priority=-100)
    paced.run_once(ahead=True)
    box.add("urgent", priority=100)
    paced.run_once(ahead=True)
    for _ in range(3):
        paced.run_once(ahead=True)
    assert sizes(box) == [30, 31, 20, 3, 3]
    paced._store.rollback()
    paced._urgent_at -= 1.2
    paced.run_once()
    assert 12 <= sizes(box)[5] <= 20
    paced._urgent_at -= 60
    paced.run_once()
    assert sizes(box)[6] == 20


def test_what_comes_after_the_end_of_a_backlog_is_not_urgent(box, paced):
    """Its last batch may have been full by chance."""
    for priority, most in ((-100, 30), (100, 20)):
        for n in range(most):
            box.add(str(n), priority=priority)
        assert (paced.run_once(), paced.run_once()) == (most, 0)
    assert paced._urgent_at == float("-inf")


def test_urgent_events_are_noticed_without_claims_ahead(box, paced):
    for n in range(80):
        box.add(str(n), priority=-100)
    paced.run_once()
    box.add("urgent", priority=-99)
    for _ in range(3):
        paced.run_once()
    assert sizes(box) == [30, 20, 3, 3]


def test_what_is_no_more_urgent_than_what_is_relayed_makes_no_batch_smaller(box, paced):
    for n in range(160):
        box.add(str(n), priority=100 if n < 100 else -100)
    paced.run_once(ahead=True)
    box.add("normal")
    for _ in range(4):
        paced.run_once(ahead=True)
    assert sizes(box) == [30, 30, 20, 20, 20]


def test_a_batch_has_an_event_whatever_the_time(box, monkeypatch):
    monkeypatch.setattr(Pace, "rows", lambda pace, seconds: 0)
    box.add("a")
    box.add("b")
    relay = box.relay(batch_size=1)
    assert [relay.run_once() for _ in range(3)] == [1, 1, 0]


def test_a_batch_takes_the_time_that_it_should_but_is_never_mostly_overhead():
    assert Pace(fixed=0.004, each=0.00001).rows(seconds=0.02) == pytest.approx(1600, abs=1)
    assert Pace(fixed=0.010, each=0.00001).rows(seconds=0.02) == pytest.approx(2000, abs=1)
    assert Pace(fixed=0.010, each=0.001).rows(seconds=0.02) == 500  # a slow Redis, say
    assert Pace(1.0, 0.5).seen(2.0, 1.0) == pytest.approx((1.2, 0.6))
