"""The inbox: an event that comes twice takes effect once, in each kind of consumer."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import create_engine, literal, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import sessionmaker

from outbox import Consumer, Retry
from outbox.errors import DatabaseUnavailable
from outbox.groups import Groups
from tests.integration.bank import KINDS, Bank, Made, entry, wait_until


@pytest.fixture(params=KINDS)
def bank(request, database_url, redis_url) -> Iterator[Bank]:
    bank = Bank(database_url, redis_url, request.param)
    yield bank
    bank.close()


def test_an_event_that_comes_twice_takes_effect_once(bank):
    made = bank.consumer(inbox=True)
    for _ in range(2):
        bank.add("a", id="4eeda19d-de48-49ff-aeb4-32b8b654002c")
    bank.add("b", id=str(uuid4()))
    assert made.drain() == 3
    assert bank.effects() == ["a", "b"]
    assert made.it.counts == {"handled": 2, "repeated": 1}


def test_a_missing_table_spends_no_delivery(bank):
    made = bank.consumer(inbox=True)
    bank.sql.execute("ALTER TABLE outbox_inbox RENAME TO elsewhere")
    bank.add("a")
    for _ in range(3):
        with pytest.raises(DatabaseUnavailable, match="inbox"):
            made.run_once()
    bank.sql.execute("ALTER TABLE elsewhere RENAME TO outbox_inbox")
    assert made.drain() == 1
    assert bank.effects() == ["a"]
    assert bank.dead() == []


def test_the_handlers_own_commit_is_refused_and_nothing_of_it_stays(bank):
    made = bank.consumer(lambda event, session: session.commit(), inbox=True, max_deliveries=1)
    bank.add("a")
    assert made.drain() == 1
    assert bank.effects() == []
    assert "must not commit" in bank.dead()[0]["dlq:error"]


def test_the_handlers_own_rollback_is_refused(bank):
    made = bank.consumer(lambda event, session: session.rollback(), inbox=True, max_deliveries=1)
    bank.add("a")
    assert made.drain() == 1
    assert "begin_nested" in bank.dead()[0]["dlq:error"]


def test_a_savepoint_is_the_handlers_own(bank):
    def act(event, session) -> None:
        with session.begin_nested():
            pass

    made = bank.consumer(act, inbox=True)
    bank.add("a")
    assert made.drain() == 1
    assert bank.effects() == ["a"]


@pytest.mark.parametrize("told", [True, False])
def test_a_handler_that_goes_on_after_an_error_of_postgresql_is_told_what_undoes_its_work(
    bank, monkeypatch, told
):
    """PostgreSQL answers the COMMIT of such a transaction by a rollback, and by no error."""

    def act(event, session) -> None:
        if not told:  # as by asyncpg, whose connection does not tell in which state its transaction is
            monkeypatch.setattr("outbox.inbox.STATE", "no_info")
        with suppress(DBAPIError):
            session.execute(text("INSERT INTO effect VALUES (NULL)"))

    made = bank.consumer(act, inbox=True, max_deliveries=1)
    bank.add("a")
    assert made.drain() == 1
    assert (bank.effects(), noted(bank)) == ([], [])
    assert "begin_nested" in bank.dead()[0]["dlq:error"]


def test_an_error_of_postgresql_in_a_savepoint_is_the_handlers_own(bank):
    def act(event, session) -> None:
        with suppress(DBAPIError), session.begin_nested():
            session.execute(text("INSERT INTO effect VALUES (NULL)"))

    made = bank.consumer(act, inbox=True)
    bank.add("a")
    assert made.drain() == 1
    assert (bank.effects(), bank.dead()) == (["a"], [])


def test_what_another_consumers_transaction_has_in_hand_is_not_waited_for(bank):
    """It may be frozen for long; what is behind its event goes on, and the event comes back without a new delivery."""
    id_, deliveries = "4eeda19d-de48-49ff-aeb4-32b8b654002c", []
    made = bank.consumer(
        lambda event, session: deliveries.append(event.deliveries),
        inbox=True,
    )
    bank.add("a", id=id_)
    bank.add("b")
    with psycopg.connect(bank.database_url.replace("+psycopg", "")) as frozen:
        frozen.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (f"g {id_}",))
        frozen.execute("INSERT INTO outbox_inbox (consumer_group, event_id) VALUES ('g', %s)", (id_,))
        wait_until(lambda: made.run_once() + 1 and bank.effects() == ["b"])
        frozen.rollback()
    wait_until(lambda: made.run_once() + 1 and bank.effects() == ["a", "b"])
    assert deliveries == [1, 1]


# -- rows that are old, or by a foreign hand --------------------------------------------------------------


def note(bank: Bank, rows: dict[int, str | float], group: str = "g") -> None:
    """Add rows to the inbox: of events with these numbers, handled at a time, or so many hours ago."""
    for number, at in rows.items():
        if not isinstance(at, str):
            at = f"{datetime.now(UTC) - timedelta(hours=at)}"
        bank.sql.execute(
            "INSERT INTO outbox_inbox VALUES (%s, %s, %s::text::timestamptz)", (group, UUID(int=number), at)
        )


def noted(bank: Bank) -> list[int]:
    """Return the numbers of the events in the inbox."""
    return sorted(event_id.int for (event_id,) in bank.sql.execute("SELECT event_id FROM outbox_inbox"))


def add_old(bank: Bank, hours: float) -> None:
    """Add an event, of the number 99, that was published so many hours ago."""
    at = datetime.now(UTC) - timedelta(hours=hours)
    bank.redis.xadd("s", entry("old", id=str(UUID(int=99))), id=f"{int(at.timestamp() * 1000)}-0")


def test_old_rows_of_the_group_are_purged(bank, monkeypatch):
    monkeypatch.setattr("outbox.inbox.PURGED_AT_ONCE", 2)
    made = bank.consumer(inbox=True)
    note(bank, {1: 7 * 24 + 1, 2: 1000, 3: 1001, 4: 1002, 5: 1003, 6: 7 * 24 - 1})
    note(bank, {5: 1, 7: 2000}, group="other")
    made.run_once()
    assert noted(bank) == [5, 6, 7]


def test_no_row_is_purged_whose_event_redis_may_still_give(bank):
    """An hour is left between the clocks of both, and for what the relay may send again."""
    made = bank.consumer(inbox=True)
    add_old(bank, hours=10 * 24)
    bank.add("new", "s:backfill")
    note(bank, {1: 9 * 24, 2: 10 * 24 + 0.5, 3: 10 * 24 + 1.5})
    made.run_once()
    assert noted(bank) == [1, 2, 99]


@pytest.mark.parametrize("handled_at", ["infinity", "-infinity", "294276-01-01", "4713-01-01 BC"])
def test_a_row_with_a_time_that_cannot_be_holds_nothing_up(bank, handled_at):
    made = bank.consumer(inbox=True)
    note(bank, {1: handled_at, 2: 1000})
    bank.add("a")
    assert made.drain() == 1
    assert bank.effects() == ["a"]
    assert (1 in noted(bank), 2 in noted(bank)) == (handled_at[0] in "i2", False)


def test_an_event_whose_row_somebody_has_added_counts_as_repeated(bank):
    made = bank.consumer(inbox=True)
    note(bank, {1: 0})
    note(bank, {2: 0}, group="other")
    bank.add("a", id=str(UUID(int=1)))
    bank.add("b", id=str(UUID(int=2)))
    assert made.drain() == 2
    assert bank.effects() == ["b"]
    assert made.it.counts == {"handled": 1, "repeated": 1}


def test_without_its_key_the_inbox_could_tell_nothing_apart_and_is_not_used(bank):
    made = bank.consumer(inbox=True)
    bank.sql.execute("ALTER TABLE outbox_inbox DROP CONSTRAINT outbox_inbox_pkey")
    bank.add("a")
    for _ in range(3):
        with pytest.raises(DatabaseUnavailable, match="the inbox: .*constraint"):
            made.run_once()
    assert (bank.effects(), bank.pending()) == ([], {"a": 1})
    bank.sql.execute("ALTER TABLE outbox_inbox ADD PRIMARY KEY (consumer_group, event_id)")
    assert made.drain() == 1
    assert bank.effects() == ["a"]


# -- PostgreSQL is away -----------------------------------------------------------------------------------


def end_connection(bank: Bank, session) -> None:
    """Have PostgreSQL end the connection of a handler's session, and the handler meet it."""
    pid = session.execute(text("SELECT pg_backend_pid()")).scalar()
    bank.sql.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
    session.execute(text("SELECT 1"))


def run_until(made: Made, condition: Callable[[], object]) -> None:
    """Let a consumer take steps until a condition holds, though PostgreSQL goes away in some."""

    def holds() -> object:
        with suppress(DatabaseUnavailable):
            made.run_once()
        return condition()

    wait_until(holds)


def test_a_connection_that_is_lost_in_a_handler_is_no_failure(bank):
    """What the handler has done is undone with it, and the event keeps its deliveries."""
    deliveries = []

    def act(event, session) -> None:
        deliveries.append(event.deliveries)
        if len(deliveries) < 3:
            end_connection(bank, session)

    made = bank.consumer(act, inbox=True, max_deliveries=1)
    bank.add("a")
    for _ in range(2):
        with pytest.raises(DatabaseUnavailable, match="PostgreSQL"):
            made.run_once()
    wait_until(made.drain)
    assert (deliveries, bank.effects(), bank.dead()) == ([1, 1, 1], ["a"], [])


def test_a_handler_that_ends_its_connection_each_time_lets_others_pass(bank):
    """Whether it does, or PostgreSQL was away twice, cannot be told: it keeps its deliveries."""

    def act(event, session) -> None:
        if event.data == "a":
            end_connection(bank, session)

    made = bank.consumer(act, inbox=True)
    bank.add("a")
    bank.add("b")
    run_until(made, lambda: bank.effects() == ["b"])
    assert bank.handled[:3] == ["a", "a", "b"]
    assert bank.pending()["a"] == 1


@pytest.mark.parametrize("sure", [True, False])
def test_the_pause_of_a_handler_that_ends_its_connection_grows_though_it_is_not_the_only_one(
    bank, monkeypatch, sure
):
    times = []
    monkeypatch.setattr("outbox.consumer.backoff_seconds", lambda n, *_: times.append(n) or 0.1)

    def act(event, session) -> None:
        end_connection(bank, session)

    made = bank.consumer(act, inbox=True)
    if not sure:  # that it is ours still: it asks Redis before each handling
        made.it._hand._sure_seconds = 0.0
    bank.add("a")
    bank.add("b")
    run_until(made, lambda: times.count(3) == 2)
    assert sorted(times)[:4] == [1, 1, 2, 2]


@pytest.mark.parametrize("state", ["53100", "53300"])
def test_a_server_that_is_full_is_no_failure(bank, state):
    """Of its disk, of its connections."""
    errors = [state]

    def act(event, session) -> None:
        if errors:
            session.execute(
                text(f"DO $$ BEGIN RAISE EXCEPTION 'full' USING ERRCODE = '{errors.pop()}'; END $$")
            )

    made = bank.consumer(act, inbox=True, max_deliveries=1)
    bank.add("a")
    with pytest.raises(DatabaseUnavailable, match="full"):
        made.run_once()
    assert made.drain() == 1
    assert (bank.effects(), bank.dead()) == (["a"], [])


def test_what_a_handler_does_to_the_info_of_its_session_changes_nothing(bank):
    def act(event, session) -> None:
        session.info.clear()
        session.commit()

    made = bank.consumer(act, inbox=True, max_deliveries=1)
    bank.add("a")
    assert made.drain() == 1
    assert (bank.effects(), noted(bank)) == ([], [])
    assert "must not commit" in bank.dead()[0]["dlq:error"]


def test_a_purge_that_postgresql_refuses_is_tried_again_after_a_minute(bank, monkeypatch, caplog):
    async def refused(self, before, is_enough):
        raise DatabaseUnavailable("permission denied")

    monkeypatch.setattr("outbox.inbox.Inbox.purge", refused)
    made = bank.consumer(inbox=True, claim_idle=timedelta(milliseconds=100))
    with made.running():
        bank.add("a")
        wait_until(lambda: bank.effects() == ["a"])
        wait_until(lambda: made.it._hand.renewed_at > time.monotonic() - 0.01)  # the keeper goes on
        bank.sql.execute("SELECT pg_sleep(1.1)")
    failures = [record for record in caplog.records if getattr(record, "action", "") == "tidying_failed"]
    assert len(failures) == 1


@pytest.mark.parametrize("state", ["53200", "53400"])
def test_a_limit_that_a_handlers_own_statement_meets_is_a_failure(bank, state):
    """Its locks do not fit in memory, say, or its sort on the disk that it may use."""

    def act(event, session) -> None:
        session.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'too much' USING ERRCODE = '{state}'; END $$"))

    made = bank.consumer(act, inbox=True, max_deliveries=1)
    bank.add("a")
    assert made.drain() == 1
    assert "too much" in bank.dead()[0]["dlq:error"]


def test_a_purge_that_waits_stops_no_heartbeat_and_no_end(bank, monkeypatch):
    beats, renew = [], Groups.renew

    async def counted(self, lane, ids):
        beats.append(ids)
        return await renew(self, lane, ids)

    def act(event, session) -> None:
        raise Retry(after=timedelta(hours=1))

    monkeypatch.setattr(Groups, "renew", counted)
    note(bank, {1: 1000})
    made = bank.consumer(act, inbox=True, claim_idle=timedelta(milliseconds=300))
    with psycopg.connect(bank.database_url.replace("+psycopg", "")) as other:
        other.execute("SELECT FROM outbox_inbox FOR UPDATE")
        with made.running():
            waits = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'DELETE%'"
            wait_until(lambda: bank.sql.execute(waits).fetchone(), "a purge that waits")
            bank.add("a")
            wait_until(lambda: bank.handled)
            seen = len(beats)
            wait_until(lambda: len(beats) > seen + 3, "a heartbeat")
        assert noted(bank) == [1]


@pytest.mark.parametrize("within", ["its own database", "another"])
def test_what_the_driver_refuses_of_a_handler_is_a_failure(bank, within):
    """Nothing is away: it would be the next event again and again."""

    def act(event, session) -> None:
        if within == "another":
            with create_engine("sqlite://").connect() as connection:
                connection.execute(text("SELECT * FROM missing"))
        session.execute(select(literal(1)).where(literal(1).in_(range(70_000))))

    made = bank.consumer(act, inbox=True, max_deliveries=1)
    bank.add("a")
    assert made.drain() == 1
    assert bank.dead()[0]["dlq:error"].startswith("OperationalError: ")
    assert bank.effects() == []


def test_a_handler_that_is_idle_in_its_transaction_for_too_long_has_failed(bank):
    def act(event, session) -> None:
        session.execute(text("SET LOCAL idle_in_transaction_session_timeout = 1"))
        pid = session.execute(text("SELECT pg_backend_pid()")).scalar()
        wait_until(
            lambda: not bank.sql.execute("SELECT pid FROM pg_stat_activity WHERE pid = %s", (pid,)).fetchone()
        )
        session.execute(text("SELECT 1"))

    made = bank.consumer(act, inbox=True, max_deliveries=1)
    bank.add("a")
    # Where the connection is reset before the last words of PostgreSQL are read, they are lost, and it comes again.
    run_until(made, bank.dead)
    assert "IdleInTransactionSessionTimeout" in bank.dead()[0]["dlq:error"]


def test_a_driver_whose_connect_raises_an_error_of_the_system_is_no_failure(bank):
    """As asyncpg's does."""

    def refuse() -> None:
        raise ConnectionRefusedError("nobody listens")

    sessions = sessionmaker(create_engine("postgresql+psycopg://", creator=refuse))
    consumer = Consumer(bank.redis_url, group="g", streams=["s"], sessions=sessions, max_deliveries=1)
    consumer.on_any(lambda event, session: None)
    bank.add("a")
    for _ in range(2):
        with pytest.raises(DatabaseUnavailable, match="nobody listens"):
            consumer.run_once()
    consumer.close()
    assert (bank.pending(), bank.dead()) == ({"a": 1}, [])


def test_a_pool_without_a_free_connection_is_no_failure(bank, monkeypatch):
    made = bank.consumer(lambda event, session: raise_once(), inbox=True, max_deliveries=1)
    errors = [PoolTimeout("QueuePool limit of size 5 reached")]

    def raise_once() -> None:
        if errors:
            raise errors.pop()

    bank.add("a")
    with pytest.raises(DatabaseUnavailable, match="QueuePool"):
        made.run_once()
    assert made.drain() == 1
    assert bank.dead() == []


def test_no_connection_is_kept_after_an_event(bank):
    """A session that is left open would hold one for each event that fails."""
    made = bank.consumer(lambda event, session: 1 / 0, inbox=True, max_deliveries=1)
    for n in range(20):  # more than the pool has
        bank.add(f"e{n}")
    assert made.drain() == 20
    assert len(bank.dead()) == 20
