"""A service that writes, relays that are killed, and an oracle that compares what committed with what arrived.

    with Harness(database_url, redis_url) as harness, harness.writing():
        with harness.relay() as relay:
            relay.wait_for(harness.entries)
            relay.kill()
    findings = harness.settle()

The writers use the public API: a transaction updates an account's row, which makes the writers of one key take
turns, and publishes what it did with the account's next number. Some transactions roll back on purpose; and one
more writer commits late what it wrote early, behind the place that the relay has come to since. The same harness runs
the product and the naive relay of `naive.py`, so that a zero of the one means something.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self

import psutil
import psycopg
import redis as redis_client
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from outbox import publish
from outbox.priority import Priority
from outbox.streams import decode

HERE = Path(__file__).parent
STREAM = "account"
LANES = (STREAM, f"{STREAM}:backfill")
KEYS = 30
SLOW = 0  # the account of the slow writer alone, so that the others need not wait for it
SLOW_SECONDS = 1.5
PATIENCE_SECONDS = 60
# Of a writer, between transactions: what is started after a kill needs the machine as well.
REST_SECONDS = 0.01
SERVICE = "service"  # as PostgreSQL knows it
HIGHEST, NEVER = 32767, float("inf")
# In the order of their ids, so that writers wait for each other and do not deadlock; and in one statement, so that the
# service leaves the machine to what is tried.
MOVE = text("""
UPDATE account SET n = account.n + 1
FROM (SELECT id FROM account WHERE id = ANY(:ids) ORDER BY id FOR UPDATE) AS locked
WHERE account.id = locked.id RETURNING account.id, account.n
""")
STAMP = text("UPDATE outbox SET created_at = to_timestamp(:now) WHERE event_id = ANY(CAST(:ids AS uuid[]))")
NOTE = text("INSERT INTO movement SELECT unnest(CAST(:ids AS uuid[]))")
Pause = Callable[[], object] | None
now = time.time  # by the oracle's clock, whatever a fault does to the service's


class Entry(NamedTuple):
    """What the oracle needs of an event: its id, key, priority, and number within the key."""

    event_id: str
    key: str
    priority: int
    n: int


def entry_of(fields: Mapping[bytes, bytes]) -> Entry:
    """Return what an entry of a lane says."""
    return Entry(
        fields[b"id"].decode(),
        fields[b"subject"].decode(),
        int(fields[b"priority"]),
        json.loads(fields[b"data"])["n"],
    )


class Findings(NamedTuple):
    """What the oracle has found; all but the first two should be 0."""

    committed: int
    published: int
    lost: int
    repeated: int
    phantom: int
    out_of_order: int

    def faults(self) -> tuple[int, int, int, int]:
        """Return lost, repeated, phantom and out of order."""
        return self[2:]


class Batch(NamedTuple):
    """What the oracle needs of a journal's batch: when it was written, and id and priority of its events."""

    at: float
    events: list[tuple[str, int]]


def compare(committed: Iterable[str], lanes: list[list[Entry]], elsewhere: Iterable[str] = ()) -> Findings:
    """Compare the ids that committed with the entries of the lanes, and the ids that are in other places.

    The order is judged by what committed alone: a number that PostgreSQL forgot is given out again.
    """
    seen = Counter(entry.event_id for lane in lanes for entry in lane)
    known = set(committed)
    return Findings(
        committed=len(known),
        published=seen.total(),
        lost=len(known - seen.keys() - set(elsewhere)),
        repeated=seen.total() - len(seen),
        phantom=len(seen.keys() - known),
        out_of_order=sum(_reversals([entry for entry in lane if entry.event_id in known]) for lane in lanes),
    )


def _reversals(lane: list[Entry]) -> int:
    """Count the entries that come after a later one of their key and priority; a repetition is none."""
    last: dict[tuple[str, int], int] = {}
    found = 0
    for entry in dict.fromkeys(lane):
        place = (entry.key, entry.priority)
        found += entry.n < last.get(place, 0)
        last[place] = max(entry.n, last.get(place, 0))
    return found


def passed_over(batches: list[Batch], committed_at: Mapping[str, float]) -> int:
    """Count the events that a batch of lower priority went before, although they could be seen.

    A batch is claimed after the one before it was journalled, so it sees all that had committed by then.
    """
    journalled = [batch.at for batch in batches]
    lowest = [min((priority for _, priority in batch.events), default=HIGHEST) for batch in batches]
    found = 0
    for place, batch in enumerate(batches):
        for event_id, priority in batch.events:
            seen_by = bisect_right(journalled, committed_at.get(event_id, NEVER)) + 1
            found += any(below < priority for below in lowest[seen_by:place])
    return found


def wait_until(
    condition: Callable[[], object], what: str = "the condition", seconds: float = PATIENCE_SECONDS
) -> None:
    """Block until the condition holds; fail after a minute."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true"
        time.sleep(0.01)


class RelayProcess:
    """A relay as a process of its own; what it logs is in `log`."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.died = False  # by itself, with nobody waiting for it
        self._is_over = False
        self._said = ""
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by __exit__
        self.process = subprocess.Popen(
            [sys.executable, *arguments], env=os.environ | environment, stderr=self._log
        )

    @property
    def log(self) -> str:
        if self._log.closed:
            return self._said
        self._log.seek(0)
        return self._log.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self._said = self.log
        self._log.close()

    def kill(self) -> None:
        """Kill the process by signal 9, and note when it had died before."""
        self.died = self.died or not (self._is_over or self.process.poll() is None)
        self._is_over = True
        self.process.kill()
        self.process.wait()

    def wait_for(self, count: Callable[[], int], more: int = 1) -> None:
        """Block until a count has grown by that much; fail at once when the relay has died."""
        start = count()

        def grown() -> bool:
            assert self.process.poll() is None, f"the relay has died; its log:\n{self.log}"
            return count() >= start + more

        wait_until(grown, f"{more} more")

    def wait_until_connected(self) -> None:
        """Block until the relay has connections to both servers, or to one twice."""
        relay = psutil.Process(self.process.pid)
        wait_until(lambda: len(relay.net_connections("tcp")) >= 2, "a relay with its connections")

    def wait_until_frozen(self) -> None:
        """Block until the relay has been stopped by SIGSTOP."""
        relay = psutil.Process(self.process.pid)
        wait_until(lambda: relay.status() == psutil.STATUS_STOPPED, "a frozen relay")

    def wait_for_death(self) -> int:
        """Block until the process has ended by itself; return its status (-9: killed by signal 9)."""
        self._is_over = True
        try:
            return self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the relay lives on; its log:\n{self.log}") from None


class Harness:
    """One outbox with its service, its relays and its oracle.

    With `naive`, its relays are the control. `relays_see` are the URLs that they are given, where a proxy stands
    between them and the servers.
    """

    most_moves = 5  # in a transaction

    def __init__(
        self, database_url: str, redis_url: str, *, naive: bool = False, relays_see: Sequence[str] = ()
    ) -> None:
        self.naive = naive
        self.redis = redis_client.Redis.from_url(redis_url)
        self.processes: list[RelayProcess] = []  # all that were ever started
        self.failed_commits: list[str] = []
        self.ended_writers: list[str] = []  # and why
        self.stamps = False  # the service sets the time of its events by its own clock
        self._relays_see = relays_see or (database_url, redis_url)
        self._dsn = database_url.replace("+psycopg", "")
        # A pooling proxy would give one session's prepared statements to another.
        connect = {"prepare_threshold": None, "application_name": SERVICE}
        self._engine = create_engine(database_url, connect_args=connect)
        self._sessions = sessionmaker(self._engine)
        self._committed_at: dict[str, float] = {}
        self.sql("CREATE TABLE account (id text PRIMARY KEY, n bigint NOT NULL DEFAULT 0)")
        self.sql("INSERT INTO account (id) SELECT 'a' || n FROM generate_series(0, %s) AS n", KEYS)
        self.sql("CREATE TABLE movement (event_id uuid)")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._engine.dispose()
        self.redis.close()

    def sql(self, query: str, *parameters: object) -> list[tuple]:
        """Run a statement on a connection of its own, as the server may have gone since the last."""
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            cursor = connection.execute(query, parameters or None)
            return [] if cursor.description is None else cursor.fetchall()

    # -- the service ------------------------------------------------------------------------------------

    @contextmanager
    def writing(self, writers: int = 3, seed: int = 0) -> Iterator[None]:
        """Keep that many threads writing, and one more that is slow, while the block runs."""
        stop = threading.Event()
        threads = [
            threading.Thread(
                target=self._write, args=(random.Random(seed + n), stop, n == writers), name=f"writer {n}"
            )
            for n in range(writers + 1)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _write(self, chance: random.Random, stop: threading.Event, slow: bool) -> None:
        pause = partial(stop.wait, SLOW_SECONDS) if slow else None
        while not stop.wait(REST_SECONDS):
            accounts = sorted(chance.sample(range(1, KEYS + 1), chance.randint(1, self.most_moves)))
            priorities = [chance.choice([*Priority]) for _ in accounts]
            try:
                self._move_all(accounts, priorities, chance.random() < 0.05, pause)
            except DBAPIError as error:
                self.failed_commits.append(str(error))
                stop.wait(0.05)
            except Exception as error:
                self.ended_writers.append(repr(error))
                raise

    def _move_all(
        self, accounts: list[int], priorities: list[int], roll_back: bool = False, pause: Pause = None
    ) -> None:
        """Move accounts in one transaction; what commits is in the table of movements too.

        With a pause, it moves one more before that, and again after it: if the relay, which has gone on meanwhile, does
        not find the first of these, the second goes before it.
        """
        with self._sessions() as session:
            ids = []
            if pause:
                ids = self._move(session, [SLOW], priorities[:1])
                session.flush()
                pause()
                ids += self._move(session, [SLOW], priorities[:1])
            ids += self._move(session, accounts, priorities)
            if self.stamps:
                session.flush()
                session.execute(STAMP, {"now": time.time(), "ids": ids})
            session.execute(NOTE, {"ids": ids})
            if roll_back:
                session.rollback()
            else:
                session.commit()
                self._committed_at |= dict.fromkeys(ids, now())

    def _move(self, session: Session, accounts: list[int], priorities: list[int]) -> list[str]:
        """Move accounts, and publish it; return the ids of the events."""
        moved = session.execute(MOVE, {"ids": [f"a{n}" for n in accounts]})
        return [
            str(publish(session, {"n": n}, type="Moved", stream=STREAM, key=account, priority=priority))
            for (account, n), priority in zip(moved, priorities, strict=True)
        ]

    # -- the relays -------------------------------------------------------------------------------------

    def relay(
        self,
        die_at: str | None = None,
        by: str = "SIGKILL",
        see: Sequence[str] = (),
        **settings: object,
    ) -> RelayProcess:
        """Start a relay: the daemon, or the naive one; with `die_at` it kills itself at a point of its step.

        `by` is the signal, SIGSTOP freezes it. `see` are the URLs of both servers, if others than all relays have.
        """
        database_url, redis_url = see or self._relays_see
        environment = {
            "OUTBOX_DATABASE_URL": database_url,
            "OUTBOX_REDIS_URL": redis_url,
            "OUTBOX_BATCH_SIZE": "50",
        } | {f"OUTBOX_{name.upper()}": str(value) for name, value in settings.items()}
        if self.naive:
            return self.launch([str(HERE / "naive.py"), *([die_at, by] if die_at else [])], environment)
        if die_at:
            return self.launch([str(HERE / "die_at.py"), die_at, by], environment)
        return self.launch(["-m", "outbox.cli", "run"], environment)

    def launch(self, arguments: list[str], environment: dict[str, str]) -> RelayProcess:
        """Start a process, and remember it."""
        self.processes.append(RelayProcess(arguments, environment))
        return self.processes[-1]

    def entries(self) -> int:
        """Return the number of entries in both lanes."""
        return sum(self.redis.xlen(lane) for lane in LANES)

    # -- the oracle -------------------------------------------------------------------------------------

    def settle(self) -> Findings:
        """Let a last relay publish what is left, and compare. The writers must have stopped.

        One more event in each lane makes sure that the relay looks at what Redis has. It may take its time, over a slow
        network, but must not stand still.
        """
        self._engine.dispose()  # the server may have gone since
        self._move_all([1, 2], [Priority.LOW, Priority.NORMAL])
        with self.relay():
            while left := len(self.waiting()):
                wait_until(lambda left=left: len(self.waiting()) < left, "fewer events in the outbox")
        return self.findings()

    def findings(self) -> Findings:
        """Compare what has committed with the lanes; what waits, and what is a dead letter, is not lost."""
        elsewhere = self.waiting() + [row[0] for row in self.sql("SELECT event_id::text FROM outbox_dead")]
        committed = [row[0] for row in self.sql("SELECT event_id::text FROM movement")]
        return compare(committed, [self._lane(name) for name in LANES], elsewhere)

    def waiting(self) -> list[str]:
        """Return the ids of the events in the outbox."""
        return [row[0] for row in self.sql("SELECT event_id::text FROM outbox")]

    def passed_over(self) -> int | None:
        """Count the violations of priority that the journal shows; None when its first batch has been purged."""
        query = (
            "SELECT batch, extract(epoch FROM published_at)::float8, body FROM outbox_journal ORDER BY batch"
        )
        rows = self.sql(query)
        batches = [
            Batch(at, [(event.event_id, event.priority) for event in decode(body)[1]]) for _, at, body in rows
        ]
        return passed_over(batches, self._committed_at) if rows and rows[0][0] == 1 else None

    def longest_pause(self) -> float:
        """Return the longest time in seconds in which nobody's commit has returned, between the first and the last."""
        moments = sorted({*self._committed_at.values()})
        return max((later - earlier for earlier, later in pairwise(moments)), default=0.0)

    def journal_is_right(self) -> bool:
        """Return whether the journal holds exactly what the lanes hold, in their order. No purge has run yet."""
        told: dict[str, list[str]] = {lane: [] for lane in LANES}
        for (body,) in self.sql("SELECT body FROM outbox_journal ORDER BY batch"):
            for event in decode(body)[1]:
                told[event.stream].append(event.event_id)
        return all(told[name] == [entry.event_id for entry in self._lane(name)] for name in LANES)

    def _lane(self, name: str) -> list[Entry]:
        return [entry_of(fields) for _, fields in self.redis.xrange(name)]
