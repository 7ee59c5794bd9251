"""Which events a batch takes, and in which order."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from outbox.errors import DatabaseUnavailable
from outbox.store import CLAIM, MANY, Store
from tests.integration.box import Box
from tests.integration.test_wakeup import wait_until


def test_highest_priority_first_then_oldest_and_each_to_its_lane(box):
    for name, priority in (("bulk", -100), ("normal", 0), ("low", -50), ("critical", 100), ("later", 0)):
        box.add(name, priority=priority)
    assert box.relay().run_once() == 5
    assert box.lane("s") == ["critical", "normal", "later"]
    assert box.lane("s:backfill") == ["low", "bulk"]


def test_the_order_of_a_batch_is_that_of_its_priorities(box):
    for priority in (-100, 0, 100, 50, -1):
        box.add(str(priority), priority=priority)
    relay = box.relay(batch_size=1)
    order: list[str] = []
    while relay.run_once():
        order += {*box.lane("s"), *box.lane("s:backfill")} - {*order}
    assert order == ["100", "50", "0", "-1", "-100"]


def test_threshold_and_suffix_are_settings(box):
    box.add("low", priority=9)
    box.add("high", priority=10)
    box.relay(threshold=10, backfill_suffix="later").drain()
    assert (box.lane("s"), box.lane("s:later")) == (["high"], ["low"])


def test_with_lanes_off_there_is_one_stream_in_the_order_of_priority(box):
    box.add("low", priority=-50)
    box.add("high", priority=50)
    box.relay(lanes="off").drain()
    assert (box.lane("s"), box.redis.exists("s:backfill")) == (["high", "low"], 0)


def test_events_of_one_instant_keep_the_order_of_their_ids(box):
    for name in "abc":
        box.add(name, created_at=datetime(2026, 1, 1, tzinfo=UTC))
    box.relay().drain()
    assert box.lane() == ["a", "b", "c"]


def test_a_batch_is_bounded_in_rows(box):
    for n in range(5):
        box.add(str(n))
    relay = box.relay(batch_size=2)
    assert [relay.run_once() for _ in range(4)] == [2, 2, 1, 0]
    assert box.lane() == list("01234")


def test_a_batch_is_bounded_in_bytes_but_takes_one_at_least(box):
    for name in ("small", "x" * 200_000, "y" * 200_000, "z" * 10):
        box.add(name)
    relay = box.relay(batch_bytes=100_000)
    assert [relay.run_once() for _ in range(4)] == [2, 1, 1, 0]
    assert [name[0] for name in box.lane()] == ["s", "x", "y", "z"]


def test_an_entry_is_a_cloud_event_with_the_bytes_that_were_recorded(box):
    payload = '{ "b": 1,  "a": "\\u00e9 é", "b": 2 }'
    event_id = box.add(
        "",
        key="k",
        priority=-50,
        payload=payload,
        headers=json.dumps({"tenant": "eu", "traceparent": "00-1"}),
    )
    created_at = box.value("SELECT created_at FROM outbox")
    box.relay(source="shop").drain()
    ((_, entry),) = box.redis.xrange("s:backfill")
    fields = {name.decode(): value.decode() for name, value in entry.items()}
    assert datetime.fromisoformat(fields.pop("time")) == created_at
    assert fields == {
        "specversion": "1.0", "id": event_id, "source": "shop", "type": "T", "subject": "k",
        "datacontenttype": "application/json", "priority": "-50", "data": payload,
        "correlationid": event_id, "tenant": "eu", "traceparent": "00-1",
    }  # fmt: skip


def test_an_event_is_not_published_before_it_is_due(box):
    later = datetime.now(UTC) + timedelta(hours=1)
    box.add("later", available_at=later, priority=100)
    box.add("now")
    relay = box.relay()
    relay.drain()
    assert (box.lane(), box.waiting()) == (["now"], ["later"])
    box.sql.execute("UPDATE outbox SET available_at = now()")
    relay.drain()
    assert box.lane() == ["now", "later"]


def test_an_event_that_somebody_changes_while_it_is_claimed_is_not_passed(box):
    for name in ("e1", "e2"):
        box.add(name, key="k")
    relay = box.relay()
    with box.connect() as operator, ThreadPoolExecutor() as thread:
        operator.execute("UPDATE outbox SET available_at = now() WHERE payload::text = '\"e1\"'")
        step = thread.submit(relay.run_once)
        wait_until(
            lambda: (
                box.sql.execute(
                    "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
                ).rowcount
            )
        )
        operator.commit()
        with pytest.raises(DatabaseUnavailable, match="an event was changed by somebody else"):
            step.result()
    assert (box.lane(), box.waiting()) == ([], ["e1", "e2"])
    relay.drain()
    assert box.lane() == ["e1", "e2"]


# -- positions --------------------------------------------------------------------------------------------


@pytest.fixture
def steps(box: Box):
    """A claim, as a list of names, that never scans from the top by itself."""
    store = Store(box.database_url)

    def claim(rows: int = 100) -> list[str]:
        store.begin()
        lead = store.lead()
        assert lead is not None
        events = store.claim(lead, rows, 1_000_000).events
        store.commit()
        store._from_top_at = float("inf")
        return [json.loads(event.payload) for event in events]

    claim.store = store
    yield claim
    store.close()


def test_what_is_committed_behind_the_position_comes_before_what_follows_it(box, steps):
    """A key's second event is visible with the first at once, and must not pass it."""
    box.add("first of all")
    assert steps() == ["first of all"]
    with box.connect() as writer:
        box.add("k1", key="k", on=writer)
        box.add("other")
        assert steps() == ["other"]
        box.sql.execute("SELECT pg_sleep(1.1)")  # past the second that is left for clocks set back
        box.add("another")
        assert steps() == ["another"]
        writer.commit()
    box.add("k2", key="k")
    assert steps() == ["k1", "k2"]


def test_a_transaction_that_runs_for_many_steps_is_not_forgotten(box, steps):
    with box.connect() as writer:
        box.add("late", on=writer)
        for n in range(5):
            box.add(str(n))
            assert steps() == [str(n)]
        box.sql.execute("SELECT pg_sleep(1.1)")
        box.add("5")
        assert steps() == ["5"]
        writer.commit()
    assert steps() == ["late"]


@pytest.mark.parametrize(("savepoints", "many"), [(0, MANY), (3, 2)], ids=["alone", "very many"])
def test_a_transaction_that_began_after_all_that_have_ended_is_not_forgotten(
    box, steps, monkeypatch, savepoints, many
):
    """The snapshot of a step does not list it: its number is higher than any that has ended."""
    monkeypatch.setattr("outbox.store.MANY", many)
    box.add("first of all")
    assert steps() == ["first of all"]
    with box.connect() as writer:
        box.add("k1", key="k", on=writer)
        for _ in range(savepoints):
            writer.execute("SAVEPOINT one")
            box.add("none", on=writer)
            writer.execute("ROLLBACK TO one")
        box.sql.execute("SELECT pg_sleep(1.5)")  # past the second that is left for clocks set back
        assert steps() == []
        box.add("other")
        assert steps() == ["other"]
        box.add("k2", key="k", on=writer)
        writer.commit()
    assert steps() == ["k1", "k2"]


def test_priorities_that_were_never_seen_are_found_beside_the_known(box, steps):
    box.add("0")
    steps()
    for priority in (32767, 1, 0, -1, -32768):
        box.add(str(priority), priority=priority)
    assert steps() == ["32767", "1", "0", "-1", "-32768"]


def test_a_step_that_is_undone_leaves_nothing_behind_the_position(box, steps):
    for name in "abc":
        box.add(name)
    steps.store.begin()
    steps.store.claim(steps.store.lead(), 2, 1_000_000)
    steps.store.rollback()
    assert steps() == ["a", "b", "c"]


def test_under_an_old_snapshot_a_claim_does_not_read_the_dead_rows_again(box, steps):
    box.sql.execute(
        "INSERT INTO outbox (stream, type, priority, payload) "
        "SELECT 's', 'T', (n % 3) * 50, to_json(n) FROM generate_series(1, 6000) AS n"
    )
    with box.connect() as old:
        old.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        old.execute("SELECT count(*) FROM outbox")
        while steps(500):
            pass
        box.sql.execute("SELECT pg_sleep(1.1)")
        steps()
        with_positions = blocks_read(steps.store)
        steps.store.forget_positions()
        from_the_top = blocks_read(steps.store)
    assert from_the_top > 5 * with_positions


def blocks_read(store: Store) -> int:
    """Return how many blocks an empty claim reads."""
    explain = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + CLAIM
    store.begin()
    store.lead()
    parameters = store._positions.parameters() | {"rows": 100, "bytes": 1_000_000}
    (((plan,),),) = store._run(explain, parameters)
    store._connection.execute("ROLLBACK")
    return plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"]
