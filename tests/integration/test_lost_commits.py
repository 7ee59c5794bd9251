"""A PostgreSQL that has lost commits, while Redis stands ahead: an asynchronous failover, a restored copy."""

from contextlib import contextmanager

import psycopg
import pytest
from psycopg import sql

from outbox.streams import KEPT, decode
from tests.conftest import admin
from tests.integration.box import Box, before
from tests.integration.test_answers import Lost, kill_backends


class Copies:
    """Keeps a copy of a database, and brings it back: what has been committed since is lost."""

    def __init__(self, server, name):
        self._server, self._name, self._kept = server, name, f"{name}_kept"

    def keep(self):
        self._copy(self._name, self._kept)

    def bring_back(self):
        self._copy(self._kept, self._name)

    def drop(self):
        with admin(self._server) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {self._kept} WITH (FORCE)")

    def _copy(self, source, target):
        with admin(self._server) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s", (source,)
            )
            connection.execute(f"DROP DATABASE IF EXISTS {target} WITH (FORCE)")
            create = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
            connection.execute(create.format(sql.Identifier(target), sql.Identifier(source)))


@pytest.fixture
def lose_commits(postgres, box):
    """A context whose commits PostgreSQL loses; Redis keeps what was published in it."""
    copies = Copies(postgres, psycopg.conninfo.conninfo_to_dict(plain(box))["dbname"])

    @contextmanager
    def losing():
        copies.keep()
        box.sql = box.connect(autocommit=True)
        yield
        for relay in box.relays:
            relay.close()
        copies.bring_back()
        box.sql = box.connect(autocommit=True)

    yield losing
    copies.drop()


def plain(box: Box) -> str:
    return box.database_url.replace("+psycopg", "")


def actions(caplog):
    return [getattr(record, "action", None) for record in caplog.records]


def journal(box):
    rows = box.sql.execute("SELECT batch, body FROM outbox_journal ORDER BY batch")
    return {batch: [event.payload for event in decode(body)[1]] for batch, body in rows}


def test_what_was_published_is_adopted_though_its_commits_are_lost(box, lose_commits, caplog):
    for name in "abcde":
        box.add(name)
    with lose_commits():
        box.relay(batch_size=2).drain()
    assert (box.lane(), box.waiting(), box.batch()) == ([*"abcde"], [*"abcde"], 0)
    box.add("f")
    box.relay().drain()
    assert (box.lane(), box.waiting()) == ([*"abcdef"], [])
    assert journal(box) == {1: ['"a"', '"b"'], 2: ['"c"', '"d"'], 3: ['"e"'], 4: ['"f"']}
    assert "commits_lost" in actions(caplog)


@pytest.mark.parametrize("published", ["x", "xy"])
def test_another_event_that_has_got_the_number_of_a_lost_one_is_published(
    box, lose_commits, caplog, published
):
    """One batch ahead looks like a leader that died; its rows may be other events all the same."""
    box.add("a")
    with lose_commits():
        relay = box.relay()
        relay.drain()
        for name in published:
            box.add(name)
            relay.drain()
    assert box.lane() == ["a", *published]
    reused = box.value("SELECT last_value FROM outbox_id_seq")
    box.add("new")
    assert box.value("SELECT id FROM outbox WHERE payload #>> '{}' = 'new'") == reused + 1
    box.relay().drain()
    assert (box.lane(), box.waiting()) == (["a", *published, "new"], [])
    assert "commits_lost" in actions(caplog)


@pytest.mark.parametrize(
    ("lost", "new"),
    [
        (
            "01a21ee1-b1c1-7cb4-a7e3-5f6809f9d7fe",
            "01a21ee1-b1c2-7647-926e-6cca8e2fc57d",
        ),  # version 7, one time
        (
            "c4b1e0f6-caf1-11f0-8000-02fc00000001",
            "d17ac7b4-caf1-11f0-8000-02fc00000001",
        ),  # version 1, one host
    ],
)
def test_ids_that_are_alike_at_one_end_are_told_apart(box, lose_commits, lost, new):
    with lose_commits():
        box.add("lost", event_id=lost)
        box.relay().drain()
    box.add("new", event_id=new)
    box.relay().drain()
    assert (box.lane(), box.waiting()) == (["lost", "new"], [])


def test_a_number_that_is_used_again_one_batch_ahead(box, lose_commits):
    with lose_commits():
        box.add("lost")
        box.relay().drain()
    box.add("new")
    box.relay().drain()
    assert (box.lane(), box.waiting(), box.batch()) == (["lost", "new"], [], 2)


def test_redis_remembers_the_last_batches_and_what_is_older_is_said(box, lose_commits, caplog):
    names = [f"{n:03}" for n in range(KEPT + 3)]
    for name in names:
        box.add(name)
    with lose_commits():
        box.relay(batch_size=1).drain()
    assert sum(field.startswith(b"ids:") for field in box.state()) == KEPT
    box.relay(batch_size=1).drain()
    assert box.lane() == [*names, *names[:3]]
    (message,) = [r.getMessage() for r in caplog.records if getattr(r, "action", None) == "commits_lost"]
    assert "Of 3 batches" in message
    assert box.batch() == KEPT + 6


def test_what_redis_forgets_after_it_was_adopted_is_sent_again(box, lose_commits):
    for name in "abc":
        box.add(name)
    with lose_commits():
        box.relay(batch_size=1).drain()
    box.relay().drain()
    box.add("d")
    box.relay().drain()
    assert box.lane() == [*"abcd"]
    box.redis.flushall()
    box.add("e")
    box.relay().drain()
    assert box.lane() == [*"abcde"]


def test_a_crash_while_it_adopts_many_batches_repeats_nothing(box, lose_commits):
    for name in "abc":
        box.add(name)
    with lose_commits():
        box.relay(batch_size=1).drain()
    relay = box.relay()
    steps = iter(range(9))

    def fail_second():
        if next(steps) == 1:
            raise Lost

    before(relay._store, "record_batch", fail_second, times=9)
    with pytest.raises(Lost):
        relay.run_once()
    relay.drain()
    assert (box.lane(), box.waiting(), box.batch()) == ([*"abc"], [], 3)


def test_a_zombie_adopts_nothing_of_its_successor(box):
    """It stands three batches behind, and its lock is lost: it must not take them for lost commits."""
    zombie, successor = box.relay(batch_size=1), box.relay(batch_size=1)
    box.add("a")

    def freeze():
        kill_backends(box)
        for name in "bcd":
            box.add(name)
            successor.run_once()

    before(zombie._streams, "publish", freeze)
    adopt = zombie._store.adopt
    zombie._store.adopt = lambda marks: pytest.fail(f"adopted {marks}")
    assert zombie.run_once() == 1
    zombie._store.adopt = adopt
    zombie.drain()
    assert (box.lane(), box.waiting()) == ([*"abcd"], [])
