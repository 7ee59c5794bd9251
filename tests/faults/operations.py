"""What operators do: a pooling proxy, clocks that are wrong, a migration under load, a small disk."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import psycopg
from sqlalchemy import make_url
from sqlalchemy.exc import OperationalError

from outbox import migrate
from tests.faults.scenario import Scenario
from tests.faults.trial import Trial
from tests.pgbouncer import PGBOUNCER, pgbouncer

RETENTION_SECONDS = 2
EVENT = import_module("outbox.event")  # `outbox.event` is the decorator
HOUR_SECONDS = 3600
OPEN_SECONDS = 12  # longer than a migration waits for a lock
HELD_UP_SECONDS = 8  # the lock_timeout of a migration, and time to take a breath
NEXT = """
from alembic import op

revision, down_revision, branch_labels, depends_on = "9999", "{head}", None, None


def upgrade():
    op.execute("{change}")
"""
CHANGE = "ALTER TABLE public.outbox ADD COLUMN tenant_{n} text"


def behind_a_pooling_proxy(trial: Trial) -> None:
    """Relays are killed behind it, too: their connections to the server are given to others."""
    pooled = trial.enter(pgbouncer(trial.database.url, connections=8))
    trial.to_database.target = make_url(pooled).port
    with trial.under_load(relays=2):
        for _ in trial.rounds():
            trial.wait_for_publish()
            trial.replace(trial.leader())
            trial.recovers()


def clocks_apart(trial: Trial) -> None:
    """One of the service's writers is an hour ahead; the control's service stamps its events by that clock."""
    trial.stamps = trial.naive
    with ahead_in_one_thread(), trial.under_load():
        for _ in trial.rounds():
            trial.let_pass(500)


@contextmanager
def ahead_in_one_thread() -> Iterator[None]:
    """Let the clock of the service's second thread be an hour ahead: the one its ids are made by, and its own."""
    real, real_ns = time.time, time.time_ns

    def ahead_seconds() -> int:
        return HOUR_SECONDS * (threading.current_thread().name == "writer 1")

    time.time = lambda: real() + ahead_seconds()
    EVENT.time_ns = lambda: real_ns() + ahead_seconds() * 10**9
    try:
        yield
    finally:
        time.time, EVENT.time_ns = real, real_ns


def migrated(trial: Trial) -> None:
    """A transaction of the service stays open meanwhile; the control alters the table without a time limit."""
    with trial.under_load(), psycopg.connect(trial.database.url.replace("+psycopg", "")) as forgotten:
        for n in trial.rounds():
            forgotten.execute("LOCK TABLE outbox IN ROW EXCLUSIVE MODE")
            end = threading.Timer(OPEN_SECONDS, forgotten.rollback)
            end.start()
            if trial.naive:
                trial.sql(CHANGE.format(n=n))
            else:
                migrate_until_done(trial, n)
            end.join()
            trial.recovers()
    trial.complain_unless(trial.longest_pause() < HELD_UP_SECONDS, "commits held up")


def migrate_until_done(trial: Trial, number: int) -> None:
    """Bring the tables to a version that is made for this, as often as it takes, as a deployment does."""
    shipped = migrate._folder()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "migrations"
        shutil.copytree(shipped, folder)
        head = max(path.name for path in (folder / "versions").glob("[0-9]*.py"))[:4]
        (folder / "versions" / "9999_next.py").write_text(
            NEXT.format(head=head, change=CHANGE.format(n=number))
        )
        migrate._folder = lambda: folder
        try:
            while migrate.revision_of(trial.database.url) != "9999":
                try:
                    migrate.upgrade(trial.database.url)
                except OperationalError:  # the lock_timeout: the writers go on, and it is tried again
                    trial.lasts(1)
        finally:
            migrate._folder = lambda: shipped


def journal_purged(trial: Trial) -> None:
    """`times` is how long it runs in seconds."""
    age = "SELECT coalesce(extract(epoch FROM clock_timestamp() - min(published_at)), 0) FROM outbox_journal"
    with trial.under_load(journal_retention_seconds=RETENTION_SECONDS):
        for _ in trial.rounds():
            trial.lasts(1)
            trial.complain_unless(trial.sql(age)[0][0] < RETENTION_SECONDS + 3, "journal not purged")


SCENARIOS = (
    Scenario(
        name="pooling-proxy",
        what="a transaction-pooling pgbouncer, kill -9 of one relay of two",
        inflict=behind_a_pooling_proxy, short=5, long=100, control="repeated", control_times=15,
        between="everybody", missing="" if PGBOUNCER else "pgbouncer is not installed",
    ),
    Scenario(
        name="clocks-apart",
        what="a service whose clocks are an hour apart",
        inflict=clocks_apart, short=4, long=40, control="out of order",
    ),
    Scenario(
        name="migration",
        what="a migration under load, with a transaction left open",
        inflict=migrated, short=1, long=1, control="commits held up",
    ),
    Scenario(
        name="journal-purged",
        what="a journal that is kept for 2 s",
        inflict=journal_purged, short=8, long=300, unit=" s", control="", why="a naive relay keeps no journal",
        journal_is_whole=False,
    ),
)  # fmt: skip
