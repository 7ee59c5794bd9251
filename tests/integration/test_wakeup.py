"""How a relay waits: woken by a notification or by its poll, behind a pooling proxy, and never past a stop."""

import threading
import time
from contextlib import contextmanager

import psycopg
import pytest

from outbox.loop import Backoff, Every, Stop, backoff_seconds
from outbox.store import CHANNEL, Store
from tests.integration.box import Box
from tests.pgbouncer import PGBOUNCER, pgbouncer

PATIENCE_SECONDS = 60
FOR_EVER = 3600.0


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (answer := condition()):
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)
    return answer


@contextmanager
def running(relay):
    """Run a relay in a thread of its own, which must end soon after it is told to."""
    thread = threading.Thread(target=relay.run)
    thread.start()
    try:
        yield thread
    finally:
        relay.stop.set()
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()


def asleep(box):
    return box.value("SELECT asleep FROM outbox_relay")


def sleepy(box, **settings):
    """Make a relay that has been idle for long: once asleep, it does not look again by itself."""
    relay = box.relay(poll_seconds=FOR_EVER, **settings)
    relay._empty_steps = 100
    return relay


# -- notifications -------------------------------------------------------------------------------------------


@pytest.fixture
def heard(box):
    """Return what the channel has said since the last call."""
    with box.connect(autocommit=True) as listener:
        listener.execute(f"LISTEN {CHANNEL}")

        def read():
            box.sql.execute("SELECT pg_notify(%s, 'the end')", (CHANNEL,))
            payloads = []
            for notification in listener.notifies(timeout=PATIENCE_SECONDS):
                if notification.payload == "the end":
                    return payloads
                payloads.append(notification.payload)
            raise AssertionError("the notification did not arrive")

        yield read


def test_a_writer_notifies_only_while_the_relay_is_asleep(box, heard):
    box.add("a")
    assert heard() == []
    box.sql.execute("UPDATE outbox_relay SET asleep = true")
    box.add("b")
    assert heard() == ["public"]
    box.relay().run_once()
    box.add("c")
    assert heard() == []


def test_an_event_wakes_a_relay_that_would_not_look_for_an_hour(box):
    with running(sleepy(box)):
        for name in "ab":
            wait_until(lambda: asleep(box))
            box.add(name)
            wait_until(lambda name=name: name in box.lane())


def test_an_event_that_was_written_before_the_sleep_and_committed_after_is_found_by_the_poll(box, heard):
    with box.connect() as writer:
        box.add("late", on=writer)
        with running(box.relay(poll_seconds=0.05)):
            wait_until(lambda: asleep(box))
            heard()  # what the relay's probe has said
            writer.commit()
            wait_until(lambda: box.lane() == ["late"])
            assert heard() == []


def test_a_relay_whose_listening_connection_is_cut_polls_and_listens_again(box):
    relay = box.relay(poll_seconds=0.05)
    relay._listen_again = Every(0)
    with running(relay):
        wait_until(lambda: asleep(box))
        first = relay._listener
        box.sql.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND query LIKE 'LISTEN%'"
        )
        wait_until(lambda: relay._listener not in (None, first))
        box.add("a")
        wait_until(lambda: box.lane() == ["a"])


def test_two_idle_relays_are_both_woken(box):
    with running(sleepy(box)), running(sleepy(box)):
        for n in range(5):
            wait_until(lambda: asleep(box))
            box.add(str(n))
            wait_until(lambda n=n: len(box.lane()) == n + 1)


def test_a_relay_that_is_to_poll_does_not_listen(box):
    relay = box.relay(wake="poll", poll_seconds=0.02)
    with running(relay):
        box.add("a")
        wait_until(lambda: box.lane() == ["a"])
    assert relay._listener is None
    assert not asleep(box)


# -- behind a transaction-pooling proxy ------------------------------------------------------------------------


@pytest.fixture
def pooled(box):
    """The same outbox behind pgbouncer with two connections for everybody."""
    if PGBOUNCER is None:
        pytest.skip("pgbouncer is not installed")
    with pgbouncer(box.database_url) as behind:
        pooled = Box(box.database_url, box.redis_url)
        pooled.database_url = behind
        yield pooled
        pooled.close()


def test_behind_a_pooling_proxy_there_is_one_warning_and_it_polls(pooled, caplog):
    with running(pooled.relay(poll_seconds=0.02)):
        for name in "abc":
            pooled.add(name)
            wait_until(lambda name=name: name in pooled.lane())
    actions = [record.action for record in caplog.records]
    assert actions == ["wake_by_polling"]
    assert not asleep(pooled)


def test_relays_behind_a_pooling_proxy_work_through_a_backlog_without_an_error(pooled, caplog):
    """Their connections to the server change hands: a prepared statement would be somebody else's."""
    for n in range(300):
        pooled.add(f"{n:03}", key="k")
    relays = [pooled.relay(batch_size=5, journal_retention_seconds=0.01) for _ in range(2)]
    with running(relays[0]), running(relays[1]):
        wait_until(lambda: len(pooled.lane()) >= 300)
        wait_until(lambda: pooled.value("SELECT count(*) FROM outbox_journal") == 0)
    pooled.relay(batch_size=5).drain()
    assert pooled.lane() == [f"{n:03}" for n in range(300)]
    assert {record.action for record in caplog.records} == {"wake_by_polling"}


def test_what_a_drain_leaves_behind_a_pooling_proxy_disturbs_nobody(pooled):
    for round_ in range(4):
        for n in range(40):
            pooled.add(f"{round_} {n:02}")
        pooled.relay(batch_size=2).drain()
    prepared = "SELECT count(*) FROM pg_prepared_statements"
    with psycopg.connect(pooled.database_url.replace("+psycopg", "")) as connection:
        assert connection.execute(prepared).fetchone() == (0,)


def test_statements_are_prepared_where_the_session_is_our_own(box):
    store = Store(box.database_url)
    listener = store.listen()
    for _ in range(8):
        store.begin()
        store.claim(store.lead(), 1, 1)
        store.commit()
    assert store._run("SELECT count(*) FROM pg_prepared_statements")[0][0] > 0
    listener.close()
    store.close()


# -- a stop ends every wait --------------------------------------------------------------------------------------


def reaches(relay, thread, state):
    wait_until(lambda: state() or not thread.is_alive())
    assert thread.is_alive()


def test_a_stop_ends_the_sleep_for_an_hour(box):
    relay = sleepy(box)
    with running(relay) as thread:
        reaches(relay, thread, lambda: asleep(box))


def test_a_stop_ends_the_poll_of_an_hour(box):
    relay = sleepy(box, wake="poll")
    with running(relay) as thread:
        reaches(relay, thread, lambda: relay._empty_steps > 100)


def test_a_stop_ends_the_wait_of_a_standby(box):
    leader, standby = Store(box.database_url), box.relay(takeover_seconds=FOR_EVER * 20)
    leader.begin()
    with running(standby) as thread:
        reaches(standby, thread, lambda: not standby._leading)
    leader.close()


def test_a_stop_ends_the_pause_after_an_error(box):
    relay = box.relay(on_redis_reset="halt")
    box.sql.execute("UPDATE outbox_relay SET batch = 7")
    box.add("a")
    relay._outage = Backoff(FOR_EVER, FOR_EVER)
    with running(relay) as thread:
        reaches(relay, thread, lambda: relay._outage.failures)


def test_a_stop_may_come_twice_and_before_the_start(box):
    box.add("a")
    relay = box.relay()
    relay.stop.set()
    relay.stop.set()
    relay.run()
    assert (box.lane(), box.waiting()) == ([], ["a"])


def test_a_stop_is_seen_by_a_wait_that_begins_after_it():
    stop = Stop()
    assert not stop.wait(0)
    stop.set()
    assert stop.wait(FOR_EVER)


@pytest.mark.parametrize("attempts", [1, 2, 5, 40, 10_000])
def test_half_of_a_pause_is_fixed_and_half_is_random(attempts):
    full = min(300.0, 2.0 ** min(attempts - 1, 100))
    pauses = {backoff_seconds(attempts, 1.0, 300.0) for _ in range(200)}
    assert full / 2 <= min(pauses) < full * 0.6
    assert full * 0.9 < max(pauses) <= full
